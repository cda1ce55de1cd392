"""What every LightningModule of ndeflow has in common: optimizers, terms of a loss, validation, pictures."""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ndeflow.diffeq import SolverError

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module)\.")


def clean_name(name: str) -> str:
    """Return a parameter's name without the components that wrappers such as torch.compile insert.

    >>> clean_name("model._orig_mod.net.weight")
    'model.net.weight'
    """
    return _WRAPPERS.sub("", name)


@dataclass(frozen=True)
class Optim:
    """How to optimize: the `optim` section of a config.

    Args:
        optimizer: builds the optimizer from parameter groups, e.g. a partial of `torch.optim.AdamW`.
        schedule: builds a learning-rate schedule from the optimizer, stepped once per optimizer step.
    """

    optimizer: Callable[..., Optimizer]
    schedule: Callable[..., LRScheduler] | None = None


class Module(pl.LightningModule, ABC):
    """Base of the families: define `loss`, and what pictures and reports show.

    A subclass holds built objects (model, path, sampler, …) and returns from `loss(batch)` the terms
    whose sum is minimized. Logging, validation, optimizers and checkpoint names are here.

    Attributes:
        optim: the `Optim` to train with; set before `fit`.
        learning_rates: factors of the learning rate by parameter name pattern, first match wins.
        terms: detached terms of the last optimizer step, averaged over its micro-batches.
        skip_failed_solves: leave out a step whose solve fails, by a loss that is not a number, and a batch of a
            validation from its means.
        data_info: shape and scaling of the data (`shape`, `scale`, `shift`, `classes`), from the data
            module or the checkpoint.
    """

    def __init__(self) -> None:
        super().__init__()
        self.optim: Optim | None = None
        self.learning_rates: Mapping[str, float] = {}
        self.terms: dict[str, Tensor] = {}
        self.data_info: dict[str, Any] = {}
        self.skip_failed_solves = False
        self._sums: dict[str, Tensor] = {}
        self._failed = 0
        self._means: dict[str, float] = {}
        self._seen_first_batch = False

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes the name of every hook of every step here; torch's search among parameters, buffers and
        # modules for the place of a string would cost more than averaging the weights does.
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    # -- what a family defines

    @abstractmethod
    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the scalar terms of the loss by name; their sum is minimized."""

    def check_data(self, data: pl.LightningDataModule) -> None:
        """Refuse data that the model cannot take, before training begins; a ValueError says what to set."""

    def preview(self) -> dict[str, np.ndarray]:
        """Return small pictures of what the model does now, uint8 (H, W) or (H, W, 3), by name."""
        return {}

    def evaluate(self, data: pl.LightningDataModule) -> dict[str, Any]:
        """Return numbers about the model on held-out data, plain containers; `{}` where a family has none."""
        return {}

    def draw_report(self, folder: Path) -> list[Path]:
        """Write the family's figures for the final report into `folder` and return their paths."""
        return []

    # -- training

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the sum of the terms, and remember them for the records."""
        if not self._seen_first_batch:
            self._check_batch(batch)
        terms = self._loss_or_nan(batch) if self.skip_failed_solves else self.loss(batch)
        parts = self.trainer.accumulate_grad_batches
        self._remember({name: value.detach() / parts for name, value in terms.items()}, first=batch_idx % parts == 0)
        return torch.stack(list(terms.values())).sum() if len(terms) > 1 else next(iter(terms.values()))

    def _loss_or_nan(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss, or one that is NaN in every gradient: all processes then skip the step, and none waits."""
        try:
            return self.loss(batch)
        except SolverError as error:
            warnings.warn(f"failed solve: {error}", stacklevel=2)
            every_weight = torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum()
            return {"failed_solve": torch.nan * every_weight}

    def _remember(self, terms: dict[str, Tensor], first: bool) -> None:
        """Sum the terms over the micro-batches of an optimizer step; those of a failed solve have other names."""
        self.terms = terms if first else self.terms | {n: v + self.terms.get(n, 0.0) for n, v in terms.items()}

    def _check_batch(self, batch: dict[str, Tensor]) -> None:
        """Refuse data of another dtype than the weights: torch's own message names neither."""
        weight = next(p.dtype for p in self.parameters() if p.is_floating_point())
        for name, value in batch.items():
            if name.startswith("x") and value.dtype == torch.uint8:
                raise TypeError(f'batch["{name}"] is uint8: scale to [-1, 1] in the data set')
            if name.startswith("x") and value.is_floating_point() and value.dtype != weight:
                raise TypeError(
                    f'batch["{name}"] is {value.dtype}, the module is {weight}: cast in the data set, or set '
                    "trainer.precision"
                )
        self._seen_first_batch = True

    def setup(self, stage: str) -> None:
        """Take over shape and scaling from the data module."""
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and hasattr(data, "info"):
            self.data_info = data.info

    # -- validation: the mean of each term over the set, the same over any number of processes

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation."""
        self._sums, self._failed = {}, 0

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the means."""
        try:
            terms = self.loss(batch)
        except SolverError as error:
            if not self.skip_failed_solves:
                raise
            warnings.warn(f"validation batch {batch_idx} is left out of the means, failed solve: {error}", stacklevel=2)
            self._failed += 1
            return
        size = batch["key"].shape[0]
        for name, value in {**terms, "loss": torch.stack(list(terms.values())).sum()}.items():
            part = value.detach().double() * size
            self._sums[name] = self._sums.get(name, 0) + torch.stack([part, torch.full_like(part, size)])

    def on_validation_epoch_end(self) -> None:
        """Take the means over all processes, of which one may have terms that another, whose solves failed, lacks."""
        own = {name: part.tolist() for name, part in self._sums.items()}, self._failed
        everyone = [own] * self.trainer.world_size
        if self.trainer.world_size > 1:
            dist.all_gather_object(everyone, own)
        parts = {name: [sums[name] for sums, _ in everyone if name in sums] for sums, _ in everyone for name in sums}
        self._means = {name: sum(s for s, _ in part) / sum(n for _, n in part) for name, part in parts.items()}
        if failed := sum(count for _, count in everyone):
            self._means["failed_solves"] = float(failed)

    def validation_means(self) -> dict[str, float]:
        """Return the mean terms of the validation that just ended, the same on all processes.

        `failed_solves` is among them, the number of batches left out, if there are any.
        """
        return dict(self._means)

    # -- optimizers

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return trained parameters grouped by the first matching pattern of `learning_rates`.

        Raises:
            ValueError: nothing is trained, or a pattern matches no trained parameter.
        """
        groups: dict[str, list[nn.Parameter]] = {pattern: [] for pattern in [*self.learning_rates, "*"]}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                pattern = next(p for p in groups if fnmatchcase(clean_name(name), p))
                groups[pattern].append(parameter)
        if not any(groups.values()):
            raise ValueError("no parameter is trained: every one is frozen; unfreeze some, or shorten init.freeze")
        for pattern in self.learning_rates:
            if not groups[pattern]:
                raise ValueError(f"learning rate pattern {pattern!r} matches no trained parameter")
        return [{"params": p, "name": pattern} for pattern, p in groups.items() if p]

    def configure_optimizers(self) -> Any:
        """Build optimizer and schedule from `optim`; group learning rates are factors of the optimizer's own."""
        if self.optim is None:
            raise ValueError("module.optim is not set: module.optim = Optim(partial(torch.optim.AdamW, lr=1e-3))")
        optimizer = self.optim.optimizer(self.parameter_groups())
        for group in optimizer.param_groups:
            group["lr"] *= self.learning_rates.get(group["name"], 1.0)
        if self.optim.schedule is None:
            return optimizer
        schedule = self.optim.schedule(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # -- checkpoints: names without wrappers, whatever is compiled now

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store clean names."""
        checkpoint["state_dict"] = {clean_name(k): v for k, v in checkpoint["state_dict"].items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give stored names the components that this module's wrappers insert."""
        actual = {clean_name(k): k for k in self.state_dict()}
        checkpoint["state_dict"] = {actual.get(k, k): v for k, v in checkpoint["state_dict"].items()}
