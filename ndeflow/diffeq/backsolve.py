"""The adjoint equation, and its solve backward in time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ndeflow.diffeq.controllers import Adaptive, Planned
from ndeflow.diffeq.equations import Equation
from ndeflow.diffeq.failures import SolverError, blame, explain, finite_samples
from ndeflow.diffeq.loop import Cursor, strides
from ndeflow.diffeq.ownership import ambient, detached
from ndeflow.diffeq.per_sample import EachSolve
from ndeflow.diffeq.problem import Breakdown, Problem, Stride, legs
from ndeflow.diffeq.script import Reel, choose, plan_each


class _Covector(NamedTuple):
    """The field of the adjoint equation.

    Attributes:
        f: f(t, y), with its graph.
        pulled: aᵀ ∂f/∂y.
        a: the covector, with the shape of y.
        t: time, () or (b,).
        y: state.
    """

    f: Tensor
    pulled: Tensor
    a: Tensor
    t: Tensor
    y: Tensor


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
            return _Covector(f, torch.zeros_like(a), a, t, state)
        (pulled,) = torch.autograd.grad(f, state, a, retain_graph=True, allow_unused=True, materialize_grads=True)
        return _Covector(f, pulled, a, t, state)

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
    def take(self, rows: Tensor) -> _AdjointEquation:
        """The same for some samples; gradients go on to reach the args of all."""
        return _AdjointEquation(self.eq.take(rows), self.shape)


class Backsolve:
    """What is left of a solve for its backward pass.

    Args:
        problem: what was solved, with solver and controller of the backward solve.
        nfe: counts field evaluations of the backward pass, int64 (B,).
    """

    def __init__(self, problem: Problem, nfe: Tensor) -> None:
        self.problem = problem._replace(y0=problem.y0.detach(), ts=problem.ts.detach(), record=False, dense=False)
        self.nfe = nfe.add_(1)
        self.within = ambient(problem.y0)

    def run(self, ys: Tensor, grad: Tensor, args: Tensor | None, params: Sequence[Tensor]) -> list[Tensor | None]:
        """Solve backward.

        Args:
            ys: the outputs, (B, T, *).
            grad: gradients of them.
            args: of the equation.
            params: its trained parameters.

        Returns:
            Gradients of y0, args and parameters, None for what requires none; all NaN if `grad` is not finite.

        Raises:
            SolverError: the backward solve breaks down and `on_failure` is "raise".
        """
        problem = self.problem
        eq = detached(problem.eq if args is None else problem.eq.with_args(args))
        inputs = [*([] if args is None else [cast(Tensor, eq.args)]), *params]
        solve = _Backward(problem._replace(eq=eq), [x for x in inputs if x.requires_grad], self.nfe)
        found = None
        if bool(torch.isfinite(grad).all()):  # else the loss is not a number, nor is its gradient
            try:
                with self.within():
                    found = solve.run(ys, grad)
            except SolverError as error:
                if problem.on_failure == "raise":
                    raise SolverError(f"backward in time (Adjoint): {error}") from None
        if found is None:
            found = torch.full_like(ys[:, 0], torch.nan), [torch.full_like(x, torch.nan) for x in solve.wanted]
        each = iter(found[1])
        return [found[0], *(next(each) if x.requires_grad else None for x in inputs)]


class _Backward:
    """One backward solve."""

    def __init__(self, problem: Problem, wanted: Sequence[Tensor], nfe: Tensor) -> None:
        self.problem, self.eq, self.wanted, self.nfe = problem, problem.eq, wanted, nfe
        self.sums: list[Tensor | None] = [None] * len(wanted)
        self.weights = problem.solver.weights or ()
        self.shape = tuple(problem.y0.shape[1:])

    def run(self, ys: Tensor, grad: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Return the gradients of y0 and of what is wanted."""
        shared, ts, count = self.problem.shared, self.problem.ts, ys.shape[1]
        used = grad.flatten(2).ne(0).any(2)
        used = used.any(0, keepdim=True) if shared else used
        # It begins at the last output that the loss depends on: later ones may not even have been reached.
        self.last = (used * torch.arange(count, device=ts.device)).amax(1)
        if not bool(self.last.any()):
            return grad[:, 0], self.sums
        places = (self.last.unsqueeze(1) - torch.arange(int(self.last.max()) + 1, device=ts.device)).clamp(min=0)
        rows = torch.arange(len(ys), device=ts.device)
        self.scale = _scale(grad, shared)
        self.ys, self.grad = ys[rows.unsqueeze(1), places], (grad / self.scale)[rows.unsqueeze(1), places]
        start = self._joined(self.ys[:, 0], self.grad[:, 0])
        backward = self.problem._replace(
            eq=_AdjointEquation(self.eq, self.shape),
            y0=start,
            ts=ts[places[0]] if shared else ts.gather(1, places),
        )
        self.due = _due(backward)
        end = self._shared(backward, rows) if shared else self._each(backward)
        a = end[:, end.shape[1] // 2 :].reshape(len(end), *self.shape) * self.scale[:, 0]
        self._check(backward, a)
        return a, self.sums

    def _check(self, backward: Problem, a: Tensor) -> None:
        """Refuse what planned steps made non-finite; adaptive ones accept nothing such."""
        if isinstance(backward.controller, Adaptive) or self.problem.on_failure == "nan":
            return
        ok = finite_samples(a)
        if not bool(ok.all()):
            raise SolverError(
                f"{type(backward.solver).__name__}: the gradients of {int((~ok).sum())} of {len(ok)} samples, first "
                f"sample {int((~ok).long().argmax())}, are not finite: the adjoint equation is not stable for these "
                "steps; take smaller ones, Adjoint(controller=...), or use Checkpointed"
            )

    def _joined(self, y: Tensor, a: Tensor) -> Tensor:
        """A state of the adjoint equation."""
        return torch.cat([y.flatten(1), a.flatten(1)], dim=1)

    def _landed(self, z: Tensor, rows: Tensor, index: Tensor) -> Tensor:
        """The state after an output: y as it was stored, and its cotangent added to a."""
        half = z.shape[1] // 2
        return self._joined(self.ys[rows, index], z[:, half:] + self.grad[rows, index].flatten(1))

    def _add(self, stride: Stride, rows: Tensor, made: Tensor | None = None) -> None:
        """Add the share of a step, of the samples that made it, to the gradients of args and parameters."""
        if not self.wanted:
            return
        covectors = [(stride.step.fields[i], weight) for i, weight in self.weights]
        seeds = []
        for covector, weight in covectors:
            seed = self.eq.apply_field(covector.a, self.eq.increment(stride.t0, stride.t0 + stride.dt))
            seed = seed * self.scale[rows, 0] * -weight
            seeds.append(seed if made is None else choose(made, seed, torch.zeros_like(seed)))
        found = self._pull([covector.f for covector, _ in covectors], seeds)
        if made is not None and not bool(made.all()) and not _finite(found):
            # A sample that threw its step away may have seen infinities, and 0 · ∞ is not a number: leave it out.
            some = made.nonzero()[:, 0]
            with torch.enable_grad():
                eq = self.eq.take(rows[some])
                fields = [eq.field(covector.t[some], covector.y[some]) for covector, _ in covectors]
            self.nfe[rows[some]] += len(fields)
            found = self._pull(fields, [seed[some] for seed in seeds])
        pairs = zip(self.sums, found, strict=True)
        self.sums = [s if x is None else x if s is None else s + x for s, x in pairs]

    def _pull(self, fields: Sequence[Tensor], seeds: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Pull seeds back through fields to what is wanted; None where nothing comes."""
        pairs = [(field, seed) for field, seed in zip(fields, seeds, strict=True) if field.requires_grad]
        if not pairs:
            return [None] * len(self.wanted)
        outputs, given = zip(*pairs, strict=True)
        # The graph is not freed: the selection of args by rows is part of many of them.
        return torch.autograd.grad(outputs, self.wanted, given, retain_graph=True, allow_unused=True)

    def _shared(self, backward: Problem, rows: Tensor) -> Tensor:
        """Solve with the same steps for all samples."""
        cursor, index = Cursor(backward, backward.y0), 1
        due = self.due.tolist()
        sign = 1.0 if due[-1] > due[0] else -1.0
        try:
            for stride in strides(cursor):
                self._add(stride, rows)
                while index < len(due) and sign * due[index] <= sign * cursor.script[-1].t1:
                    cursor.y, cursor.state = self._landed(cursor.y, rows, torch.full_like(rows, index)), None
                    index += 1
        except Breakdown as breakdown:
            raise explain(backward, [blame(backward, cursor, breakdown)], len(rows)) from None
        self.nfe.add_(cursor.nfe)
        return cursor.y

    def _each(self, backward: Problem) -> Tensor:
        """Solve with steps of their own for each sample."""
        self.index = torch.ones_like(self.last)
        self.sign = (backward.ts[:, -1] - backward.ts[:, 0]).sign()
        if isinstance(backward.controller, Planned):
            return self._planned(backward, backward.controller)
        assert isinstance(backward.controller, Adaptive)

        def visit(rows: Tensor, stride: Stride, accept: Tensor, t: Tensor, z: Tensor) -> Tensor:
            self._add(stride, rows, accept)
            return self._land_each(rows, accept, t, z)

        outcome = EachSolve(backward, backward.controller, visit).run()
        if outcome.failures:
            raise explain(backward, outcome.failures, len(outcome.failures))
        self.nfe.add_(outcome.nfe)
        return outcome.y

    def _planned(self, backward: Problem, controller: Planned) -> Tensor:
        """The same where the steps are known."""
        script = plan_each(backward, controller)
        reel, end = Reel(backward, script), backward.y0.clone()
        for _, rows, stride, t1 in reel.run(0, len(script.live)):
            self._add(stride, rows)
            reel.y, reel.state = self._land_each(rows, torch.ones_like(rows).bool(), t1, reel.y), None
            end[rows] = reel.y
        self.nfe.add_(reel.nfe)
        return end

    def _land_each(self, rows: Tensor, accept: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """The states of samples that have made a step to t, some of them to an output."""
        last, sign = self.last[rows], self.sign[rows]
        while True:
            index = self.index[rows]
            at = torch.minimum(index, last)
            due = accept & (index <= last) & (sign * self.due[rows, at] <= sign * t)
            if not bool(due.any()):
                return z
            z = choose(due, self._landed(z, rows, at), z)
            self.index[rows] += due


def _scale(grad: Tensor, shared: bool) -> Tensor:
    """A power of two near the size of each sample's cotangents, (B, 1, …): how a loss averages must not show.

    Else an absolute tolerance would leave the gradient of a mean over many samples without any error control.
    """
    size = grad.abs().flatten(1).amax(1)
    size = (size.max().expand_as(size) if shared else size).clamp(min=torch.finfo(size.dtype).tiny)
    scale = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent - 1)
    return scale.reshape(-1, *(1,) * (grad.ndim - 1))


def _due(backward: Problem) -> Tensor:
    """When the outputs are reached: those within a jump of the field with its near side."""
    ts = backward.ts
    if not backward.eq.jumps:
        return ts
    spans, sign = legs(backward), (ts[..., -1:] - ts[..., :1]).sign()
    near, far, at = spans.t1[..., None, :-1], spans.t0[..., None, 1:], ts.unsqueeze(-1)
    sign = sign.unsqueeze(-1)
    within = (near != far) & (sign * near <= sign * at) & (sign * at <= sign * far)
    return torch.where(within.any(-1), (within * near).sum(-1), ts)


def _finite(tensors: Sequence[Tensor | None]) -> bool:
    """Whether all numbers are finite."""
    return all(x is None or bool(x.isfinite().all()) for x in tensors)
