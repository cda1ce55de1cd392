"""Gradient methods: how a solve is differentiated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ndeflow.diffeq.loop import Problem, Solution, run
from ndeflow.diffeq.solvers.runge_kutta import Heun

_HEUN = Heun()


class Gradient(ABC):
    """A way to differentiate a solve; the solution does not depend on it."""

    @abstractmethod
    def solve(self, problem: Problem) -> Solution:
        """Solve a problem such that gradients of the solution reach y0, `eq.args` and the parameters of `eq`."""


@dataclass(frozen=True)
class Backprop(Gradient):
    """Differentiate through the steps: the exact gradient of the discrete solution.

    Memory grows with the number of field evaluations. Derivatives of every order exist.
    """

    def solve(self, problem: Problem) -> Solution:
        """Run the loop under autograd's eyes."""
        return run(problem)


def solve_in_time(gradient: Gradient, problem: Problem, ts: Tensor) -> Solution:
    r"""Solve a problem whose output times require gradients.

    .. math:: \tilde y_0 = \Phi(t_0,\, \bar t_0 - t_0,\, y_0), \qquad
              \tilde y_i = \Phi(\bar t_i,\, t_i - \bar t_i,\, y_i), \quad i \ge 1

    with Φ(t, Δt, y) a step of Heun's method and t̄ the detached times: steps of size zero, which do not
    change values. First and second derivatives are those of the exact solution, ∂y_i/∂t_i = f(t_i, y_i)
    and ∂y_i/∂t_0 = −(∂y_i/∂y_0) f(t_0, y_0), the same for every gradient method. (A step of Euler's
    method would give a vanishing second derivative. The steps between the outputs are data.)

    Args:
        gradient: how the solve itself is differentiated.
        problem: the problem, its stops equal to `ts`.
        ts: output times, float64, shape (T,).

    Returns:
        The solution; 2T field evaluations more are counted.
    """
    eq, y0, zero = problem.eq, problem.y0, ts - ts.detach()
    start = _HEUN.step(eq, ts[0], -zero[0], y0, None).y1
    solution = gradient.solve(problem._replace(y0=start))
    ends = zip(ts.detach().unbind(), zero.unbind(), solution.ys.unbind(1), strict=True)
    later = [_HEUN.step(eq, t, dt, y, None).y1 for t, dt, y in list(ends)[1:]]
    stats = solution.stats._replace(nfe=solution.stats.nfe + _HEUN.evaluations * len(ts))
    return solution._replace(ts=ts, ys=torch.stack([y0, *later], dim=1), stats=stats)
