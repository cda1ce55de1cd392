"""Gradient methods: how a solve is differentiated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ndeflow.diffeq.controllers import Adaptive, Planned
from ndeflow.diffeq.failures import blame, explain, finite_samples
from ndeflow.diffeq.loop import assemble, run
from ndeflow.diffeq.ownership import gradients_flow
from ndeflow.diffeq.per_sample import Outcome, run_each
from ndeflow.diffeq.problem import Problem
from ndeflow.diffeq.script import Reel, Script, Sheet, plan_each
from ndeflow.diffeq.solution import Solution
from ndeflow.diffeq.solvers.runge_kutta import Heun
from ndeflow.tensors import expand_time

_HEUN = Heun()


class Gradient(ABC):
    """A way to differentiate a solve; the solution does not depend on it."""

    @abstractmethod
    def solve(self, problem: Problem) -> Solution:
        """Solve a problem such that gradients of the solution reach y0, `eq.args` and the parameters of `eq`."""


@dataclass(frozen=True)
class Backprop(Gradient):
    """Differentiate through the steps: the exact gradient of the discrete solution.

    Memory grows with the number of field evaluations. Derivatives of every order exist. In per-sample stepping the
    steps are found without gradients and then made again by the samples that have made them, which counts as
    `Stats.nfe_backward`: gradients through masks would carry the infinities of steps thrown away.
    """

    def solve(self, problem: Problem) -> Solution:
        """Run the loop under autograd's eyes."""
        return solve_shared(problem) if problem.shared else solve_each(problem)


def solve_shared(problem: Problem) -> Solution:
    """Solve with the same steps for all samples.

    Raises:
        SolverError: the solve breaks down and `on_failure` is "raise".
    """
    cursor, collector, breakdown = run(problem)
    if breakdown is not None and problem.on_failure == "raise":
        raise explain(problem, [blame(problem, cursor, breakdown)], len(problem.y0)) from None
    return assemble(problem, cursor, collector)


def solve_each(problem: Problem) -> Solution:
    """Solve with steps for each sample.

    Raises:
        SolverError: a sample breaks down and `on_failure` is "raise".
    """
    if isinstance(problem.controller, Planned):
        script = plan_each(problem, problem.controller)
        sheet, nfe = make_again(problem, script)
        return sheet.solution(torch.zeros_like(nfe), nfe)
    outcome = find_steps(problem)
    if not needs_gradients(problem):
        return outcome.sheet.solution(outcome.rejected, outcome.nfe)
    sheet, again = make_again(problem, outcome.script)
    solution = sheet.solution(outcome.rejected, outcome.nfe + outcome.sheet.nfe - sheet.nfe)
    stats = solution.stats._replace(accepted=outcome.sheet.count, nfe_backward=again + sheet.nfe)
    return solution._replace(stats=stats)


def find_steps(problem: Problem) -> Outcome:
    """Find the adaptive steps of each sample, without gradients; obey `on_failure`."""
    assert isinstance(problem.controller, Adaptive)
    outcome = run_each(problem, problem.controller)
    if outcome.failures and problem.on_failure == "raise":
        raise explain(problem, outcome.failures, len(outcome.failures))
    return outcome


def make_again(problem: Problem, script: Script) -> tuple[Sheet, Tensor]:
    """Make the steps of a script under autograd's eyes; return what was read off, and the field evaluations."""
    sheet, reel = Sheet(problem), Reel(problem, script)
    for eq, rows, stride, t1 in reel.run(0, len(script.live)):
        sheet.take(eq, rows, stride, t1)
    return sheet, reel.nfe


def needs_gradients(problem: Problem) -> bool:
    """Whether gradients may be asked for: of y0, args, parameters, or of whatever else the field uses."""
    if not torch.is_grad_enabled():
        return False
    args = problem.eq.args
    known = [problem.y0, *([] if args is None else [args]), *problem.eq.parameters()]
    return any(x.requires_grad for x in known) or gradients_flow(problem)


def solve_in_time(gradient: Gradient, problem: Problem) -> Solution:
    r"""Solve a problem whose output times require gradients.

    .. math:: \tilde y_0 = \Phi(t_0,\, \bar t_0 - t_0,\, y_0), \qquad
              \tilde y_i = \Phi(\bar t_i,\, t_i - \bar t_i,\, y_i), \quad i \ge 1

    with Φ(t, Δt, y) a step of Heun's method and t̄ the detached times: steps of size zero, which do not
    change values. First and second derivatives are those of the exact solution, ∂y_i/∂t_i = f(t_i, y_i)
    and ∂y_i/∂t_0 = −(∂y_i/∂y_0) f(t_0, y_0), the same for every gradient method. (A step of Euler's
    method would give a vanishing second derivative. The steps between the outputs are data.)

    Args:
        gradient: how the solve itself is differentiated.
        problem: the problem, its `ts` requiring gradients.

    Returns:
        The solution; 2T field evaluations more are counted.
    """
    ts, y0 = problem.ts, problem.y0
    zero = ts - ts.detach()
    start = _heun(problem, ts[..., 0], -zero[..., 0], y0)
    solution = gradient.solve(problem._replace(y0=start, ts=ts.detach()))
    ends = zip(ts.detach().unbind(-1), zero.unbind(-1), solution.ys.unbind(1), strict=True)
    later = [_moved(problem, t, dt, y) for t, dt, y in list(ends)[1:]]
    stats = solution.stats._replace(nfe=solution.stats.nfe + (_HEUN.evaluations + 1) * ts.shape[-1])
    return solution._replace(ts=ts, ys=torch.stack([y0, *later], dim=1), stats=stats)


def _heun(problem: Problem, t: Tensor, dt: Tensor, y: Tensor) -> Tensor:
    """A step of Heun's method."""
    return _HEUN.step(problem.eq, t, dt, y, _HEUN.init(problem.eq, t, y)).y1


def _moved(problem: Problem, t: Tensor, dt: Tensor, y: Tensor) -> Tensor:
    """The same, not made by samples that are not finite: 0 · ∞ would spoil the gradients of all."""
    if problem.on_failure == "raise":
        return _heun(problem, t, dt, y)
    lost = expand_time(~finite_samples(y), y)
    return torch.where(lost, y, _heun(problem, t, dt, torch.where(lost, problem.y0.detach(), y)))
