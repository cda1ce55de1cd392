"""Time grids: at which times of a path a sampler stops."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ndeflow.flows.paths import Path


class Grid(NamedTuple):
    """Nodes of a path, from the source's end on: times and the path's coefficients there, float64 (n + 1,)."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor


def lay(path: Path, t: Tensor) -> Grid:
    """Make a grid of given times.

    Args:
        path: gives the coefficients.
        t: n + 1 ≥ 2 times in the path's own clock, (n + 1,).

    Returns:
        The grid, float64 on the CPU.

    Raises:
        ValueError: there are fewer than two nodes, or log(α/σ) does not increase strictly, so that the grid does not
            lead from source to data.

    >>> from ndeflow.flows import Affine, Linear
    >>> lay(Affine(Linear()), torch.tensor([0.0, 0.5, 1.0])).sigma.tolist()
    [1.0, 0.5, 0.0]
    """
    t = t.to("cpu", torch.float64)
    if t.ndim != 1 or len(t) < 2:
        raise ValueError(f"a grid needs at least two times in one row, got shape {tuple(t.shape)}")
    levels = path.half_log_snr(t).tolist()
    for i in range(1, len(levels)):
        if not levels[i] > levels[i - 1]:
            raise ValueError(
                f"the grid does not lead from source to data: log(alpha/sigma) goes from {levels[i - 1]:g} to "
                f"{levels[i]:g} at node {i} (t={t[i]:g}) of {path}"
            )
    alpha, sigma, _, _ = path.coefficients(t)
    return Grid(t, alpha, sigma)


class GridSpec(ABC):
    """A rule that lays a grid on any path. Subclasses are frozen dataclasses."""

    @abstractmethod
    def __call__(self, path: Path) -> Grid:
        """Lay the grid on a path."""


@dataclass(frozen=True)
class UniformGrid(GridSpec):
    """Equal steps in the path's own time, from t_source to t_data, both exact.

    Args:
        steps: number of steps, ≥ 1; the grid has one node more.

    Raises:
        ValueError: there is no step.
    """

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"UniformGrid needs steps >= 1, got {self.steps}")

    def __call__(self, path: Path) -> Grid:
        """Lay the grid on the interval of a path."""
        source, data = path.interval
        u = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
        return lay(path, torch.lerp(torch.full_like(u, source), torch.full_like(u, data), u))
