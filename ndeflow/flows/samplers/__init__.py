"""Samplers: short functions of (model, x, time grid), and the keyed drawing of many samples.

The solvers that `Integrate` takes are exported here too, since their class names name samplers: `named("Heun", 20)`.
"""

from ndeflow.diffeq import RK4, Euler, Heun, Midpoint
from ndeflow.flows.samplers.base import Noise, Sample, Sampler
from ndeflow.flows.samplers.drawing import draw
from ndeflow.flows.samplers.grids import Grid, GridSpec, UniformGrid
from ndeflow.flows.samplers.integrate import Integrate, named

__all__ = [
    "RK4",
    "Euler",
    "Grid",
    "GridSpec",
    "Heun",
    "Integrate",
    "Midpoint",
    "Noise",
    "Sample",
    "Sampler",
    "UniformGrid",
    "draw",
    "named",
]
