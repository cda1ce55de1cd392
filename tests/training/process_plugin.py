"""What runs of many processes are disturbed and watched with; the environment says where and when.

DISTURB="kind rank step" with kind nan, solver, validation (a solve fails in it), SIGTERM or SIGUSR1: at that
step (0, 1, …) of that rank.
PROBE=folder: every rank notes there its first averaged gradients and the samples it validated.
"""

import os
import signal
from pathlib import Path

import pytorch_lightning as pl
import torch

from ndeflow.data import Digits, Labeled
from ndeflow.diffeq import SolverError
from ndeflow.modules.flow import RectifiedFlow


def disturbance(trainer):
    """The kind of disturbance due now on this rank, or an empty text."""
    kind, rank, step = os.environ.get("DISTURB", "none 0 -1").split()
    return kind if (trainer.global_rank, trainer.global_step) == (int(rank), int(step)) else ""


class Uneven(RectifiedFlow):
    """A loss of two terms that takes one evaluation of the net on rank 0, three on rank 1. Slot 0 is left in peace."""

    def loss(self, batch):
        kind = disturbance(self.trainer) if not self.training or batch["slot"][0] > 0 else ""
        if kind == ("solver" if self.training else "validation"):
            raise SolverError("planned")
        times = 1 + 2 * self.trainer.global_rank
        value = torch.stack([super(Uneven, self).loss(batch)["velocity"] for _ in range(times)]).mean()
        return {"velocity": value * (torch.nan if kind == "nan" else 1.0), "half": 0.5 * value}


class Few(Digits):
    """Digits of which one is for validation."""

    def load(self):
        splits = super().load()
        return {**splits, "val": Labeled(splits["val"].raw[:1], splits["val"].label[:1])}


class Probe(pl.Callback):
    """Send the planned signal, note gradients and validated samples."""

    def __init__(self):
        self.seen, self.folder = [], os.environ.get("PROBE")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        kind = disturbance(trainer)
        if kind.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, kind))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.folder and trainer.global_step == 0:
            gradients = {name: p.grad.clone() for name, p in pl_module.named_parameters()}
            torch.save(gradients, Path(self.folder) / f"gradients{trainer.global_rank}.pt")

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.seen += batch["slot"].tolist()

    def on_validation_end(self, trainer, pl_module):
        if self.folder:
            torch.save(self.seen, Path(self.folder) / f"seen{trainer.global_rank}.pt")
        self.seen = []
