"""What a solver is: a rule for one step, and facts about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, TypeAlias

from torch import Tensor

from ndeflow.diffeq.equations import Equation

State: TypeAlias = Any
"""What a solver carries from one step to the next beside y: None, a tensor, or a tuple of tensors."""


class Step(NamedTuple):
    """What a step knows about itself; everything is differentiable.

    Attributes:
        y1: state at the end of the step, shape (B, *).
        error: embedded estimate of the step's local error, shape (B, *), or None.
        stiffness: estimate of the field's dominant |eigenvalue| over the stability size, shape (B,),
            or None.
        state: what the next step needs beside y1.
        stages: products of field and increment, one (B, *) per field call, the first at the start.
    """

    y1: Tensor
    error: Tensor | None
    stiffness: Tensor | None
    state: State
    stages: tuple[Tensor, ...]


class Solver(ABC):
    """A rule for one step: a pure function of tensors, and facts about it.

    A step reads no value of a tensor and writes to none, so it compiles whole, runs per sample and
    never waits for a device. Subclasses are frozen dataclasses.

    Attributes:
        order: p, the global error of a smooth solution being O(Δt^p).
        error_order: order of the embedded formula that `Step.error` compares with, or None without one.
        evaluations: field calls of one step.
        stability_size: |z| of the largest real interval [−|z|, 0] on which the step is stable for
            y' = λy, z = λΔt.
    """

    order: ClassVar[float]
    error_order: ClassVar[float | None]
    evaluations: ClassVar[int]
    stability_size: ClassVar[float]

    @abstractmethod
    def init(self, eq: Equation, t0: Tensor, y0: Tensor) -> State:
        """Return the state that the first step at t0 takes."""

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
