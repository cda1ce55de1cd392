"""Solvers: rules for one step."""

from ndeflow.diffeq.solvers.base import Solver, Step
from ndeflow.diffeq.solvers.runge_kutta import RK4, Euler, Heun, Midpoint, RungeKutta
from ndeflow.diffeq.solvers.tableaus import Tableau

__all__ = ["RK4", "Euler", "Heun", "Midpoint", "RungeKutta", "Solver", "Step", "Tableau"]
