"""The stepping loop of shared stepping. It knows no gradients: autograd may or may not watch it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ndeflow.diffeq.controllers import Adaptive, Memory, Planned
from ndeflow.diffeq.problem import Breakdown, Problem, Stride, spans
from ndeflow.diffeq.solution import Dense, Solution, Stats, Steps
from ndeflow.diffeq.solvers.base import State, Step
from ndeflow.tensors import rms

ROUNDING = 4 * torch.finfo(torch.float64).eps
"""The smallest step, beside the time: less would not move it."""
NOTHING = 1e-30
"""The smallest step, beside the way to the next stop: near time 0 rounding sets no bound."""


class Mark(NamedTuple):
    """A step of a script: from t0 to t1, and whether it begins behind a jump of the field."""

    t0: float
    t1: float
    fresh: bool


class Cursor:
    """Where a solve stands, and what it has cost: the one thing that changes during a solve.

    Attributes:
        y: state.
        state: what the next step needs beside y, or None.
        script: the accepted steps.
        rejected: number of rejected steps.
        nfe: field evaluations.
        last: the last step tried.
    """

    def __init__(self, problem: Problem, y: Tensor, state: State = None) -> None:
        self.problem, self.y, self.state = problem, y, state
        self.script: list[Mark] = []
        self.rejected = self.nfe = 0
        self.last: Stride | None = None

    def prepare(self, t0: Tensor) -> State:
        """Return the solver's state, asking it for one where there is none."""
        if self.state is None:
            self.state = self.problem.solver.init(self.problem.eq, t0, self.y)
            self.nfe += 1
        return self.state

    def attempt(self, t0: Tensor, dt: Tensor) -> Stride:
        """Make a step without going it."""
        state = self.prepare(t0)
        step = self.problem.solver.step(self.problem.eq, t0, dt, self.y, state)
        self.nfe += self.problem.solver.evaluations
        self.last = Stride(t0, dt, self.y, state, step)
        return self.last

    def accept(self, stride: Stride, mark: Mark) -> Stride:
        """Go a step."""
        self.y, self.state = stride.step.y1, stride.step.state
        self.script.append(mark)
        return stride

    def finish(self, stride: Stride) -> Step:
        """Complete the last step for its interpolant."""
        t0, dt, y0, _, step = stride
        finished = self.problem.solver.finish(self.problem.eq, t0, dt, y0, step)
        self.nfe += len(finished.stages) - len(step.stages)
        self.state = finished.state
        return finished


def plan(problem: Problem, controller: Planned) -> list[Mark]:
    """Return the steps of a planned solve.

    Times are computed from the ends of their leg, never accumulated: accumulating makes an extra
    step of 1e-16 for every second number of steps.

    Raises:
        ValueError: there are more steps than the budget allows.
    """
    ways = spans(problem)
    resolution = problem.resolution * max(abs(ways[0][0]), abs(ways[-1][1]))
    counts = [controller.cuts(t0, t1, resolution) for t0, t1, _ in ways]
    if sum(counts) > problem.max_steps:
        raise ValueError(
            f"{controller} needs {sum(counts)} steps from t={ways[0][0]:g} to {ways[-1][1]:g} "
            f"({problem.ts.shape[-1]} output times), max_steps is {problem.max_steps}: take larger steps or fewer "
            "output times, or raise max_steps"
        )
    script = []
    for (t0, t1, fresh), n in zip(ways, counts, strict=True):
        times = [*(t0 + (t1 - t0) * (i / n) for i in range(n)), t1]
        script += [Mark(times[i], times[i + 1], fresh and i == 0) for i in range(n)]
    return script


def scripted(cursor: Cursor, script: Sequence[Mark]) -> Iterator[Stride]:
    """Make given steps, without waiting for the device."""
    times = torch.tensor([mark[:2] for mark in script], dtype=torch.float64).to(cursor.y.device)
    starts, sizes = times[:, 0].unbind(), (times[:, 1] - times[:, 0]).unbind()
    for mark, t0, dt in zip(script, starts, sizes, strict=True):
        if mark.fresh:
            cursor.state = None
        yield cursor.accept(cursor.attempt(t0, dt), mark)


def adaptive(cursor: Cursor, controller: Adaptive) -> Iterator[Stride]:
    """Make steps as large as the controller allows, and wait for the device once per attempt."""
    problem, dt, memory = cursor.problem, math.nan, Memory(1.0, 1.0, False)
    ways = spans(problem)
    for t, end, fresh in ways:
        if fresh:
            cursor.state = None
        if not cursor.script and math.isnan(dt):
            dt = _first_step(cursor, controller, t, ways[-1][1])
        while t != end:
            t, dt, memory, stride = _accepted(cursor, controller, (t, end, fresh), dt, memory)
            fresh = False
            yield stride


def _first_step(cursor: Cursor, controller: Adaptive, t0: float, end: float) -> float:
    """The first step of a solve; a state that is not finite shows here."""
    problem = cursor.problem
    start = _time(t0, cursor.y)
    state = cursor.prepare(start)
    dt, evaluations = controller.init(
        problem.eq, problem.solver, start, _time(end - t0, cursor.y), cursor.y.detach(), state
    )
    cursor.nfe += evaluations
    return dt


def _accepted(
    cursor: Cursor, controller: Adaptive, leg: tuple[float, float, bool], dt: float, memory: Memory
) -> tuple[float, float, Memory, Stride]:
    """Try steps from the start of a leg until one is accepted; never beyond its end."""
    problem, (t, end, fresh) = cursor.problem, leg
    least = max(controller.dt_min or 0.0, ROUNDING * abs(t), NOTHING * abs(end - t))
    while True:
        last = dt * (1 + 1e-10) >= abs(end - t)  # else a step of rounding error might be left
        t1 = end if last else t + math.copysign(dt, end - t)
        if len(cursor.script) + cursor.rejected >= problem.max_steps:
            raise Breakdown("budget", t, t1 - t)
        stride = cursor.attempt(_time(t, cursor.y), _time(t1 - t, cursor.y))
        norm = float(controller.measure(stride.y0, stride.step, shared=True))
        verdict = controller.judge(abs(t1 - t), norm, memory, problem.solver)
        memory = verdict.memory
        if verdict.accept:
            cursor.accept(stride, Mark(t, t1, fresh))
            return t1, max(dt, verdict.dt) if last else verdict.dt, memory, stride
        cursor.rejected += 1
        if min(dt, abs(t1 - t)) <= least:
            raise Breakdown("underflow", t, t1 - t, stride)
        dt = max(verdict.dt, least)


def _time(t: float, y: Tensor) -> Tensor:
    """A time beside a state; `torch.full` does not wait for the device."""
    return torch.full((), t, dtype=torch.float64, device=y.device)


def strides(cursor: Cursor) -> Iterator[Stride]:
    """Make the steps of a solve as its controller wants them."""
    controller = cursor.problem.controller
    if isinstance(controller, Adaptive):
        return adaptive(cursor, controller)
    assert isinstance(controller, Planned)
    return scripted(cursor, plan(cursor.problem, controller))


class Collector:
    """Reads off the steps what the solution is made of.

    Args:
        problem: what is solved.
        index: the first output to read.

    Attributes:
        ys: outputs so far, each (B, *).
        rows: what was recorded of each step: error, raw error, stiffness.
        polynomials: of each step, if all are kept.
    """

    def __init__(self, problem: Problem, index: int = 1) -> None:
        self.problem = problem
        self.times = problem.ts.tolist()
        self.sign = math.copysign(1.0, self.times[-1] - self.times[0])
        self.index = index
        self.ys: list[Tensor] = []
        self.rows: list[tuple[Tensor | None, ...]] = []
        self.polynomials: list[tuple[Tensor, ...]] = []

    def take(self, cursor: Cursor, stride: Stride) -> None:
        """Read off the step just made."""
        problem, mark = self.problem, cursor.script[-1]
        thetas = self._thetas(mark)
        if problem.dense or any(0.0 < x < 1.0 for x in thetas):
            step = cursor.finish(stride)
            coefficients = (stride.y0, *problem.solver.polynomial(step))
            if problem.dense:
                self.polynomials.append(coefficients)
            self.ys += _interpolated(coefficients, thetas, step.y1)
        else:
            self.ys += [stride.step.y1 if x else stride.y0 for x in thetas]
        if problem.record:
            self.rows.append(measure(problem, stride))

    def _thetas(self, mark: Mark) -> list[float]:
        """Where within the step the outputs lie that it reaches: 0 for one in the jump before it."""
        first = self.index
        while self.index < len(self.times) and self.sign * self.times[self.index] <= self.sign * mark.t1:
            self.index += 1
        return [max(0.0, (t - mark.t0) / (mark.t1 - mark.t0)) for t in self.times[first : self.index]]


def _interpolated(coefficients: Sequence[Tensor], thetas: Sequence[float], y1: Tensor) -> list[Tensor]:
    """The outputs of one step; its ends exactly."""
    y0 = coefficients[0]
    inner = [x for x in thetas if 0.0 < x < 1.0]
    values: Iterator[Tensor] = iter(())
    if inner:
        theta = torch.tensor(inner, dtype=torch.float64)
        powers = torch.stack([theta**j for j in range(1, len(coefficients))], dim=1).to(y0.device, y0.dtype)
        values = iter((torch.tensordot(powers, torch.stack(tuple(coefficients[1:])), dims=1) + y0).unbind())
    return [next(values) if 0.0 < x < 1.0 else (y1 if x else y0) for x in thetas]


def measure(problem: Problem, stride: Stride) -> tuple[Tensor | None, ...]:
    """Error, raw error and stiffness of one step, each (B,) or None."""
    raw = None if stride.step.error is None else rms(stride.step.error)
    stiffness = problem.solver.stiffness(stride.dt, stride.y0, stride.step)
    return problem.controller.error(stride.y0, stride.step), raw, stiffness


def run(
    problem: Problem, watch: Callable[[Cursor, Collector], None] | None = None
) -> tuple[Cursor, Collector, Breakdown | None]:
    """Solve a problem with one step size for all samples.

    Args:
        problem: what to solve.
        watch: called after each step.

    Returns:
        Where the solve got, what was read off it, and why it stopped before its end, if it did.
    """
    cursor, collector = Cursor(problem, problem.y0), Collector(problem)
    try:
        for stride in strides(cursor):
            collector.take(cursor, stride)
            if watch:
                watch(cursor, collector)
    except Breakdown as breakdown:
        return cursor, collector, breakdown
    return cursor, collector, None


def assemble(problem: Problem, cursor: Cursor, collector: Collector) -> Solution:
    """Make the solution of what was read off the steps; outputs that were not reached are NaN."""
    y0 = problem.y0
    missing = [torch.full_like(y0, torch.nan)] * (problem.ts.shape[-1] - 1 - len(collector.ys))
    counts = (len(cursor.script), cursor.rejected, cursor.nfe, 0)
    return Solution(
        ts=problem.ts,
        ys=torch.stack([y0, *collector.ys, *missing], dim=1),
        stats=Stats(*(torch.full((len(y0),), n, device=y0.device) for n in counts)),
        steps=stack_rows(cursor.script, collector.rows, y0) if problem.record else None,
        dense=_dense(problem, cursor.script, collector.polynomials) if problem.dense else None,
    )


def stack_rows(script: Sequence[Mark], rows: Sequence[tuple[Tensor | None, ...]], y0: Tensor) -> Steps:
    """Stack what was recorded of each step."""
    times = _times(script, y0)
    t, dt = times[:, 0], times[:, 1] - times[:, 0]
    error, raw_error, stiffness = (_stack(column) for column in zip(*rows, strict=True)) if rows else (None,) * 3
    t, dt = (x.unsqueeze(1).expand(-1, len(y0)) for x in (t, dt))
    return Steps(t, dt, error, raw_error, stiffness, torch.ones_like(t, dtype=torch.bool))


def _times(script: Sequence[Mark], y0: Tensor) -> Tensor:
    """Starts and ends of the steps, float64 (n, 2)."""
    return torch.tensor([mark[:2] for mark in script], dtype=torch.float64).reshape(-1, 2).to(y0.device)


def _stack(column: Sequence[Tensor | None]) -> Tensor | None:
    """Stack tensors, None if the steps do not have them."""
    present = [x for x in column if x is not None]
    return torch.stack(present) if present else None


def _dense(problem: Problem, script: Sequence[Mark], polynomials: Sequence[tuple[Tensor, ...]]) -> Dense:
    """The polynomials of all steps, the same steps for each sample; without any a step of no length."""
    batch, span = len(problem.y0), problem.ts.detach()[[0, -1]]
    times = _times(script, problem.y0) if script else span[[0, 0]].unsqueeze(0)
    span, times = (x.unsqueeze(-1).expand(*x.shape, batch) for x in (span, times))
    polynomials = polynomials or [(problem.y0,)]
    return Dense(span, times[:, 0], times[:, 1], [torch.stack(c) for c in zip(*polynomials, strict=True)])
