"""Numerics of single methods against theory and against other libraries."""

import numpy as np
import pytest
import scipy.integrate
import torch
import torchdiffeq

from ndeflow.diffeq import ODE, RK4, Constant, Euler, Heun, Integrator, Midpoint
from ndeflow.diffeq.solvers.runge_kutta import _nodes


def forced(t, y):
    """y' = (y₂ + 0.2 cos(t) y₁, −sin y₁)."""
    return torch.stack((y[:, 1] + 0.2 * torch.cos(t) * y[:, 0], -torch.sin(y[:, 0])), dim=1)


def driven(t, y):
    """y' = (y₂ cos t − ½y₁², −y₁ + 0.3 sin 2t · y₂)."""
    first = y[:, 1] * torch.cos(t) - 0.5 * y[:, 0] ** 2
    return torch.stack((first, -y[:, 0] + 0.3 * torch.sin(2 * t) * y[:, 1]), dim=1)


PROBLEMS = [(forced, (1.0, 0.0), (20, 40, 80)), (driven, (1.0, 0.5), (20, 40, 80, 160))]


def reference(f, y0, t1):
    def numpy_field(t, y):
        return f(torch.tensor(t, dtype=torch.float64), torch.from_numpy(y)[None])[0].numpy()

    return scipy.integrate.solve_ivp(numpy_field, (0, t1), y0, method="DOP853", rtol=1e-13, atol=1e-14).y[:, -1]


def solve(solver, f, y0, ts, dt=None):
    start = torch.tensor([y0], dtype=torch.float64)
    return Integrator(solver, Constant(dt))(ODE(f), start, ts).ys[0]


@pytest.mark.parametrize(("f", "y0", "counts"), PROBLEMS, ids=["forced", "driven"])
def test_errors_fall_with_the_order(solver, f, y0, counts):
    exact = reference(f, y0, 2.0)
    errors = [np.abs(solve(solver, f, y0, [0.0, 2.0], 2 / n)[-1].numpy() - exact).max() for n in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope >= solver.order - 0.15
    if solver.order in (1, 2, 4):  # where the asymptotic range is reached, it is no higher either
        assert slope <= solver.order + 0.15


@pytest.mark.parametrize(("f", "y0", "counts"), PROBLEMS, ids=["forced", "driven"])
def test_error_estimates_fall_with_their_order(solver, f, y0, counts):
    sizes = torch.tensor([2.0**-i for i in range(3, 9)], dtype=torch.float64)
    y = torch.tensor([y0], dtype=torch.float64)
    t = torch.tensor(0.3, dtype=torch.float64)
    errors = [solver.step(ODE(f), t, dt, y, solver.init(ODE(f), t, y)).error for dt in sizes]
    if solver.error_order is None:
        assert errors == [None] * len(sizes)
    else:
        slope = np.polyfit(np.log(sizes.numpy()), [e.norm().log().item() for e in errors], 1)[0]
        assert slope == pytest.approx(solver.error_order + 1, abs=0.15)


def test_the_stability_size_is_where_decay_turns_into_growth(solver):
    rate = torch.linspace(-8, 0, 80001, dtype=torch.float64)[:-1, None]
    eq, y0, t0 = ODE(lambda t, y, a: a * y, rate), torch.ones_like(rate), torch.zeros((), dtype=torch.float64)
    growth = solver.step(eq, t0, torch.ones_like(t0), y0, solver.init(eq, t0, y0)).y1.abs()
    unstable = rate[growth > 1 + 1e-12]
    assert -unstable.max().item() == pytest.approx(solver.stability_size, abs=1e-3)


@pytest.mark.parametrize(("ours", "theirs"), [(Euler(), "euler"), (Midpoint(), "midpoint"), (Heun(), "heun2")])
@pytest.mark.parametrize("ts", [[0.0, 0.1, 0.25, 0.7, 1.0], [1.0, 0.6, 0.55, 0.0]], ids=["forward", "backward"])
def test_methods_equal_those_of_torchdiffeq(ours, theirs, ts):
    mine = solve(ours, driven, (1.0, 0.5), ts)
    grid = torch.tensor(ts, dtype=torch.float64)
    other = torchdiffeq.odeint(driven, torch.tensor([[1.0, 0.5]], dtype=torch.float64), grid, method=theirs)
    torch.testing.assert_close(mine, other[:, 0], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(
    ("method", "rule", "per_step"),
    [(Heun(), scipy.integrate.trapezoid, 1), (RK4(), scipy.integrate.simpson, 2)],
    ids=["trapezoid", "simpson"],
)
def test_a_field_of_time_alone_gives_the_quadrature_rule(method, rule, per_step):
    ys = solve(method, lambda t, y: torch.exp(-t) * torch.cos(3 * t) + 0 * y, (0.0,), [0.0, 2.0], 0.25)
    x = np.linspace(0, 2, 8 * per_step + 1)
    assert ys[-1].item() == pytest.approx(rule(np.exp(-x) * np.cos(3 * x), x=x), rel=1e-13)


def test_rk4_is_the_classical_method():
    """Methods of order 4 differ in Δt⁵; the number is one step on y' = y² in exact fractions."""
    y1 = solve(RK4(), lambda t, y: y**2, (1.0,), [0.0, 0.5])[-1].item()
    assert y1 == pytest.approx(1601314529 / 805306368, rel=1e-15)


def test_times_are_computed_in_float64_and_cast_after_the_sum(solver):
    """In float32, 10⁶ + 10⁻³ is 10⁶: the steps must not vanish, nor the increments."""
    seen = []

    def field(t, y):
        seen.append(t)
        return torch.ones_like(y)

    ys = Integrator(solver, Constant(1e-3))(ODE(field), torch.zeros(1, 1), [1e6, 1e6 + 1e-2]).ys
    assert ys[0, -1, 0].item() == pytest.approx(1e-2, rel=1e-6)
    assert {t.dtype for t in seen} == {torch.float32}


def test_stage_times_are_the_exact_ones_rounded_once():
    """16777217 and 16777219.5 are no float32: rounding before the sum gives another second stage."""
    t0, dt = torch.tensor(16777217.0, dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64)
    seen = []
    RK4().step(ODE(lambda t, y: seen.append(t.item()) or y), t0, dt, torch.ones(1, 1), None)
    assert seen == [float(np.float32(t)) for t in (16777217.0, 16777219.5, 16777219.5, 16777222.0)]


def test_nodes_are_copied_to_a_device_once():
    _nodes.cache_clear()
    solve(RK4(), driven, (1.0, 0.5), [0.0, 1.0], 0.1)
    assert _nodes.cache_info()[:2] == (9, 1)
