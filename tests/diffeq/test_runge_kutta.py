"""Numerics of single methods against theory and against other libraries."""

from functools import cache

import numpy as np
import pytest
import scipy.integrate
import torch
import torchdiffeq

from ndeflow.diffeq import ODE, RK4, RK38, Bosh3, Dopri5, Dopri8, Euler, Heun, Midpoint, Ralston, Tsit5
from ndeflow.diffeq.solvers.runge_kutta import _nodes

TWINS = {RK4(): (1, 2), Dopri5(): (5, 6), Dopri5(True): (5, 6), Tsit5(): (5, 6), Dopri8(): (12, 13)}


def forced(t, y):
    """y' = (y₂ + 0.2 cos(t) y₁, −sin y₁)."""
    return torch.stack((y[:, 1] + 0.2 * torch.cos(t) * y[:, 0], -torch.sin(y[:, 0])), dim=1)


def driven(t, y):
    """y' = (y₂ cos t − ½y₁², −y₁ + 0.3 sin 2t · y₂)."""
    first = y[:, 1] * torch.cos(t) - 0.5 * y[:, 0] ** 2
    return torch.stack((first, -y[:, 0] + 0.3 * torch.sin(2 * t) * y[:, 1]), dim=1)


PROBLEMS = [(forced, (1.0, 0.0), (20, 40, 80)), (driven, (1.0, 0.5), (20, 40, 80, 160))]
both_problems = pytest.mark.parametrize(("f", "y0", "counts"), PROBLEMS, ids=["forced", "driven"])


def in_numpy(f):
    return lambda t, y: f(torch.tensor(t, dtype=torch.float64), torch.from_numpy(y)[None])[0].numpy()


@cache
def reference(f, y0):
    """State at t = 2."""
    return scipy.integrate.solve_ivp(in_numpy(f), (0, 2), y0, method="DOP853", rtol=1e-13, atol=1e-14).y[:, -1]


def float64(values):
    return torch.as_tensor(values, dtype=torch.float64)


def steps(solver, f, y0, ts):
    """Finished steps from time to time, each as (t0, dt, y0, step)."""
    eq, ts = ODE(f), float64(ts)
    state = solver.init(eq, ts[0], y0)
    for t0, dt in zip(ts[:-1], ts.diff(), strict=True):
        step = solver.finish(eq, t0, dt, y0, solver.step(eq, t0, dt, y0, state))
        yield t0, dt, y0, step
        y0 = step.y1
        state = solver.init(eq, t0 + dt, y0) if step.state is None else step.state


def solve(solver, f, y0, ts):
    """States of one sample at all times."""
    y0 = float64(y0)[None]
    return torch.cat([y0, *(step.y1 for *_, step in steps(solver, f, y0, ts))])


def one_step(solver, f, t0, dt, y0):
    return next(steps(solver, f, y0, [t0, t0 + dt]))[-1]


def slope(sizes, errors):
    return np.polyfit(np.log(sizes), np.log(errors), 1)[0]


@both_problems
def test_errors_fall_with_the_order(solver, f, y0, counts):
    exact = reference(f, y0)
    counts = (3, 6, 12) if solver.order == 8 else counts  # more steps, and rounding is all that is left
    errors = [np.abs(solve(solver, f, y0, np.linspace(0, 2, n + 1))[-1].numpy() - exact).max() for n in counts]
    measured = -slope(counts, errors)
    assert measured >= solver.order - 0.15
    if solver.order in (1, 2, 4):  # where the asymptotic range is reached, it is no higher either
        assert measured <= solver.order + 0.15


@both_problems
def test_error_estimates_fall_with_their_order(solver, f, y0, counts):
    sizes = 2.0 ** -np.arange(1.5, 4.1, 0.5) if solver.order == 8 else 2.0 ** -np.arange(3, 9)
    errors = [one_step(solver, f, 0.3, dt, float64([y0])).error for dt in sizes]
    if solver.error_order is None:
        assert errors == [None] * len(sizes)
    else:
        excess = slope(sizes, [e.norm().item() for e in errors]) - (solver.error_order + 1)
        assert -0.15 <= excess <= (0.5 if solver.order == 8 else 0.15)  # rounding hides the asymptotic range of order 8


def test_errors_between_the_ends_fall_with_the_order_of_the_interpolant(solver):
    """On y' = −2ty², y = 1/(1 + t²), over two units of time."""
    theta, counts, errors = float64([0.3, 0.5, 0.7]), (20, 40, 80), []
    for n in counts:
        walk = steps(
            solver, lambda t, y: -2 * t * y**2, torch.ones(1, 1, dtype=torch.float64), np.linspace(0, 2, n + 1)
        )
        worst = 0.0
        for t0, dt, y0, step in walk:
            terms = [c * theta**j for j, c in enumerate(solver.polynomial(step), start=1)]
            worst = max(worst, (y0 + sum(terms) - 1 / (1 + (t0 + theta * dt) ** 2)).abs().max().item())
        errors.append(worst)
    assert -slope(counts, errors) >= min(solver.order, solver.interpolation_order + 1) - 0.15


@pytest.mark.parametrize(
    ("ours", "theirs"), [(Euler(), "euler"), (Midpoint(), "midpoint"), (Heun(), "heun2"), (RK38(), "rk4")], ids=repr
)
@pytest.mark.parametrize("ts", [[0.0, 0.1, 0.25, 0.7, 1.0], [1.0, 0.6, 0.55, 0.0]], ids=["forward", "backward"])
def test_methods_equal_those_of_torchdiffeq(ours, theirs, ts):
    other = torchdiffeq.odeint(driven, float64([[1.0, 0.5]]), float64(ts), method=theirs)
    torch.testing.assert_close(solve(ours, driven, (1.0, 0.5), ts), other[:, 0], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(Bosh3(), scipy.integrate.RK23), (Dopri5(), scipy.integrate.RK45)], ids=repr
)
def test_pairs_equal_those_of_scipy(ours, theirs):
    """Solution, error estimate and interpolant of one step."""
    y0, h = np.array([1.0, 0.5]), 0.2
    other = theirs(in_numpy(driven), 0.3, y0, 2.0, first_step=h, rtol=1e3, atol=1e3)
    other.step()
    step = one_step(ours, driven, 0.3, h, float64(y0)[None])
    np.testing.assert_allclose(step.y1[0], other.y, rtol=1e-14)
    np.testing.assert_allclose(step.error[0], -h * other.K.T @ other.E, atol=1e-15)
    for theta in (0.0, 0.25, 0.6, 1.0):
        inside = y0 + sum(c[0].numpy() * theta**j for j, c in enumerate(ours.polynomial(step), start=1))
        np.testing.assert_allclose(inside, other.dense_output()(0.3 + theta * h), rtol=1e-13)


def test_the_estimate_of_shampine_is_two_thirds_of_the_default():
    y0 = float64([[1.0, 0.5]])
    default, other = (one_step(Dopri5(choice), driven, 0.3, 0.2, y0) for choice in (False, True))
    assert torch.equal(default.y1, other.y1)
    torch.testing.assert_close(other.error, default.error * 2 / 3, rtol=1e-9, atol=0)


def test_a_choice_of_the_estimate_is_a_bool():
    with pytest.raises(TypeError, match="Dopri5 takes shampine=True or False, got 'no'"):
        Dopri5("no")


@pytest.mark.parametrize(
    ("method", "rule", "per_step"),
    [(Heun(), scipy.integrate.trapezoid, 1), (RK4(), scipy.integrate.simpson, 2)],
    ids=["trapezoid", "simpson"],
)
def test_a_field_of_time_alone_gives_the_quadrature_rule(method, rule, per_step):
    ys = solve(method, lambda t, y: torch.exp(-t) * torch.cos(3 * t) + 0 * y, (0.0,), np.linspace(0, 2, 9))
    x = np.linspace(0, 2, 8 * per_step + 1)
    assert ys[-1].item() == pytest.approx(rule(np.exp(-x) * np.cos(3 * x), x=x), rel=1e-13)


def test_ralston_alone_of_its_order_integrates_parabolas():
    """Which fixes its node: b₂c₂ = ½ and b₂c₂² = ⅓."""
    ends = [solve(method, lambda t, y: t**2 + 0 * y, (0.0,), [0.0, 3.0])[-1] for method in (Ralston(), Heun())]
    assert [y.item() for y in ends] == pytest.approx([9.0, 13.5], rel=1e-15)


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

    *_, (_, _, _, last) = steps(solver, field, torch.zeros(1, 1), np.linspace(1e6, 1e6 + 1e-2, 11))
    assert last.y1.item() == pytest.approx(1e-2, rel=1e-6)
    assert {t.dtype for t in seen} == {torch.float32}


def test_stage_times_are_the_exact_ones_rounded_once():
    """16777217 and 16777219.5 are no float32: rounding before the sum gives another second stage."""
    seen, eq, y0 = [], ODE(lambda t, y: seen.append(t.item()) or y), torch.ones(1, 1)
    t0, dt = float64(16777217.0), float64(5.0)
    RK4().step(eq, t0, dt, y0, RK4().init(eq, t0, y0))
    assert seen == [float(np.float32(t)) for t in (16777217.0, 16777219.5, 16777219.5, 16777222.0)]


def test_nodes_are_copied_to_a_device_once():
    _nodes.cache_clear()
    solve(RK4(), driven, (1.0, 0.5), np.linspace(0, 1, 11))
    assert _nodes.cache_info()[:2] == (9, 1)


def stiffness(solver, f, dt, y0):
    return solver.stiffness(float64(dt), y0, one_step(solver, f, 0.0, dt, y0))


@pytest.mark.parametrize("rate", [30.0, 200.0])
@pytest.mark.parametrize(("dtype", "sign"), [(torch.float64, 1), (torch.float64, -1), (torch.complex128, 1)])
def test_stiffness_is_the_rate_of_a_decay_over_the_stability_size(solver, rate, dtype, sign):
    """Forward in time, or backward in time with a field of the other sign."""
    y0 = torch.ones(2, 2, dtype=dtype)
    found = stiffness(solver, lambda t, y: -sign * y * float64([1.0, rate]), sign * 0.8 / rate, y0)
    if solver.tableau.twins is None:
        assert found is None
    else:
        torch.testing.assert_close(found, float64([rate / solver.stability_size] * 2), rtol=1e-6, atol=0)


def test_the_methods_with_a_stiffness_estimate_are_known(solver):
    assert solver.tableau.twins == TWINS.get(solver)


@pytest.mark.parametrize("solver_of_twins", TWINS, ids=repr)
def test_stiffness_is_0_with_gradient_0_where_the_stages_agree(solver_of_twins):
    """In one sample of the batch, or in a step of size zero; in none of them may a NaN spoil the gradients."""
    y0, speed = float64([[0.3], [0.7]]).requires_grad_(), float64([[0.0], [1.0]])
    for dt in (0.1, 0.0):
        found = stiffness(solver_of_twins, lambda t, y: 0.7 - speed * y**2, dt, y0)
        (grad,) = torch.autograd.grad(found.sum(), y0)
        assert found[0] == grad[0] == 0
        assert (found[1] > 0 and grad[1] != 0) if dt else found[1] == grad[1] == 0


@pytest.mark.parametrize("solver_of_twins", TWINS, ids=repr)
def test_stiffness_is_differentiable(solver_of_twins):
    y0, dt = float64([[0.3, -0.8], [1.1, 0.2]]).requires_grad_(), float64(0.4).requires_grad_()

    def estimate(y0, dt):
        eq = ODE(driven)
        step = solver_of_twins.step(eq, float64(0.2), dt, y0, solver_of_twins.init(eq, float64(0.2), y0))
        return solver_of_twins.stiffness(dt, y0, step)

    assert torch.autograd.gradcheck(estimate, (y0, dt))


@pytest.mark.parametrize("solver_of_twins", TWINS, ids=repr)
def test_stiffness_belongs_to_a_sample_alone(solver_of_twins):
    torch.manual_seed(0)
    y0 = torch.randn(9, 2, dtype=torch.float64)
    together = stiffness(solver_of_twins, driven, 0.3, y0)
    alone = [stiffness(solver_of_twins, driven, 0.3, y0[i : i + 1]) for i in range(9)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-9, atol=0)
    assert together.unique().numel() == 9


@pytest.mark.parametrize("solver_of_twins", TWINS, ids=repr)
def test_stiffness_of_a_tiny_step_is_not_rounding_over_nothing(solver_of_twins):
    """Stages that differ by less than the spacing of float32 around their states read as equal, or at their rate."""
    torch.manual_seed(0)
    found = stiffness(solver_of_twins, lambda t, y: -2 * y, 1e-3, 1 + torch.rand(64, 4))
    assert found.max() < 10
