"""What a solve returns: outputs, cost, steps, and the solution between the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ndeflow.diffeq.equations import States


class Unpacker(Protocol):
    """What turns a tensor back into the state it was made of."""

    def unpack(self, packed: Tensor) -> States:
        """Return the state in a tensor (…, n)."""


class Stats(NamedTuple):
    """What a solve cost, per sample: int64 of shape (B,).

    Attributes:
        accepted: steps that became part of the solution.
        rejected: steps that were tried and thrown away.
        nfe: field evaluations of the solve.
        nfe_backward: field evaluations made again or backward in time for the sake of gradients. A backward pass
            that makes such fills them in.
    """

    accepted: Tensor
    rejected: Tensor
    nfe: Tensor
    nfe_backward: Tensor


class Steps(NamedTuple):
    """The accepted steps of a solve in their order, each of shape (n, B).

    In per-sample stepping n is the largest number of steps; what a sample with fewer has not made is not accepted and
    has size and estimates 0, so that sums over steps are right as they are.

    Attributes:
        t: start of the step, float64.
        dt: its signed size, float64.
        error: error norm scaled by the controller's tolerances, or None without tolerances.
        raw_error: rms over a sample's state of the embedded error, or None if the solver has none.
        stiffness: the solver's stiffness estimate, or None if it has none.
        accepted: whether the sample made the step, bool.

    Gradients reach `error`, `raw_error` and `stiffness`; t and dt are data.
    """

    t: Tensor
    dt: Tensor
    error: Tensor | None
    raw_error: Tensor | None
    stiffness: Tensor | None
    accepted: Tensor


@dataclass(frozen=True)
class Dense:
    """The polynomials of all steps.

    Args:
        span: first and last time of each sample, float64 (2, B).
        t0: starts of the steps, float64 (n, B), where a sample made no more steps its last time.
        t1: their ends.
        coefficients: y at the start and c₁, c₂, … of each step, each (n, B, *).
    """

    span: Tensor
    t0: Tensor
    t1: Tensor
    coefficients: Sequence[Tensor]

    def at(self, t: Tensor) -> Tensor:
        """Return the states at times t (B, T), shape (B, T, *); NaN where the solve did not get.

        Raises:
            ValueError: a time lies outside the solve.
        """
        first, last = self.span.unsqueeze(-1)
        sign = (last - first).sign()
        c = self.coefficients[0]
        width = 4 * torch.finfo((c.real if c.is_complex() else c).dtype).eps * torch.maximum(first.abs(), last.abs())
        outside = (sign * (t - first) < -width) | (sign * (t - last) > width) | ((sign == 0) & (t != first))
        if bool(outside.any()):
            sample, i = (int(x) for x in outside.nonzero()[0])
            raise ValueError(
                f"t={t[sample, i]:g} lies outside the solve of sample {sample}, from {first[sample, 0]:g} to "
                f"{last[sample, 0]:g}: solve further"
            )
        ends = (sign * self.t1.T).contiguous()
        step = torch.searchsorted(ends, (sign * t).detach().contiguous()).clamp(max=len(self.t0) - 1)
        rows = torch.arange(len(step), device=step.device).unsqueeze(-1)
        t0, t1 = self.t0[step, rows], self.t1[step, rows]
        theta = torch.where(t1 == t0, 0.0, (t - t0) / torch.where(t1 == t0, 1.0, t1 - t0))
        lost = (sign * (t - t1) > width).detach()
        value = horner([c[step, rows] for c in self.coefficients], theta.clamp(min=0.0))
        return value.masked_fill(lost.reshape(*lost.shape, *(1,) * (value.ndim - 2)), torch.nan)


def horner(coefficients: Sequence[Tensor], theta: Tensor) -> Tensor:
    """Return Σ θ^j c_j; theta has the first axes of the coefficients."""
    last = coefficients[-1]
    real = last.real.dtype if last.is_complex() else last.dtype
    x = theta.to(real).reshape(*theta.shape, *(1,) * (last.ndim - theta.ndim))
    value = last
    for c in reversed(coefficients[:-1]):
        value = torch.addcmul(c, value, x.to(value.dtype))
    return value


class Solution(NamedTuple):
    """A solved equation.

    Attributes:
        ts: output times, float64, shape (T,) or (B, T).
        ys: states at these times, shape (B, T, *), or a tuple or dict of such as y0 is; the first is y0.
        stats: what the solve cost.
        steps: its steps if they were recorded, else None.
        dense: the solution between the outputs if it was asked for, else None.
        packing: how the leaves of a state of several lie in one tensor, None for a tensor.
    """

    ts: Tensor
    ys: States
    stats: Stats
    steps: Steps | None = None
    dense: Dense | None = None
    packing: Unpacker | None = None

    def at(self, t: Tensor | float) -> States:
        """Return the states at any times within the solve.

        Args:
            t: (), (T,) the same times for each sample, or (B, T); any real dtype. Gradients reach it.

        Returns:
            States of shape (B, *) for one time, else (B, T, *).

        Raises:
            ValueError: the solve did not keep what is needed, or a time lies outside of it.
        """
        if self.dense is None:
            raise ValueError("solution.at(t) needs the steps of the solve: call the integrator with dense=True")
        batch = self.dense.span.shape[1]
        t = torch.as_tensor(t, dtype=torch.float64, device=self.dense.span.device)
        if t.ndim > 2 or (t.ndim == 2 and len(t) != batch):
            raise ValueError(f"t must have shape (), (T,) or (B, T) with B = {batch}, got {tuple(t.shape)}")
        y = self.dense.at(t.reshape(1, -1).expand(batch, -1) if t.ndim < 2 else t)
        y = y[:, 0] if t.ndim == 0 else y
        return y if self.packing is None else self.packing.unpack(y)
