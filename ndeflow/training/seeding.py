"""Seed the global generators once per batch, so that dropout needs no state in a checkpoint."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from ndeflow.randomness import seed_all


class Seeds(pl.Callback):
    """Seed by (seed, purpose, rank, batch number) before every training and validation batch.

    What a module draws itself comes from the keys in its batch and does not pass through here; this
    covers what libraries draw from global generators. The batch number is optimizer steps done times
    accumulation plus the place in the accumulation, hence the same after a restart.

    Args:
        seed: the seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed for a training batch by its number in the run."""
        parts = trainer.accumulate_grad_batches
        seed_all(self.seed, "train", trainer.global_rank, trainer.global_step * parts + batch_idx % parts)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Seed alike at every validation, so that its curves compare like with like."""
        seed_all(self.seed, "val", trainer.global_rank, dataloader_idx, batch_idx)
