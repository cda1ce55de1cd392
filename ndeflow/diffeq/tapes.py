"""A solve on tape: stored states, and its steps made again from any of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ndeflow.diffeq.controllers import Planned
from ndeflow.diffeq.failures import blame, explain
from ndeflow.diffeq.gradients import find_steps
from ndeflow.diffeq.loop import Collector, Cursor, Mark, assemble, plan, run, scripted
from ndeflow.diffeq.ownership import ambient
from ndeflow.diffeq.problem import Problem
from ndeflow.diffeq.script import Reel, Script, Sheet, pick, plan_each
from ndeflow.diffeq.solution import Solution
from ndeflow.diffeq.solvers.base import State


class Segment(NamedTuple):
    """A part of a solve made again.

    Attributes:
        pairs: outputs, recorded estimates and polynomials of its steps, each with what the loss gives to it.
        y: state at its end, of the samples that go on.
        state: the solver's.
    """

    pairs: list[tuple[Tensor, Tensor]]
    y: Tensor
    state: State


class Tape(ABC):
    """A solve, with stored states from which its parts can be made again.

    Args:
        problem: what to solve, without gradients.
        segment: steps between stored states, or None for the number that needs least memory.
        graph: bytes that autograd keeps for one step.

    Attributes:
        within: enters the autocast state of the solve.
        stored: state and solver's state before step j.
        steps: number of steps.
    """

    slack: ClassVar[float]

    def __init__(self, problem: Problem, segment: int | None, graph: int) -> None:
        self.problem, self.segment, self.graph = problem._replace(y0=problem.y0.detach()), segment, graph
        self.within = ambient(problem.y0)
        self.stored: dict[int, tuple[Tensor, State]] = {}
        self.steps = 0

    @torch.no_grad()
    def solve(self) -> Solution:
        """Solve and store; the solution is not kept, since what it becomes part of keeps the tape."""
        solution = self.record()
        self._nfe = solution.stats.nfe_backward.add_(1)
        self._end = solution.ys[:, -1].clone()
        return solution

    @property
    def order(self) -> Tensor | slice:
        """The samples in the order in which states are stored."""
        return slice(None)

    @abstractmethod
    def record(self) -> Solution:
        """Solve, and store states."""

    @abstractmethod
    def prepare(self) -> None:
        """Store states if that was not done in the solve."""

    @abstractmethod
    def replay(self, problem: Problem, first: int, last: int, y: Tensor, state: State, grads: Sequence) -> Segment:
        """Make steps first … last − 1 again.

        Args:
            problem: with what gradients shall reach.
            first: the first step.
            last: behind the last step.
            y: state before the first step, of the samples that make it.
            state: the solver's.
            grads: gradients of all outputs, of error, raw error and stiffness, and of the coefficients, or None.
        """

    def length(self, steps: int) -> int:
        """The best segment of a solve of so many steps."""
        if self.segment is not None:
            return self.segment
        state = 2 * self.problem.y0.numel() * self.problem.y0.element_size()
        return max(1, round(math.sqrt(steps * state / max(1, self.graph))))

    def count(self, evaluations: Tensor | int) -> None:
        """Add to the field evaluations of the backward pass."""
        self._nfe.add_(evaluations)

    def compare(self, rows: Tensor | slice, made: Tensor) -> None:
        """Refuse a field whose steps, made again, end elsewhere.

        Raises:
            RuntimeError: they do, by more than rounding.
        """
        end = self._end[rows]
        size = torch.maximum(self._end.abs().max(), self.problem.y0.abs().max())
        off = (made.detach() - end).abs()
        if bool((off > self.slack * size).any()):
            raise RuntimeError(
                "the steps of the solve end elsewhere when they are made again for the gradient, by "
                f"{float(off.max()):.1e}, states being up to {float(size):.1e}: the field is random, or something that "
                "it reads was exchanged since; let it be the same until the backward pass, or use Backprop"
            )


def _pairs(values: Sequence[Tensor | None], grads: Sequence, at: object) -> list[tuple[Tensor, Tensor]]:
    """Values with their gradients, which lie at some place of `grads`."""
    both = zip(values, grads, strict=True)
    return [(value, grad[at]) for value, grad in both if value is not None and grad is not None]


class SharedTape(Tape):
    """The same steps for all samples."""

    slack = 1e-4
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
        return assemble(problem, cursor, read)

    def prepare(self) -> None:
        """Do nothing: states were stored."""

    def replay(self, problem: Problem, first: int, last: int, y: Tensor, state: State, grads: Sequence) -> Segment:
        """Make the steps again, and pair what they give with its gradients."""
        cursor, read = Cursor(problem, y, state), Collector(problem, self.outputs[first])
        for stride in scripted(cursor, self.script[first:last]):
            read.take(cursor, stride)
        self.count(cursor.nfe)
        pairs = []
        for i, value in enumerate(read.ys, start=self.outputs[first]):
            pairs.append((value, grads[0][:, i]))
        if read.index == grads[0].shape[1] > self.outputs[first]:
            self.compare(slice(None), read.ys[-1])
        for j, row in enumerate(read.rows, start=first):
            pairs += _pairs(row, grads[1:4], j)
        for j, coefficients in enumerate(read.polynomials, start=first):
            pairs += _pairs(coefficients, grads[4:], j)
        return Segment(pairs, cursor.y, cursor.state)


class EachTape(Tape):
    """Steps of their own for each sample."""

    slack = 1e-2  # other samples beside it change how a matrix product rounds
    script: Script

    @property
    def order(self) -> Tensor:
        """The samples with the most steps first."""
        return self.script.order

    def record(self) -> Solution:
        """Find the steps; states are stored where the steps are made in the order of the script."""
        problem, controller = self.problem, self.problem.controller
        if isinstance(controller, Planned):
            self.script = plan_each(problem, controller)
            self.steps = len(self.script.live)
            sheet = Sheet(problem)
            nfe = self._store(sheet)
            return sheet.solution(torch.zeros_like(nfe), nfe)
        outcome = find_steps(problem)
        self.script, self.steps = outcome.script, len(outcome.script.live)
        return outcome.sheet.solution(outcome.rejected, outcome.nfe)

    @torch.no_grad()
    def prepare(self) -> None:
        """Make all steps once more, if they were found by trying."""
        if not self.stored:
            self.count(self._store(None))

    def _store(self, sheet: Sheet | None) -> Tensor:
        """Make all steps, storing a state every m of them; return the field evaluations."""
        reel, spacing = Reel(self.problem, self.script), self.length(self.steps)
        self.stored[0] = (reel.y, None)
        for j, (eq, rows, stride, t1) in enumerate(reel.run(0, self.steps), start=1):
            if sheet is not None:
                sheet.take(eq, rows, stride, t1)
            if j % spacing == 0 and j < self.steps:
                some = slice(self.script.live[j])
                self.stored[j] = (reel.y[some], pick(reel.state, some))
        return reel.nfe

    def replay(self, problem: Problem, first: int, last: int, y: Tensor, state: State, grads: Sequence) -> Segment:
        """Make the steps again, and pair what they give with its gradients."""
        reel = Reel(problem, self.script)
        sheet = Sheet(problem._replace(dense=any(grad is not None for grad in grads[4:])))
        sheet.skip(self.script, first)
        reel.y, reel.state = y, state
        for eq, rows, stride, t1 in reel.run(first, last):
            sheet.take(eq, rows, stride, t1)
        self.count(reel.nfe + sheet.nfe)
        pairs = []
        for rows, index, value in sheet.ys:
            pairs.append((value, grads[0][rows, index]))
            ends = index == grads[0].shape[1] - 1
            self.compare(rows[ends], value[ends])
        for number, rows, row in sheet.steps:
            pairs += _pairs(row[2:], grads[1:4], (number, rows))
        for number, rows, row in sheet.polynomials:
            pairs += _pairs(row[2:], grads[4:], (number, rows))
        going = slice(self.script.live[last]) if last < self.steps else slice(0)
        return Segment(pairs, reel.y[going], pick(reel.state, going))
