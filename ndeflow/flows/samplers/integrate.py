"""Sampling by a solver of the probability-flow equation."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from torch import Tensor

from ndeflow.diffeq import RK4, Constant, Euler, Heun, Integrator, Midpoint, Solver
from ndeflow.flows.dynamics import probability_flow
from ndeflow.flows.model import FlowModel
from ndeflow.flows.samplers.base import Noise, Sample, Sampler
from ndeflow.flows.samplers.grids import GridSpec, UniformGrid


@dataclass(frozen=True)
class Integrate(Sampler):
    """Solve dx/dt = velocity with one step of a solver per interval of a grid.

    Args:
        solver: the step rule.
        grid: the times between the steps.

    Reference:
        Liu, Gong, Liu, "Flow straight and fast", 2022, section 2.1, for the Euler method.

    >>> Integrate(Heun(), UniformGrid(20))
    Integrate(solver=Heun(), grid=UniformGrid(steps=20))
    """

    solver: Solver
    grid: GridSpec

    def __call__(self, model: FlowModel, x: Tensor, cond: Tensor | None = None, noise: Noise | None = None) -> Sample:
        """Solve from the first to the last node of the grid; `noise` is refused."""
        if noise is not None:
            raise ValueError("Integrate is deterministic: it takes no noise")
        t = self.grid(model.path).t
        equation = probability_flow(model, cond, (t[0].item(), t[-1].item()))
        solve = Integrator(self.solver, Constant(), max_steps=len(t))
        solution = solve(equation, x, t)
        return Sample(solution.ys[:, -1], solution.stats.nfe, solution.ys)


def named(name: str, steps: int) -> Sampler:
    """Make the sampler that commands call by the class name of a solver.

    Args:
        name: "Euler", "Midpoint", "Heun" or "RK4".
        steps: of a uniform grid, ≥ 1.

    Returns:
        The sampler.

    Raises:
        ValueError: there is no such name, or no step.

    >>> named("Euler", 100)
    Integrate(solver=Euler(), grid=UniformGrid(steps=100))
    """
    solvers = {solver.__name__: solver for solver in (Euler, Midpoint, Heun, RK4)}
    if name not in solvers:
        folded = {known.lower(): known for known in solvers}
        close = difflib.get_close_matches(name.lower(), folded, n=1)
        hint = f" (did you mean {folded[close[0]]}?)" if close else ""
        raise ValueError(f"unknown sampler {name!r}{hint}; there are: {', '.join(solvers)}")
    return Integrate(solvers[name](), UniformGrid(steps))
