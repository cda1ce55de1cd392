"""Gradients by making the steps again, segment by segment, from stored states."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ndeflow.diffeq.controllers import Planned
from ndeflow.diffeq.failures import blame, explain
from ndeflow.diffeq.gradients import Backprop, Gradient, find_steps, needs_gradients
from ndeflow.diffeq.loop import Collector, Cursor, Mark, assemble, plan, run, scripted
from ndeflow.diffeq.ownership import ambient, detached, inspect, parameters
from ndeflow.diffeq.problem import Problem
from ndeflow.diffeq.script import Reel, Script, Sheet, pick, plan_each
from ndeflow.diffeq.solution import Solution
from ndeflow.diffeq.solvers.base import State


@dataclass(frozen=True)
class Checkpointed(Gradient):
    r"""The gradient of `Backprop` from little memory: store some states, and make the steps between them again.

    Backward, each segment of m steps is made again under autograd's eyes from the state stored at its start, and
    differentiated; the accepted steps are replayed, not searched. With n steps, |y| bytes of state and G bytes of
    autograd's graph per step the memory is n|y|/m + mG, least for

    .. math:: m = \sqrt{n\,|y| / G}

    The time is that of `Backprop` and one more forward solve (two in per-sample adaptive stepping). Second derivatives
    replay the whole solve as one segment, with the memory of `Backprop`. The field must be deterministic, and own what
    it depends on: parameters, and per-sample `args`.

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
        tape: _Tape = (_SharedTape if problem.shared else _EachTape)(problem, self.segment, graph)
        args = problem.eq.args
        ys, error, raw, stiffness = cast(
            tuple[Tensor, ...], _Replay.apply(tape, problem.y0, args, *parameters(problem.eq))
        )
        solution = tape.solution
        steps = solution.steps and solution.steps._replace(error=error, raw_error=raw, stiffness=stiffness)
        return solution._replace(ys=ys, steps=steps)


class Segment(NamedTuple):
    """A part of a solve made again.

    Attributes:
        values: outputs and recorded estimates of its steps.
        cotangents: what the loss gives to them.
        y: state at its end, of the samples that go on.
        state: the solver's.
    """

    values: list[Tensor]
    cotangents: list[Tensor]
    y: Tensor
    state: State


class _Tape(ABC):
    """A solve, with stored states from which its parts can be made again.

    Attributes:
        problem: what was solved, without gradients.
        solution: its solution.
        stored: state and solver's state before step j.
        steps: number of steps.
    """

    def __init__(self, problem: Problem, segment: int | None, graph: int) -> None:
        self.problem, self.segment, self.graph = problem._replace(y0=problem.y0.detach()), segment, graph
        self.within = ambient(problem.y0)
        self.stored: dict[int, tuple[Tensor, State]] = {}
        self.steps = 0
        with torch.no_grad():
            self.solution = self.record()

    @abstractmethod
    def record(self) -> Solution:
        """Solve, and store states."""

    @abstractmethod
    def replay(self, problem: Problem, first: int, last: int, y: Tensor, state: State, grads: Sequence) -> Segment:
        """Make steps first … last − 1 again."""

    def length(self, steps: int) -> int:
        """The best segment of a solve of so many steps."""
        if self.segment is not None:
            return self.segment
        state = 2 * self.problem.y0.numel() * self.problem.y0.element_size()
        return max(1, round(math.sqrt(steps * state / max(1, self.graph))))

    def count(self, evaluations: Tensor | int) -> None:
        """Add to the field evaluations of the backward pass."""
        self.solution.stats.nfe_backward.add_(evaluations)


class _SharedTape(_Tape):
    """The same steps for all samples."""

    script: list[Mark]
    outputs: list[int]

    def record(self) -> Solution:
        """Solve, and store a state every m steps; if their number is not known before, m grows with it."""
        problem = self.problem
        controller = problem.controller
        spacing = self.length(len(plan(problem, controller))) if isinstance(controller, Planned) else self.segment or 1
        self.outputs = [1]
        self.stored[0] = (problem.y0, None)

        def watch(cursor: Cursor, read: Collector) -> None:
            nonlocal spacing
            done = len(cursor.script)
            self.outputs.append(read.index)
            if done % spacing == 0:
                self.stored[done] = (cursor.y, cursor.state)
            if self.length(done) >= 2 * spacing:
                spacing *= 2
                self.stored = {j: kept for j, kept in self.stored.items() if j % spacing == 0}

        cursor, read, breakdown = run(problem, watch)
        if breakdown is not None and problem.on_failure == "raise":
            raise explain(problem, [blame(problem, cursor, breakdown)], len(problem.y0)) from None
        self.script, self.steps = cursor.script, len(cursor.script)
        self.stored.pop(self.steps, None)
        solution = assemble(problem, cursor, read)
        solution.stats.nfe_backward.add_(1)
        return solution

    def replay(self, problem: Problem, first: int, last: int, y: Tensor, state: State, grads: Sequence) -> Segment:
        """Make the steps again, and pair what they give with its cotangents."""
        cursor, read = Cursor(problem, y, state), Collector(problem._replace(dense=False), self.outputs[first])
        for stride in scripted(cursor, self.script[first:last]):
            read.take(cursor, stride)
        if last in self.stored and self.stored[last][1] is not None and cursor.state is None:
            cursor.prepare(torch.full((), self.script[last - 1].t1, dtype=torch.float64, device=y.device))
        self.count(cursor.nfe)
        values, cotangents = [], []
        for i, value in enumerate(read.ys, start=self.outputs[first]):
            values.append(value)
            cotangents.append(grads[0][:, i])
        for j, row in enumerate(read.rows, start=first):
            for value, grad in zip(row, grads[1:], strict=True):
                if value is not None and grad is not None:
                    values.append(value)
                    cotangents.append(grad[j])
        return Segment(values, cotangents, cursor.y, cursor.state)


class _EachTape(_Tape):
    """Steps of their own for each sample."""

    script: Script

    def record(self) -> Solution:
        """Find the steps; states are stored where the steps are made in the order of the script."""
        problem, controller = self.problem, self.problem.controller
        if isinstance(controller, Planned):
            self.script = plan_each(problem, controller)
            sheet, nfe = self._store()
            solution = sheet.solution(torch.zeros_like(nfe), nfe)
        else:
            outcome = find_steps(problem)
            self.script = outcome.script
            solution = outcome.sheet.solution(outcome.rejected, outcome.nfe)
        self.steps = len(self.script.live)
        solution.stats.nfe_backward.add_(1)
        return solution

    def _store(self) -> tuple[Sheet, Tensor]:
        """Make all steps, storing a state every m of them."""
        reel, sheet = Reel(self.problem, self.script), Sheet(self.problem)
        steps = len(self.script.live)
        spacing = self.length(steps)
        self.stored[0] = (reel.y, None)
        for j, (eq, rows, stride, t1) in enumerate(reel.run(0, steps), start=1):
            sheet.take(eq, rows, stride, t1)
            if j % spacing == 0 and j < steps:
                some = slice(self.script.live[j])
                self.stored[j] = (reel.y[some], pick(reel.state, some))
        return sheet, reel.nfe

    def replay(self, problem: Problem, first: int, last: int, y: Tensor, state: State, grads: Sequence) -> Segment:
        """Make the steps again, and pair what they give with its cotangents."""
        reel = Reel(problem, self.script)
        sheet = Sheet(problem._replace(dense=False))
        sheet.skip(self.script, first)
        reel.y, reel.state = y, state
        for eq, rows, stride, t1 in reel.run(first, last):
            sheet.take(eq, rows, stride, t1)
        self.count(reel.nfe + sheet.nfe)
        values = [value for _, _, value in sheet.ys]
        cotangents = [grads[0][rows, index] for rows, index, _ in sheet.ys]
        for number, rows, row in sheet.steps:
            for value, grad in zip(row[2:], grads[1:], strict=True):
                if value is not None and grad is not None:
                    values.append(value)
                    cotangents.append(grad[number, rows])
        going = slice(self.script.live[last]) if last < self.steps else slice(0)
        return Segment(values, cotangents, reel.y[going], pick(reel.state, going))


class _Replay(torch.autograd.Function):
    """A solve as one node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, tape: _Tape, y0: Tensor, args: Tensor | None, *params: Tensor) -> tuple[Tensor | None, ...]:
        """Return the outputs and the recorded estimates of a solve that was made."""
        ctx.tape, ctx.has_args = tape, args is not None
        ctx.save_for_backward(y0, *([] if args is None else [args]), *params)
        ctx.set_materialize_grads(False)
        steps = tape.solution.steps
        return tape.solution.ys, *((None,) * 3 if steps is None else (steps.error, steps.raw_error, steps.stiffness))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Differentiate the segments from the last to the first, or all as one if that shall be differentiated."""
        tape, (y0, *rest) = ctx.tape, ctx.saved_tensors
        args, params = (rest[0], rest[1:]) if ctx.has_args else (None, rest)
        ys = torch.zeros_like(tape.solution.ys) if grads[0] is None else grads[0]
        with tape.within():
            if torch.is_grad_enabled():
                found = _whole(tape, y0, args, params, (ys, *grads[1:]))
            else:
                found = _by_segments(tape, args, params, (ys, *grads[1:]))
        return None, *(found if args is not None else (found[0], None, *found[1:]))


def _whole(
    tape: _Tape, y0: Tensor, args: Tensor | None, params: Sequence[Tensor], grads: Sequence
) -> list[Tensor | None]:
    """Gradients with a graph of their own: starts of segments that were detached would lose second derivatives."""
    eq = tape.problem.eq if args is None else tape.problem.eq.with_args(args)
    problem = tape.problem._replace(eq=eq, y0=y0)
    order = tape.script.order if isinstance(tape, _EachTape) else slice(None)
    made = tape.replay(problem, 0, tape.steps, y0[order], None, grads)
    inputs = [y0, *([] if args is None else [args]), *params]
    found = _grad(made.values, inputs, made.cotangents, create_graph=True)
    return [grads[0][:, 0] if found[0] is None else found[0] + grads[0][:, 0], *found[1:]]


def _by_segments(tape: _Tape, args: Tensor | None, params: Sequence[Tensor], grads: Sequence) -> list[Tensor | None]:
    """Gradients, segment by segment."""
    if isinstance(tape, _EachTape) and not tape.stored:
        with torch.no_grad():
            _, nfe = tape._store()
        tape.count(nfe)
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
        outputs = _flat((made.y, made.state)) if carried else []
        found = _grad([*made.values, *outputs], [*flat, *shared_inputs], [*made.cotangents, *carried])
        carried = [torch.zeros_like(x) if g is None else g for x, g in zip(flat, found, strict=False)]
        totals = [
            b if a is None else a if b is None else a + b for a, b in zip(totals, found[len(flat) :], strict=True)
        ]
    start = grads[0][:, 0].clone()
    if carried:
        order = tape.script.order if isinstance(tape, _EachTape) else slice(None)
        start[order] += carried[0]
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
    values: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], create_graph: bool = False
) -> list[Tensor | None]:
    """Gradients of those values that have any; None where an input has no part."""
    pairs = [(v, c) for v, c in zip(values, cotangents, strict=True) if v.requires_grad]
    wanted = [x for x in inputs if x.requires_grad]
    if not pairs or not wanted:
        return [None] * len(inputs)
    outputs, seeds = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, seeds, create_graph=create_graph, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in inputs]
