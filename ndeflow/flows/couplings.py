"""Couplings: which source point goes with which data point."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor

from ndeflow.randomness import fold, normal


class Pair(NamedTuple):
    """Coupled source and data, (B, *) each, and the conditions, (B, …) or None, that belong to the data."""

    x0: Tensor
    x1: Tensor
    cond: Tensor | None


class Coupling(ABC):
    """A joint law of source and data.

    Attributes:
        independent: whether x0 and x1 are independent. Otherwise −E[x0 | x_t]/σ is not the score of x_t.
    """

    independent: ClassVar[bool]

    @abstractmethod
    def __call__(self, x1: Tensor, cond: Tensor | None, keys: Tensor) -> Pair:
        """Give each data point its source.

        Args:
            x1: data, float32 or float64, (B, *).
            cond: conditions of the data, (B, …), or None.
            keys: one per sample, int64 (B,).

        Returns:
            The pairs; with a permuting coupling, conditions move with their data.
        """


class Independent(Coupling):
    """Fresh Gaussian noise for each data point, x0 ~ N(0, I) independent of x1: the coupling of a first flow."""

    independent: ClassVar[bool] = True

    def __call__(self, x1: Tensor, cond: Tensor | None, keys: Tensor) -> Pair:
        """Draw x0 by the keys, in the dtype of the data."""
        return Pair(normal(fold(keys, "source"), x1.shape[1:], x1.dtype), x1, cond)
