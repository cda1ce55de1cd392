"""Solve differential equations: equation, solver, controller, gradient method, solution."""

from ndeflow.diffeq.adjoint import Adjoint
from ndeflow.diffeq.checkpointed import Checkpointed
from ndeflow.diffeq.controllers import PID, Adaptive, Constant, Controller, Planned
from ndeflow.diffeq.equations import ODE, Equation
from ndeflow.diffeq.failures import SolverError
from ndeflow.diffeq.gradient_check import GradientCheck, check_gradient
from ndeflow.diffeq.gradients import Backprop, Gradient
from ndeflow.diffeq.integrator import Integrator
from ndeflow.diffeq.solution import Dense, Solution, Stats, Steps
from ndeflow.diffeq.solvers import RK4, RK38, Bosh3, Dopri5, Dopri8, Euler, Heun, Midpoint, Ralston, Solver, Step, Tsit5

__all__ = [
    "ODE",
    "PID",
    "RK4",
    "RK38",
    "Adaptive",
    "Adjoint",
    "Backprop",
    "Bosh3",
    "Checkpointed",
    "Constant",
    "Controller",
    "Dense",
    "Dopri5",
    "Dopri8",
    "Equation",
    "Euler",
    "Gradient",
    "GradientCheck",
    "Heun",
    "Integrator",
    "Midpoint",
    "Planned",
    "Ralston",
    "Solution",
    "Solver",
    "SolverError",
    "Stats",
    "Step",
    "Steps",
    "Tsit5",
    "check_gradient",
]
