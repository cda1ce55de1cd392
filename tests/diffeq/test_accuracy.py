"""Errors and costs on classical problems, beside SciPy's for the same pair and tolerance.

The fields are written once, for states (B, d); SciPy gets the same function on B = 1. References are DOP853 at 1e-13.
"""

import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from ndeflow.diffeq import ODE, PID, Bosh3, Dopri5, Dopri8, Integrator, Tsit5

PEER = {Dopri5: "RK45", Bosh3: "RK23"}
TOLERANCES = {
    Bosh3: (1e-3, 1e-4, 1e-5),
    Dopri5: (1e-4, 1e-6, 1e-8),
    Tsit5: (1e-4, 1e-6, 1e-8),
    Dopri8: (1e-6, 1e-8, 1e-10),
}
MASSES = torch.arange(1.0, 8.0, dtype=torch.float64)
# The antisymmetric part turns, the rest decays: eigenvalues −0.1 ± iω with ω up to about 2.8.
TURN = torch.randn(100, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 10
SLOPE = TURN - TURN.T - 0.1 * torch.eye(100, dtype=torch.float64)


def lotka_volterra(t, y):
    prey, hunters = y.unbind(-1)
    return torch.stack((1.5 * prey - prey * hunters, prey * hunters - 3 * hunters), -1)


def lorenz(t, y):
    a, b, c = y.unbind(-1)
    return torch.stack((10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c), -1)


def van_der_pol(t, y):
    x, v = y.unbind(-1)
    return torch.stack((v, (1 - x * x) * v - x), -1)


def brusselator(t, y):
    u, v = y.unbind(-1)
    return torch.stack((1 + u * u * v - 4 * u, 3 * u - u * u * v), -1)


def pleiades(t, y):
    """Seven stars in a plane: y = (x, y, x', y'), seven of each."""
    place = y[..., :14].unflatten(-1, (2, 7))
    away = place.unsqueeze(-2) - place.unsqueeze(-1)
    distance = away.square().sum(-3, keepdim=True).add(torch.eye(7, dtype=y.dtype)).sqrt()
    return torch.cat((y[..., 14:], (MASSES * away / distance**3).sum(-1).flatten(-2)), -1)


def oscillator(t, y):
    return torch.stack((y[..., 1], -y[..., 0]), -1)


def linear(t, y):
    return y @ SLOPE.T


def arenstorf(t, y):
    """A satellite between earth and moon, in their turning frame."""
    moon, earth = 0.012277471, 1 - 0.012277471
    x, y, u, v = y.unbind(-1)
    a, b = ((x + moon) ** 2 + y**2) ** 1.5, ((x - earth) ** 2 + y**2) ** 1.5
    return torch.stack(
        (
            u,
            v,
            x + 2 * v - earth * (x + moon) / a - moon * (x - earth) / b,
            y - 2 * u - earth * y / a - moon * y / b,
        ),
        -1,
    )


def rational(t, y):
    """y = (t / (t + 10), 10 t / (t + 10)²), a test problem of SciPy."""
    a, b = y.unbind(-1)
    return torch.stack((b / t, b * (a + 2 * b - 1) / (t * (a - 1))), -1)


# fmt: off
STARS = [3, 3, -1, -3, 2, -2, 2, 3, -3, 2, 0, 0, -4, 4, 0, 0, 0, 0, 0, 1.75, -1.5, 0, 0, 0, -1.25, 1, 0, 0]
# fmt: on
PROBLEMS = {  # start, and time
    lotka_volterra: ([10.0, 5.0], 10.0),
    lorenz: ([1.0, 1.0, 1.0], 3.0),
    van_der_pol: ([2.0, 0.0], 10.0),
    brusselator: ([1.5, 3.0], 20.0),
    pleiades: (STARS, 3.0),
    oscillator: ([1.0, 0.0], 10.0),
    linear: (torch.cos(torch.arange(100.0)).tolist(), 3.0),
    arenstorf: ([0.994, 0.0, 0.0, -2.00158510637908252240537862224], 17.0652165601579625588917206249),
}
ORDINARY = [f for f in PROBLEMS if f is not arenstorf]
named = pytest.mark.parametrize("field", ORDINARY, ids=lambda f: f.__name__)
paired = pytest.mark.parametrize("method", list(PEER), ids=lambda m: m.__name__)
each = pytest.mark.parametrize("method", list(TOLERANCES), ids=lambda m: m.__name__)


def scipys(field, method, tolerance):
    """SciPy's end of a problem, and its cost."""
    start, end = PROBLEMS[field]
    found = solve_ivp(
        lambda t, y: field(t, torch.from_numpy(y)).numpy(), (0, end), start, method, rtol=tolerance, atol=tolerance
    )
    return found.y[:, -1], found.nfev


@cache
def ours(field, method, tolerance, stepping="shared"):
    """The same of ours."""
    start, end = PROBLEMS[field]
    integrator = Integrator(method(), PID(tolerance, tolerance), max_steps=10**5, stepping=stepping)
    solution = integrator(ODE(field), torch.tensor([start], dtype=torch.float64), [0.0, end])
    return solution.ys[0, -1].numpy(), int(solution.stats.nfe)


@cache
def exact(field):
    return scipys(field, "DOP853", 1e-13)[0]


def misses(field, end):
    return np.abs(end - exact(field)).max()


def compare(field, method, tolerances):
    """At each tolerance: not less accurate than SciPy by more than a factor of 2, nor costlier by more than 5 %."""
    for tolerance in tolerances:
        (mine, cost), (its, its_cost) = ours(field, method, tolerance), scipys(field, PEER[method], tolerance)
        assert misses(field, mine) <= 2 * misses(field, its), tolerance
        assert cost <= 1.05 * its_cost, tolerance


def slope(field, method, tolerances):
    """The power of the tolerance with which the error falls."""
    errors = [misses(field, ours(field, method, tolerance)[0]) for tolerance in tolerances]
    return np.polyfit(np.log(tolerances), np.log(errors), 1)[0]


@named
@paired
def test_errors_and_costs_are_those_of_scipy(field, method):
    compare(field, method, TOLERANCES[method][1:])


@named
@each
def test_the_error_is_proportional_to_the_tolerance(field, method):
    assert 0.85 <= slope(field, method, TOLERANCES[method]) <= 1.35


@pytest.mark.slow
@named
@paired
def test_errors_and_costs_are_those_of_scipy_from_loose_to_tight(field, method):
    compare(field, method, np.logspace(-3, -6 if method is Bosh3 else -10, 7))


@pytest.mark.slow
@named
@each
def test_the_error_is_proportional_to_the_tolerance_from_loose_to_tight(field, method):
    loose, tight = {Bosh3: (-3, -7), Dopri8: (-5, -11)}.get(method, (-4, -10))
    assert 0.85 <= slope(field, method, np.logspace(loose, tight, 9)) <= 1.35


@pytest.mark.parametrize(("method", "gap"), [(Dopri5, 1e-5), (Tsit5, 1e-6), (Dopri8, 1e-6)])
def test_the_arenstorf_orbit_closes(method, gap):
    """At 1e-10 the gap is 3.3e-6 with Dopri5 (SciPy's the same), 4.9e-8 with Tsit5, 2.5e-7 with Dopri8."""
    end, _ = ours(arenstorf, method, 1e-10)
    assert np.abs(end - PROBLEMS[arenstorf][0]).max() < gap


@each
@pytest.mark.parametrize("end", [9.0, 1.0], ids=["forward", "backward"])
def test_outputs_within_steps_keep_to_the_tolerance(method, end):
    """SciPy asks the same of its own methods: at most 5 tolerances, at all outputs."""
    ts = torch.linspace(5.0, end, 9, dtype=torch.float64)
    y0 = torch.tensor([[1 / 3, 2 / 9]], dtype=torch.float64)
    solution = Integrator(method(), PID(rtol=1e-3, atol=1e-6))(ODE(rational), y0, ts)
    right = torch.stack((ts / (ts + 10), 10 * ts / (ts + 10) ** 2), -1)
    errors = (solution.ys[0] - right) / (1e-6 + 1e-3 * right.abs())
    assert errors.square().mean(-1).sqrt().max() < 5


@named
@each
def test_a_batch_of_one_takes_the_same_steps_per_sample(field, method):
    shared, own = (ours(field, method, TOLERANCES[method][0], stepping) for stepping in ("shared", "per_sample"))
    assert own[1] == shared[1]
    np.testing.assert_allclose(own[0], shared[0], rtol=1e-9, atol=1e-9)


def test_a_batch_in_shared_stepping_is_one_system():
    """SciPy on both samples as one state of four: the norm is over the batch."""
    starts = np.array([[10.0, 5.0], [1.0, 1.0]])
    solution = Integrator(Dopri5(), PID(1e-6, 1e-6))(ODE(lotka_volterra), torch.from_numpy(starts), [0.0, 10.0])
    its = solve_ivp(
        lambda t, y: lotka_volterra(t, torch.from_numpy(y.reshape(2, 2))).numpy().ravel(),
        (0, 10),
        starts.ravel(),
        rtol=1e-6,
        atol=1e-6,
    )
    assert solution.stats.nfe.tolist() == [its.nfev] * 2
    np.testing.assert_allclose(solution.ys[:, -1].numpy(), its.y[:, -1].reshape(2, 2), rtol=1e-8)


def test_the_linear_reference_is_the_matrix_exponential():
    """That a reference by DOP853 can be trusted, where something better is known."""
    start, end = PROBLEMS[linear]
    right = torch.linalg.matrix_exp(end * SLOPE) @ torch.tensor(start, dtype=torch.float64)
    np.testing.assert_allclose(exact(linear), right.numpy(), atol=1e-11)
    assert math.isclose(exact(oscillator)[0], math.cos(10.0), abs_tol=1e-11)
