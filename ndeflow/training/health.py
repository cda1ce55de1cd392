"""Non-finite gradients: found before they reach the weights, the same decision on every process."""

from __future__ import annotations

from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from ndeflow.modules.base import Module, clean_name


class NonFinite(RuntimeError):
    """Training met gradients that are not finite and stopped; the weights are those of the step before."""


class Health(pl.Callback):
    """Check the gradient norm of every optimizer step before the weights move.

    Under data parallelism the gradients are averaged by then, so one bad process is seen by all, and
    all decide alike. A skipped step changes neither weights nor optimizer state.

    Args:
        nonfinite: `"stop"` raises at the first non-finite gradient or failed solve; `"skip"` leaves the step out, and
            what a failed solve concerns in a validation: its batch, or the pictures.
        limit: with `"skip"`, the longest run of skipped steps in a row before stopping after all.

    Raises:
        ValueError: `limit` below 1.
    """

    def __init__(self, nonfinite: Literal["stop", "skip"] = "stop", limit: int = 10) -> None:
        if limit < 1:
            raise ValueError(f"limit={limit} must be at least 1 step")
        self.nonfinite, self.limit = nonfinite, limit
        self.skipped = 0
        self.in_a_row = 0
        self.gradient_norm: Tensor | None = None
        self._parameters: list[Tensor] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let a failed solve take the same way as a non-finite gradient."""
        if isinstance(pl_module, Module):
            pl_module.skip_failed_solves = self.nonfinite == "skip"

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the parameters once."""
        self._parameters = list(pl_module.parameters())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Measure the norm; stop or drop the gradients where it is not finite."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        self.gradient_norm = torch.nn.utils.get_total_norm(gradients)
        if bool(torch.isfinite(self.gradient_norm)):
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        message = self._describe(trainer, pl_module)
        if self.nonfinite == "stop" or self.in_a_row > self.limit:
            raise NonFinite(message)
        rank_zero_warn(f"skipped: {message}")
        optimizer.zero_grad(set_to_none=True)

    def _describe(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
        """Step, terms, the first parameter concerned, and what to do."""
        step = trainer.global_step + 1
        terms = pl_module.terms if isinstance(pl_module, Module) else {}
        bad = [f"{name} = {value.item():g}" for name, value in terms.items() if not torch.isfinite(value)]
        cause = f"loss term {', '.join(bad)}" if bad else "the loss is finite on this process, its gradient is not"
        named = ((clean_name(n), p.grad) for n, p in pl_module.named_parameters() if p.grad is not None)
        first = next((n for n, g in named if not torch.isfinite(g).all()), "none alone: the norm overflows")
        row = f"{self.in_a_row} steps in a row had non-finite gradients, last " if self.in_a_row > 1 else ""
        return (
            f"{row}step {step}: {cause}; first parameter with a non-finite gradient: {first}. The weights are still "
            f"those of step {step - self.in_a_row}. Lower optim.optimizer.lr, set trainer.gradient_clip_val, look at "
            "the data, or set health.nonfinite=skip"
        )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the counts."""
        checkpoint["health"] = {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on counting."""
        counts = checkpoint.get("health", {"skipped": 0, "in_a_row": 0})
        self.skipped, self.in_a_row = counts["skipped"], counts["in_a_row"]
