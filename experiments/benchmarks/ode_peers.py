"""The same solves by torchode and diffrax, where they are installed: `pip install 'ndeflow[bench]'`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

Solve = Callable[[], tuple[Tensor, int]]
"""Returns the states at the end and the number of field calls."""
Side = Callable[[], int]
"""Does the work and returns the number of field calls."""


def installed(*names: str) -> list[ModuleType]:
    """Modules, or nothing if one of them is not there."""
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError:
        return []


def torchode_solve(f: Callable[[Tensor, Tensor], Tensor], y0: Tensor, end: float, tolerance: float) -> Solve | None:
    """torchode's dopri5 with its integral controller: steps of its own for each sample, by masks."""
    if not (modules := installed("torchode")):
        return None
    torchode = modules[0]
    term = torchode.ODETerm(f)
    control = torchode.IntegralController(tolerance, tolerance, term=term)
    solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), control)
    ends = {"t_start": torch.zeros(len(y0)), "t_end": torch.full((len(y0),), end)}

    def solve() -> tuple[Tensor, int]:
        solution = solver.solve(torchode.InitialValueProblem(y0=y0, **ends))
        return solution.ys[:, -1], int(solution.stats["n_f_evals"].max())

    return solve


def diffrax_network(net: nn.Sequential, y0: Tensor, end: float, tolerance: float, train: bool) -> Side | None:
    """diffrax's dopri5 with the same MLP in jax."""
    if not (modules := installed("jax")):
        return None
    jax = modules[0]
    act = jax.numpy.tanh if isinstance(net[1], nn.Tanh) else jax.nn.silu
    linear = [layer for layer in net if isinstance(layer, nn.Linear)]
    weights = [tuple(jax.numpy.asarray(p.detach().numpy()) for p in layer.parameters()) for layer in linear]

    def f(_, y, weights):
        for i, (weight, bias) in enumerate(weights):
            y = y @ weight.T + bias
            y = act(y) if i < len(weights) - 1 else y
        return y

    return _diffrax(f, weights, y0, end, tolerance, train)


def diffrax_stiff(rate: Tensor, y0: Tensor, end: float, tolerance: float) -> Side | None:
    """diffrax's dopri5 on y' = −rate (y − cos t)."""
    if not (modules := installed("jax.numpy")):
        return None
    numpy = modules[0]
    return _diffrax(
        lambda t, y, rate: -rate * (y - numpy.cos(t)), numpy.asarray(rate.numpy()), y0, end, tolerance, train=False
    )


def _diffrax(f: Callable, args: object, y0: Tensor, end: float, tolerance: float, train: bool) -> Side | None:
    """A whole solve compiled, with the gradient of the mean square of its end if it trains."""
    if not (modules := installed("jax", "diffrax")):
        return None
    jax, diffrax = modules
    term, control = diffrax.ODETerm(f), diffrax.PIDController(rtol=tolerance, atol=tolerance)
    start = jax.numpy.asarray(y0.numpy())

    def loss(args):
        found = diffrax.diffeqsolve(term, diffrax.Dopri5(), 0.0, end, None, start, args, stepsize_controller=control)
        return (found.ys[-1] ** 2).mean(), found.stats["num_steps"]

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True) if train else loss)

    def side() -> int:
        found = jax.block_until_ready(compiled(args))
        return 6 * int(found[0][1] if train else found[1]) + 2

    return side
