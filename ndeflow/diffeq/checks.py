"""Checks of what is given to a solve, and the form in which the solve takes it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ndeflow.diffeq.controllers import Adaptive
from ndeflow.diffeq.equations import Equation
from ndeflow.diffeq.failures import finite_samples
from ndeflow.diffeq.problem import Problem

_DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def check_state(y0: Tensor) -> None:
    """Refuse a start that cannot be solved from."""
    if not isinstance(y0, Tensor):
        raise TypeError(f"y0 must be a tensor of shape (B, *), got {type(y0).__name__}")
    if y0.dtype in (torch.float16, torch.bfloat16):
        raise TypeError(
            f"y0 is {y0.dtype}: increments below {torch.finfo(y0.dtype).eps / 2:.0e} of the state would be rounded "
            "away; keep the state in float32 and run the field under torch.autocast"
        )
    if y0.dtype not in _DTYPES:
        raise TypeError(f"y0 must be float32, float64, complex64 or complex128, got {y0.dtype}: write y0.float()")
    if y0.ndim < 2:
        raise ValueError(
            f"y0 must have shape (B, *), a batch axis and at least one axis of the state, got {tuple(y0.shape)}: write "
            "y0[None] for one sample, y0[:, None] for a batch of numbers"
        )
    ok = finite_samples(y0)
    if not ok.all():
        first = int((~ok).long().argmax())
        raise ValueError(f"y0 is not finite in {int((~ok).sum())} of {len(y0)} samples, first in sample {first}")


class Times(NamedTuple):
    """Output times as a solve takes them.

    Attributes:
        given: as they were given, float64.
        ts: (T,) or (B, T), with the times that only fill up a row at its end.
        order: where in `ts` each given time went, or None if nothing moved.
        mask: which of the given times are real, or None if all are.
        resolution: relative spacing of numbers in the dtype they were given in.
    """

    given: Tensor
    ts: Tensor
    order: Tensor | None
    mask: Tensor | None
    resolution: float

    def restore(self, ys: Tensor) -> Tensor:
        """Put states (B, T, *) in the order of the given times, NaN at those that are not real."""
        if self.mask is None:
            return ys
        if self.order is not None:
            ys = ys[torch.arange(len(ys), device=ys.device).unsqueeze(-1), self.order]
        return ys.masked_fill(~self.mask.reshape(*self.mask.shape, *(1,) * (ys.ndim - 2)), math.nan)


def read_times(
    ts: Tensor | Sequence[float], mask: Tensor | None, batch: int, each: bool, device: torch.device
) -> Times:
    """Return the output times of a solve, or refuse them.

    Args:
        ts: times as the user gave them.
        mask: bool (B, T) or None.
        batch: B.
        each: whether samples make steps of their own.
        device: of the state.
    """
    if not isinstance(ts, Tensor):
        try:
            ts = torch.as_tensor(ts, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"ts must be a tensor or a sequence of numbers, got {type(ts).__name__} {ts!r}") from error
    if ts.is_complex() or ts.dtype == torch.bool:
        raise TypeError(f"ts must be real numbers, got {ts.dtype}")
    _check_shape(ts, batch, each)
    eps = torch.finfo(ts.dtype).eps if ts.is_floating_point() else 0.0
    given = ts.to(device, torch.float64)
    if mask is not None:
        mask = _check_mask(mask, batch, ts.shape[-1]).to(device)
        if not each:
            check_monotone(given, None)
            return Times(given, given, None, mask, eps)
    rows = given.expand(batch, -1) if each and given.ndim == 1 else given
    check_monotone(rows if given.ndim == 2 else given, mask)
    if mask is None:
        return Times(given, rows, None, None, eps)
    moved = (~mask).long().argsort(dim=1, stable=True)
    count = mask.sum(1, keepdim=True)
    sorted_rows = rows.gather(1, moved)
    last = sorted_rows.gather(1, count - 1)
    within = torch.arange(rows.shape[1], device=device) < count
    order = torch.empty_like(moved).scatter_(1, moved, torch.arange(rows.shape[1], device=device).expand_as(moved))
    solved = torch.where(within, sorted_rows, last.detach())
    return Times(given, solved, order, mask, eps)


def _check_shape(ts: Tensor, batch: int, each: bool) -> None:
    """Refuse times of a shape that means nothing."""
    if ts.ndim not in (1, 2) or ts.shape[-1] < 2:
        raise ValueError(
            "ts must have shape (T,) or (B, T) with T ≥ 2, a start and at least one later output, got "
            f"{tuple(ts.shape)}"
        )
    if ts.ndim == 2 and not each:
        raise ValueError(
            f"ts of shape {tuple(ts.shape)} gives each sample its own times: set stepping='per_sample', or give one "
            "row (T,) for all"
        )
    if ts.ndim == 2 and len(ts) != batch:
        raise ValueError(f"ts has shape {tuple(ts.shape)}, y0 a batch of {batch}: each has one row per sample")


def _check_mask(mask: Tensor, batch: int, length: int) -> Tensor:
    """Refuse a mask that does not say which times are real."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != (batch, length):
        given = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor of shape (B, T) = {(batch, length)}, got {given}")
    if not bool(mask[:, 0].all()):
        sample = int((~mask[:, 0]).long().argmax())
        raise ValueError(f"the first time of each sample is its start and must be real: mask[{sample}, 0] is False")
    return mask


def check_monotone(ts: Tensor, mask: Tensor | None) -> None:
    """Refuse real output times that are not finite and strictly monotone."""
    rows = ts.detach().reshape(-1, ts.shape[-1]).tolist()
    real = [[True] * ts.shape[-1]] * len(rows) if mask is None else mask.tolist()
    for row, (times, chosen) in enumerate(zip(rows, real, strict=True)):
        name = "ts" if ts.ndim == 1 else f"ts[{row}]"
        _check_row(name, [(i, t) for i, (t, use) in enumerate(zip(times, chosen, strict=True)) if use])


def _check_row(name: str, times: list[tuple[int, float]]) -> None:
    """The same for the times of one sample, each with its place."""
    for i, t in times:
        if not math.isfinite(t):
            raise ValueError(f"ts must be finite, got {name}[{i}] = {t}")
    forward = times[-1][1] > times[0][1]
    for (i, t0), (j, t1) in pairwise(times):
        if t0 == t1 or (t1 > t0) != forward:
            raise ValueError(
                f"ts must be strictly increasing or strictly decreasing, got {name}[{i}] = {t0:g}, {name}[{j}] = "
                f"{t1:g} between {times[0][1]:g} and {times[-1][1]:g}: sort them and drop repeated ones"
            )


_warned: set[str] = set()


def check_field(problem: Problem) -> None:
    """Refuse a field that takes no time per sample where it has to; warn of random ones in adaptive solves, once."""
    if isinstance(problem.controller, Adaptive):
        warn_of_noise(problem.eq)
    if not problem.shared:
        ts = problem.ts.detach()
        # Irregular times, at which no periodic field looks constant.
        share = torch.linspace(0.05, 0.97, len(ts), dtype=torch.float64, device=ts.device) ** 1.3
        check_times(problem.eq, ts[:, 0] + share * (ts[:, -1] - ts[:, 0]), problem.y0.detach())


def warn_of_noise(eq: Equation) -> None:
    """Warn once per kind of layer that makes the field another one at each evaluation."""
    for name, module in eq.named_modules():
        if not module.training or not isinstance(module, _BatchNorm | _DropoutNd) or getattr(module, "p", 1.0) == 0:
            continue
        kind = type(module).__name__
        if kind not in _warned:
            _warned.add(kind)
            warnings.warn(
                f"{kind} ({name}) is active inside a field that is solved adaptively: every evaluation sees "
                "another field, and step sizes follow the noise; use LayerNorm or GroupNorm, or put the layer outside",
                stacklevel=4,
            )


def check_times(eq: Equation, t: Tensor, y: Tensor) -> None:
    """Refuse a field that takes one time for the whole batch only, before it spreads times along a data axis.

    Args:
        eq: the equation.
        t: times at which it may be asked, float64 (B,), not all equal.
        y: states, (B, *).

    Raises:
        ValueError: the field refuses such times, or it gives a sample something else than at its time alone.
    """
    cure = "write expand_time(t, y) for t in the field (from ndeflow.tensors), or use stepping='shared'"
    with torch.no_grad():
        try:
            together = eq.field(t, y)
        except (RuntimeError, ValueError, TypeError) as error:
            eq.field(t.sum(), y)  # if this fails as well, it says better what is wrong
            raise ValueError(
                f"the field does not take a time per sample, t of shape {tuple(t.shape)}: {cure}"
            ) from error
        if len(t) not in y.shape[1:] or len(t) < 2 or not isinstance(together, Tensor):
            return
        for i in (0, len(t) - 1):
            alone = eq.field(t[i], y)
            if not torch.allclose(together[i], alone[i], rtol=1e-3, atol=1e-6, equal_nan=True):
                raise ValueError(
                    f"the field spreads the times of the samples, t of shape {tuple(t.shape)}, along an axis of the "
                    f"state, {tuple(y.shape)}: {cure}"
                )
