"""Whether a gradient can be trusted: a method against backpropagation in float64 and against differences."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ndeflow.diffeq.controllers import PID
from ndeflow.diffeq.equations import Equation
from ndeflow.diffeq.gradients import Backprop
from ndeflow.diffeq.integrator import Integrator
from ndeflow.diffeq.solution import Solution
from ndeflow.randomness import fold, normal

Loss = Callable[[Solution], Tensor]
_STEP = 1e-5  # of the differences: their own error is its square, and rounding over it


class GradientCheck(NamedTuple):
    """How good a gradient is.

    Attributes:
        method: name of the gradient method.
        error: ‖g − g₆₄‖ / ‖g₆₄‖ over y0, args and parameters, with g₆₄ by `Backprop` in float64 through the same kind
            of steps.
        slope_error: difference between the slopes of the loss along a random direction by g and by finite differences
            of a far more accurate solve in float64, over the slope's size.
        allowed: what `error` may be: 100 rtol for adaptive steps, 0.01 for planned ones.
        nfe: field evaluations of the solve, mean over samples.
        nfe_backward: of the backward pass.
    """

    method: str
    error: float
    slope_error: float
    allowed: float
    nfe: float
    nfe_backward: float

    @property
    def good(self) -> bool:
        """Whether the gradient is as accurate as the solve."""
        return self.error <= self.allowed


def check_gradient(
    integrator: Integrator,
    eq: Equation,
    y0: Tensor,
    ts: Tensor | Sequence[float],
    loss: Loss,
    mask: Tensor | None = None,
) -> GradientCheck:
    """Compare the gradient of an integrator with one that is beyond doubt, on one batch.

    Args:
        integrator: whose gradient method is judged, with its tolerances and in the dtype of y0.
        eq: the equation; a copy of it is made in float64.
        y0: states, (B, *).
        ts: output times, as for the integrator.
        loss: maps a solution to a scalar.
        mask: as for the integrator.

    Returns:
        The comparison. Its cost is that of a dozen solves.

    >>> from ndeflow.diffeq import ODE, PID, Checkpointed, Tsit5
    >>> integrator = Integrator(Tsit5(), PID(1e-3, 1e-5), Checkpointed())
    >>> eq = ODE(lambda t, y, a: a * y.cos(), args=torch.ones(4, 2))
    >>> check_gradient(integrator, eq, torch.zeros(4, 2), [0.0, 1.0], lambda s: s.ys[:, -1].sum()).good
    True
    """
    solution, gradients = _gradients(integrator, eq, y0, ts, loss, mask)
    double = _double(eq)
    y64 = y0.detach().to(torch.complex128 if y0.is_complex() else torch.float64)
    _, exact = _gradients(replace(integrator, gradient=Backprop()), double, y64, ts, loss, mask)
    difference, size = (_norm(x) for x in ([a - b for a, b in zip(gradients, exact, strict=True)], exact))
    direction = [
        normal(fold("direction", i, torch.zeros((), dtype=torch.int64)), tuple(g.shape), torch.float64).to(g.device)
        for i, g in enumerate(exact)
    ]
    slope = sum(float((g.conj() * d).real.sum()) for g, d in zip(gradients, direction, strict=True))
    measured = _difference(_finer(integrator), double, y64, ts, loss, mask, direction)
    controller = integrator.controller
    return GradientCheck(
        method=type(integrator.gradient).__name__,
        error=difference / max(size, 1e-300),
        slope_error=abs(slope - measured) / max(abs(measured), 1e-300),
        allowed=max(100 * controller.rtol if isinstance(controller, PID) else 0.01, 1e3 * torch.finfo(y0.dtype).eps),
        nfe=float(solution.stats.nfe.double().mean()),
        nfe_backward=float(solution.stats.nfe_backward.double().mean()),
    )


def _inputs(eq: Equation, y0: Tensor) -> list[Tensor]:
    """What gradients are compared of."""
    args = eq.args
    owned = [] if args is None or not args.is_floating_point() else [args]
    return [y0, *owned, *(p for p in eq.parameters() if p.requires_grad)]


@torch.enable_grad()
def _gradients(
    integrator: Integrator, eq: Equation, y0: Tensor, ts: Tensor | Sequence[float], loss: Loss, mask: Tensor | None
) -> tuple[Solution, list[Tensor]]:
    """Solve and differentiate; gradients in float64."""
    y0, args = y0.detach().requires_grad_(), eq.args
    if args is not None:
        eq = eq.with_args(args.detach().requires_grad_(args.is_floating_point()))
    solution = integrator(eq, y0, ts, mask=mask)
    inputs = _inputs(eq, y0)
    found = torch.autograd.grad(loss(solution), inputs, allow_unused=True, materialize_grads=True)
    return solution, [g.to(torch.complex128 if g.is_complex() else torch.float64) for g in found]


def _double(eq: Equation) -> Equation:
    """A copy of an equation in float64."""
    args = eq.args
    twin = copy.deepcopy(eq.with_args(None)).double()
    return twin if args is None else twin.with_args(args.detach().double() if args.is_floating_point() else args)


def _finer(integrator: Integrator) -> Integrator:
    """The same with tolerances a million times smaller; planned steps stay, theirs being the loss that is meant."""
    controller = integrator.controller
    if not isinstance(controller, PID):
        return integrator
    rtol, atol = (max(x * 1e-6, 1e-12) for x in (controller.rtol, controller.atol))
    return replace(integrator, controller=replace(controller, rtol=rtol, atol=atol), max_steps=10**6)


@torch.no_grad()
def _difference(
    integrator: Integrator,
    eq: Equation,
    y0: Tensor,
    ts: Tensor | Sequence[float],
    loss: Loss,
    mask: Tensor | None,
    direction: Sequence[Tensor],
) -> float:
    """The slope of the loss along a direction, by central differences."""
    args, values = eq.args, []
    for sign in (_STEP, -_STEP):
        moved = eq if args is None or not args.is_floating_point() else eq.with_args(args + sign * direction[1])
        parameters = [p for p in eq.parameters() if p.requires_grad]
        steps = [sign * d for d in direction[len(direction) - len(parameters) :]]
        for p, step in zip(parameters, steps, strict=True):
            p += step
        values.append(float(loss(integrator(moved, y0 + sign * direction[0], ts, mask=mask))))
        for p, step in zip(parameters, steps, strict=True):
            p -= step
    return (values[0] - values[1]) / (2 * _STEP)


def _norm(tensors: Sequence[Tensor]) -> float:
    """The Euclidean norm of all entries."""
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(x) for x in tensors])))
