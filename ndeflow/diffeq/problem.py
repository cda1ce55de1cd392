"""What is to be solved, checked by `Integrator`, and how its time is divided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ndeflow.diffeq.controllers import Controller
from ndeflow.diffeq.equations import Equation, real_dtype
from ndeflow.diffeq.solvers.base import Solver, State, Step

_ROUNDING = 2 * torch.finfo(torch.float64).eps  # of a time, beside the largest time


class Problem(NamedTuple):
    """Everything a solve depends on, checked by `Integrator`.

    Attributes:
        eq: the equation.
        solver: the step rule.
        controller: the step sizes.
        y0: state at the first output, shape (B, *).
        ts: output times, float64, (T,) in shared and (B, T) in per-sample stepping, in each row monotone; repeated
            ones only at the end of a row, where they stand for outputs that nobody asked for.
        land: whether steps end at each output, else the outputs are interpolated.
        resolution: relative spacing of numbers in the dtype the outputs were given in.
        max_steps: budget of steps, accepted or not, per sample.
        record: whether to keep `Steps`.
        dense: whether to keep the solution between the outputs.
        on_failure: what a failed solve does.
    """

    eq: Equation
    solver: Solver
    controller: Controller
    y0: Tensor
    ts: Tensor
    land: bool
    resolution: float
    max_steps: int
    record: bool
    dense: bool
    on_failure: Literal["raise", "nan"]

    @property
    def shared(self) -> bool:
        """Whether all samples make the same steps."""
        return self.ts.ndim == 1


class Legs(NamedTuple):
    """The spans that steps must land on the ends of, each float64 of shape (L,) or (B, L).

    Attributes:
        t0: starts. The end of one leg is the start of the next, but for a jump, which lies between.
        t1: ends. A row with fewer legs repeats its last time.
        fresh: whether the leg begins behind a jump of the field.
    """

    t0: Tensor
    t1: Tensor
    fresh: Tensor


def legs(problem: Problem) -> Legs:
    """Divide the time of a problem at the outputs, if steps land on them, and at the jumps of the field."""
    ts = problem.ts.detach()
    stops = ts if problem.land else ts[..., [0, -1]]
    jumps = _jumps_within(problem)
    if not jumps:
        return Legs(stops[..., :-1], stops[..., 1:], torch.zeros_like(stops[..., 1:], dtype=torch.bool))
    sign = (ts[..., -1:] - ts[..., :1]).sign()
    before, after = (_neighbors(jumps, ts, real_dtype(problem.y0), side) for side in (-1, 1))
    inside = (sign * before > sign * ts[..., :1]) & (sign * after < sign * ts[..., -1:])
    # Outputs within the width of a jump give way to it: they are read off the leg behind.
    near = ((sign * stops).unsqueeze(-1) >= (sign * before).unsqueeze(-2)) & (
        (sign * stops).unsqueeze(-1) <= (sign * after).unsqueeze(-2)
    )
    last = ts[..., -1:]
    stops = torch.where((near & inside.unsqueeze(-2)).any(-1), last, stops)
    ends = torch.cat([stops[..., 1:], torch.where(inside, before, last)], dim=-1)
    nexts = torch.cat([stops[..., 1:], torch.where(inside, after, last)], dim=-1)
    fresh = torch.cat([torch.zeros_like(stops[..., 1:], dtype=torch.bool), inside], dim=-1)
    order = (sign * ends).argsort(dim=-1, stable=True)
    ends, nexts, fresh = ends.gather(-1, order), nexts.gather(-1, order), fresh.gather(-1, order)
    t0 = torch.cat([ts[..., :1], nexts[..., :-1]], dim=-1)
    fresh = torch.cat([torch.zeros_like(fresh[..., :1]), fresh[..., :-1]], dim=-1)
    return Legs(t0, ends, fresh)


def beside_jumps(ts: Tensor, jumps: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Return the times of a solve, its first and last ones moved off the jumps of the field to the side of the solve.

    Args:
        ts: float64, (T,) or (B, T), in each row monotone; gradients pass.
        jumps: of the field.
        dtype: of the times that the field sees; times move by about the spacing of its numbers.
    """
    if not jumps or not ts.numel():
        return ts
    given = ts.detach()
    first, last = given[..., :1], given[..., -1:]
    sign = (last - first).sign()
    before, after = (_neighbors(jumps, given, dtype, side) for side in (-1, 1))
    start, end = (((sign * before <= sign * t) & (sign * t <= sign * after)) for t in (first, last))
    begin = first + sign * torch.where(start, sign * (after - first), 0.0).amax(-1, keepdim=True)
    until = last - sign * torch.where(end, sign * (last - before), 0.0).amax(-1, keepdim=True)
    moved = torch.where(given == first, begin, torch.where(given == last, until, given))
    fits = ((sign * moved.diff(dim=-1) > 0) | (given.diff(dim=-1) == 0)).all(-1, keepdim=True)
    return ts + torch.where(fits, moved - given, 0.0)


def spans(problem: Problem) -> list[tuple[float, float, bool]]:
    """Return the legs of a problem in shared stepping as numbers: start, end, whether behind a jump."""
    if not problem.eq.jumps:
        times = problem.ts.tolist()
        stops = times if problem.land else [times[0], times[-1]]
        return [(t0, t1, False) for t0, t1 in pairwise(stops)]
    return [leg for leg in zip(*(x.tolist() for x in legs(problem)), strict=True) if leg[0] != leg[1]]


def _jumps_within(problem: Problem) -> list[float]:
    """The jumps between the first and the last output; of those that the dtype cannot tell apart, the first."""
    if not problem.eq.jumps or not problem.ts.numel():
        return []
    low, high = float(problem.ts.min()), float(problem.ts.max())
    eps, apart = torch.finfo(real_dtype(problem.y0)).eps, [-math.inf]
    for t in sorted(problem.eq.jumps):
        if low < t < high and t - apart[-1] > 4 * eps * abs(t) + 4 * _ROUNDING * max(abs(low), abs(high)):
            apart.append(t)
    return apart[1:]


def _neighbors(jumps: Sequence[float], ts: Tensor, dtype: torch.dtype, side: int) -> Tensor:
    """The times next to each jump, before (side −1) or after it in the direction of time, (J,) or (B, J).

    Both are numbers that a field which sees times in the dtype can tell from the jump, whatever the rounding of the
    times of stages.
    """
    first, last = ts[..., :1], ts[..., -1:]
    at = torch.tensor(jumps, dtype=torch.float64, device=ts.device)
    seen, slack = at.to(dtype), _ROUNDING * torch.maximum(first.abs(), last.abs())
    low = torch.minimum(torch.nextafter(seen, torch.full_like(seen, -math.inf)), at - slack)
    high = torch.maximum(torch.nextafter(seen, torch.full_like(seen, math.inf)), at + slack)
    return torch.where((last - first).sign() * side < 0, low, high)


class Stride(NamedTuple):
    """An accepted step with where it began.

    Attributes:
        t0: start, float64, () or (b,).
        dt: signed size, of the shape of t0.
        y0: state at the start, (b, *).
        state: what the solver began with.
        step: the step.
    """

    t0: Tensor
    dt: Tensor
    y0: Tensor
    state: State
    step: Step


class Breakdown(Exception):
    """A solve cannot go on; `failures.explain` makes a message of it.

    Args:
        reason: "underflow": the steps became too small; "budget": there were too many.
        t: where.
        dt: signed size of the last step tried.
        stride: the step that was rejected last, if there was one.
    """

    def __init__(
        self, reason: Literal["underflow", "budget"], t: float, dt: float, stride: Stride | None = None
    ) -> None:
        super().__init__(reason)
        self.reason, self.t, self.dt, self.stride = reason, t, dt, stride
