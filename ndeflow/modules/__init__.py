"""LightningModules, one per family."""

from ndeflow.modules.base import Module, Optim

__all__ = ["Module", "Optim"]
