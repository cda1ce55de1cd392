"""Gradients by solving the adjoint equation backward in time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ndeflow.diffeq.backsolve import Backsolve
from ndeflow.diffeq.controllers import Controller
from ndeflow.diffeq.equations import real_dtype
from ndeflow.diffeq.gradients import Backprop, Gradient, needs_gradients
from ndeflow.diffeq.ownership import check_owned, inspect, parameters
from ndeflow.diffeq.problem import Problem
from ndeflow.diffeq.solution import Solution
from ndeflow.diffeq.solvers.base import Solver


@dataclass(frozen=True)
class Adjoint(Gradient):
    r"""The gradient of the exact solution, by the adjoint equation, from the memory of one step.

    .. math:: \dot y = f(t, y), \quad \dot a = -\Bigl(\frac{\partial f}{\partial y}\Bigr)^{\!\top} a, \quad
              a(t_i^-) = a(t_i^+) + \frac{\partial L}{\partial y(t_i)}, \qquad
              \frac{dL}{d\theta} = \int_{t_0}^{t_1} \Bigl(\frac{\partial f}{\partial \theta}\Bigr)^{\!\top} a\, dt

    solved backward from the last output, y being put back to its stored value at each output. The integral feeds back
    into nothing: it is summed over the stages of the accepted steps by the weights of the solver and takes no part in
    the error norm, so that the number of parameters changes neither step sizes nor the cost of a rejected step.

    The result is not the gradient of the discrete solution: it is as accurate as both solves, and useless where the
    equation is unstable backward in time (`compare_gradients` shows it). Second derivatives are refused. The field
    must own what it depends on: parameters, and per-sample `args`.

    Args:
        solver: for the backward solve; None takes that of the forward solve.
        controller: for the backward solve; None takes that of the forward solve. Its norm, if it has one of its own,
            measures y and a alike.

    Reference:
        Chen, Rubanova, Bettencourt, Duvenaud, "Neural ordinary differential equations", 2018, section 2; for the
        integral outside of the norm Kidger, Chen, Lyons, "Hey, that's not an ODE", 2021.
    """

    solver: Solver | None = None
    controller: Controller | None = None

    def solve(self, problem: Problem) -> Solution:
        """Solve without gradients, and hand autograd one function that solves backward."""
        if not needs_gradients(problem):
            return Backprop().solve(problem)
        backward = self.solver or problem.solver
        if backward.weights is None:
            raise ValueError(
                f"Adjoint cannot integrate gradients with {type(backward).__name__}, which is no weighted sum of "
                "stages: give Adjoint(solver=Tsit5())"
            )
        if problem.record:
            raise ValueError(
                "record=True under Adjoint would give estimates without gradients: regularize one step at a random "
                "time (local), use Checkpointed or Backprop, or call under torch.no_grad()"
            )
        if problem.dense:
            raise ValueError(
                "dense=True under Adjoint would give states without gradients: name their times in ts, use "
                "Checkpointed or Backprop, or call under torch.no_grad()"
            )
        inspect(problem, "Adjoint")
        with torch.no_grad():
            solution = Backprop().solve(problem._replace(y0=problem.y0.detach()))
        packing = getattr(problem.eq, "packing", None)
        controller = (self.controller or problem.controller).check(backward, real_dtype(problem.y0), packing)
        controller = controller.doubled(tuple(problem.y0.shape[1:]))
        nfe = solution.stats.nfe_backward
        task = Backsolve(problem._replace(solver=backward, controller=controller, land=True), nfe)
        ys = _SolveBackward.apply(task, (solution.ys,), problem.y0, problem.eq.args, *parameters(problem.eq))
        return solution._replace(ys=cast(Tensor, ys))


class _SolveBackward(torch.autograd.Function):
    """A solve as one node of autograd's graph."""

    @staticmethod
    def forward(
        ctx: Any,
        task: Backsolve,
        ys: tuple[Tensor],
        y0: Tensor,  # noqa: ARG004
        args: Tensor | None,
        *params: Tensor,
    ) -> Tensor:
        """Return the outputs of a solve that was made; in a tuple they are no input."""
        ctx.task, ctx.has_args, ctx.number = task, args is not None, len(params)
        frozen = [p for p in task.problem.eq.parameters() if not p.requires_grad]  # saved: they must not change either
        ctx.save_for_backward(*ys, *([] if args is None else [args]), *params, *frozen)
        return ys[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Solve backward."""
        if torch.is_grad_enabled():
            raise RuntimeError("Adjoint has no second derivatives (create_graph=True): use Checkpointed or Backprop")
        task, (ys, *rest) = ctx.task, ctx.saved_tensors
        args = rest.pop(0) if ctx.has_args else None
        params = rest[: ctx.number]
        check_owned(task.problem.eq, params)
        found = task.run(ys, grads[0], args, params)
        return None, None, *(found if ctx.has_args else (found[0], None, *found[1:]))
