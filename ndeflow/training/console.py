"""What a person sees of a run: the summary at the start, the progress bar, the line at the end."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import nn

from ndeflow.modules.base import Module
from ndeflow.training.records import Rows


def quiet_lightning() -> None:
    """Silence Lightning's banners and advertisements; its warnings still come through."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        for logger in (name, f"{name}.utilities.rank_zero"):
            logging.getLogger(logger).setLevel(logging.WARNING)
    # We say what the data order and the workers are; these warn about choices that are ours.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")


_LOG = logging.getLogger("ndeflow.run")
_LOG.propagate = False
_LOG.setLevel(logging.INFO)


def log_to(path: Path | None) -> None:
    """Append what is printed to a file as well, with times; None ends that."""
    for handler in list(_LOG.handlers):
        _LOG.removeHandler(handler)
        handler.close()
    if path is not None:
        handler = logging.FileHandler(path)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        _LOG.addHandler(handler)


class StepBar(ProgressBar):
    """One bar over optimizer steps: loss, steps per second, time left. Plain lines where stdout is no terminal.

    Args:
        rows: where the last numbers are.
        seconds: how often to write a line where stdout is no terminal.
    """

    def __init__(self, rows: Rows, seconds: float = 10.0) -> None:
        super().__init__()
        self._rows, self._seconds = rows, seconds
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._first = self._shown_step = 0
        self._began = self._shown = 0.0

    def disable(self) -> None:
        """Nothing to do: other ranks get no bar."""

    def enable(self) -> None:
        """Nothing to do."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock and, in a terminal, the bar."""
        self._first = self._shown_step = trainer.global_step
        self._began = self._shown = time.monotonic()
        if sys.stdout.isatty():
            columns = ("{task.description}", BarColumn(), "{task.completed}/{task.total}", "{task.fields[text]}")
            self._bar = Progress(*(TextColumn(c) if isinstance(c, str) else c for c in columns), TimeRemainingColumn())
            self._task = self._bar.add_task("train", total=trainer.max_steps, completed=self._first, text="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Refresh ten times a second at most; without a terminal, write a line now and then."""
        now, step = time.monotonic(), trainer.global_step
        if now - self._shown < (0.1 if self._bar else self._seconds) and step < trainer.max_steps:
            return
        text = self._text(now, step)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif step != self._shown_step:
            left = (trainer.max_steps - step) * (now - self._began) / max(1, step - self._first)
            self._write(f"step {step}/{trainer.max_steps}  {text}  {left:.0f} s left")
        self._shown, self._shown_step = now, step

    def _text(self, now: float, step: int) -> str:
        """Loss and speed; the loss is that of the last row, so that showing it costs no sync."""
        speed = (step - self._first) / max(1e-9, now - self._began)
        loss = self._rows.latest.get("train/loss")
        return (f"loss {loss:.4g}  " if loss is not None else "") + f"{speed:.1f} steps/s"

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the validation loss."""
        if trainer.sanity_checking or not isinstance(pl_module, Module):
            return
        means = pl_module.validation_means()
        self._write(f"step {trainer.global_step}: validation " + ", ".join(f"{k} {v:.4g}" for k, v in means.items()))

    def _write(self, text: str) -> None:
        """A line above the bar."""
        _LOG.info(text)
        self._bar.console.print(text, highlight=False) if self._bar else print(text, flush=True)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the terminal as it was, however the run ends."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def say(text: str, error: bool = False) -> None:
    """Print a line, errors to stderr, from rank 0 only."""
    if rank_zero_only.rank == 0:
        _LOG.info(text)
        print(text, file=sys.stderr if error else sys.stdout, flush=True)


def fail(error: Exception) -> None:
    """Print an error to stderr, from every rank: its cause may be on one alone."""
    rank = rank_zero_only.rank
    _LOG.info("error: %s", error)
    print(f"error on rank {rank}: {error}" if rank else f"error: {error}", file=sys.stderr, flush=True)


def count(module: nn.Module) -> str:
    """Return how many parameters a module has, and how many of them are frozen."""
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in module.parameters() if not p.requires_grad)
    return f"{trained:,} trained" + (f", {frozen:,} frozen" if frozen else "")


def device_name(trainer: pl.Trainer) -> str:
    """Return what the trainer computes on."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return f"{trainer.world_size} × {device.type} ({name}), precision {trainer.precision}"


def show(title: str, rows: Mapping[str, str]) -> None:
    """Print a titled two-column list."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{title}[/bold]" if console.is_terminal else title)
    _LOG.info(title)
    for name, text in rows.items():
        _LOG.info("  %-12s %s", name, text)
        console.print(f"  {name:<12} {text}", markup=False)
