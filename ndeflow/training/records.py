"""Records of a run: `metrics.jsonl` is the record, Weights & Biases is a view of it."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from ndeflow.diffeq import SolverError
from ndeflow.modules.base import Module
from ndeflow.training.health import Health
from ndeflow.training.tracking import Tracker


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file; a half-written last line (the process was killed) is left out."""
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")
    rows = [json.loads(line) for line in lines[:-1] if line]
    return rows + list(_whole(lines[-1]))


def _whole(line: str) -> Iterator[dict[str, Any]]:
    """The row of a last line without its end, if it is whole all the same."""
    try:
        yield json.loads(line)
    except json.JSONDecodeError:
        return


def _kept(row: Mapping[str, Any], step: int) -> bool:
    """Whether a row stays when a run goes on from `step`: a validation due there is made again, as a whole."""
    evaluated = "media" in row or any(name.startswith("val/") for name in row)
    return row["step"] < step or (row["step"] == step and not evaluated)


class Records(Logger):
    """Write rows of numbers and pictures of a run, on rank 0 only.

    One JSON object per row: `{"step": 120, "time": …, "train/loss": …}`; `step` counts optimizer steps
    done. Non-finite numbers are written as strings ("nan", "inf"), which JSON lacks. Pictures go to
    `media/`, their rows hold the relative file name. Rows are flushed one by one and survive a kill.

    Args:
        folder: the run directory.
        tracker: where to send rows as well, or None.
        resumed_at: optimizer steps of the checkpoint the run goes on from; later rows are cut off.
    """

    def __init__(self, folder: Path, tracker: Tracker | None = None, resumed_at: int = 0) -> None:
        super().__init__()
        self.folder, self.tracker = folder, tracker
        self.path = folder / "metrics.jsonl"
        self._file: TextIO | None = None
        if rank_zero_only.rank == 0:
            self._open(resumed_at)

    def _open(self, resumed_at: int) -> None:
        """Cut the file back to the checkpoint's step, atomically, and show the tracker what is left."""
        rows = [row for row in read_rows(self.path) if _kept(row, resumed_at)] if resumed_at else []
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(temporary, self.path)
        self._file = self.path.open("a", buffering=1)
        if self.tracker:
            self.tracker.start(rows)

    @property
    def name(self) -> str:
        """The name of the run."""
        return self.folder.name

    @property
    def version(self) -> str:
        """Runs have no versions: one directory is one run."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the resolved config is in config.yaml, in the checkpoints and in the tracker."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write a row of numbers; also serves `self.log` of a user's module."""
        values = {k: float(v) for k, v in metrics.items() if k != "epoch"}
        if values and step is not None:
            self._write(step, values)
            if self.tracker:
                self.tracker.log(step, values)

    @rank_zero_only
    def log_pictures(self, pictures: Mapping[str, np.ndarray], step: int) -> None:
        """Write pictures, uint8 (H, W) or (H, W, 3), as PNG and note their names in a row."""
        from PIL import Image  # the one heavy import of pictures, not needed by runs without them

        names = {name: f"media/{name}_{step:08d}.png" for name in pictures}
        (self.folder / "media").mkdir(exist_ok=True)
        for name, picture in pictures.items():
            Image.fromarray(picture).save(self.folder / names[name])
        if names:
            self._write(step, {"media": names})
            if self.tracker:
                self.tracker.log_pictures(step, {name: self.folder / path for name, path in names.items()})

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one row."""
        assert self._file is not None
        finite = {k: repr(v) if isinstance(v, float) and not np.isfinite(v) else v for k, v in values.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows so far."""
        return read_rows(self.path)

    def close(self, exit_code: int) -> None:
        """Close file and tracker."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self.tracker:
            self.tracker.finish(exit_code)


class Rows(pl.Callback):
    """Write a row of training numbers every n optimizer steps and a row of means after each validation.

    `self.log` in every step would cost more than the step of a small model. Terms of the loss are means
    over processes.

    Args:
        records: where to.
        every: n; the first and the last step get a row too.
        health: knows the gradient norm and the skipped steps.
    """

    def __init__(self, records: Records, every: int, health: Health) -> None:
        self.records, self.every, self.health = records, every, health
        self.latest: dict[str, float] = {}
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from where the run stands; validate if the run was stopped or killed before it could."""
        self._step = trainer.global_step
        interval = trainer.val_check_batch
        parts = trainer.accumulate_grad_batches
        if self._step and isinstance(interval, int) and self._step * parts % interval == 0:
            loop = trainer.fit_loop.epoch_loop.val_loop
            loop.restarting = False  # else only the batches after the restored counter are seen
            trainer.validating = True
            loop.run()
            trainer.training = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the numbers of this optimizer step when it is time."""
        step = trainer.global_step
        due = step % self.every == 0 or step == 1 or step >= trainer.max_steps
        if step != self._step and due and isinstance(pl_module, Module):
            self.latest = self._numbers(trainer, pl_module)
            self.records.log_metrics(self.latest, step)
        self._step = step

    def _numbers(self, trainer: pl.Trainer, module: Module) -> dict[str, float]:
        """Loss terms averaged over processes in one collective, gradient norm, learning rate, skipped steps."""
        values = torch.stack([v.double() for v in module.terms.values()]).tolist()
        terms = dict(zip(module.terms, values, strict=True))
        if trainer.world_size > 1:
            terms = _averaged(terms, trainer.world_size)
        row: dict[str, float] = {"train/loss": sum(terms.values())}
        row |= {f"train/{name}": value for name, value in terms.items()} if len(terms) > 1 else {}
        if self.health.gradient_norm is not None:
            row["train/grad_norm"] = float(self.health.gradient_norm)
        if self.health.skipped:
            row["train/skipped_steps"] = float(self.health.skipped)
        return row | {"train/lr": float(trainer.optimizers[0].param_groups[0]["lr"])}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the means of the validation and the family's pictures, made with the averaged weights."""
        if trainer.sanity_checking or not isinstance(pl_module, Module):
            return
        means = pl_module.validation_means()
        self.records.log_metrics({f"val/{name}": value for name, value in means.items()}, trainer.global_step)
        if trainer.is_global_zero:
            self.records.log_pictures(self._pictures(pl_module), trainer.global_step)

    def _pictures(self, module: Module) -> dict[str, np.ndarray]:
        """The family's pictures; none where their solve fails and failed solves are to be skipped."""
        try:
            return module.preview()
        except SolverError as error:
            if self.health.nonfinite == "stop":
                raise
            warnings.warn(f"no pictures, failed solve: {error}", stacklevel=2)
            return {}


def _averaged(terms: dict[str, float], world_size: int) -> dict[str, float]:
    """The mean of each term over the processes that have it: where a solve failed the terms are others."""
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, terms)
    shares = {name: [part[name] for part in everyone if name in part] for part in everyone for name in part}
    return {name: sum(values) / len(values) for name, values in shares.items()}
