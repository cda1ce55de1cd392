"""What the framework costs per training step, beside a bare torch loop that does the same work.

    python experiments/benchmarks/framework_cost.py            digits, MLP 3×384, batch 256
    python experiments/benchmarks/framework_cost.py small      the same with an MLP 3×64, where milliseconds resolve
    python experiments/benchmarks/framework_cost.py mnist      MNIST, the U-Net of configs/flow/mnist.yaml
    python experiments/benchmarks/framework_cost.py surviving  the MLP 3×64 with and without what makes a run survive:
                                                               seeding, the gradient check, signals and saving

Both sides draw keyed noise and stratified times, compute the gradient norm, step AdamW and average the
weights. CPU time of the process, in turns (bare, framework, bare, …), medians over the turns. The first
steps of every turn are not counted.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytorch_lightning as pl
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import framework_cost as this  # the module that the config names, not __main__

from ndeflow import config as configs
from ndeflow.randomness import fold, normal, permutation, uniform
from ndeflow.training.fitting import fit
from ndeflow.training.health import Health
from ndeflow.training.saving import Checkpoints
from ndeflow.training.seeding import Seeds
from train import ROOT

# config, steps not counted, steps counted, turns
CASES = {
    "digits": ("flow/digits", [], 20, 200, 9),
    "small": ("flow/digits", ["module.model.net.width=64"], 20, 400, 11),
    "surviving": ("flow/digits", ["module.model.net.width=64"], 20, 400, 11),
    "mnist": ("flow/mnist", [], 1, 3, 3),
}


class Clock(pl.Callback):
    """CPU and wall seconds of the steps after the warm-up."""

    spans: tuple[float, float] = (0.0, 0.0)

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.warmup:
            self.began = (time.process_time(), time.perf_counter())
        if trainer.global_step == trainer.max_steps:
            this.Clock.spans = (time.process_time() - self.began[0], time.perf_counter() - self.began[1])


def framework(config: dict, warmup: int, steps: int) -> tuple[float, float]:
    """Seconds per step of a run without validation, pictures and W&B, rows and checkpoints as configured."""
    with tempfile.TemporaryDirectory() as folder:
        config = {
            **config,
            "plugins": ["framework_cost"],
            "callbacks": {"clock": {"_target_": "framework_cost.Clock", "warmup": warmup}},
            "run": {"root": folder, "name": "cost", "overwrite": False},
            "trainer": {**config["trainer"], "max_steps": warmup + steps, "val_check_interval": 10**6},
            "wandb": {"mode": "disabled"},
            "report": {"evaluate": False},
        }
        config["module"] = {**config["module"], "pictures": 0}
        assert fit(config) == 0
    return this.Clock.spans[0] / steps, this.Clock.spans[1] / steps


@contextmanager
def fragile():
    """Take away what makes a run survive: per-batch seeds, the gradient check, the look at signals and the clock."""
    hooks = [
        (Seeds, "on_train_batch_start"),
        (Health, "on_before_optimizer_step"),
        (Checkpoints, "on_train_batch_end"),
    ]
    kept = [(cls, name, vars(cls)[name]) for cls, name in hooks]
    for cls, name, _ in kept:
        delattr(cls, name)
    try:
        yield
    finally:
        for cls, name, hook in kept:
            setattr(cls, name, hook)


def without(config: dict, _, warmup: int, steps: int) -> tuple[float, float]:
    """Seconds per step of a run that would not survive."""
    with fragile():
        return framework(config, warmup, steps)


def bare(config: dict, data, warmup: int, steps: int) -> tuple[float, float]:
    """Seconds per step of a loop written by hand."""
    torch.manual_seed(0)
    net = configs.build(config["module"]["model"]["net"], "net")
    optimizer = configs.build(config["optim"]["optimizer"], "optimizer")(net.parameters())
    schedule = configs.build(config["optim"]["schedule"], "schedule")(optimizer)
    average = [p.detach().clone() for p in net.parameters()]
    raw, label = data.dataset("train").split
    size, n = config["data"]["batch_size"], len(raw)
    clip = config["trainer"].get("gradient_clip_val")
    conditional, per_epoch = config["data"].get("cond") is not None, n // size
    began = (0.0, 0.0)
    for step in range(warmup + steps):
        if step == warmup:
            began = (time.process_time(), time.perf_counter())
        epoch, row = divmod(step, per_epoch)
        if row == 0 or step == 0:
            order = permutation(n, 0, "order", epoch)
        ids = order[row * size : (row + 1) * size]
        x1 = raw[ids].float() * data.scale + data.shift
        keys = fold(0, epoch, ids)
        x0 = normal(fold(keys, "source"), x1.shape[1:])
        t = (torch.randperm(size) + uniform(fold(keys, "time"))) / size
        s = t.reshape(-1, *(1,) * (x1.ndim - 1))
        loss = (net(t, (1 - s) * x0 + s * x1, label[ids] if conditional else None) - (x1 - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in net.parameters()])
        assert torch.isfinite(norm)
        if clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        schedule.step()
        torch._foreach_lerp_(average, [p.detach() for p in net.parameters()], 0.001)
    return (time.process_time() - began[0]) / steps, (time.perf_counter() - began[1]) / steps


def main(case: str) -> None:
    """Measure one case and print it as JSON."""
    name, overrides, warmup, steps, turns = CASES[case]
    config = configs.load(configs.find(name, ROOT), overrides)
    data = configs.build(config["data"], "data", seed=0)
    data.prepare_data()
    data.setup()
    other = without if case == "surviving" else bare
    by_hand, by_frame = [], []
    for _ in range(turns):
        by_hand.append(other(config, data, warmup, steps))
        by_frame.append(framework(config, warmup, steps))
    cpu, wall = ([statistics.median(x[i] for x in side) * 1e3 for side in (by_hand, by_frame)] for i in (0, 1))
    paired = statistics.median((b[0] - a[0]) * 1e3 for a, b in zip(by_hand, by_frame, strict=True))
    result = {
        "case": case,
        "threads": torch.get_num_threads(),
        "turns": turns,
        "steps": steps,
        f"{other.__name__}_cpu_ms": round(cpu[0], 2),
        "ndeflow_cpu_ms": round(cpu[1], 2),
        "cost_cpu_ms": round(paired, 2),
        "speed_ratio_cpu": round(cpu[0] / cpu[1], 3),
        f"{other.__name__}_wall_ms": round(wall[0], 2),
        "ndeflow_wall_ms": round(wall[1], 2),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "digits")
