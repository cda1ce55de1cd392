"""What to paste first into an issue: versions, devices, data, and whether the parts of a config work together."""

from __future__ import annotations

import copy
import importlib.metadata
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytorch_lightning as pl
import torch
from pytorch_lightning.profilers import SimpleProfiler
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ndeflow import __version__
from ndeflow import config as configs
from ndeflow.config import ConfigError
from ndeflow.data import MNIST, DataModule
from ndeflow.data.files import cache_folder
from ndeflow.data.mnist import Variant
from ndeflow.diffeq import ODE, RK4, Constant, Integrator
from ndeflow.modules.base import Module
from ndeflow.nets import MLP
from ndeflow.randomness import fold, normal, seed_all
from ndeflow.training import console, sections
from ndeflow.training.saving import code_version
from ndeflow.training.seeding import Seeds
from ndeflow.training.tracking import Wandb

BAD = "BAD: "
_SUM = """
import sys, torch, torch.distributed as dist
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(sys.argv[1]), world_size=2)
x = torch.tensor([float(sys.argv[1]) + 1])
dist.all_reduce(x)
assert x.item() == 3.0, f"1 + 2 gave {x.item()}"
"""


def examine() -> int:
    """Print what is installed and whether it works; return 1 if something is BAD, else 0."""
    checks = {"solve": time_solve, "all-reduce": all_reduce}
    return _machine("runs") | _show("checks", ((name, _tried(check)) for name, check in checks.items()))


def rehearse(config: Mapping[str, Any]) -> int:
    """Build what a config describes, check the gradient, train one step; return 1 if something is BAD, else 0.

    Nothing is written to runs or W&B. Data sets may be downloaded, as for training.

    Raises:
        ConfigError: the config is wrong.
    """
    sections.check(config)
    console.quiet_lightning()
    return _machine(sections.build(config, "run").root) | _show("config", _rehearsal(config))


def _tried(check: Callable[[], str]) -> str:
    """What a check says, or how it failed."""
    try:
        return check()
    except ConfigError:
        raise
    except Exception as error:  # whatever it is: a doctor says it and goes on
        return f"{BAD}{type(error).__name__}: {error}"


def _show(title: str, rows: Iterable[tuple[str, str]]) -> int:
    """Print rows, as far as they come; return 1 if one is BAD."""
    texts: dict[str, str] = {}
    if failure := _tried(lambda: texts.update(rows) or ""):  # the rows before a failure stay
        texts["stopped"] = failure
    console.show(title, texts)
    return int(any(text.startswith(BAD) for text in texts.values()))


def _machine(root: str) -> int:
    """Print versions, devices and folders."""
    rows = {"python": f"{platform.python_version()}, {platform.platform()}"}
    for name in ("torch", "pytorch-lightning", "wandb", "numpy", "omegaconf"):
        rows[name.removeprefix("pytorch-")] = _tried(partial(importlib.metadata.version, name))
    rows |= {
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "cuda": ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) or "none",
        "mps": "there, unused: it has no float64, which times need" if torch.backends.mps.is_available() else "none",
        "W&B": _tried(lambda: "{} ({})".format(*Wandb().resolve())),
        "data": _tried(data_sets),
        "runs": _tried(partial(space, Path(root))),
    }
    return _show(f"ndeflow {__version__} ({code_version()})", rows.items())


def data_sets() -> str:
    """Say in which folders the known data sets are."""
    own, found = os.environ.get("NDEFLOW_DATA"), []
    if own and not Path(own).is_dir():
        return f"{BAD}NDEFLOW_DATA={own} does not exist"
    for name in get_args(Variant):
        for folder in filter(None, (own, cache_folder(name))):
            with suppress(FileNotFoundError):
                MNIST(1, root=str(folder), variant=name).prepare_data()  # given a root, it downloads nothing
                found.append(f"{name} in {folder}")
    return f"{', '.join(found) or 'none'} (NDEFLOW_DATA {own or 'not set'}, cache {cache_folder('')})"


def space(root: Path, needed: float = 0.0) -> str:
    """Say whether a folder of runs can be written and has the bytes needed free; writes nothing."""
    there = next(p for p in (root, *root.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return f"{BAD}{there} cannot be written: set run.root=DIR"
    free = shutil.disk_usage(there).free
    return f"{BAD if free < needed else ''}{root} can be written, {free / 1e9:.1f} GB free"


def time_solve(steps: int = 25) -> str:
    """Solve y' = net(t, y) − y for a net that begins as zero, so that y(1) = y(0)/e is known; time an evaluation."""
    with torch.random.fork_rng(devices=[]):
        net = MLP((2,), width=128, depth=2)
    field, solve = ODE(lambda t, y: net(t.expand(len(y)), y) - y), Integrator(RK4(), Constant(1 / steps))
    y0 = normal(fold("doctor", torch.arange(256)), (2,))
    with torch.no_grad():
        solve(field, y0, [0.0, 1 / steps])  # the first call pays for setting up
        began = time.perf_counter()
        solution = solve(field, y0, [0.0, 1.0])
    seconds, nfe = time.perf_counter() - began, int(solution.stats.nfe.max())
    error = float((solution.ys[:, -1] * math.e - y0).norm() / y0.norm())
    text = f"{1e3 * seconds / nfe:.3f} ms per field evaluation (RK4, MLP 128×2, 256 states), error {error:.0e}"
    return text if error < 1e-5 else BAD + text


def all_reduce(timeout: float = 60.0) -> str:
    """Let two processes sum over gloo, as data-parallel training on CPUs does."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        commands = [[sys.executable, "-c", _SUM, str(rank), f"{folder}/store"] for rank in (0, 1)]
        pair = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
        alarm = threading.Timer(timeout, lambda: [process.kill() for process in pair])
        alarm.start()
        said = [process.communicate()[1] for process in pair]
        alarm.cancel()
    if not any(process.returncode for process in pair):
        return f"two processes over gloo, {time.monotonic() - began:.1f} s with their start"
    errors = [text.strip().rpartition("\n")[2] for text, p in zip(said, pair, strict=True) if p.returncode > 0]
    return BAD + (errors[0] if errors else f"two processes did not find each other in {timeout:g} s")


def _rehearsal(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Rows about a config, as far as it gets."""
    plugins, seed = config.get("plugins") or (), config["seed"]
    parts = {n: sections.build(config, n) for n in ("optim", "ema", "health", "checkpoints", "wandb", "report")}
    configs.build(config.get("callbacks") or {}, "callbacks", plugins)
    data = configs.build(config["data"], "data", plugins, seed=seed)
    seed_all(seed, "init")
    module = configs.build(config["module"], "module", plugins)
    for name, built, kind in (("data", data, DataModule), ("module", module, Module)):
        if not isinstance(built, kind):
            raise ConfigError(f"{name}._target_ builds a {type(built).__name__}, expected a {kind.__name__}")
    if config.get("init"):
        warm = sections.build(config, "init")
        yield "init", str(warm.load(module)[0])
        warm.prepare(module)
    yield "module", f"{config['module']['_target_']}, {console.count(module)}"
    data.ready()
    yield "data", data.summary()
    batch = next(iter(data.train_dataloader()))
    yield "batch", ", ".join(f"{n} {str(v.dtype).removeprefix('torch.')} {tuple(v.shape)}" for n, v in batch.items())
    module.data_info, module.optim = data.info, parts["optim"]
    errors = gradient_errors(module, batch, seed)
    verdict = "" if all(error <= 1e-4 for error in errors) else f"{BAD}the backward pass is wrong or cut off: "
    shown = ", ".join(f"{error:.1e}" for error in errors)
    yield "gradient", f"{verdict}relative errors {shown} against finite differences in float64"
    trainer, clock = _train_one_step(config, module, data, parts["health"])
    yield "device", console.device_name(trainer)
    loss, seconds = sum(map(float, module.terms.values())), sum(clock.recorded_durations["run_training_batch"])
    yield "step", f"{'' if math.isfinite(loss) else BAD}loss {loss:.4g}, {seconds:.3f} s (the first one)"
    sizes = checkpoint_bytes(module, trainer.optimizers[0], parts["ema"].enabled)
    split = ", ".join(f"{name} {size / 1e6:.2f}" for name, size in sizes.items())
    yield "checkpoint", f"{sum(sizes.values()) / 1e6:.2f} MB ({split})"
    files = parts["checkpoints"].keep + 2  # the best one, and the one being written
    yield "space", space(Path(sections.build(config, "run").root), files * sum(sizes.values()))


def _train_one_step(
    config: Mapping[str, Any], module: Module, data: DataModule, health: pl.Callback
) -> tuple[pl.Trainer, SimpleProfiler]:
    """Train and validate one batch on one device, as the config's trainer does, and leave no files."""
    clock = SimpleProfiler()
    own = {"devices": 1, "num_nodes": 1, "strategy": "auto", "enable_progress_bar": False, "profiler": clock}
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            **{**sections.trainer_arguments(config), **own},
            callbacks=[Seeds(config["seed"]), health],
            fast_dev_run=1,
            logger=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
        trainer.fit(module, datamodule=data)
    return trainer, clock


def checkpoint_bytes(module: nn.Module, optimizer: torch.optim.Optimizer, ema: bool) -> dict[str, int]:
    """Return how many bytes a checkpoint takes for raw weights, averaged weights and optimizer states."""
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    trained = [p.numel() * max(4, p.element_size()) for p in module.parameters() if p.requires_grad]
    raw = sum(t.nbytes for t in module.state_dict().values())
    return {"raw": raw, "ema": sum(trained) * ema, "optimizer": sum(t.nbytes for t in states)}


def gradient_errors(module: Module, batch: Mapping[str, Tensor], seed: int = 0, h: float = 2e-5) -> list[float]:
    r"""Compare the gradient of a loss with central differences along three random directions v, on a float64 copy.

    .. math:: |g - d| / \max(|g|, |d|), \quad g = \nabla L(\theta)\, v, \quad d = (L(\theta + hv) - L(\theta - hv))/2h

    θ are the weights shaken by a tenth of their scale: where a last layer begins as zero, the gradients of all
    others are zero, and anything would pass. v and h are relative to the scale of θ, dropout is the same throughout.

    Returns:
        The three errors, about 1e-8 from rounding; inf where the loss does not depend on the weights.
    """
    module = copy.deepcopy(module).double()
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    weights = [p for p in module.parameters() if p.requires_grad]
    theta = parameters_to_vector(weights).detach()
    scale = float(theta.square().mean().sqrt()) or 1.0
    shake, *directions = scale * normal(fold(seed, "doctor", torch.arange(4)), tuple(theta.shape), torch.float64)
    theta = theta + 0.1 * shake

    def loss(at: Tensor) -> Tensor:
        vector_to_parameters(at, weights)
        seed_all(seed, "doctor")
        return torch.stack(list(module.loss(batch).values())).sum()

    grads = torch.autograd.grad(loss(theta), weights, allow_unused=True, materialize_grads=True)
    errors = []
    for v in directions:
        g, d = (
            float(parameters_to_vector(grads) @ v),
            float((loss(theta + h * v) - loss(theta - h * v)).detach() / 2 / h),
        )
        errors.append(abs(g - d) / max(abs(g), abs(d)) if g or d else math.inf)
    return errors
