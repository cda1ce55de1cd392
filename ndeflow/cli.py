"""The `ndeflow` command: use what a run left behind.

    ndeflow sample RUN [n=64] [steps=20] [sampler=Heun] [seed=0] [weights=ema] [label=3] [out=DIR]
    ndeflow evaluate RUN [n=450] [steps=[1,2,5,20,100]] [sampler=Euler] [seeds=[0,1,2]] [weights=ema]
    ndeflow export RUN FILE.safetensors [weights=ema]
    ndeflow doctor [CONFIG key=value ...]

RUN is a run directory, a checkpoint, or a file of `export`. `doctor` says what is installed and whether it works;
with a config, whether its data, model, gradient and first step do. Paste what it prints into an issue.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ndeflow import config as configs
from ndeflow.config import ConfigError
from ndeflow.config.overrides import dotted, parse

if TYPE_CHECKING:
    from ndeflow.modules.flow import RectifiedFlow


@dataclass(frozen=True)
class SampleRequest:
    """What `ndeflow sample` takes.

    Args:
        n: number of samples.
        steps: steps of the sampler over a uniform time grid.
        sampler: class name in `ndeflow.flows.samplers`.
        seed: with the sample's index, its address.
        weights: averaged or raw weights.
        label: class to sample, for a class-conditional model; by default all in turn.
        out: folder for the files, by default `samples` in the run directory.
        plugins: packages of your own that the run was trained with.
    """

    n: int = 64
    steps: int = 20
    sampler: str = "Heun"
    seed: int = 0
    weights: Literal["ema", "raw"] = "ema"
    label: int | None = None
    out: str | None = None
    plugins: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvaluateRequest:
    """What `ndeflow evaluate` takes.

    Args:
        n: samples compared, by default as many as there are test samples, at most 1000.
        steps: numbers of steps to compare.
        sampler: class name in `ndeflow.flows.samplers`.
        seeds: sampling seeds; numbers are means over them.
        weights: averaged or raw weights.
        plugins: packages of your own that the run was trained with.
    """

    n: int | None = None
    steps: tuple[int, ...] = (1, 2, 5, 20, 100)
    sampler: str = "Euler"
    seeds: tuple[int, ...] = (0, 1, 2)
    weights: Literal["ema", "raw"] = "ema"
    plugins: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExportRequest:
    """What `ndeflow export` takes.

    Args:
        weights: averaged or raw weights.
        plugins: packages of your own that the run was trained with.
    """

    weights: Literal["ema", "raw"] = "ema"
    plugins: tuple[str, ...] = ()


def sample(run: str, request: SampleRequest) -> None:
    """Draw samples and write them as PNG and npz."""
    import numpy as np
    import torch
    from PIL import Image

    from ndeflow.flows.samplers import named
    from ndeflow.modules.pictures import picture
    from ndeflow.randomness import fold

    if request.n < 1:
        raise ConfigError(f"n={request.n} must be at least 1")
    module = _flow(run, request)
    try:
        sampler = named(request.sampler, request.steps)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    keys = fold(request.seed, "sample", torch.arange(request.n))
    labels = _labels(module, request)
    drawn = module.sample(keys, labels, sampler)
    folder = Path(request.out) if request.out else _home(run) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{request.sampler}_{request.steps}_seed{request.seed}_n{request.n}"
    raw = (drawn.x - torch.as_tensor(module.data_info["shift"])) / torch.as_tensor(module.data_info["scale"])
    np.savez(f"{stem}.npz", x=raw.numpy(), keys=keys.numpy(), **({} if labels is None else {"label": labels.numpy()}))
    written = [f"{stem}.npz"]
    if (image := picture(drawn.x)) is not None:
        Image.fromarray(image).save(f"{stem}.png")
        written.append(f"{stem}.png")
    nfe = int(drawn.nfe.max())
    print(f"{request.n} samples, {request.sampler} {request.steps} steps, NFE {nfe}, weights {request.weights}")
    print("wrote " + ", ".join(written))


def _flow(run: str, request: SampleRequest | EvaluateRequest) -> RectifiedFlow:
    """The flow of a run, or an error that says what else it is."""
    from ndeflow.modules.flow import RectifiedFlow
    from ndeflow.training.loading import load

    module = load(run, request.weights, plugins=request.plugins)
    if not isinstance(module, RectifiedFlow):
        raise ConfigError(f"{run} holds a {type(module).__name__}; this command needs a RectifiedFlow")
    return module


def _labels(module: RectifiedFlow, request: SampleRequest) -> Any:
    """Labels of the samples, or None."""
    labels = module.labels(request.n)
    if request.label is None:
        return labels
    if labels is None:
        raise ConfigError(f"label={request.label}, but this model is unconditional: leave label out")
    classes = module.data_info["classes"]
    if not 0 <= request.label < classes:
        raise ConfigError(f"label={request.label} must be one of 0 to {classes - 1}")
    return labels.fill_(request.label)


def _home(run: str) -> Path:
    """The run directory of a run or of one of its checkpoints."""
    path = Path(run)
    if not path.is_file():
        return path
    return path.parent.parent if path.parent.name == "ckpt" else path.parent


def evaluate(run: str, request: EvaluateRequest) -> None:
    """Compare samples with held-out data; print a table and write `report/evaluation.json`."""
    from ndeflow.data.loading import DataModule
    from ndeflow.modules.evaluation import table
    from ndeflow.training.loading import read, trusted

    config = trusted(read(run), run, request.plugins)
    data = configs.build(config["data"], "data", request.plugins, seed=config["seed"])
    assert isinstance(data, DataModule)
    data.ready()
    try:
        result = _flow(run, request).evaluate(data, request.n, request.steps, request.sampler, request.seeds)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    result["weights"] = request.weights
    folder = _home(run) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    print(f"wrote {folder / 'evaluation.json'}")


def export(run: str, file: str, request: ExportRequest) -> None:
    """Write the weights of a run as a safetensors file that `ndeflow.load` reads back."""
    from ndeflow.training import export as exports
    from ndeflow.training.loading import pick, read, restore

    if Path(file).suffix != exports.SUFFIX:
        raise ConfigError(f"{file}: the name of an export ends with {exports.SUFFIX}, by which ndeflow.load knows it")
    checkpoint = read(run)
    restore(checkpoint, request.weights, run, request.plugins)  # what could not be read back is not written
    exports.write(checkpoint, pick(checkpoint, request.weights, run), request.weights, file)
    print(f"wrote {file}: {request.weights} weights of step {checkpoint['global_step']}")


def doctor(arguments: list[str]) -> int:
    """Examine the machine and, if one is given, a config; return the exit code."""
    names, overrides = [a for a in arguments if "=" not in a], [a for a in arguments if "=" in a]
    if len(names) > 1 or (overrides and not names):
        raise ConfigError("ndeflow doctor takes at most one config, and KEY=VALUE after it")
    sys.path.insert(0, str(Path.cwd()))  # `plugins:` are importable from the working directory, as in training
    if not names:
        from ndeflow.training.doctor import examine

        return examine()
    path = configs.find(names[0])
    config = configs.load(path, overrides)
    from ndeflow.training.doctor import rehearse

    with configs.located(path, overrides):
        return rehearse(config)


COMMANDS = {
    "sample": (SampleRequest, sample, ("RUN",)),
    "evaluate": (EvaluateRequest, evaluate, ("RUN",)),
    "export": (ExportRequest, export, ("RUN", "FILE.safetensors")),
}


def run_command(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "doctor":
        return doctor(rest)
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name}; there are: {', '.join([*COMMANDS, 'doctor'])}")
    schema, command, operands = COMMANDS[name]
    given, rest = rest[: len(operands)], rest[len(operands) :]
    if len(given) < len(operands) or any("=" in word for word in given):
        wanted = "a run directory or a checkpoint" + (f" and {operands[1]}" if operands[1:] else "")
        raise ConfigError(f"ndeflow {name} needs {wanted}: ndeflow {name} {' '.join(operands)} key=value …")
    request = configs.section(_values(rest), schema, name)
    from ndeflow.data.loading import DataError  # imports torch: seconds that a typo need not wait for
    from ndeflow.training.files import CheckpointError

    try:
        command(*given, request)
    except ConfigError:
        raise  # also where it is a CheckpointError: a path that leads to none
    except (CheckpointError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _values(arguments: list[str]) -> dict[str, Any]:
    """The KEY=VALUE arguments of a command as a flat mapping."""
    parsed = [parse(argument) for argument in arguments]
    return {dotted(override.path): override.value for override in parsed}


def main() -> None:
    """Enter from the shell."""
    sys.path.insert(0, str(Path.cwd()))  # packages of one's own are importable from the working directory
    try:
        code = run_command(sys.argv[1:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
