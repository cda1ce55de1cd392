"""The accepted steps of per-sample stepping, and how to make them again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ndeflow.diffeq.controllers import Planned
from ndeflow.diffeq.equations import Equation
from ndeflow.diffeq.loop import measure
from ndeflow.diffeq.problem import Problem, Stride, legs
from ndeflow.diffeq.solution import Dense, Solution, Stats, Steps, horner
from ndeflow.diffeq.solvers.base import State


def pick(nested: Any, rows: Tensor | slice) -> Any:
    """Return some rows of a tensor, of nested tuples of tensors, or None."""
    if nested is None or isinstance(nested, Tensor):
        return nested if nested is None else nested[rows]
    picked = [pick(part, rows) for part in nested]
    return type(nested)(*picked) if hasattr(nested, "_fields") else tuple(picked)


def choose(where: Tensor, new: Any, old: Any) -> Any:
    """Return `new` in the rows where a condition (b,) holds, else `old`, for nested tuples of tensors."""
    if isinstance(new, Tensor):
        return torch.where(where.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
    return new if new is None else tuple(choose(where, a, b) for a, b in zip(new, old, strict=True))


class Script(NamedTuple):
    """The steps of each sample; those with more steps come first, so that step j concerns the first live[j] of them.

    Attributes:
        order: the samples in this order, int64 (B,).
        t0: starts of the steps, float64 (n, B) in this order.
        t1: their ends.
        fresh: whether they begin behind a jump of the field.
        live: how many samples make step j.
        jumps: whether any of them begins behind a jump.
    """

    order: Tensor
    t0: Tensor
    t1: Tensor
    fresh: Tensor
    live: list[int]
    jumps: list[bool]


def arrange(batch: int, rows: Tensor, t0: Tensor, t1: Tensor, fresh: Tensor) -> Script:
    """Order a list of steps, each sample's in their order in time, by samples.

    Args:
        batch: number of samples.
        rows: the sample of each step, int64 (N,).
        t0: starts, float64 (N,).
        t1: ends.
        fresh: whether they begin behind a jump.
    """
    counts = torch.bincount(rows, minlength=batch)
    order = counts.argsort(descending=True, stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(batch, device=rows.device))
    sorting = rows.argsort(stable=True)
    rows = rows[sorting]
    number = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    n = int(counts.max()) if batch else 0
    at = (number, place[rows])
    starts, ends = (t0.new_zeros(n, batch).index_put(at, t[sorting]) for t in (t0, t1))
    jumped = fresh.new_zeros(n, batch).index_put(at, fresh[sorting])
    live = (counts > torch.arange(n, device=rows.device).unsqueeze(-1)).sum(1)
    return Script(order, starts, ends, jumped, live.tolist(), jumped.any(1).tolist())


def plan_each(problem: Problem, controller: Planned) -> Script:
    """Return the steps of a planned solve whose samples have their own times.

    Raises:
        ValueError: a sample needs more steps than the budget allows.
    """
    spans = legs(problem)
    alike = bool((problem.ts == problem.ts[:1]).all())
    table = [x[:1].tolist() if alike else x.tolist() for x in spans]
    steps: list[tuple[int, float, float, bool]] = []
    for row, (starts, ends, freshes) in enumerate(zip(*table, strict=True)):
        before, resolution = len(steps), problem.resolution * max(abs(starts[0]), abs(ends[-1]))
        for t0, t1, fresh in zip(starts, ends, freshes, strict=True):
            n = 0 if t0 == t1 else controller.cuts(t0, t1, resolution)
            if len(steps) - before + n > problem.max_steps:
                raise ValueError(
                    f"{controller} needs more than max_steps={problem.max_steps} steps for sample {row} from "
                    f"t={starts[0]:g} to {ends[-1]:g}: take larger steps or fewer output times, or raise max_steps"
                )
            times = [*(t0 + (t1 - t0) * (i / n) for i in range(n)), t1]
            steps += [(row, times[i], times[i + 1], fresh and i == 0) for i in range(n)]
    device, batch = problem.y0.device, len(problem.y0)
    columns = list(zip(*steps, strict=True)) or [(), (), (), ()]
    rows = torch.tensor(columns[0], dtype=torch.int64, device=device)
    t0, t1 = (torch.tensor(column, dtype=torch.float64, device=device) for column in columns[1:3])
    fresh = torch.tensor(columns[3], dtype=torch.bool, device=device)
    if alike:
        rows = torch.arange(batch, device=device).repeat_interleave(len(steps))
        t0, t1, fresh = (x.repeat(batch) for x in (t0, t1, fresh))
    return arrange(batch, rows, t0, t1, fresh)


class Reel:
    """Makes the steps of a script, or a part of them.

    Args:
        problem: what is solved.
        script: its steps.

    Attributes:
        nfe: field evaluations so far, of each sample.
    """

    def __init__(self, problem: Problem, script: Script) -> None:
        self.problem, self.script = problem, script
        self.eq = problem.eq.take(script.order)
        self.nfe = torch.zeros(len(script.order), dtype=torch.int64, device=script.order.device)
        self.y: Tensor = problem.y0[script.order]
        self.state: State = None

    def run(self, first: int, last: int) -> Iterator[tuple[Equation, Tensor, Stride, Tensor]]:
        """Make the steps first … last − 1 from `y` and `state` on; yield equation, samples, step and its end."""
        solver, script = self.problem.solver, self.script
        eq = self.eq
        for j in range(first, last):
            n = script.live[j]
            rows, t0, t1 = script.order[:n], script.t0[j, :n], script.t1[j, :n]
            if len(self.y) > n or j == first:
                self.y, self.state = self.y[:n], pick(self.state, slice(n))
                eq = self.eq.take(torch.arange(n, device=rows.device))
            state = self._prepare(eq, t0, j)
            step = solver.step(eq, t0, t1 - t0, self.y, state)
            stride = Stride(t0, t1 - t0, self.y, state, step)
            self.nfe[rows] += solver.evaluations
            self.y, self.state = step.y1, step.state
            yield eq, rows, stride, t1

    def _prepare(self, eq: Equation, t0: Tensor, j: int) -> State:
        """The solver's state, asked for where there is none or where the field has jumped."""
        if self.state is not None and not self.script.jumps[j]:
            return self.state
        new, fresh = self.problem.solver.init(eq, t0, self.y), self.script.fresh[j, : len(t0)]
        self.nfe[self.script.order[: len(t0)]] += 1 if self.state is None else fresh
        return new if self.state is None else choose(fresh, new, self.state)


class Sheet:
    """Reads off the steps of single samples what the solution is made of.

    Args:
        problem: what is solved.

    Attributes:
        count: steps of each sample so far.
        nfe: field evaluations that interpolating took, of each sample.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        batch, device = len(problem.y0), problem.y0.device
        self.sign = (problem.ts[:, -1:] - problem.ts[:, :1]).sign()
        self.written = problem.ts.detach() == problem.ts.detach()[:, :1]  # with all that fills up a row of one time
        self.count = torch.zeros(batch, dtype=torch.int64, device=device)
        self.nfe = torch.zeros_like(self.count)
        self.ys: list[tuple[Tensor, Tensor, Tensor]] = []
        self.steps: list[tuple[Tensor, Tensor, tuple[Tensor | None, ...]]] = []
        self.polynomials: list[tuple[Tensor, Tensor, tuple[Tensor, ...]]] = []

    def skip(self, script: Script, first: int) -> None:
        """Take all that comes before step `first` as read."""
        if not first:
            return
        n = script.live[first - 1]
        rows = script.order[:n]
        reached = script.t1[first - 1, :n, None]
        self.written[rows] |= self.sign[rows] * self.problem.ts.detach()[rows] <= self.sign[rows] * reached
        self.count[rows] = first

    def take(self, eq: Equation, rows: Tensor, stride: Stride, t1: Tensor, at: Tensor | None = None) -> None:
        """Read off a step of the samples `rows`, made by those at the places `at` of them, or by all."""
        problem, some = self.problem, stride
        if at is not None and len(at) < len(rows):
            rows, t1 = rows[at], t1[at]
            some = None
        if problem.record or problem.dense:
            some = some or cast(Stride, pick(stride, at if at is not None else slice(None)))
            number, begin = self.count[rows], (some.t0, some.dt)
            if problem.record:
                self.steps.append((number, rows, (*begin, *measure(problem, some))))
            if problem.dense:
                coefficients = self._polynomial(eq if at is None else eq.take(at), rows, some)
                self.polynomials.append((number, rows, (some.t0, t1, *coefficients)))
        self.count[rows] += 1
        ts, sign = problem.ts.detach()[rows], self.sign[rows]
        due, index = (~self.written[rows] & (sign * ts <= sign * t1[:, None])).nonzero(as_tuple=True)
        if len(due):
            self.written[rows[due], index] = True
            place = due if at is None else at[due]
            self.ys.append(
                (rows[due], index, self._read(eq.take(place), rows[due], pick(stride, place), ts[due, index]))
            )

    def _read(self, eq: Equation, rows: Tensor, stride: Stride, t: Tensor) -> Tensor:
        """The states at times within or at the ends of a step, one time per row; before it for one in a jump."""
        theta = ((t - stride.t0) / stride.dt).clamp(0.0, 1.0)
        ends = choose(theta > 0, stride.step.y1, stride.y0)
        if self.problem.land:
            return ends
        inner = horner(self._polynomial(eq, rows, stride), theta)
        return choose((theta > 0) & (theta < 1), inner, ends)

    def _polynomial(self, eq: Equation, rows: Tensor, stride: Stride) -> tuple[Tensor, ...]:
        """The interpolant of a step."""
        t0, dt, y0, _, step = stride
        finished = self.problem.solver.finish(eq, t0, dt, y0, step)
        self.nfe[rows] += len(finished.stages) - len(step.stages)
        return (y0, *self.problem.solver.polynomial(finished))

    def outputs(self) -> Tensor:
        """The states at the output times, (B, T, *), NaN where no step came."""
        y0, ts = self.problem.y0, self.problem.ts.detach()
        starts, places = (ts == ts[:, :1]).nonzero(as_tuple=True)
        pieces = [(starts, places, y0[starts]), *self.ys]
        rows, index, values = (torch.cat(column) for column in zip(*pieces, strict=True))
        empty = y0.new_full((*ts.shape, *y0.shape[1:]), torch.nan)
        return empty.index_put((rows, index), values)

    def solution(self, rejected: Tensor, nfe: Tensor) -> Solution:
        """The solution, given what it has cost."""
        problem = self.problem
        stats = Stats(self.count, rejected, nfe + self.nfe, torch.zeros_like(nfe))
        return Solution(
            ts=problem.ts,
            ys=self.outputs(),
            stats=stats,
            steps=self._steps() if problem.record else None,
            dense=self._dense() if problem.dense else None,
        )

    def _steps(self) -> Steps:
        """What was recorded, (n, B)."""
        n, batch = self._longest(), len(self.count)
        last = self.problem.ts.detach()[:, -1].expand(n, -1)
        table = _table(self.steps, n, batch)
        if not table:
            nothing = torch.zeros(0, batch, dtype=torch.float64, device=self.count.device)
            return Steps(nothing, nothing, None, None, None, nothing.bool())
        t, dt, error, raw, stiffness = table
        assert t is not None
        assert dt is not None
        made = torch.arange(n, device=self.count.device).unsqueeze(-1) < self.count
        return Steps(torch.where(made, t, last), dt, error, raw, stiffness, made)

    def _longest(self) -> int:
        """The largest number of steps."""
        return int(self.count.max()) if len(self.count) else 0

    def _dense(self) -> Dense:
        """The polynomials of all steps, (n, B, *), n ≥ 1; a step that was not made has no length."""
        n, y0, span = max(1, self._longest()), self.problem.y0, self.problem.ts.detach()[:, [0, -1]].T
        nothing = (self.count[:0], self.count[:0], (span[0, :0], span[0, :0], y0[:0]))
        t0, t1, start, *others = (c for c in _table(self.polynomials or [nothing], n, len(y0)) if c is not None)
        made = torch.arange(n, device=self.count.device).unsqueeze(-1) < self.count
        reached = torch.where(self.count > 0, t1.gather(0, (self.count - 1).clamp(min=0).unsqueeze(0))[0], span[0])
        t0, t1 = (torch.where(made, t, reached) for t in (t0, t1))
        start = torch.where(made.reshape(n, -1, *(1,) * (y0.ndim - 1)), start, y0)
        return Dense(span, t0, t1, [start, *others])


def _table(
    pieces: Sequence[tuple[Tensor, Tensor, tuple[Tensor | None, ...]]], n: int, batch: int
) -> list[Tensor | None]:
    """Columns (n, B, *) of pieces of rows; 0 where there is none."""
    if not pieces:
        return []
    at = torch.cat([piece[0] for piece in pieces]), torch.cat([piece[1] for piece in pieces])
    columns = zip(*(piece[2] for piece in pieces), strict=True)
    return [_column(at, [x for x in column if x is not None], n, batch) for column in columns]


def _column(at: tuple[Tensor, ...], values: list[Tensor], n: int, batch: int) -> Tensor | None:
    """One column, None where no piece has it."""
    if not values:
        return None
    value = torch.cat(values)
    return value.new_zeros(n, batch, *value.shape[1:]).index_put(at, value)
