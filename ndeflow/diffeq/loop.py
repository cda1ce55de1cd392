"""The stepping loop. It knows no gradients: autograd may or may not watch it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ndeflow.diffeq.controllers import Controller
from ndeflow.diffeq.equations import Equation
from ndeflow.diffeq.solvers.base import Solver, Step


class Stats(NamedTuple):
    """What a solve cost, per sample: int64 of shape (B,).

    Attributes:
        accepted: steps that became part of the solution.
        rejected: steps that were tried and thrown away.
        nfe: field evaluations of the forward solve.
        nfe_backward: field evaluations of the backward pass beyond differentiating the forward ones.
    """

    accepted: Tensor
    rejected: Tensor
    nfe: Tensor
    nfe_backward: Tensor


class Steps(NamedTuple):
    """The steps of a solve in their order, each of shape (n, B).

    Attributes:
        t: start of the step, float64.
        dt: its signed size, float64.
        error: error norm scaled by the controller's tolerances, or None without tolerances.
        raw_error: rms over a sample's state of the embedded error, or None if the solver has none.
        stiffness: the solver's stiffness estimate, or None if it has none.
        accepted: whether the step became part of the solution, bool.

    Gradients reach `error`, `raw_error` and `stiffness`; t and dt are data.
    """

    t: Tensor
    dt: Tensor
    error: Tensor | None
    raw_error: Tensor | None
    stiffness: Tensor | None
    accepted: Tensor


class Solution(NamedTuple):
    """A solved equation.

    Attributes:
        ts: output times, float64, shape (T,).
        ys: states at these times, shape (B, T, *); the first is y0.
        stats: what the solve cost.
        steps: its steps if they were recorded, else None.
    """

    ts: Tensor
    ys: Tensor
    stats: Stats
    steps: Steps | None


class Problem(NamedTuple):
    """Everything a solve depends on, checked by `Integrator`.

    Attributes:
        eq: the equation.
        solver: the step rule.
        controller: the step sizes.
        y0: state at the first stop, shape (B, *).
        stops: output times, monotone, at least two.
        resolution: spacing of numbers near the stops in the dtype they were given in.
        max_steps: budget of steps.
        record: whether to keep `Steps`.
    """

    eq: Equation
    solver: Solver
    controller: Controller
    y0: Tensor
    stops: Sequence[float]
    resolution: float
    max_steps: int
    record: bool


class Stride(NamedTuple):
    """One step with where it began."""

    t0: Tensor
    dt: Tensor
    y0: Tensor
    step: Step


def plan(problem: Problem) -> list[list[float]]:
    """Return the times of all steps before the solve, one list from stop to stop for each span.

    Times are computed from the ends of their span, never accumulated: accumulating makes an extra
    step of 1e-16 for every second number of steps.

    Raises:
        ValueError: there are more steps than the budget allows.
    """
    spans = list(pairwise(problem.stops))
    counts = [problem.controller.cuts(t0, t1, problem.resolution) for t0, t1 in spans]
    if sum(counts) > problem.max_steps:
        raise ValueError(
            f"{problem.controller} needs {sum(counts)} steps from t={problem.stops[0]:g} to {problem.stops[-1]:g} "
            f"({len(spans) + 1} output times), max_steps is {problem.max_steps}: take larger steps or fewer output "
            "times, or raise max_steps"
        )
    return [[*(t0 + (t1 - t0) * (i / n) for i in range(n)), t1] for (t0, t1), n in zip(spans, counts, strict=True)]


def walk(problem: Problem, y0: Tensor, times: Sequence[float]) -> Iterator[Stride]:
    """Step through given times from y0, without waiting for the device."""
    grid = torch.tensor(times, dtype=torch.float64, device=y0.device)
    state = problem.solver.init(problem.eq, grid[0], y0)
    for t0, dt in zip(grid[:-1].unbind(), grid.diff().unbind(), strict=True):
        step = problem.solver.step(problem.eq, t0, dt, y0, state)
        yield Stride(t0, dt, y0, step)
        y0, state = step.y1, step.state


def run(problem: Problem) -> Solution:
    """Solve a problem by stepping onto each of its stops."""
    spans = plan(problem)
    times = [problem.stops[0], *(t for span in spans for t in span[1:])]
    landings = set(accumulate(len(span) - 1 for span in spans))
    outputs, records = [problem.y0], []
    for i, stride in enumerate(walk(problem, problem.y0, times), start=1):
        if problem.record:
            records.append(_measure(problem.controller, stride))
        if i in landings:
            outputs.append(stride.step.y1)
    return Solution(
        ts=torch.tensor(problem.stops, dtype=torch.float64, device=problem.y0.device),
        ys=torch.stack(outputs, dim=1),
        stats=_stats(problem.y0, accepted=len(times) - 1, nfe=(len(times) - 1) * problem.solver.evaluations),
        steps=_steps(records, len(problem.y0)) if problem.record else None,
    )


def _stats(y0: Tensor, accepted: int, nfe: int) -> Stats:
    """The same cost for every sample."""
    return Stats(*(torch.full((len(y0),), n, device=y0.device) for n in (accepted, 0, nfe, 0)))


def _measure(controller: Controller, stride: Stride) -> tuple[Tensor | None, ...]:
    """t, dt, error, raw_error and stiffness of one step."""
    t0, dt, y0, step = stride
    raw = None if step.error is None else _rms(step.error)
    return t0, dt, controller.error(y0, step), raw, step.stiffness


def _rms(x: Tensor) -> Tensor:
    """Root mean square per sample, shape (B,); its gradient at 0 is 0."""
    x = x.flatten(1)
    return torch.linalg.vector_norm(x, dim=1) / x.shape[1] ** 0.5


def _steps(records: list[tuple[Tensor | None, ...]], batch: int) -> Steps:
    """Stack what was measured of each step."""
    t, dt, error, raw_error, stiffness = zip(*records, strict=True)
    times, sizes = (torch.stack(x).unsqueeze(1).expand(-1, batch) for x in (t, dt))
    accepted = torch.ones_like(times, dtype=torch.bool)
    return Steps(times, sizes, _stack(error), _stack(raw_error), _stack(stiffness), accepted)


def _stack(column: tuple[Tensor | None, ...]) -> Tensor | None:
    """Stack tensors, None if the steps do not have them."""
    present = [x for x in column if x is not None]
    return torch.stack(present) if present else None
