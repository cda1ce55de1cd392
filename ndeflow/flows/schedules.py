"""Schedules: how much data and how much source a state holds at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """The coefficients of x_t = α x1 + σ x0 and their derivatives in the path's own time; float64, the shape of t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


class Schedule(ABC):
    """The coefficients of data and source, x_t = α(t) x1 + σ(t) x0, and the direction of time.

    Each schedule keeps the time of its paper: 0 → 1, 1 → 0 or 80 → 0. Whoever moves along a path asks `interval`,
    so no other place has a direction written into it. Subclasses are frozen dataclasses.
    """

    @property
    @abstractmethod
    def interval(self) -> tuple[float, float]:
        """(t_source, t_data): where the state is the source and where it is data."""

    @property
    @abstractmethod
    def clip(self) -> tuple[float, float]:
        """(nearest to the source, nearest to the data): the times at which a net may be asked, within `interval`."""

    @abstractmethod
    def coefficients(self, t: Tensor) -> Coefficients:
        """Return α, σ, α̇, σ̇ at times of any real dtype and shape, computed in float64 without cancellation."""

    def half_log_snr(self, t: Tensor) -> Tensor:
        """Return log(α/σ), half of the logarithm of the signal-to-noise ratio; −∞ where α = 0, +∞ where σ = 0."""
        alpha, sigma, _, _ = self.coefficients(t)
        return alpha.log() - sigma.log()

    @abstractmethod
    def time_of(self, half_log_snr: Tensor) -> Tensor:
        """Return the time at which log(α/σ) has a given value, float64: the inverse of `half_log_snr`."""


@dataclass(frozen=True)
class Linear(Schedule):
    r"""The straight line from source to data.

    .. math:: α(t) = t, \qquad σ(t) = 1 - t, \qquad t: 0 → 1, \qquad t = \mathrm{sigmoid}(\log α/σ)

    The velocity x1 − x0 is regular at both ends, so that a net that predicts it may be asked everywhere.

    Reference:
        Liu, Gong, Liu, "Flow straight and fast: learning to generate and transfer data with rectified flow", 2022,
        equation 1.

    >>> Linear().half_log_snr(torch.tensor([0.0, 0.5, 1.0]))
    tensor([-inf, 0., inf], dtype=torch.float64)
    """

    @property
    def interval(self) -> tuple[float, float]:
        """(0, 1)."""
        return (0.0, 1.0)

    @property
    def clip(self) -> tuple[float, float]:
        """(0, 1): the velocity is regular at both ends."""
        return (0.0, 1.0)

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return t, 1 − t, 1, −1."""
        t = t.to(torch.float64)
        one = torch.ones_like(t)
        return Coefficients(t, 1 - t, one, -one)

    def time_of(self, half_log_snr: Tensor) -> Tensor:
        """Return sigmoid(log(α/σ))."""
        return half_log_snr.to(torch.float64).sigmoid()
