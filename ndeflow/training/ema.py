"""Exponential moving average of the weights, beside the raw weights and never instead of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from ndeflow.modules.base import clean_name


class EMA(pl.Callback):
    r"""Keep a moving average of the weights, updated once per optimizer step.

    .. math:: \bar\theta_n = \bar\theta_{n-1} + (1-\beta_n)(\theta_n - \bar\theta_{n-1})

    :math:`\beta_n = \min(\beta, (1+n)/(10+n))` with `warmup="inverse"`, and β with `"none"`: the initial
    weights are then still there with weight :math:`\beta^n`. The average is float32 (float64 where the
    parameter is): a bfloat16 average at β = 0.999 does not move at all. Buffers are not averaged.
    Validation, sample pictures and reports use the average; checkpoints hold both.

    Args:
        decay: β in [0, 1).
        warmup: `"inverse"` or `"none"`.
        drop: resume from a checkpoint that has an average without keeping one on.

    Raises:
        ValueError: `decay` outside [0, 1).
    """

    def __init__(
        self, decay: float | None = None, warmup: Literal["inverse", "none"] = "inverse", drop: bool = False
    ) -> None:
        if decay is not None and not 0.0 <= decay < 1.0:
            raise ValueError(f"decay={decay} must lie in [0, 1); 0.999 averages over about the last 1000 steps")
        if drop and decay is not None:
            raise ValueError(f"drop=true and decay={decay} exclude each other: drop means to keep no average")
        self.decay, self.warmup, self.drop = decay, warmup, drop
        self.updates = 0
        self.weights: dict[str, Tensor] = {}
        self._raw: dict[str, Tensor] | None = None
        self._step = 0
        self._trained: list[Tensor] = []  # walking through the modules at each step would cost as much as averaging

    @property
    def enabled(self) -> bool:
        """Whether an average is kept."""
        return self.decay is not None

    def decay_at(self, n: int) -> float:
        """Return β_n of the n-th update, n = 1, 2, …"""
        assert self.decay is not None
        return min(self.decay, (1 + n) / (10 + n)) if self.warmup == "inverse" else self.decay

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start from the weights as they are, unless a checkpoint brought the average along."""
        if not self.enabled:
            return
        parameters = _parameters(pl_module)
        if not self.weights:
            self.weights = {name: p.detach().to(_shadow_dtype(p), copy=True) for name, p in parameters.items()}
        for name, p in parameters.items():
            self.weights[name] = self.weights[name].to(p.device)
        self._trained = list(parameters.values())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from where the run stands, which is known only after `on_fit_start`."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update once per optimizer step, not per micro-batch."""
        if self.enabled and trainer.global_step != self._step:
            self._step = trainer.global_step
            self.update(self._trained)

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor]) -> None:
        """Move the average towards `parameters`, in the order of `weights`, by one step."""
        self.updates += 1
        shadow = list(self.weights.values())
        current = [p.detach().to(s.dtype) for p, s in zip(parameters, shadow, strict=True)]
        torch._foreach_lerp_(shadow, current, 1.0 - self.decay_at(self.updates))

    @torch.no_grad()
    def swap_in(self, module: torch.nn.Module) -> None:
        """Put the average into the module and the raw weights aside."""
        if not self.weights or self._raw is not None:
            return
        parameters = _parameters(module)
        self._raw = {name: p.detach().clone() for name, p in parameters.items()}
        for name, p in parameters.items():
            p.copy_(self.weights[name])

    @torch.no_grad()
    def swap_out(self, module: torch.nn.Module) -> None:
        """Put the raw weights back, bit for bit."""
        if self._raw is None:
            return
        for name, p in _parameters(module).items():
            p.copy_(self._raw[name])
        self._raw = None

    @contextmanager
    def applied(self, module: torch.nn.Module) -> Iterator[None]:
        """Run a block with the average in the module."""
        self.swap_in(module)
        try:
            yield
        finally:
            self.swap_out(module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate the average."""
        self.swap_in(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Train on from the raw weights."""
        self.swap_out(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the raw weights behind when validation fails."""
        self.swap_out(pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the average beside the raw weights."""
        if self._raw is not None:
            raise RuntimeError("a checkpoint was asked for while the averaged weights are in the module")
        if self.enabled:
            checkpoint["ema"] = {"decay": self.decay, "step": self.updates, "weights": dict(self.weights)}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on with the average of the checkpoint, or say why not."""
        stored = checkpoint.get("ema")
        if stored is None:
            if self.enabled:
                rank_zero_warn("checkpoint has no EMA: averaging starts from its raw weights")
            return
        if not self.enabled:
            if self.drop:
                return
            raise ValueError(
                f"checkpoint has EMA (decay {stored['decay']}, step {stored['step']}) but ema is not configured; "
                f"set ema.decay={stored['decay']} or ema.drop=true"
            )
        self.updates = stored["step"]
        self.weights = {name: stored["weights"][name].clone() for name in _parameters(pl_module)}


def _parameters(module: torch.nn.Module) -> dict[str, Tensor]:
    """The trained parameters by the names that checkpoints use."""
    return {clean_name(name): p for name, p in module.named_parameters() if p.requires_grad}


def _shadow_dtype(p: Tensor) -> torch.dtype:
    """At least float32."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32
