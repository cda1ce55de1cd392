"""What a sampler is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from torch import Tensor

from ndeflow.flows.model import FlowModel

Noise: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Increments noise(q0, q1) = W(q1) − W(q0) of one Brownian path per sample, (B, *); q is the sampler's noise clock."""


class Sample(NamedTuple):
    """What a sampler returns.

    Attributes:
        x: states at the end of the grid, (B, *).
        nfe: network calls for each sample, int64 (B,).
        nodes: states at all nodes of the grid, (B, n + 1, *), or None where they were not kept.
    """

    x: Tensor
    nfe: Tensor
    nodes: Tensor | None


class Sampler(ABC):
    """Moves states from the first to the last time of a grid by calling a model. Subclasses are frozen dataclasses."""

    @abstractmethod
    def __call__(self, model: FlowModel, x: Tensor, cond: Tensor | None = None, noise: Noise | None = None) -> Sample:
        """Sample.

        Args:
            model: the flow; the grid is laid on its path.
            x: states at the grid's first time, (B, *), e.g. of `model.path.prior`.
            cond: conditions, one per sample, (B, …), for a conditional model.
            noise: Brownian increments, for a stochastic sampler.

        Returns:
            States at the grid's last time.

        Raises:
            ValueError: `noise` is missing, or given to a deterministic sampler.
        """
