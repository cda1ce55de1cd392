"""Saving during training: when, what, how many to keep, and leaving at a step boundary on a signal."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from ndeflow import __version__
from ndeflow.config import ConfigError
from ndeflow.modules.base import Module
from ndeflow.training import files
from ndeflow.training.signals import StopFlag, Stopped


class CheckpointIO(TorchCheckpointIO):
    """Let Lightning write atomically and read with checksums and `weights_only=True`.

    Attributes:
        full: the error of the last save if the disk was full; all processes go on to the next barrier.
    """

    full: files.DiskFull | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write one file atomically."""
        self.full = None
        try:
            files.write(checkpoint, Path(path))
        except files.DiskFull as error:
            self.full = error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read one file on the CPU."""
        return files.read(Path(path))


def code_version() -> str:
    """Return the commit of the code, with `+dirty` for uncommitted changes, or the package version."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return __version__


class Checkpoints(Checkpoint):
    """Save every `every` optimizer steps and at the end; keep the newest, the best, and every n-th.

    Files are `step_00001000.ckpt` and `best.ckpt`. Raw weights are `state_dict`, averaged ones `ema`;
    `ndeflow` holds the resolved config and all that is needed to go on. A full disk leaves earlier files
    untouched and training goes on; the third full disk in a row ends the run.

    Args:
        every: optimizer steps between checkpoints.
        keep: how many step files to keep.
        keep_every: never delete step files at multiples of this.
        monitor: a validation term whose best value is kept as `best.ckpt`, e.g. `loss`; never that of a validation
            with failed solves, whose means are over fewer samples.
        mode: whether a smaller (`"min"`) or larger (`"max"`) value of `monitor` is better.

    Raises:
        ValueError: a count below 1.
    """

    def __init__(
        self,
        every: int,
        keep: int = 2,
        keep_every: int | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
    ) -> None:
        for name, value in {"every": every, "keep": keep, "keep_every": keep_every}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.every, self.keep, self.keep_every, self.monitor, self.mode = every, keep, keep_every, monitor, mode
        self.folder: Path | None = None
        self.facts: Callable[[], Mapping[str, Any]] = dict
        self.flag = StopFlag()
        self.best: float | None = None
        self.saved: Path | None = None
        self._step = 0
        self._full = 0
        self._vote: Any = None

    def attach(self, folder: Path, facts: Callable[[], Mapping[str, Any]], flag: StopFlag) -> Checkpoints:
        """Say where to save, what to store under `ndeflow`, and which signals to obey."""
        self.folder, self.facts, self.flag = folder, facts, flag
        return self

    # -- hooks

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals back from Lightning, whose handlers save or communicate in the middle of a step."""
        self._step = trainer.global_step
        if trainer.is_global_zero:
            self._set_newer_aside(self._step)
        self.flag.install()
        if trainer.world_size > 1:
            self._vote = dist.new_group(backend="gloo")
            # Lightning broadcasts rank 0's flag through the device at every batch; the vote replaces it.
            loop = trainer.fit_loop.epoch_loop
            assert hasattr(loop, "_broadcast_sigterm_tensor"), "Lightning moved its signal broadcast"
            loop._broadcast_sigterm_tensor = lambda: None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time, and leave when a process was told to stop. Lightning calls this hook last."""
        step = trainer.global_step
        if step == self._step:  # inside an accumulation: stopping here would lose the gradients summed so far
            return
        self._step = step
        self._check_monitor(pl_module)
        signum = self._told_to_stop()
        if signum or step % self.every == 0 or step >= trainer.max_steps:
            self.save(trainer, step)
        if signum:
            raise Stopped(signum, step)

    def _check_monitor(self, module: pl.LightningModule) -> None:
        """Refuse a monitor that no validation will have, after the first step and not after hours."""
        if self.monitor is None or not isinstance(module, Module) or "failed_solve" in module.terms:
            return
        terms = dict.fromkeys([*module.terms, "loss"])
        if self.monitor not in terms:
            known = ", ".join(terms)
            raise ConfigError(f"checkpoints.monitor={self.monitor} is no validation term; there are: {known}")

    def _told_to_stop(self) -> int:
        """The signal of any process, 0 if none."""
        if self._vote is None:
            return self.flag.signum
        vote = torch.tensor(self.flag.signum)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self._vote)
        return int(vote)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the best by the monitored term, decided on rank 0."""
        if self.monitor is None or trainer.sanity_checking or not isinstance(pl_module, Module):
            return
        means = pl_module.validation_means()
        value = math.nan if "failed_solves" in means else means[self.monitor]
        sign = 1.0 if self.mode == "min" else -1.0
        better = value == value and (self.best is None or sign * value < sign * self.best)
        if trainer.strategy.broadcast(better):
            self.best = value
            self._write(trainer, self._path("best.ckpt"))

    # -- saving

    def _path(self, name: str) -> Path:
        """A file in the folder of checkpoints."""
        if self.folder is None:
            raise RuntimeError("Checkpoints.attach(folder, facts, flag) was not called")
        return self.folder / name

    def save(self, trainer: pl.Trainer, step: int) -> None:
        """Write the checkpoint of `step` and delete what is no longer kept."""
        path = self._path(files.step_name(step))
        if self._write(trainer, path):
            self.saved = path
            if trainer.is_global_zero:
                self._prune()
        trainer.strategy.barrier("checkpoint")

    def _write(self, trainer: pl.Trainer, path: Path) -> bool:
        """Write one file; collective over processes. Says so and returns False when the disk is full."""
        trainer.save_checkpoint(path, weights_only=False)
        writer = trainer.strategy.checkpoint_io
        full = writer.full if isinstance(writer, CheckpointIO) else None
        self._full = self._full + 1 if trainer.strategy.broadcast(full is not None) else 0
        if full is not None:
            rank_zero_warn(f"{full}; training goes on")
        if self._full >= 3:
            raise files.DiskFull(f"the disk was full for three checkpoints in a row, last {path}: free space, resume")
        return self._full == 0

    def _prune(self) -> None:
        """Delete step files beyond the newest `keep`, sparing multiples of `keep_every`."""
        found = files.step_files(self._path("."))
        spare = [p for p in found if not self.keep_every or files.step_of(p) % self.keep_every]
        for path in spare[: -self.keep]:
            path.unlink()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what the checkpoint means: config, code, data, position, best value."""
        for name, value in checkpoint["state_dict"].items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise files.CheckpointError(f"{name} is not finite: not saved; the checkpoints before are good")
        checkpoint["ndeflow"] = {
            "format": files.FORMAT,
            "version": __version__,
            "commit": code_version(),
            "torch": str(torch.__version__),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "world_size": trainer.world_size,
            "accumulate": trainer.accumulate_grad_batches,
            "best": self.best,
            **self.facts(),
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from the best value so far; count micro-batches anew where the accumulation has changed."""
        facts = checkpoint["ndeflow"]
        self.best = facts["best"]
        old, new = facts["accumulate"], trainer.accumulate_grad_batches
        if old != new:
            _recount(checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"], old, new)

    def _set_newer_aside(self, step: int) -> None:
        """Move step files beyond the step that the run goes on from out of the way of `keep`."""
        for path in files.step_files(self._path(".")):
            if files.step_of(path) > step:
                aside = self._path("old")
                aside.mkdir(exist_ok=True)
                path.rename(aside / path.name)


def _recount(progress: dict[str, Any], old: int, new: int) -> None:
    """Lightning counts micro-batches; a checkpoint is written at optimizer steps, so the counts scale exactly."""
    for part in (progress["total"], progress["current"]):
        behind = part["processed"] - part["completed"]
        for name in ("ready", "started", "processed"):
            part[name] = part[name] // old * new
        part["completed"] = part["processed"] - behind
