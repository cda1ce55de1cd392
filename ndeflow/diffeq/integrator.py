"""The public door: check what belongs together, then solve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ndeflow.diffeq.checks import check_field, check_state, read_times
from ndeflow.diffeq.controllers import Adaptive, Controller
from ndeflow.diffeq.equations import ODE, Equation, States, real_dtype
from ndeflow.diffeq.failures import explain_planned, finite_samples
from ndeflow.diffeq.gradients import Backprop, Gradient, solve_in_time
from ndeflow.diffeq.problem import Problem, beside_jumps
from ndeflow.diffeq.solution import Solution
from ndeflow.diffeq.solvers.base import Solver
from ndeflow.tensors import Packing


@dataclass(frozen=True)
class Integrator:
    """Solve initial value problems: a solver, its step sizes, and how to differentiate the result.

    Args:
        solver: the step rule.
        controller: the step sizes.
        gradient: how to differentiate.
        max_steps: budget of steps of one solve, accepted or not, per sample; ≥ 1.
        stepping: "shared", one step size for the whole batch, or "per_sample", one for each: no sample then changes
            the answer or the cost of another. The field must take t of shape (B,), and a batch whose samples are
            about equally hard costs up to twice as much.
        landing: how outputs are reached: "step" ends a step at each, "interpolate" reads them off the interpolant,
            so that the steps do not depend on them; "auto" interpolates where the controller is adaptive and the
            interpolant at most one order worse than the solver.
        on_failure: what a sample does that becomes non-finite or cannot go on: "raise" a `SolverError`, or turn "nan"
            in the outputs that it does not reach (a non-finite one in all its outputs), while the others stay. In
            shared stepping all samples get as far as the first that breaks down. (The gradients of a NaN are not
            defined: leave the sample out before the backward pass.)

    Raises:
        TypeError: a part is not of its kind.
        ValueError: a setting is out of range.

    >>> from ndeflow.diffeq import ODE, PID, Tsit5
    >>> integrator = Integrator(Tsit5(), PID(rtol=1e-6, atol=1e-6))
    >>> solution = integrator(ODE(lambda t, y: -y), torch.ones(2, 1), [0.0, 1.0])
    >>> solution.ys[0, :, 0], solution.stats.nfe
    (tensor([1.0000, 0.3679]), tensor([32, 32]))
    """

    solver: Solver
    controller: Controller
    gradient: Gradient = field(default_factory=Backprop)
    _: KW_ONLY
    max_steps: int = 4096
    stepping: Literal["shared", "per_sample"] = "shared"
    landing: Literal["auto", "step", "interpolate"] = "auto"
    on_failure: Literal["raise", "nan"] = "raise"

    def __post_init__(self) -> None:
        for name, kind in (("solver", Solver), ("controller", Controller), ("gradient", Gradient)):
            _check_kind(f"Integrator's {name}", getattr(self, name), kind)
        if isinstance(self.max_steps, bool) or not isinstance(self.max_steps, int) or self.max_steps < 1:
            raise ValueError(f"max_steps must be an integer ≥ 1, got {self.max_steps!r}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {getattr(self, name)!r}")

    def __call__(
        self,
        eq: Equation,
        y0: States,
        ts: Tensor | Sequence[float],
        *,
        mask: Tensor | None = None,
        dense: bool = False,
        record: bool = False,
    ) -> Solution:
        """Solve `eq` from y0 at the first time and return the states at all times.

        Args:
            eq: the equation.
            y0: state at the first time, shape (B, *) with at least one axis after the batch, float32, float64
                or complex; or a tuple, list or dict of such, leaves of shape (B,) included. The solution keeps
                dtype and device.
            ts: output times, strictly increasing or decreasing: T ≥ 2 of them for all samples, or, in per-sample
                stepping, (B, T). A tensor of any real dtype or whatever `torch.as_tensor` reads as float64; it is
                moved to y0's device as float64. If it requires gradients, they are those of the exact solution.
            mask: bool (B, T), False for times that only fill up the row of a sample with fewer; their states are NaN,
                so select by the mask and do not multiply by it. The first time of each sample is real.
            dense: whether to keep the solution between the outputs, for `Solution.at`.
            record: whether to return `Solution.steps`.

        Returns:
            The solution; `ys` has shape (B, T, *), or leaves of it.

        Raises:
            TypeError: an argument is of the wrong kind or dtype.
            ValueError: an argument has the wrong shape or values, or planned steps exceed `max_steps`.
            SolverError: a sample breaks down and `on_failure` is "raise".
        """
        _check_kind("the equation", eq, Equation)
        packing = None
        if not isinstance(y0, Tensor):
            packing = Packing(y0)
            if not isinstance(eq, ODE):
                raise TypeError(f"a state of several leaves is for an ODE, got {type(eq).__name__}: pack it into one")
            y0, eq = packing.pack(y0), eq.packed(packing)
        check_state(y0)
        if eq.args is not None and len(eq.args) != len(y0):
            raise ValueError(
                f"args has shape {tuple(eq.args.shape)}, y0 {tuple(y0.shape)}: each has one row per sample of the batch"
            )
        times = read_times(ts, mask, len(y0), self.stepping == "per_sample", y0.device)
        controller = self.controller.check(self.solver, real_dtype(y0), packing)
        problem = Problem(
            eq=eq,
            solver=self.solver,
            controller=controller,
            y0=y0,
            ts=beside_jumps(times.ts, eq.jumps, real_dtype(y0)),
            land=self._lands(),
            resolution=times.resolution,
            max_steps=self.max_steps,
            record=record,
            dense=dense,
            on_failure=self.on_failure,
        )
        check_field(problem)
        if problem.ts.requires_grad and torch.is_grad_enabled():
            solution = solve_in_time(self.gradient, problem)
        else:
            solution = self.gradient.solve(problem)
        solution = self._check_solution(problem, solution)
        ys = times.restore(solution.ys)
        return solution._replace(ts=times.given, ys=ys if packing is None else packing.unpack(ys), packing=packing)

    def _lands(self) -> bool:
        """Whether steps end at the outputs."""
        good = isinstance(self.controller, Adaptive) and self.solver.interpolation_order >= self.solver.order - 1
        return self.landing == "step" or (self.landing == "auto" and not good)

    def _check_solution(self, problem: Problem, solution: Solution) -> Solution:
        """Obey `on_failure` where a sample went non-finite: the only time a planned solve waits for its device."""
        if isinstance(problem.controller, Adaptive):
            return solution  # it accepts no step that is not finite
        ok = finite_samples(solution.ys)
        if ok.all():
            return solution
        if self.on_failure == "raise":
            raise explain_planned(problem, solution.ys)
        # Solved once more without them: 0 · ∞ would reach the gradients of what all samples share.
        rows = ok.nonzero()[:, 0]
        ts = problem.ts if problem.shared else problem.ts[rows]
        ys = self.gradient.solve(problem._replace(eq=problem.eq.take(rows), y0=problem.y0[rows], ts=ts)).ys
        return solution._replace(ys=torch.full_like(solution.ys, math.nan).index_copy(0, rows, ys))


_CHOICES = {
    "stepping": ("shared", "per_sample"),
    "landing": ("auto", "step", "interpolate"),
    "on_failure": ("raise", "nan"),
}


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
