"""How much a regularizer weighs in the course of training."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass


class Weight(ABC):
    """A weight that changes with the optimizer step, from `start` to `end` within `steps`, and stays there.

    Attributes:
        steps: optimizer steps until the weight is `end`.
    """

    steps: int

    @abstractmethod
    def at(self, step: int) -> float:
        """Return the weight at an optimizer step ≥ 0."""


def _check(weight: Weight, start: float, end: float, every: int) -> None:
    """Refuse what is no schedule."""
    if weight.steps < 1 or not 1 <= every <= weight.steps:
        raise ValueError(
            f"steps={weight.steps} and every={every}: a weight changes over at least one optimizer step, every "
            "1 … steps"
        )
    if not (math.isfinite(start) and math.isfinite(end)) or start < 0 or end < 0:
        raise ValueError(f"a weight goes from {start} to {end}: weights are finite and not negative")


def _progress(step: int, steps: int, every: int) -> float:
    """The share of the schedule done, in stairs of `every` steps."""
    return min(1.0, (step // every) * every / steps)


@dataclass(frozen=True)
class ExponentialWeight(Weight):
    r"""A weight that falls (or grows) by the same factor at each step.

    .. math:: \lambda_k = \lambda_0 \left(\lambda_1 / \lambda_0\right)^{k/n}

    Args:
        start: λ₀ > 0.
        end: λ₁ > 0.
        steps: n ≥ 1, usually `${trainer.max_steps}`.
        every: change it only after so many steps; the steps of an epoch for a weight per epoch.

    Raises:
        ValueError: a value out of its range.

    >>> ExponentialWeight(start=1.0, end=0.01, steps=100).at(50)
    0.1
    """

    start: float
    end: float
    steps: int
    every: int = 1

    def __post_init__(self) -> None:
        _check(self, self.start, self.end, self.every)
        if not (self.start > 0 and self.end > 0):
            raise ValueError(f"start={self.start} and end={self.end} of an ExponentialWeight must be positive")

    def at(self, step: int) -> float:
        """Return the weight at a step."""
        return self.start * (self.end / self.start) ** _progress(step, self.steps, self.every)


@dataclass(frozen=True)
class CosineWeight(Weight):
    r"""A weight along half a cosine.

    .. math:: \lambda_k = \lambda_1 + \tfrac12 (\lambda_0 - \lambda_1)(1 + \cos \pi k/n)

    Args:
        start: λ₀ ≥ 0.
        end: λ₁ ≥ 0.
        steps: n ≥ 1, usually `${trainer.max_steps}`.
        every: change it only after so many steps; the steps of an epoch for a weight per epoch.

    Raises:
        ValueError: a value out of its range.
    """

    start: float
    end: float
    steps: int
    every: int = 1

    def __post_init__(self) -> None:
        _check(self, self.start, self.end, self.every)

    def at(self, step: int) -> float:
        """Return the weight at a step."""
        turn = math.cos(math.pi * _progress(step, self.steps, self.every))
        return self.end + 0.5 * (self.start - self.end) * (1.0 + turn)
