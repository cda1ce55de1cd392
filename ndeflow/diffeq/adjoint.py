"""Gradients by solving the adjoint equation backward in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ndeflow.diffeq.controllers import Adaptive, Controller, Planned
from ndeflow.diffeq.equations import Equation, real_dtype
from ndeflow.diffeq.failures import SolverError, blame, explain
from ndeflow.diffeq.gradients import Backprop, Gradient, needs_gradients
from ndeflow.diffeq.loop import Cursor, strides
from ndeflow.diffeq.ownership import ambient, detached, inspect, parameters
from ndeflow.diffeq.per_sample import EachSolve
from ndeflow.diffeq.problem import Breakdown, Problem, Stride
from ndeflow.diffeq.script import Reel, choose, plan_each
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
        inspect(problem, "Adjoint")
        with torch.no_grad():
            solution = Backprop().solve(problem._replace(y0=problem.y0.detach()))
        solution.stats.nfe_backward.add_(1)
        controller = (self.controller or problem.controller).check(backward, real_dtype(problem.y0), None)
        controller = controller.doubled(tuple(problem.y0.shape[1:]))
        task = _Task(problem, backward, controller, solution, ambient(problem.y0))
        ys = _SolveBackward.apply(task, problem.y0, problem.eq.args, *parameters(problem.eq))
        return solution._replace(ys=cast(Tensor, ys))


class _Task(NamedTuple):
    """What the backward pass needs: the problem, how to solve backward, the solution, the autocast of the solve."""

    problem: Problem
    solver: Solver
    controller: Controller
    solution: Solution
    within: Any


class _Covector(NamedTuple):
    """The field of the adjoint equation.

    Attributes:
        f: f(t, y), with its graph.
        pulled: aᵀ ∂f/∂y.
        a: the covector, with the shape of y.
    """

    f: Tensor
    pulled: Tensor
    a: Tensor


class _AdjointEquation(Equation):
    """y' = f and a' = −aᵀ ∂f/∂y for states [y, a] of shape (B, 2n).

    Args:
        eq: the equation, its args detached.
        shape: of one sample's y.
    """

    def __init__(self, eq: Equation, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.eq, self.shape, self.args, self.jumps = eq, shape, eq.args, eq.jumps

    def field(self, t: Tensor, y: Tensor) -> _Covector:
        """Evaluate f once, and pull a back through it."""
        half = y.shape[1] // 2
        state, a = (part.reshape(len(y), *self.shape) for part in (y[:, :half].detach(), y[:, half:]))
        with torch.enable_grad():
            state.requires_grad_()
            f = self.eq.field(t, state)
        if not isinstance(f, Tensor):
            raise TypeError(
                f"Adjoint needs an equation whose field is a tensor, got {type(f).__name__}: use Checkpointed"
            )
        if not f.requires_grad:
            return _Covector(f, torch.zeros_like(a), a)
        (pulled,) = torch.autograd.grad(f, state, a, retain_graph=True, allow_unused=True, materialize_grads=True)
        return _Covector(f, pulled, a)

    def increment(self, t0: Tensor, t1: Tensor) -> Any:
        """The increment of the equation."""
        return self.eq.increment(t0, t1)

    def apply_field(self, f: _Covector, du: Any) -> Tensor:
        """Products of both halves."""
        halves = (self.eq.apply_field(f.f.detach(), du), self.eq.apply_field(f.pulled, du).neg())
        return torch.cat([half.flatten(1) for half in halves], dim=1)

    def with_args(self, args: Tensor | None) -> _AdjointEquation:
        """The same for other args."""
        return _AdjointEquation(self.eq.with_args(args), self.shape)

    @torch.enable_grad()
    def take(self, rows: Tensor) -> Equation:
        """The same for some samples; gradients go on to reach the args of all."""
        return _AdjointEquation(self.eq.take(rows), self.shape)


class _SolveBackward(torch.autograd.Function):
    """A solve as one node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, task: _Task, y0: Tensor, args: Tensor | None, *params: Tensor) -> Tensor:  # noqa: ARG004
        """Return the outputs of a solve that was made."""
        ctx.task, ctx.has_args = task, args is not None
        ctx.save_for_backward(*([] if args is None else [args]), *params)
        return task.solution.ys

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Solve backward."""
        if torch.is_grad_enabled():
            raise RuntimeError("Adjoint has no second derivatives (create_graph=True): use Checkpointed or Backprop")
        task, saved = ctx.task, list(ctx.saved_tensors)
        args = saved.pop(0) if ctx.has_args else None
        with task.within():
            found = _Backward(task, args, saved).run(grads[0])
        return None, *(found if ctx.has_args else (found[0], None, *found[1:]))


class _Backward:
    """The backward solve of one problem, for one cotangent."""

    def __init__(self, task: _Task, args: Tensor | None, params: Sequence[Tensor]) -> None:
        problem = task.problem
        self.task = task
        self.eq = detached(problem.eq if args is None else problem.eq.with_args(args))
        self.inputs = [*([] if args is None else [cast(Tensor, self.eq.args)]), *params]
        self.wanted = [x for x in self.inputs if x.requires_grad]
        self.sums = [torch.zeros_like(x) for x in self.wanted]
        self.weights = task.solver.weights or ()
        self.shape = tuple(problem.y0.shape[1:])
        self.back = _reversed(problem.ts.detach())
        # An output within a jump of the field, two numbers of the state's dtype wide, is reached with its near side.
        self.width = 4 * torch.finfo(real_dtype(problem.y0)).eps * float(problem.ts.detach().abs().max())

    def run(self, grad: Tensor) -> list[Tensor | None]:
        """Return the gradients of y0, args and parameters."""
        if not bool(torch.isfinite(grad).all()):  # the loss is not a number, nor is its gradient
            return [torch.full_like(grad[:, 0], torch.nan), *self._given([x * torch.nan for x in self.sums])]
        rows = torch.arange(len(grad), device=grad.device).unsqueeze(-1)
        self.grad, self.ys = (x[rows, self.back] for x in (grad, self.task.solution.ys))
        start = self._joined(self.ys[:, 0], self.grad[:, 0])
        ts = self.task.problem.ts.detach()
        backward = self.task.problem._replace(
            eq=_AdjointEquation(self.eq, self.shape),
            solver=self.task.solver,
            controller=self.task.controller,
            y0=start,
            ts=ts[self.back[0]] if self.task.problem.shared else ts.gather(1, self.back),
            land=True,
            record=False,
            dense=False,
        )
        try:
            a = self._shared(backward) if self.task.problem.shared else self._each(backward)
        except SolverError as error:
            if self.task.problem.on_failure == "raise":
                raise SolverError(f"backward in time (Adjoint): {error}") from None
            return [torch.full_like(grad[:, 0], torch.nan), *self._given([x * torch.nan for x in self.sums])]
        return [a, *self._given(self.sums)]

    def _given(self, found: Sequence[Tensor]) -> list[Tensor | None]:
        """One gradient per input, None for those that want none."""
        each = iter(found)
        return [next(each) if x.requires_grad else None for x in self.inputs]

    def _joined(self, y: Tensor, a: Tensor) -> Tensor:
        """A state of the adjoint equation."""
        return torch.cat([y.flatten(1), a.flatten(1)], dim=1)

    def _landed(self, z: Tensor, rows: Tensor, index: Tensor) -> Tensor:
        """The state after an output: y as it was stored, and its cotangent added to a."""
        half = z.shape[1] // 2
        return self._joined(self.ys[rows, index], z[:, half:] + self.grad[rows, index].flatten(1))

    def _add(self, stride: Stride, made: Tensor | None) -> None:
        """Add the share of a step, of the samples that made it, to the gradients of args and parameters."""
        if not self.wanted:
            return
        outputs, seeds = [], []
        for i, weight in self.weights:
            covector = stride.step.fields[i]
            if covector.f.requires_grad:
                seed = self.eq.apply_field(covector.a, self.eq.increment(stride.t0, stride.t0 + stride.dt))
                seed = seed * -weight
                outputs.append(covector.f)
                seeds.append(seed if made is None else choose(made, seed, torch.zeros_like(seed)))
        if outputs:
            # The graph is not freed: the selection of args by rows is part of many of them.
            found = torch.autograd.grad(outputs, self.wanted, seeds, retain_graph=True, allow_unused=True)
            self.sums = [s if g is None else s + g for s, g in zip(self.sums, found, strict=True)]

    def _shared(self, backward: Problem) -> Tensor:
        """Solve with the same steps for all samples."""
        cursor, index = Cursor(backward, backward.y0), 1
        times, rows = backward.ts.tolist(), torch.arange(len(backward.y0), device=backward.y0.device)
        sign = 1.0 if times[-1] > times[0] else -1.0
        try:
            for stride in strides(cursor):
                self._add(stride, None)
                while index < len(times) and sign * times[index] <= sign * cursor.script[-1].t1 + self.width:
                    cursor.y, cursor.state = self._landed(cursor.y, rows, torch.full_like(rows, index)), None
                    index += 1
        except Breakdown as breakdown:
            raise explain(backward, [blame(backward, cursor, breakdown)], len(rows)) from None
        self.task.solution.stats.nfe_backward.add_(cursor.nfe)
        return cursor.y[:, cursor.y.shape[1] // 2 :].reshape(len(rows), *self.shape)

    def _each(self, backward: Problem) -> Tensor:
        """Solve with steps of their own for each sample."""
        self.index = torch.ones(len(backward.y0), dtype=torch.int64, device=backward.y0.device)
        self.sign = (backward.ts[:, -1] - backward.ts[:, 0]).sign()
        if isinstance(backward.controller, Planned):
            end, nfe = self._planned(backward, backward.controller)
        else:
            assert isinstance(backward.controller, Adaptive)

            def visit(rows: Tensor, stride: Stride, accept: Tensor, t: Tensor, z: Tensor) -> Tensor:
                self._add(stride, accept)
                return self._land_each(backward, rows, accept, t, z)

            outcome = EachSolve(backward, backward.controller, visit).run()
            if outcome.failures:
                raise explain(backward, outcome.failures, len(outcome.failures))
            end, nfe = outcome.y, outcome.nfe
        self.task.solution.stats.nfe_backward.add_(nfe)
        return end[:, end.shape[1] // 2 :].reshape(len(end), *self.shape)

    def _planned(self, backward: Problem, controller: Planned) -> tuple[Tensor, Tensor]:
        """The same where the steps are known: the state at the end, and field evaluations."""
        script = plan_each(backward, controller)
        reel, end = Reel(backward, script), backward.y0.clone()
        for _, rows, stride, t1 in reel.run(0, len(script.live)):
            self._add(stride, None)
            reel.y, reel.state = self._land_each(backward, rows, torch.ones_like(rows).bool(), t1, reel.y), None
            end[rows] = reel.y
        return end, reel.nfe

    def _land_each(self, backward: Problem, rows: Tensor, accept: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """The states of samples that have made a step to t, some of them to an output."""
        last, sign = backward.ts.shape[1] - 1, self.sign[rows]
        while True:
            index = self.index[rows]
            due = accept & (index <= last) & (sign * backward.ts[rows, index.clamp(max=last)] <= sign * t + self.width)
            if not bool(due.any()):
                return z
            z = choose(due, self._landed(z, rows, index.clamp(max=last)), z)
            self.index[rows] += due


def _reversed(ts: Tensor) -> Tensor:
    """Places of the output times in backward order, (1 or B, T); those that only fill up a row stay at its end."""
    rows = ts.reshape(-1, ts.shape[-1])
    count = 1 + (rows.diff(dim=1) != 0).sum(1, keepdim=True)
    return (count - 1 - torch.arange(rows.shape[1], device=ts.device)).clamp(min=0)
