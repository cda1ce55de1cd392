"""Solve differential equations: equation, solver, controller, gradient method, solution."""

from ndeflow.diffeq.adjoint import Adjoint
from ndeflow.diffeq.checkpointed import Checkpointed
from ndeflow.diffeq.controllers import PID, Adaptive, Constant, Controller, Planned
from ndeflow.diffeq.equations import ODE, Equation
from ndeflow.diffeq.failures import SolverError
from ndeflow.diffeq.gradients import Backprop, Gradient
from ndeflow.diffeq.integrator import Integrator
from ndeflow.diffeq.solution import Dense, Solution, Stats, Steps
from ndeflow.diffeq.solvers import RK4, Euler, Heun, Midpoint, Solver, Step

__all__ = [
    "ODE",
    "PID",
    "RK4",
    "Adaptive",
    "Adjoint",
    "Backprop",
    "Checkpointed",
    "Constant",
    "Controller",
    "Dense",
    "Equation",
    "Euler",
    "Gradient",
    "Heun",
    "Integrator",
    "Midpoint",
    "Planned",
    "Solution",
    "Solver",
    "SolverError",
    "Stats",
    "Step",
    "Steps",
]
