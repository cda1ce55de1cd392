"""What a solver is: a rule for one step, and facts about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, TypeAlias

from torch import Tensor

from ndeflow.diffeq.equations import Equation, Field

State: TypeAlias = Any
"""What a solver carries from one step to the next beside y: a tensor, or nested tuples of tensors, each with the
batch axis first; or None, if the next step has to ask `Solver.init`."""


class Step(NamedTuple):
    """What a step knows about itself; everything is differentiable.

    Attributes:
        y1: state at the end of the step, shape (B, *).
        error: embedded estimate of the step's local error, shape (B, *), or None.
        state: what the next step needs beside y1, or None if it has to ask `Solver.init`.
        stages: products of field and increment, one (B, *) per stage, the first at the start.
        fields: the fields of these products, in the form that the equation gives them, one per stage.
    """

    y1: Tensor
    error: Tensor | None
    state: State
    stages: tuple[Tensor, ...]
    fields: tuple[Field, ...]


class Solver(ABC):
    """A rule for one step: a pure function of tensors, and facts about it.

    A step reads no value of a tensor and writes to none, so it compiles whole, runs per sample and
    never waits for a device. Subclasses are frozen dataclasses.

    Attributes:
        order: p, the global error of a smooth solution being O(Δt^p).
        error_order: order of the embedded formula that `Step.error` compares with, or None without one.
        evaluations: field calls of one step from a given state.
        stability_size: |z| of the largest real interval [−|z|, 0] on which the step is stable for
            y' = λy, z = λΔt.
        interpolation_order: q, the interpolant between exact ends of a step being in error by O(Δt^(q+1)).
        weights: how much of each stage's product is in y1 − y0, as (stage, weight), if y1 is such a sum: what
            `Adjoint` integrates the gradients of parameters with; else None.
    """

    order: ClassVar[float]
    error_order: ClassVar[float | None]
    evaluations: ClassVar[int]
    stability_size: ClassVar[float]
    interpolation_order: ClassVar[int]
    weights: ClassVar[tuple[tuple[int, float], ...] | None]

    @abstractmethod
    def init(self, eq: Equation, t0: Tensor, y0: Tensor) -> State:
        """Return the state with which a step can begin at t0, by one field call."""

    @abstractmethod
    def field_at_start(self, state: State) -> Field:
        """Return the field at the start of the next step, which every state contains."""

    @abstractmethod
    def step(self, eq: Equation, t0: Tensor, dt: Tensor, y0: Tensor, state: State) -> Step:
        """Make one step from t0 to t0 + dt.

        Args:
            eq: the equation.
            t0: start, float64, shape () (one time for the batch) or (B,) (one per sample).
            dt: signed step size, float64, of the shape of t0.
            y0: state at t0, shape (B, *), real or complex.
            state: `Step.state` of the step before, or what `init` returned.

        Returns:
            The state at t0 + dt and what the step knows about it.
        """

    @abstractmethod
    def finish(self, eq: Equation, t0: Tensor, dt: Tensor, y0: Tensor, step: Step) -> Step:
        """Return a step with all that its interpolant needs.

        That may cost one field call at the end of the step, which is then in `stages`, `fields` and `state`.
        """

    @abstractmethod
    def polynomial(self, step: Step) -> tuple[Tensor, ...]:
        r"""Return the interpolant of a finished step as coefficients c₁, c₂, …, each (B, *).

        .. math:: y(t_0 + \theta\,\Delta t) = y_0 + \textstyle\sum_j c_j \theta^j, \qquad \theta \in [0, 1]
        """

    @abstractmethod
    def stiffness(self, dt: Tensor, y0: Tensor, step: Step) -> Tensor | None:
        """Return the estimated largest |eigenvalue| of ∂f/∂y over `stability_size`, shape (B,), or None without one.

        |Δt| times it is above 1 where the step is too large for stability.
        """
