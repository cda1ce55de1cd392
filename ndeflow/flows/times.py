"""Time samplers: at which times a model is trained."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ndeflow.randomness import fold, uniform

_GOLDEN = (math.sqrt(5) - 1) / 2
_TRIES = 64  # longer than any run of consecutive integers that all share a factor with a number below 10^10


def _stride(n: Tensor) -> Tensor:
    """The integer at or above 0.618 n that is coprime to n, int64 (), without waiting for the device."""
    first = (n.to(torch.float64) * _GOLDEN).round().to(torch.int64).clamp_(min=1)
    candidates = first + torch.arange(_TRIES, device=n.device)
    return candidates[(torch.gcd(candidates, n) == 1).int().argmax()]


@lru_cache(maxsize=64)
def _known_stride(n: int) -> int:
    """`_stride` of a number that the host knows, remembered."""
    return int(_stride(torch.tensor(n)))


def stratified(keys: Tensor, slots: Tensor, global_batch: int | Tensor) -> Tensor:
    r"""Draw one number of U(0, 1) per sample such that a whole batch covers the interval evenly.

    .. math:: p_i = \bigl((s\,i \bmod G) + U_i\bigr) / G, \qquad U_i ∼ U[0, 1)

    for the sample in slot i of the global batch of G, with a stride s ≈ 0.618 G coprime to G: each of G strata gets
    one sample, and neighboring slots, hence every rank's share, are spread over the interval.

    Args:
        keys: one per sample, int64 (B,).
        slots: places in the global batch, int64 (B,), in [0, G).
        global_batch: G, an int, or an int64 tensor () or (B,) of equal entries.

    Returns:
        float64 (B,). Over a batch in random order each number is uniform.

    Raises:
        ValueError: G is an int below 1.
    """
    if isinstance(global_batch, int) and global_batch < 1:
        raise ValueError(f"global_batch must be at least 1, got {global_batch}")
    n = torch.as_tensor(global_batch, dtype=torch.int64, device=slots.device).reshape(-1)[0]
    stride = _known_stride(int(n)) if n.device.type == "cpu" else _stride(n)
    stratum = (slots * stride).remainder(n)
    return (stratum + uniform(fold(keys, "time"), dtype=torch.float64)) / n


class TimeSampler(ABC):
    r"""A law of training times.

    A law is given on the unit interval, where 0 is the source and 1 the data, by its quantiles, and carried to the
    path's own time by :math:`t = t_{source} + u\,(t_{data} - t_{source})`. Draws are stratified over the global batch.
    """

    @abstractmethod
    def quantile(self, p: Tensor) -> Tensor:
        """Return the u below which a share p of the times lies, float64; p in [0, 1)."""

    @abstractmethod
    def unit_density(self, u: Tensor) -> Tensor:
        """Return the density at u in (0, 1), float64."""

    def __call__(
        self, keys: Tensor, slots: Tensor, global_batch: int | Tensor, interval: tuple[float, float]
    ) -> Tensor:
        """Draw one time per sample.

        Args:
            keys: one per sample, int64 (B,).
            slots: places in the global batch, int64 (B,).
            global_batch: size of the global batch, as an int or as an int64 tensor of equal entries.
            interval: (t_source, t_data), the ends of the law in the path's own time.

        Returns:
            float64 (B,).
        """
        source, data = interval
        return source + (data - source) * self.quantile(stratified(keys, slots, global_batch))

    def density(self, t: Tensor, interval: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        """Return the density of the drawn times at t, in the path's own time.

        Args:
            t: times inside the interval, any shape.
            interval: (t_source, t_data), as in the draw.

        Returns:
            float64, the shape of t.
        """
        source, data = interval
        u = (t.to(torch.float64) - source) / (data - source)
        return self.unit_density(u) / abs(data - source)


@dataclass(frozen=True)
class Uniform(TimeSampler):
    """Uniform times, the law of the first rectified flow."""

    def quantile(self, p: Tensor) -> Tensor:
        """Return p."""
        return p

    def unit_density(self, u: Tensor) -> Tensor:
        """Return 1."""
        return torch.ones_like(u)


@dataclass(frozen=True)
class LogitNormal(TimeSampler):
    r"""Logistic of a normal variable: u = sigmoid(mean + std·z), z ~ N(0, 1).

    Args:
        mean: of the logit; above 0 is nearer to the data. On the linear path EDM's log σ ~ N(−1.2, 1.2²) is mean 1.2,
            std 1.2.
        std: of the logit, > 0.

    Raises:
        ValueError: std is not positive.

    Reference:
        Esser et al., "Scaling rectified flow transformers for high-resolution image synthesis", 2024, section 3.1 (its
        time runs from data to noise: mean changes its sign).
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"LogitNormal needs std > 0, got {self.std}")

    def quantile(self, p: Tensor) -> Tensor:
        """Return sigmoid(mean + std·Φ⁻¹(p))."""
        return (self.mean + self.std * torch.special.ndtri(p)).sigmoid()

    def unit_density(self, u: Tensor) -> Tensor:
        """Return the normal density of logit(u), divided by u(1 − u)."""
        z = (u.logit() - self.mean) / self.std
        return (-0.5 * z.square()).exp() / (self.std * math.sqrt(2 * math.pi) * u * (1 - u))


@dataclass(frozen=True)
class UShape(TimeSampler):
    r"""More times at both ends, for reflow: density ∝ e^{au} + e^{a(1−u)}.

    .. math:: p(u) = \frac{a \cosh(a(u - ½))}{2 \sinh(a/2)}, \qquad u = ½ + \mathrm{asinh}((2p - 1)\sinh(a/2))/a

    Args:
        a: steepness, in (0, 1000]; at 4 the ends have 3.8 times the density of the middle.

    Raises:
        ValueError: a is out of range.

    Reference:
        Lee, Lin, Fanti, "Improving the training of rectified flows", 2024, section 4.1.
    """

    a: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.a <= 1000:
            raise ValueError(f"UShape needs 0 < a <= 1000, got {self.a}; for a = 0 use Uniform")

    def quantile(self, p: Tensor) -> Tensor:
        """Return ½ + asinh((2p − 1) sinh(a/2))/a."""
        return 0.5 + ((2 * p - 1) * math.sinh(self.a / 2)).asinh() / self.a

    def unit_density(self, u: Tensor) -> Tensor:
        """Return a cosh(a(u − ½))/(2 sinh(a/2))."""
        return self.a * (self.a * (u - 0.5)).cosh() / (2 * math.sinh(self.a / 2))


@dataclass(frozen=True)
class CosMap(TimeSampler):
    r"""Times for which the linear path passes noise levels as the cosine schedule does.

    .. math:: u = 1 - \frac{1}{\tan(πp/2) + 1}, \qquad p(u) = \frac{2}{π(1 - 2u + 2u^2)}

    Reference:
        Esser et al., 2024, section 3.1.
    """

    def quantile(self, p: Tensor) -> Tensor:
        """Return 1 − 1/(tan(πp/2) + 1)."""
        return 1 - 1 / ((p * (math.pi / 2)).tan() + 1)

    def unit_density(self, u: Tensor) -> Tensor:
        """Return 2/(π(1 − 2u + 2u²))."""
        return 2 / (math.pi * (1 - 2 * u + 2 * u.square()))


@dataclass(frozen=True)
class Shift(TimeSampler):
    r"""Uniform times moved towards the noise, for images of many pixels.

    .. math:: 1 - u = \frac{k(1 - p)}{1 + (k - 1)(1 - p)}, \qquad p(u) = \frac{k}{(1 + (k - 1)u)^2}

    that is, logit(u) lowered by log k.

    Args:
        k: > 0; 1 is uniform, above 1 is nearer to the source.

    Raises:
        ValueError: k is not positive.

    Reference:
        Esser et al., 2024, section 5.3.2, equation 23.
    """

    k: float

    def __post_init__(self) -> None:
        if not self.k > 0:
            raise ValueError(f"Shift needs k > 0, got {self.k}")

    def quantile(self, p: Tensor) -> Tensor:
        """Return p/(p + k(1 − p))."""
        return p / (p + self.k * (1 - p))

    def unit_density(self, u: Tensor) -> Tensor:
        """Return k/(1 + (k − 1)u)²."""
        return self.k / (1 + (self.k - 1) * u).square()
