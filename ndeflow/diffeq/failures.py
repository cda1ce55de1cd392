"""A failed solve explains itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ndeflow.diffeq.controllers import Adaptive, Planned
from ndeflow.diffeq.loop import Cursor, plan, scripted
from ndeflow.diffeq.problem import Breakdown, Problem, Stride
from ndeflow.diffeq.script import Reel, Script, plan_each

_GROWN = 1e6  # a state this much larger than at the start has diverged; a smaller one met a hole of the field


class SolverError(RuntimeError):
    """A solve failed; the message says for which sample, where, probably why, and what to do."""


class Failure(NamedTuple):
    """Why a sample did not get to its end.

    Attributes:
        reason: "underflow": its steps became too small; "budget": there were too many; "nonfinite".
        sample: which one.
        t: where.
        dt: signed size of the last step tried.
        counts: accepted steps, rejected steps, field evaluations.
        stride: the last step tried.
        row: the sample's place in it.
    """

    reason: str
    sample: int
    t: float
    dt: float
    counts: tuple[int, int, int]
    stride: Stride
    row: int


def finite_samples(x: Tensor) -> Tensor:
    """Return which samples are finite throughout, bool of shape (B,)."""
    return torch.isfinite(x.detach()).flatten(1).all(1)


@torch.no_grad()
def blame(problem: Problem, cursor: Cursor, breakdown: Breakdown) -> Failure:
    """Return the failure of a solve whose samples share their steps: that of the sample with the largest error."""
    stride = breakdown.stride or cursor.last
    assert stride is not None
    assert isinstance(problem.controller, Adaptive)
    error = problem.controller.error(stride.y0, stride.step)
    assert error is not None
    row = int(error.nan_to_num(nan=torch.inf).argmax())
    counts = (len(cursor.script), cursor.rejected, cursor.nfe)
    return Failure(breakdown.reason, row, breakdown.t, breakdown.dt, counts, stride, row)


@torch.no_grad()
def explain(problem: Problem, failures: list[Failure], failed: int) -> SolverError:
    """Return the error of a solve, `failed` samples of which did not get to their ends, by the first of them."""
    first = min(failures, key=lambda failure: failure.sample)
    accepted, rejected, nfe = first.counts
    solver, ts = type(problem.solver).__name__, problem.ts if problem.shared else problem.ts[first.sample]
    what = {
        "budget": f"reached max_steps={problem.max_steps}",
        "underflow": "needs steps too small to go on",
        "nonfinite": "is not finite",
    }[first.reason]
    others = f"; {failed} samples failed" if failed > 1 else ""
    error = problem.controller.error(first.stride.y0, first.stride.step)
    scaled = "" if error is None else f", scaled error {float(error[first.row]):.2g}"
    together = "the solve, by" if problem.shared and first.reason != "nonfinite" else ""
    y, f = _sizes(first)
    return SolverError(
        f"{solver}: {together}{' ' if together else ''}sample {first.sample} of {len(problem.y0)} {what} at "
        f"t={first.t:.6g} of [{float(ts[0]):g}, {float(ts[-1]):g}] ({accepted} accepted, {rejected} rejected, "
        f"NFE {nfe}, last dt {first.dt:.3g}{scaled}, |y| {y:.3g}, |f| {f:.3g}{others}): "
        f"{_cause(problem, first, y, f)}; "
        "on_failure='nan' returns what was reached"
    )


def _sizes(failure: Failure) -> tuple[float, float]:
    """The largest entries of state and field at the start of the last step."""
    y, k = failure.stride.y0[failure.row], failure.stride.step.stages[0][failure.row]
    return float(y.abs().max()), float(k.abs().max()) / max(abs(failure.dt), 1e-300)


def _cause(problem: Problem, failure: Failure, y: float, f: float) -> str:
    """The likely cause, and what to do."""
    stages = torch.stack([stage[failure.row].abs().max() for stage in failure.stride.step.stages])
    start = max(1.0, float(problem.y0[failure.sample].abs().max()))
    largest = max(y, float(stages.nan_to_num(0.0, posinf=0.0).max()))
    if not bool(stages.isfinite().all()) and largest < _GROWN * start:
        return "the field is not finite at a state of ordinary size; look for a division, log, sqrt or exp in it"
    if isinstance(problem.controller, Planned):
        return (
            "the field is too stiff for this step, or the solution itself blows up; take smaller steps, a solver with "
            "a larger stability_size, or bound the field"
        )
    if largest >= _GROWN * start or f >= _GROWN * _GROWN * start:
        return "the solution itself blows up there; end the solve before, or bound the field"
    return (
        "the field is stiff, or has a kink or jump there; loosen rtol and atol, raise max_steps, name the jump "
        "(ODE(f, jumps=...)), or regularize the field"
    )


@torch.no_grad()
def explain_planned(problem: Problem, ys: Tensor) -> SolverError:
    """Return the error of a planned solve that went non-finite.

    The loop looks at no value, so the step that failed is found here, by making the steps again.

    Args:
        problem: what was solved.
        ys: the outputs, shape (B, T, *), some of them not finite.
    """
    failed = (~finite_samples(ys)).nonzero()[:, 0].tolist()
    found = _search_shared(problem) if problem.shared else _search_each(problem)
    if found is not None:
        return explain(problem, [found], len(failed))
    return SolverError(
        f"{type(problem.solver).__name__}: {len(failed)} of {len(ys)} samples, first sample {failed[0]}, are not "
        "finite, yet the same steps made again are: the field is random, or, where ts requires gradients, not finite "
        "at an output time; make it deterministic within a solve"
    )


def _search_shared(problem: Problem) -> Failure | None:
    """Make the steps again until one is not finite."""
    assert isinstance(problem.controller, Planned)
    cursor = Cursor(problem, problem.y0)
    for stride in scripted(cursor, plan(problem, problem.controller)):
        ok = finite_samples(stride.step.y1)
        if not ok.all():
            row = int((~ok).long().argmax())
            counts = (len(cursor.script), 0, cursor.nfe)
            return Failure("nonfinite", row, float(stride.t0 + stride.dt), float(stride.dt), counts, stride, row)
    return None


def _search_each(problem: Problem) -> Failure | None:
    """The same where samples have their own times."""
    assert isinstance(problem.controller, Planned)
    script: Script = plan_each(problem, problem.controller)
    reel = Reel(problem, script)
    for j, (_, rows, stride, t1) in enumerate(reel.run(0, len(script.live)), start=1):
        ok = finite_samples(stride.step.y1)
        if not ok.all():
            row = int((~ok).long().argmax())
            sample = int(rows[row])
            counts = (j, 0, int(reel.nfe[sample]))
            return Failure("nonfinite", sample, float(t1[row]), float(stride.dt[row]), counts, stride, row)
    return None
