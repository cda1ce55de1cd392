"""The public door: check what belongs together, then solve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ndeflow.diffeq.controllers import Controller
from ndeflow.diffeq.equations import Equation
from ndeflow.diffeq.failures import explain, finite_samples
from ndeflow.diffeq.gradients import Backprop, Gradient, solve_in_time
from ndeflow.diffeq.loop import Problem, Solution
from ndeflow.diffeq.solvers.base import Solver
from ndeflow.tensors import expand_time

_DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


@dataclass(frozen=True)
class Integrator:
    """Solve initial value problems: a solver, its step sizes, and how to differentiate the result.

    Args:
        solver: the step rule.
        controller: the step sizes.
        gradient: how to differentiate.
        max_steps: budget of steps of one solve, ≥ 1.
        on_failure: what a sample that becomes non-finite does: "raise" a `SolverError`, or turn "nan"
            in all its outputs while the others stay. (Its gradients are then not defined: drop the
            sample before the next backward pass.)

    Raises:
        TypeError: a part is not of its kind.
        ValueError: a setting is out of range.

    >>> from ndeflow.diffeq import ODE, RK4, Constant
    >>> integrator = Integrator(RK4(), Constant(0.1))
    >>> solution = integrator(ODE(lambda t, y: -y), torch.ones(2, 1), [0.0, 1.0])
    >>> solution.ys[0, :, 0], solution.stats.nfe
    (tensor([1.0000, 0.3679]), tensor([40, 40]))
    """

    solver: Solver
    controller: Controller
    gradient: Gradient = field(default_factory=Backprop)
    _: KW_ONLY
    max_steps: int = 4096
    on_failure: Literal["raise", "nan"] = "raise"

    def __post_init__(self) -> None:
        for name, kind in (("solver", Solver), ("controller", Controller), ("gradient", Gradient)):
            _check_kind(f"Integrator's {name}", getattr(self, name), kind)
        if isinstance(self.max_steps, bool) or not isinstance(self.max_steps, int) or self.max_steps < 1:
            raise ValueError(f"max_steps must be an integer ≥ 1, got {self.max_steps!r}")
        if self.on_failure not in ("raise", "nan"):
            raise ValueError(f"on_failure must be 'raise' or 'nan', got {self.on_failure!r}")

    def __call__(self, eq: Equation, y0: Tensor, ts: Tensor | Sequence[float], *, record: bool = False) -> Solution:
        """Solve `eq` from y0 at ts[0] and return the states at all ts.

        Args:
            eq: the equation.
            y0: state at ts[0], shape (B, *) with at least one axis after the batch, float32, float64
                or complex; the solution keeps its dtype and device.
            ts: T ≥ 2 output times, strictly increasing or decreasing. A tensor of any real dtype or
                whatever `torch.as_tensor` reads as float64; it is moved to y0's device as float64. If
                it requires gradients, they are those of the exact solution.
            record: whether to return `Solution.steps`.

        Returns:
            The solution; `ys` has shape (B, T, *).

        Raises:
            TypeError: an argument is of the wrong kind or dtype.
            ValueError: an argument has the wrong shape or values, or the steps exceed `max_steps`.
            SolverError: a sample becomes non-finite and `on_failure` is "raise".
        """
        _check_kind("the equation", eq, Equation)
        _check_state(y0)
        if eq.args is not None and len(eq.args) != len(y0):
            raise ValueError(
                f"args has shape {tuple(eq.args.shape)}, y0 {tuple(y0.shape)}: each has one row per sample of the batch"
            )
        ts, eps = _read_times(ts)
        stops = ts.tolist()
        _check_stops(stops)
        resolution = eps * max(abs(stops[0]), abs(stops[-1]))
        problem = Problem(eq, self.solver, self.controller, y0, stops, resolution, self.max_steps, record)
        if ts.requires_grad and torch.is_grad_enabled():
            solution = solve_in_time(self.gradient, problem, ts.to(y0.device))
        else:
            solution = self.gradient.solve(problem)
        return self._check_solution(problem, solution)

    def _check_solution(self, problem: Problem, solution: Solution) -> Solution:
        """Obey `on_failure`: the only time a fixed-step solve waits for its device."""
        ok = finite_samples(solution.ys)
        if ok.all():
            return solution
        if self.on_failure == "raise":
            raise explain(problem, solution.ys)
        return solution._replace(ys=solution.ys.masked_fill(~expand_time(ok, solution.ys), math.nan))


def _check_kind(name: str, value: object, kind: type) -> None:
    """Refuse what is not an instance of `kind`, naming the usual mistakes."""
    if isinstance(value, kind):
        return
    hint = ""
    if isinstance(value, type):
        hint = f": write {value.__name__}()"
    elif kind is Equation and callable(value):
        hint = ": wrap a field f(t, y) as ODE(f)"
    article = "an" if kind.__name__[0] in "AEIOU" else "a"
    raise TypeError(f"{name} must be {article} {kind.__name__}, got {_describe(value)}{hint}")


def _describe(value: object) -> str:
    """A class by its name, an object by its type."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _check_state(y0: Tensor) -> None:
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


def _read_times(ts: Tensor | Sequence[float]) -> tuple[Tensor, float]:
    """Return the output times as float64 and the relative rounding error with which they were given."""
    if not isinstance(ts, Tensor):
        try:
            ts = torch.as_tensor(ts, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"ts must be a tensor or a sequence of numbers, got {type(ts).__name__} {ts!r}") from error
    if ts.is_complex() or ts.dtype == torch.bool:
        raise TypeError(f"ts must be real numbers, got {ts.dtype}")
    if ts.ndim != 1 or len(ts) < 2:
        raise ValueError(
            f"ts must have shape (T,) with T ≥ 2, a start and at least one later output, got {tuple(ts.shape)}"
        )
    return ts.to(torch.float64), torch.finfo(ts.dtype).eps if ts.is_floating_point() else 0.0


def _check_stops(stops: list[float]) -> None:
    """Refuse output times that are not finite and strictly monotone."""
    for i, t in enumerate(stops):
        if not math.isfinite(t):
            raise ValueError(f"ts must be finite, got ts[{i}] = {t}")
    forward = stops[-1] > stops[0]
    for i, (t0, t1) in enumerate(pairwise(stops)):
        if t0 == t1 or (t1 > t0) != forward:
            raise ValueError(
                f"ts must be strictly increasing or strictly decreasing, got ts[{i}] = {t0:g}, ts[{i + 1}] = {t1:g} "
                f"between {stops[0]:g} and {stops[-1]:g}: sort them and drop repeated ones"
            )
