"""A failed solve explains itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ndeflow.diffeq.loop import Problem, Stride, plan, walk

_GROWN = 1e6  # a state this much larger than at the start has diverged; a smaller one met a hole of the field


class SolverError(RuntimeError):
    """A solve failed; the message says for which sample, where, probably why, and what to do."""


def finite_samples(x: Tensor) -> Tensor:
    """Return which samples are finite throughout, bool of shape (B,)."""
    return torch.isfinite(x.detach()).flatten(1).all(1)


@torch.no_grad()
def explain(problem: Problem, ys: Tensor) -> SolverError:
    """Return the error of a fixed-step solve that went non-finite.

    The loop looks at no value, so the step that failed is found here, by repeating the steps after the
    last output at which all samples were finite.

    Args:
        problem: what was solved.
        ys: the outputs, shape (B, T, *), some of them not finite.
    """
    spans = plan(problem)
    finite = torch.isfinite(ys).flatten(2).all(2)
    reached = int(finite.all(0).long().cumprod(0).sum()) - 1  # y0 is finite, some later output is not
    before = sum(len(span) - 1 for span in spans[:reached])
    total = sum(len(span) - 1 for span in spans)
    solver, failed = type(problem.solver).__name__, int((~finite.all(1)).sum())
    where = f"[{problem.stops[0]:g}, {problem.stops[-1]:g}]"
    for i, stride in enumerate(walk(problem, ys[:, reached], spans[reached]), start=before + 1):
        ok = finite_samples(stride.step.y1)
        if not ok.all():
            sample = int((~ok).long().argmax())
            return SolverError(
                f"{solver}: sample {sample} of {len(ys)} is not finite after the step from t={float(stride.t0):g} of "
                f"{where} ({failed} samples fail in all; step {i} of {total}, NFE {i * problem.solver.evaluations}, "
                f"last dt {float(stride.dt):.3g}, {_diagnosis(problem, stride, sample)}; on_failure='nan' returns the "
                "other samples"
            )
    return SolverError(
        f"{solver}: {failed} of {len(ys)} samples are not finite after t={problem.stops[reached]:g} of {where} (NFE "
        f"{total * problem.solver.evaluations}), yet the same steps repeated are: the field is random, or, where ts "
        "requires gradients, not finite at an output time; make it deterministic within a solve"
    )


def _diagnosis(problem: Problem, stride: Stride, sample: int) -> str:
    """Sizes of state and field before the step, the likely cause, what to do."""
    y, k = stride.y0[sample].abs().max(), torch.stack([stage[sample].abs().max() for stage in stride.step.stages])
    sizes = f"|y| {float(y):.3g}, |f| {float(k[0] / stride.dt.abs()):.3g})"
    largest = torch.maximum(y, k.nan_to_num(0, posinf=0).max())
    if largest < _GROWN * problem.y0[sample].abs().max().clamp(min=1):
        return (
            f"{sizes}: the field is not finite at a state of ordinary size; look for a division, log, sqrt or exp in it"
        )
    return (
        f"{sizes}: the field is too stiff for this step, or the solution itself blows up; take smaller steps, a solver "
        "with a larger stability_size, or bound the field"
    )
