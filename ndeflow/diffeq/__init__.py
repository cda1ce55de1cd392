"""Solve differential equations: equation, solver, controller, gradient method, solution."""

from ndeflow.diffeq.controllers import Constant, Controller
from ndeflow.diffeq.equations import ODE, Equation
from ndeflow.diffeq.failures import SolverError
from ndeflow.diffeq.gradients import Backprop, Gradient
from ndeflow.diffeq.integrator import Integrator
from ndeflow.diffeq.loop import Solution, Stats, Steps
from ndeflow.diffeq.solvers import RK4, Euler, Heun, Midpoint, Solver, Step

__all__ = [
    "ODE",
    "RK4",
    "Backprop",
    "Constant",
    "Controller",
    "Equation",
    "Euler",
    "Gradient",
    "Heun",
    "Integrator",
    "Midpoint",
    "Solution",
    "Solver",
    "SolverError",
    "Stats",
    "Step",
    "Steps",
]
