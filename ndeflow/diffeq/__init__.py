"""Solve differential equations: equation, solver, controller, gradient method, solution."""

from ndeflow.diffeq.controllers import Constant, Controller
from ndeflow.diffeq.equations import ODE, Equation
from ndeflow.diffeq.failures import SolverError
from ndeflow.diffeq.gradients import Backprop, Gradient
from ndeflow.diffeq.integrator import Integrator
from ndeflow.diffeq.loop import Solution, Stats, Steps
from ndeflow.diffeq.solvers import (
    RK4,
    RK38,
    Bosh3,
    Dopri5,
    Dopri8,
    Euler,
    Heun,
    Midpoint,
    Ralston,
    Solver,
    Step,
    Tsit5,
)

__all__ = [
    "ODE",
    "RK4",
    "RK38",
    "Backprop",
    "Bosh3",
    "Constant",
    "Controller",
    "Dopri5",
    "Dopri8",
    "Equation",
    "Euler",
    "Gradient",
    "Heun",
    "Integrator",
    "Midpoint",
    "Ralston",
    "Solution",
    "Solver",
    "SolverError",
    "Stats",
    "Step",
    "Steps",
    "Tsit5",
]
