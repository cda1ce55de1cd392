"""Gradients by making the steps again, segment by segment, from stored states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from ndeflow.diffeq.gradients import Backprop, Gradient, needs_gradients
from ndeflow.diffeq.ownership import check_owned, detached, inspect, parameters
from ndeflow.diffeq.problem import Problem
from ndeflow.diffeq.solution import Solution
from ndeflow.diffeq.tapes import EachTape, SharedTape, Tape


@dataclass(frozen=True)
class Checkpointed(Gradient):
    r"""The gradient of `Backprop` from little memory: store some states, and make the steps between them again.

    Backward, each segment of m steps is made again under autograd's eyes from the state stored at its start, and
    differentiated; the accepted steps are replayed, not searched. With n steps, |y| bytes of state and G bytes of
    autograd's graph per step the memory is n|y|/m + mG, least for

    .. math:: m = \sqrt{n\,|y| / G}

    The time is that of `Backprop` and one more forward solve (two in per-sample adaptive stepping). Second derivatives
    replay the whole solve as one segment, with the memory of `Backprop`. The field must be deterministic, and own what
    it depends on: parameters, and per-sample `args`. What a solve's backward pass would get wrong, it refuses.

    Args:
        segment: m ≥ 1, or None for the above, G being measured on one field evaluation.

    Raises:
        ValueError: `segment` below 1.
    """

    segment: int | None = None

    def __post_init__(self) -> None:
        if self.segment is not None and self.segment < 1:
            raise ValueError(f"segment={self.segment} must be at least 1 step, or None to choose it from memory")

    def solve(self, problem: Problem) -> Solution:
        """Solve without gradients, and hand autograd one function that makes the steps again."""
        if not needs_gradients(problem):
            return Backprop().solve(problem)
        graph = inspect(problem, "Checkpointed") * (problem.solver.evaluations + 1)
        tape = (SharedTape if problem.shared else EachTape)(problem, self.segment, graph)
        solution = tape.solve()
        made = _Replay.apply(tape, solution, problem.y0, problem.eq.args, *parameters(problem.eq))
        ys, error, raw, stiffness, *coefficients = cast(tuple[Tensor, ...], made)
        steps, dense = solution.steps, solution.dense
        return solution._replace(
            ys=ys,
            steps=None if steps is None else steps._replace(error=error, raw_error=raw, stiffness=stiffness),
            dense=None if dense is None else replace(dense, coefficients=coefficients),
        )


class _Replay(torch.autograd.Function):
    """A solve as one node of autograd's graph."""

    @staticmethod
    def forward(
        ctx: Any, tape: Tape, solution: Solution, y0: Tensor, args: Tensor | None, *params: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the outputs, recorded estimates and polynomials of a solve that was made."""
        ctx.tape, ctx.has_args, ctx.number = tape, args is not None, len(params)
        frozen = [p for p in tape.problem.eq.parameters() if not p.requires_grad]  # saved: they must not change either
        ctx.save_for_backward(y0, *([] if args is None else [args]), *params, *frozen)
        ctx.set_materialize_grads(False)
        steps, dense = solution.steps, solution.dense
        estimates = (None,) * 3 if steps is None else (steps.error, steps.raw_error, steps.stiffness)
        return solution.ys, *estimates, *(() if dense is None else dense.coefficients)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Differentiate the segments from the last to the first, or all as one if that shall be differentiated."""
        tape, (y0, *rest) = ctx.tape, ctx.saved_tensors
        args = rest.pop(0) if ctx.has_args else None
        params = rest[: ctx.number]
        check_owned(tape.problem.eq, params)
        if grads[0] is None:
            grads = (y0.new_zeros(len(y0), tape.problem.ts.shape[-1], *y0.shape[1:]), *grads[1:])
        with tape.within():
            if torch.is_grad_enabled():
                found = _whole(tape, y0, args, params, grads)
            else:
                found = _by_segments(tape, args, params, grads)
        return None, None, *(found if ctx.has_args else (found[0], None, *found[1:]))


def _whole(
    tape: Tape, y0: Tensor, args: Tensor | None, params: Sequence[Tensor], grads: Sequence
) -> list[Tensor | None]:
    """Gradients with a graph of their own: starts of segments that were detached would lose second derivatives."""
    eq = tape.problem.eq if args is None else tape.problem.eq.with_args(args)
    made = tape.replay(tape.problem._replace(eq=eq, y0=y0), 0, tape.steps, y0[tape.order], None, grads)
    found = _grad(made.pairs, [y0, *([] if args is None else [args]), *params], create_graph=True)
    return [grads[0][:, 0] if found[0] is None else found[0] + grads[0][:, 0], *found[1:]]


def _by_segments(tape: Tape, args: Tensor | None, params: Sequence[Tensor], grads: Sequence) -> list[Tensor | None]:
    """Gradients, segment by segment."""
    tape.prepare()
    eq = detached(tape.problem.eq if args is None else tape.problem.eq.with_args(args))
    problem = tape.problem._replace(eq=eq)
    shared_inputs = [*([] if args is None else [eq.args]), *params]
    totals: list[Tensor | None] = [None] * len(shared_inputs)
    carried: list[Tensor] = []
    ends = [*list(tape.stored)[1:], tape.steps]
    for first, last in reversed(list(zip(tape.stored, ends, strict=True))):
        y, state = _leafs(tape.stored[first])
        flat = _flat((y, state))
        with torch.enable_grad():
            made = tape.replay(problem, first, last, y, state, grads)
        outputs = zip(_flat((made.y, made.state)), carried, strict=True) if carried else ()
        found = _grad([*made.pairs, *outputs], [*flat, *shared_inputs])
        carried = [torch.zeros_like(x) if g is None else g for x, g in zip(flat, found, strict=False)]
        totals = [
            b if a is None else a if b is None else a + b for a, b in zip(totals, found[len(flat) :], strict=True)
        ]
    start = grads[0][:, 0].clone()
    if carried:
        start[tape.order] += carried[0]
    return [start, *totals]


def _flat(nested: Any) -> list[Tensor]:
    """The tensors in nested tuples."""
    if nested is None:
        return []
    return [nested] if isinstance(nested, Tensor) else [x for part in nested for x in _flat(part)]


def _leafs(nested: Any) -> Any:
    """The same tensors, detached and requiring gradients."""
    if nested is None or isinstance(nested, Tensor):
        return nested if nested is None else nested.detach().requires_grad_()
    return tuple(_leafs(part) for part in nested)


def _grad(
    pairs: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor], create_graph: bool = False
) -> list[Tensor | None]:
    """Gradients of those values that have any; None where an input has no part."""
    pairs = [(value, grad) for value, grad in pairs if value.requires_grad]
    wanted = [x for x in inputs if x.requires_grad]
    if not pairs or not wanted:
        return [None] * len(inputs)
    outputs, seeds = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, seeds, create_graph=create_graph, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in inputs]
