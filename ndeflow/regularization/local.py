"""Local regularizers: one step of the solver from a random point of the trajectory."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from ndeflow.diffeq import Equation, Integrator, Solution
from ndeflow.diffeq.controllers import Adaptive
from ndeflow.diffeq.solvers.base import Step
from ndeflow.randomness import fold, uniform
from ndeflow.regularization.estimates import refuse_without_error, refuse_without_stiffness
from ndeflow.regularization.terms import SolveRegularizer
from ndeflow.regularization.weights import Weight
from ndeflow.tensors import rms

Sampling = Literal["unbiased", "biased"]


class _Local(SolveRegularizer):
    r"""A step at a random time τ, from the detached state of the trajectory, with the solver's automatic first step.

    Gradients reach the field only through the stages of this one step, hence under every gradient method.
    """

    needs: ClassVar[Literal["steps", "dense"]] = "dense"

    def __init__(self, weight: float | Weight, sampling: Sampling = "unbiased") -> None:
        super().__init__(weight)
        if sampling not in ("unbiased", "biased"):
            raise ValueError(f"sampling={sampling!r} must be 'unbiased' (τ uniform) or 'biased' (τ a step's start)")
        self.sampling: Sampling = sampling

    def _step(
        self, integrator: Integrator, eq: Equation, solution: Solution, keys: Tensor
    ) -> tuple[Tensor, Tensor, Step]:
        """The size of the step, the state before it, and the step."""
        dense = solution.dense
        assert dense is not None
        tau = self._time(integrator, solution, keys)
        state = solution.at(tau.unsqueeze(1))[:, 0].detach()
        end = dense.span[1]
        shared = integrator.stepping == "shared"
        t, span = (x[0] if shared else x for x in (tau, end - tau))
        solver, controller = integrator.solver, integrator.controller
        start = solver.init(eq, t, state)
        if isinstance(controller, Adaptive):
            size, _ = controller.init(eq, solver, t, span, state, start)
            dt = torch.as_tensor(size, dtype=torch.float64, device=t.device).copysign(span)
        else:
            at = (dense.t0 <= tau).sum(0).clamp(min=1) - 1
            sizes = (dense.t1 - dense.t0).gather(0, at.unsqueeze(0))[0]
            dt = sizes[0] if shared else sizes
        return dt, state, solver.step(eq, t, dt, state, start)

    def _time(self, integrator: Integrator, solution: Solution, keys: Tensor) -> Tensor:
        """τ, float64 (B,): one for all samples where they share their steps."""
        dense = solution.dense
        assert dense is not None
        shared = integrator.stepping == "shared"
        drawn = uniform(fold(keys[:1] if shared else keys, "local", "tau"), dtype=torch.float64).expand(len(keys))
        if self.sampling == "unbiased":
            return dense.span[0] + drawn * (dense.span[1] - dense.span[0])
        count = (dense.t1 != dense.t0).sum(0)
        return dense.t0.gather(0, (drawn * count).long().unsqueeze(0))[0]


class LocalError(_Local):
    r"""The error of one step at a random time.

    .. math:: R = E_\tau\, |h_\tau|

    With `sampling="unbiased"`, τ uniform over the solve, its mean is proportional to the integral of the density of
    local errors; with "biased", τ is the start of a step that the solver made, more often where steps are small.

    Args:
        weight: ≥ 0, or a schedule.
        sampling: the law of τ.
        scaled: False takes the root mean square of the error itself.

    Raises:
        ValueError: a value out of its range.

    Reference:
        Pal, Edelman, Rackauckas, "Locally regularized neural differential equations: some black boxes were meant to
        remain closed!", ICML 2023, section 3.
    """

    def __init__(self, weight: float | Weight, sampling: Sampling = "unbiased", scaled: bool = True) -> None:
        super().__init__(weight, sampling)
        self.scaled = scaled

    def check(self, integrator: Integrator) -> None:
        """Refuse a solver without an embedded formula, and scaling without tolerances."""
        refuse_without_error(integrator, "LocalError", self.scaled)

    def __call__(self, integrator: Integrator, eq: Equation, solution: Solution, keys: Tensor) -> Tensor:
        """Return R, averaged over the batch."""
        dt, state, step = self._step(integrator, eq, solution, keys)
        assert step.error is not None
        e = integrator.controller.error(state, step) if self.scaled else rms(step.error)
        assert e is not None
        e = rms(e.unsqueeze(0)) if integrator.stepping == "shared" else e
        return (e * dt.abs().to(e.dtype)).mean()


class LocalStiffness(_Local):
    r"""The stiffness estimate of one step at a random time.

    .. math:: R = S_\tau

    Args:
        weight: ≥ 0, or a schedule.
        sampling: the law of τ: "unbiased" or "biased" as for `LocalError`.

    Reference:
        Pal, Edelman, Rackauckas, ICML 2023, section 3.
    """

    def check(self, integrator: Integrator) -> None:
        """Refuse a solver without an estimate."""
        refuse_without_stiffness(integrator, "LocalStiffness")

    def __call__(self, integrator: Integrator, eq: Equation, solution: Solution, keys: Tensor) -> Tensor:
        """Return R, averaged over the batch."""
        dt, state, step = self._step(integrator, eq, solution, keys)
        stiffness = integrator.solver.stiffness(dt, state, step)
        assert stiffness is not None
        return rms(stiffness.unsqueeze(0)).mean() if integrator.stepping == "shared" else stiffness.mean()
