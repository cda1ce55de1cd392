"""Global regularizers: what the solver found out about itself, over all accepted steps."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from ndeflow.diffeq import Equation, Integrator, Solution
from ndeflow.diffeq.controllers import Adaptive
from ndeflow.regularization.terms import SolveRegularizer
from ndeflow.regularization.weights import Weight
from ndeflow.tensors import rms

Reduce = Literal["sum", "mean", "max"]


def _reduced(values: Tensor, accepted: Tensor, reduce: Reduce) -> Tensor:
    """One number per sample or for the batch of values (n, …) over accepted steps."""
    if reduce == "max":
        return values.masked_fill(~accepted, 0.0).amax(0)
    total = values.masked_fill(~accepted, 0.0).sum(0)
    return total if reduce == "sum" else total / accepted.sum(0).clamp(min=1)


def _check_reduce(reduce: str) -> None:
    """Refuse another reduction."""
    if reduce not in ("sum", "mean", "max"):
        raise ValueError(f"reduce={reduce!r} must be 'sum', 'mean' or 'max' over the accepted steps")


def _over_batch(integrator: Integrator, per_sample: Tensor) -> Tensor:
    """Estimates (n, B) of steps that all samples share as one number per step, by the norm that the controller uses."""
    return rms(per_sample) if integrator.stepping == "shared" else per_sample


class ErrorEstimate(SolveRegularizer):
    r"""The local errors that the solver estimated, over accepted steps.

    .. math:: R = \sum_j E_j^p\, |h_j|

    with E the error norm scaled by the tolerances (over the batch where the samples share their steps, else of each
    sample, averaged over the batch), h the step sizes, which are data, and p the `power`. Scaled errors are
    proportional to 1/tolerance and, under control, near a set point that depends on the controller: a weight means
    something together with both.

    Args:
        weight: ≥ 0, or a schedule.
        reduce: over the steps; "sum" estimates an integral.
        power: p, 1 or 2.
        scaled: False takes the root mean square of the errors themselves.

    Raises:
        ValueError: a value out of its range.

    Reference:
        Pal, Ma, Shah, Rackauckas, "Opening the blackbox: accelerating neural differential equations by regularizing
        internal solver heuristics", ICML 2021, equations of section 3. Their released code averages over the steps.
    """

    needs: ClassVar[Literal["steps", "dense"]] = "steps"

    def __init__(
        self, weight: float | Weight, reduce: Reduce = "sum", power: Literal[1, 2] = 1, scaled: bool = True
    ) -> None:
        super().__init__(weight)
        _check_reduce(reduce)
        if power not in (1, 2):
            raise ValueError(f"power={power} must be 1 or 2")
        self.reduce: Reduce = reduce
        self.power, self.scaled = power, scaled

    def check(self, integrator: Integrator) -> None:
        """Refuse a solver without an embedded formula, and scaling without tolerances."""
        refuse_without_error(integrator, "ErrorEstimate", self.scaled)

    def __call__(self, integrator: Integrator, eq: Equation, solution: Solution, keys: Tensor) -> Tensor:
        """Return R."""
        steps = solution.steps
        assert steps is not None
        errors = steps.error if self.scaled else steps.raw_error
        assert errors is not None
        e, h, made = _over_batch(integrator, errors), steps.dt.abs(), steps.accepted
        if integrator.stepping == "shared":
            h, made = h[:, 0], made[:, 0]
        return _reduced(e**self.power * h.to(e.dtype), made, self.reduce).mean()


class Stiffness(SolveRegularizer):
    r"""The stiffness that the solver estimated, over accepted steps.

    .. math:: R = \max_j S_j, \qquad S_j = \hat\rho_j / s

    with ρ̂ the dominant |eigenvalue| and s the stability size of the solver, by the root mean square over the batch
    where the samples share their steps.

    Args:
        weight: ≥ 0, or a schedule.
        reduce: over the steps.

    Raises:
        ValueError: a value out of its range.

    Reference:
        Pal, Ma, Shah, Rackauckas, ICML 2021, section 3.
    """

    needs: ClassVar[Literal["steps", "dense"]] = "steps"

    def __init__(self, weight: float | Weight, reduce: Reduce = "max") -> None:
        super().__init__(weight)
        _check_reduce(reduce)
        self.reduce: Reduce = reduce

    def check(self, integrator: Integrator) -> None:
        """Refuse a solver without an estimate."""
        refuse_without_stiffness(integrator, "Stiffness")

    def __call__(self, integrator: Integrator, eq: Equation, solution: Solution, keys: Tensor) -> Tensor:
        """Return R."""
        steps = solution.steps
        assert steps is not None
        assert steps.stiffness is not None
        made = steps.accepted[:, 0] if integrator.stepping == "shared" else steps.accepted
        return _reduced(_over_batch(integrator, steps.stiffness), made, self.reduce).mean()


def refuse_without_error(integrator: Integrator, name: str, scaled: bool) -> None:
    """Refuse an integrator whose steps estimate no error."""
    solver = type(integrator.solver).__name__
    if integrator.solver.error_order is None:
        raise ValueError(
            f"{name} needs a solver that estimates its errors, {solver} has no embedded formula: use Heun, Bosh3, "
            "Dopri5, Tsit5 or Dopri8"
        )
    if scaled and not isinstance(integrator.controller, Adaptive):
        raise ValueError(
            f"{name} scales errors by tolerances, {type(integrator.controller).__name__} has none: use PID(rtol, "
            "atol), or scaled=False"
        )


def refuse_without_stiffness(integrator: Integrator, name: str) -> None:
    """Refuse an integrator whose steps estimate no stiffness."""
    if getattr(getattr(integrator.solver, "tableau", None), "twins", None) is None:
        raise ValueError(
            f"{name} needs a solver with two stages at the same time, {type(integrator.solver).__name__} has none: "
            "use RK4, Dopri5, Tsit5 or Dopri8"
        )
