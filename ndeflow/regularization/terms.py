"""What a regularizer of a solve is."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal, TypeAlias

from torch import Tensor

from ndeflow.diffeq import Equation, Integrator, Solution
from ndeflow.regularization.weights import Weight

Field: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""f(t, y) of a solve, args included."""


class Regularizer:
    """A term that is added to a loss, times its weight.

    Args:
        weight: ≥ 0, or how it changes in the course of training.

    Raises:
        ValueError: a negative weight.
    """

    def __init__(self, weight: float | Weight) -> None:
        if not isinstance(weight, Weight) and not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight={weight} of {type(self).__name__} must be finite and not negative")
        self.weight = weight

    def weight_at(self, step: int) -> float:
        """Return the weight at an optimizer step."""
        return self.weight.at(step) if isinstance(self.weight, Weight) else self.weight


class SolveRegularizer(Regularizer):
    """Judges a solve that was made, by its steps or by its trajectory.

    Attributes:
        needs: what the solve has to keep: "steps" (`record=True`) or "dense".
    """

    needs: ClassVar[Literal["steps", "dense"]]

    @abstractmethod
    def check(self, integrator: Integrator) -> None:
        """Refuse an integrator that cannot give what is needed; a ValueError names some that can."""

    @abstractmethod
    def __call__(self, integrator: Integrator, eq: Equation, solution: Solution, keys: Tensor) -> Tensor:
        """Return the raw term, a scalar.

        Args:
            integrator: that solved.
            eq: what was solved.
            solution: the solve, with what `needs` says.
            keys: one per sample, int64 (B,).
        """


class DynamicsRegularizer(Regularizer):
    """Integrates something along the trajectory: it becomes one more entry of the state, outside of the error norm."""

    @abstractmethod
    def integrand(self, f: Field, t: Tensor, y: Tensor, value: Tensor, keys: Tensor) -> Tensor:
        """Return the rate at which the term grows, (B,).

        Args:
            f: the field.
            t: time, () or (B,), in the state's dtype.
            y: state, (B, *).
            value: f(t, y), already evaluated.
            keys: one per sample, the same throughout a solve: a probe drawn anew would make the field random.
        """
