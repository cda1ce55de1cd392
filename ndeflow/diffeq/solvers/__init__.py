"""Solvers: rules for one step."""

from ndeflow.diffeq.solvers.base import Solver, Step
from ndeflow.diffeq.solvers.runge_kutta import (
    RK4,
    RK38,
    Bosh3,
    Dopri5,
    Dopri8,
    Euler,
    Heun,
    Midpoint,
    Ralston,
    RungeKutta,
    Tsit5,
)
from ndeflow.diffeq.solvers.tableaus import Tableau

__all__ = [
    "RK4",
    "RK38",
    "Bosh3",
    "Dopri5",
    "Dopri8",
    "Euler",
    "Heun",
    "Midpoint",
    "Ralston",
    "RungeKutta",
    "Solver",
    "Step",
    "Tableau",
    "Tsit5",
]
