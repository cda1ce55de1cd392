"""A small module and data set with everything that can go wrong on resume: dropout, keyed noise, augmentation."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from ndeflow.data.loading import DataModule, Labeled
from ndeflow.modules.base import Module, Optim
from ndeflow.randomness import fold, normal
from ndeflow.training.saving import CheckpointIO


class Toy(Module):
    """Regress x on x plus keyed noise, with dropout."""

    def __init__(self, width: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, width), nn.Dropout(dropout), nn.SiLU(), nn.Linear(width, 3))
        self.optim = Optim(partial(torch.optim.AdamW, lr=1e-2))

    def loss(self, batch):
        noise = normal(fold(batch["key"], "noise"), (3,)).to(batch["x1"].dtype)
        return {"fit": (self.net(batch["x1"] + noise) - batch["x1"]).square().mean()}


class Numbers(DataModule):
    """64 training points in three dimensions."""

    shape = (3,)

    def load(self):
        x = normal(fold("numbers", torch.arange(96)), (3,))
        return {"train": Labeled(x[:64]), "val": Labeled(x[64:80]), "test": Labeled(x[80:])}


@pytest.fixture
def toy():
    torch.manual_seed(0)
    return Toy()


@pytest.fixture
def numbers():
    return Numbers(batch_size=16)


@pytest.fixture
def fit():
    """Train with the trainer settings of `ndeflow.training.fitting`, without its run directory."""

    def run(module, data, callbacks, steps=20, ckpt_path=None, **settings):
        saves = any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks)
        trainer = pl.Trainer(
            max_steps=steps,
            max_epochs=-1,
            accelerator="cpu",
            callbacks=callbacks,
            num_sanity_val_steps=0,
            check_val_every_n_epoch=None,
            use_distributed_sampler=False,
            enable_checkpointing=saves,
            enable_progress_bar=False,
            enable_model_summary=False,
            **{"val_check_interval": 5, "logger": False, "plugins": [CheckpointIO()]} | settings,
        )
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return trainer

    return run
