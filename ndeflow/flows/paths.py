"""Paths: random curves from a source to data, and their velocity."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ndeflow.flows.schedules import Coefficients, Schedule
from ndeflow.randomness import fold, normal
from ndeflow.tensors import expand_time


class PathSample(NamedTuple):
    """Points on curves of a path, and what losses and regularizers would otherwise compute again.

    Attributes:
        t: times, float64, () or (B,).
        x_t: points, (B, *).
        x0: their sources, (B, *).
        x1: their data, (B, *).
        velocity: ẋ_t given the curve, (B, *): what a model of the velocity regresses on.
        latent: noise of a path that is random given its ends, (B, *), else None.
        coefficients: at t.
    """

    t: Tensor
    x_t: Tensor
    x0: Tensor
    x1: Tensor
    velocity: Tensor
    latent: Tensor | None
    coefficients: Coefficients


class Path(ABC):
    """A random curve x_t for each pair of a source x0 and a data point x1. Subclasses are frozen dataclasses.

    Attributes:
        schedule: the coefficients of x1 and x0 and the direction of time.
        gaussian_source: whether x0 ~ N(0, I). Only then, and only if x0 is independent of x1, is −E[x0 | x_t]/σ the
            score.
    """

    schedule: Schedule
    gaussian_source: bool

    @property
    def interval(self) -> tuple[float, float]:
        """(t_source, t_data)."""
        return self.schedule.interval

    @property
    def clip(self) -> tuple[float, float]:
        """The times at which a net may be asked, the source's end first."""
        return self.schedule.clip

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return α, σ, α̇, σ̇ at t, float64."""
        return self.schedule.coefficients(t)

    def half_log_snr(self, t: Tensor) -> Tensor:
        """Return log(α/σ) at t, float64, ±∞ at ends."""
        return self.schedule.half_log_snr(t)

    def time_of(self, half_log_snr: Tensor) -> Tensor:
        """Return the time at which log(α/σ) has a given value, float64."""
        return self.schedule.time_of(half_log_snr)

    @abstractmethod
    def sample(self, x0: Tensor, x1: Tensor, t: Tensor, keys: Tensor | None = None) -> PathSample:
        """Draw a point of each curve.

        Args:
            x0: sources, float32 or float64, (B, *).
            x1: data, of the dtype and shape of x0.
            t: times, () or (B,).
            keys: one per sample, int64 (B,); a path that is random given its ends draws from `fold(keys, "path")`.

        Returns:
            The points with their velocities, in the dtype of x1.

        Raises:
            TypeError: dtypes differ, or are of half precision.
            ValueError: shapes differ.
        """

    @abstractmethod
    def prior(self, keys: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw the states with which sampling starts, at t_source.

        Args:
            keys: one per sample, int64 (B,).
            shape: of one sample.
            dtype: float32 or float64.

        Returns:
            (B, *shape), sample by sample a function of its key.

        Raises:
            ValueError: the source is not a known law.
        """


def check_state(x: Tensor, name: str) -> None:
    """Refuse states without batch axis or of a dtype in which a solve loses its steps.

    Raises:
        TypeError: the dtype is not float32 or float64.
        ValueError: there is no axis after the batch.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} must be float32 or float64, got {x.dtype}: at half precision the small steps of a solve are "
            "rounded away; keep states in float32 and run the net alone under torch.autocast"
        )
    if x.ndim < 2:
        raise ValueError(f"{name} must have shape (B, *), a batch axis and a data axis at least, got {tuple(x.shape)}")


@dataclass(frozen=True)
class Affine(Path):
    r"""Straight combination of the ends by a schedule.

    .. math:: x_t = α(t)\,x_1 + σ(t)\,x_0, \qquad \dot x_t = \dot α(t)\,x_1 + \dot σ(t)\,x_0

    The coefficients are computed in float64 and cast once: 1 − t taken from a time in low precision would be zero
    long before t is 1.

    Args:
        schedule: α and σ.
        gaussian_source: whether x0 ~ N(0, I); False for flows between two data sets.

    Reference:
        Lipman, Chen, Ben-Hamu, Nickel, Le, "Flow matching for generative modeling", 2023, section 4; Liu, Gong, Liu,
        2022, section 2.3.

    >>> from ndeflow.flows import Linear
    >>> sample = Affine(Linear()).sample(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor(0.25))
    >>> sample.x_t, sample.velocity
    (tensor([[0.2500, 0.2500]]), tensor([[1., 1.]]))
    """

    schedule: Schedule
    gaussian_source: bool = True

    def sample(self, x0: Tensor, x1: Tensor, t: Tensor, keys: Tensor | None = None) -> PathSample:
        """Combine the ends; `keys` are not needed."""
        check_state(x1, "x1")
        if x0.shape != x1.shape:
            raise ValueError(f"source and data must have one shape, got x0 {tuple(x0.shape)} and x1 {tuple(x1.shape)}")
        if x0.dtype != x1.dtype:
            raise TypeError(f"source and data must have one dtype, got x0 {x0.dtype} and x1 {x1.dtype}")
        t = t.to(torch.float64)
        coefficients = self.coefficients(t)
        alpha, sigma, d_alpha, d_sigma = (expand_time(c.to(x1.dtype), x1) for c in coefficients)
        return PathSample(t, alpha * x1 + sigma * x0, x0, x1, d_alpha * x1 + d_sigma * x0, None, coefficients)

    def prior(self, keys: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return σ(t_source)·x0 with x0 ~ N(0, I): what is left of the data at t_source is neglected."""
        if not self.gaussian_source:
            raise ValueError(f"{self} starts from data, not from a known law: hand the source samples to the sampler")
        sigma = self.coefficients(torch.tensor(self.interval[0], dtype=torch.float64)).sigma
        return sigma.to(dtype).to(keys.device) * normal(fold(keys, "source"), shape, dtype)
