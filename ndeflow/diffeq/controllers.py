"""Controllers: how large the steps of a solve are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ndeflow.diffeq.equations import Equation, real_dtype
from ndeflow.diffeq.solvers.base import Solver, State, Step
from ndeflow.tensors import Packing, expand_time, rms

_MOST = 2**62  # a count beyond every budget, where the quotient would overflow
Real: TypeAlias = Any
"""A float in shared stepping, a float64 tensor (B,) in per-sample stepping; all formulas serve both."""
Numbers: TypeAlias = Any
"""A float, or a NumPy array of float64 (B,)."""
Norm: TypeAlias = Callable[[Tensor], Tensor]
"""Maps scaled errors (B, *) to one number ≥ 0 per sample (B,)."""


class Controller(ABC):
    """Decides how large the steps of a solve are: `Planned` before the solve, or `Adaptive` during it."""

    @abstractmethod
    def error(self, y0: Tensor, step: Step) -> Tensor | None:
        """Return the scaled error norm of a step from y0, shape (B,), differentiable, or None without tolerances."""

    @abstractmethod
    def check(self, solver: Solver, dtype: torch.dtype, packing: Packing | None) -> Controller:
        """Return the controller for states of a dtype and leaves, or refuse what cannot work, before a solve."""

    @abstractmethod
    def doubled(self, shape: tuple[int, ...]) -> Controller:
        """Return the controller for states [y, a] of shape (B, 2n), where y and a have the given shape per sample."""


class Planned(Controller, ABC):
    """Decides on the steps before the solve, which then never waits for its device."""

    @abstractmethod
    def cuts(self, t0: float, t1: float, resolution: float) -> int:
        """Return into how many equal steps the span between two neighboring stops is cut.

        Args:
            t0: a stop of the solve.
            t1: the next one, before or after it.
            resolution: how far the stops may lie from what was meant: the spacing of numbers near them
                in the dtype in which the output times were given.
        """


class Memory(NamedTuple):
    """What an adaptive controller remembers: the scaled errors of the last two accepted steps, and a rejection."""

    last: Real
    before: Real
    rejected: Real


class Verdict(NamedTuple):
    """What becomes of a step, and the size of the next one."""

    accept: Real
    dt: Real
    memory: Memory


class Adaptive(Controller, ABC):
    """Decides on each step by the error of the one before. Sizes are positive; the loop knows the direction.

    In shared stepping sizes and norms are floats, one for the batch; in per-sample stepping float64 tensors (B,).

    Attributes:
        dt_min: steps are not smaller but to meet a stop; a solve that needs smaller ones fails. None leaves that to
            the resolution of time.
    """

    dt_min: float | None

    @abstractmethod
    def init(
        self, eq: Equation, solver: Solver, t0: Tensor, span: Tensor, y0: Tensor, state: State
    ) -> tuple[Real, int]:
        """Return the size of the first step, and how many field calls it took to find it.

        Args:
            eq: the equation.
            solver: the step rule.
            t0: start, float64, () for shared and (B,) for per-sample stepping.
            span: signed time from t0 to the end, of the shape of t0.
            y0: state at t0, shape (B, *).
            state: what `solver.init` returned.
        """

    @abstractmethod
    def measure(self, y0: Tensor, step: Step, shared: bool) -> Tensor:
        """Return the detached error norm that `judge` takes, shape () if shared, else (B,); a step above 1 fails."""

    @abstractmethod
    def judge(self, dt: Real, norm: Real, memory: Memory, solver: Solver) -> Verdict:
        """Accept or reject a step of size dt, and say how large the next one is."""


@dataclass(frozen=True)
class Constant(Planned):
    r"""Equal steps between stops, not longer than dt.

    .. math:: n = \bigl\lceil (|t_1 - t_0| - 2\rho)/\Delta t \cdot (1 - 10^{-9}) \bigr\rceil, \qquad
              t_i = t_0 + (t_1 - t_0)\, i/n

    with ρ the resolution of the stops, so that n steps of 1/n cover [0, 1] whatever the rounding, in
    float32 too. Every output time is reached by a step; nothing is interpolated.

    Args:
        dt: longest step, > 0, in units of t; for a solve backward in time as well. None takes one step
            per interval of the output times, which is how a given grid is integrated.

    Raises:
        TypeError: `dt` is not a number.
        ValueError: `dt` is not positive and finite.

    >>> Constant(0.1).cuts(0.0, 1.0, resolution=0.0), Constant().cuts(0.0, 1.0, resolution=0.0)
    (10, 1)
    """

    dt: float | None = None

    def __post_init__(self) -> None:
        if self.dt is None:
            return
        if isinstance(self.dt, bool) or not isinstance(self.dt, int | float):
            raise TypeError(f"Constant takes dt as a number or None, got {type(self.dt).__name__} {self.dt!r}")
        if not (math.isfinite(self.dt) and self.dt > 0):
            raise ValueError(
                f"Constant takes a finite dt > 0, got {self.dt}; the direction of time comes from the order of ts, and "
                "None takes one step per interval of ts"
            )

    def cuts(self, t0: float, t1: float, resolution: float) -> int:
        """Return n of the equation above, at least 1."""
        if self.dt is None:
            return 1
        return max(1, math.ceil(min((abs(t1 - t0) - 2 * resolution) / self.dt * (1 - 1e-9), _MOST)))

    def error(self, y0: Tensor, step: Step) -> None:
        """Return None: there is no tolerance to measure an error by."""

    def check(self, solver: Solver, dtype: torch.dtype, packing: Packing | None) -> Constant:
        """Return itself: equal steps suit every solver."""
        return self

    def doubled(self, shape: tuple[int, ...]) -> Constant:
        """Return itself."""
        return self


@dataclass(frozen=True)
class PID(Adaptive):
    r"""Steps whose scaled error norm E stays below 1, by proportional, integral and derivative control.

    .. math:: E = \Bigl\|\frac{e}{a + r \max(|y_0|, |y_1|)}\Bigr\|, \qquad
              \frac{\Delta t_{n+1}}{\Delta t_n} = s\, E_n^{-(P+I+D)/k}\, E_{n-1}^{(P+2D)/k}\, E_{n-2}^{-D/k}

    with a = `atol`, r = `rtol`, k one more than the order of the error estimate, the last accepted E, and the factor
    between `factor_min` and `factor_max`, at most 1 after a rejection. The default, (P, I, D) = (0, 1, 0), chooses the
    steps that SciPy chooses; (0.4, 0.3, 0) steps more evenly where stability limits the step. A step with E > 1, or
    with an E that is not finite, is made again with a smaller size. The norm is the root mean square, over the whole
    batch in shared stepping. Gradients never flow through step sizes.

    Args:
        rtol: relative tolerance, > 0.
        atol: absolute tolerance, > 0.
        pcoeff: P.
        icoeff: I.
        dcoeff: D.
        safety: s in (0, 1).
        factor_min: in (0, 1).
        factor_max: > 1.
        dt0: first step; None estimates it by one more field evaluation.
        dt_min: smallest step, but for one that ends at a stop; a solve that needs smaller ones fails, it is never
            forced past its tolerance.
        dt_max: largest step.
        norm: instead of the root mean square, any map from scaled errors (B, *) to (B,); or, for states of several
            leaves, one per leaf name, None for a leaf that shall not count: E is then the largest of them.

    Raises:
        ValueError: a number is out of its range.

    Reference:
        Hairer, Nørsett, Wanner, "Solving Ordinary Differential Equations I", 1993, section II.4; Söderlind, "Digital
        filters in adaptive time-stepping", 2003.

    >>> from ndeflow.diffeq import Heun
    >>> PID(rtol=1e-3, atol=1e-6).judge(0.1, 0.81, Memory(1.0, 1.0, False), Heun())
    Verdict(accept=True, dt=0.1, memory=Memory(last=0.81, before=1.0, rejected=False))
    """

    rtol: float
    atol: float
    pcoeff: float = 0.0
    icoeff: float = 1.0
    dcoeff: float = 0.0
    safety: float = 0.9
    factor_min: float = 0.2
    factor_max: float = 10.0
    dt0: float | None = None
    dt_min: float | None = None
    dt_max: float | None = None
    norm: Norm | Mapping[str, Norm | None] | None = None

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            if isinstance(getattr(self, name), str | bool):
                raise TypeError(f"PID takes {name} as a number, got {getattr(self, name)!r}: in YAML write 1.0e-3")
            if not getattr(self, name) > 0 or not math.isfinite(getattr(self, name)):
                raise ValueError(f"PID takes {name} > 0, got {getattr(self, name)}: 1e-3 to 1e-8 are usual")
        if not (0 < self.safety < 1 and 0 < self.factor_min < 1 < self.factor_max):
            raise ValueError(
                f"PID takes safety and factor_min in (0, 1) and factor_max > 1, got {self.safety}, {self.factor_min}, "
                f"{self.factor_max}"
            )
        if self.pcoeff + self.icoeff + self.dcoeff <= 0:
            raise ValueError(
                f"PID takes coefficients of sum > 0, got {self.pcoeff} + {self.icoeff} + {self.dcoeff}: larger errors "
                "must lead to smaller steps"
            )
        for name in ("dt0", "dt_min", "dt_max"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"PID takes {name} > 0 or None, got {value}; the direction comes from the order of ts")
        if self.dt_min is not None and self.dt_max is not None and self.dt_min > self.dt_max:
            raise ValueError(f"PID takes dt_min ≤ dt_max, got {self.dt_min} and {self.dt_max}")

    def check(self, solver: Solver, dtype: torch.dtype, packing: Packing | None) -> PID:
        """Return the controller with its norms bound to leaves; refuse what the dtype cannot resolve."""
        if solver.error_order is None:
            raise ValueError(
                f"{type(solver).__name__} has no error estimate for the tolerances of PID: use Constant(dt), or a "
                "solver with an embedded formula such as Tsit5"
            )
        info = torch.finfo(dtype)
        if self.rtol < 4 * info.eps or self.atol < info.tiny:
            raise ValueError(
                f"rtol={self.rtol} and atol={self.atol} are below what {dtype} resolves (rtol ≥ {4 * info.eps:.1e}, "
                f"atol ≥ {info.tiny:.1e}): loosen them, or give y0.double()"
            )
        return replace(self, norm=_by_leaf(self.norm, packing)) if isinstance(self.norm, Mapping) else self

    def doubled(self, shape: tuple[int, ...]) -> PID:
        """Return the controller whose norm, if it has one of its own, measures both halves."""
        norm = self.norm
        if norm is None:
            return self
        assert not isinstance(norm, Mapping)

        def both(x: Tensor) -> Tensor:
            halves = x.unflatten(1, (2, -1)).unbind(1)
            return rms(torch.stack([norm(half.reshape(len(x), *shape)) for half in halves], dim=1))

        return replace(self, norm=both)

    def error(self, y0: Tensor, step: Step) -> Tensor:
        """Return E of each sample."""
        assert step.error is not None
        scale = torch.maximum(y0.abs(), step.y1.abs()).mul(self.rtol).add(self.atol)
        return self._norms(step.error / scale)

    def _norms(self, scaled: Tensor) -> Tensor:
        """The norm of each sample, (B,)."""
        assert not isinstance(self.norm, Mapping)
        norms = (self.norm or rms)(scaled)
        if norms.shape != scaled.shape[:1]:
            raise ValueError(
                f"PID's norm gave shape {tuple(norms.shape)} for scaled errors of shape {tuple(scaled.shape)}: it must "
                f"give one number per sample, ({len(scaled)},), as x.abs().flatten(1).amax(1) does"
            )
        return norms

    @torch.no_grad()
    def measure(self, y0: Tensor, step: Step, shared: bool) -> Tensor:
        """Return E, over the batch as the root mean square of the samples' if shared."""
        assert step.error is not None
        if not shared or self.norm is not None:
            norms = self.error(y0, step)
            return rms(norms.unsqueeze(0))[0] if shared else norms.to(torch.float64)
        scale = torch.maximum(y0.abs(), step.y1.abs()).mul_(self.rtol).add_(self.atol)
        return torch.linalg.vector_norm(step.error / scale) / max(1, scale.numel()) ** 0.5

    @torch.no_grad()
    @np.errstate(all="ignore")  # a field that is not finite shows in the first step
    def init(
        self, eq: Equation, solver: Solver, t0: Tensor, span: Tensor, y0: Tensor, state: State
    ) -> tuple[Real, int]:
        r"""Estimate a first step whose Euler step and its change are small beside the tolerances.

        Reference:
            Hairer, Nørsett, Wanner, 1993, section II.4, "Starting step size".
        """
        length = span.abs().cpu().numpy()
        if self.dt0 is not None:
            return self._sized(np.minimum(self.dt0, length), t0), 0
        dtype = real_dtype(y0)
        du = eq.increment(t0, t0 + span).to(dtype)
        scale, shared = y0.abs().mul_(self.rtol).add_(self.atol), t0.ndim == 0
        k0 = eq.apply_field(solver.field_at_start(state), du)
        d0, d1 = self._size(y0 / scale, shared), self._size(k0 / scale, shared) / length
        small = (d0 < 1e-5) | (d1 < 1e-5)
        h0 = np.minimum(np.where(small, 1e-6, 0.01 * d0 / np.where(small, 1.0, d1)), length)
        h0 = np.where(np.isfinite(h0), h0, 1e-6 * length)
        share = torch.as_tensor(h0 / length, device=y0.device)
        y1 = y0 + k0 * expand_time(share.to(dtype), y0)
        k1 = eq.apply_field(eq.field((t0 + share * span).to(dtype), y1), du)
        d2 = self._size((k1 - k0) / scale, shared) / length / h0
        largest = np.maximum(d1, d2)
        assert solver.error_order is not None
        flat = largest <= 1e-15
        h1 = (0.01 / np.where(flat, 1.0, largest)) ** (1.0 / (solver.error_order + 1))
        h1 = np.where(flat, np.maximum(1e-6, 1e-3 * h0), h1)
        found = np.minimum(np.minimum(100 * h0, h1), length)
        return self._sized(np.where(np.isfinite(found), found, 1e-6 * length), t0), 1

    def _size(self, scaled: Tensor, shared: bool) -> Numbers:
        """The norm of a scaled state, of the batch or of each sample."""
        if shared and self.norm is None:
            return float(torch.linalg.vector_norm(scaled)) / max(1, scaled.numel()) ** 0.5
        norms = self._norms(scaled).to(torch.float64)
        return float(rms(norms.unsqueeze(0))) if shared else norms.cpu().numpy()

    def _sized(self, dt: Numbers, t0: Tensor) -> Real:
        """A first step between dt_min and dt_max, as a float or as a tensor beside t0."""
        dt = np.clip(dt, self.dt_min or 0.0, self.dt_max or math.inf)
        return torch.as_tensor(dt, device=t0.device) if t0.ndim else float(dt)

    def judge(self, dt: Real, norm: Real, memory: Memory, solver: Solver) -> Verdict:
        """Apply the equation above."""
        assert solver.error_order is not None
        k, (p, i, d) = solver.error_order + 1, (self.pcoeff, self.icoeff, self.dcoeff)
        if isinstance(norm, Tensor):
            return self._judge_each(dt, norm, memory, k)
        if not math.isfinite(norm):
            return Verdict(False, dt * self.factor_min, memory._replace(rejected=True))
        change = max(norm, _TINY) ** (-(p + i + d) / k) * memory.last ** ((p + 2 * d) / k) * memory.before ** (-d / k)
        factor = self.safety * change
        if norm > 1.0:
            factor = min(max(factor, self.factor_min), self.safety)
            return Verdict(False, dt * factor, memory._replace(rejected=True))
        factor = min(max(factor, self.factor_min), 1.0 if memory.rejected else self.factor_max)
        dt = min(max(dt * factor, self.dt_min or 0.0), self.dt_max or math.inf)
        return Verdict(True, dt, Memory(norm or 1.0, memory.last, False))

    def _judge_each(self, dt: Tensor, norm: Tensor, memory: Memory, k: float) -> Verdict:
        """The same for one step per sample."""
        p, i, d = self.pcoeff, self.icoeff, self.dcoeff
        finite = norm.isfinite()
        e = torch.where(finite, norm, 1.0).clamp(min=_TINY)
        factor = self.safety * e ** (-(p + i + d) / k)
        if p or d:
            factor = factor * memory.last ** ((p + 2 * d) / k) * memory.before ** (-d / k)
        accept = finite & (norm <= 1.0)
        most = torch.where(accept, torch.where(memory.rejected, 1.0, self.factor_max), self.safety)
        factor = torch.where(finite, torch.minimum(factor.clamp(min=self.factor_min), most), self.factor_min)
        last = torch.where(accept, torch.where(norm == 0, 1.0, norm), memory.last)
        before = torch.where(accept, memory.last, memory.before)
        dt = dt * factor
        if self.dt_min or self.dt_max:
            dt = torch.where(accept, dt.clamp(self.dt_min or 0.0, self.dt_max or math.inf), dt)
        return Verdict(accept, dt, Memory(last, before, ~accept))


_TINY = 1e-300  # a power of 0 would be infinite


def _by_leaf(norms: Mapping[str, Norm | None], packing: Packing | None) -> Norm:
    """The largest of the norms of the leaves that count."""
    leaves = [] if packing is None else list(packing.slices)
    if sorted(norms) != sorted(leaves):
        raise ValueError(
            f"PID's norm has entries {sorted(norms)}, the state has leaves "
            f"{sorted(leaves) or 'none (it is one tensor)'}: give one norm per leaf, None where none counts"
        )
    assert packing is not None
    counted = [(packing.slices[name], norm) for name, norm in norms.items() if norm is not None]
    if not counted:
        raise ValueError("PID's norm leaves out every leaf: at least one must count")
    return lambda x: torch.stack([norm(x[:, part]) for part, norm in counted]).amax(dim=0)
