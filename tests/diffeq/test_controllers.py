import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ndeflow.diffeq import ODE, Constant, Euler, Integrator
from ndeflow.diffeq.loop import plan
from ndeflow.diffeq.problem import Problem


def planned(controller, stops, resolution=0.0):
    """The times of all steps."""
    problem = Problem(
        eq=ODE(lambda t, y: y),
        solver=Euler(),
        controller=controller,
        y0=torch.ones(1, 1),
        ts=torch.tensor(stops, dtype=torch.float64),
        land=True,
        resolution=resolution,
        max_steps=10**6,
        record=False,
        dense=False,
        on_failure="raise",
    )
    script = plan(problem, controller)
    assert [mark.t1 for mark in script[:-1]] == [mark.t0 for mark in script[1:]]
    return [script[0].t0, *(mark.t1 for mark in script)]


def test_n_steps_of_one_nth_cover_the_unit_interval():
    assert [Constant(1 / n).cuts(0.0, 1.0, 0.0) for n in range(1, 201)] == list(range(1, 201))


def test_a_step_a_little_too_long_makes_one_more():
    assert Constant(0.1).cuts(0.0, 1.0 + 1e-7, 0.0) == 11
    assert Constant(0.1 - 1e-7).cuts(0.0, 1.0, 0.0) == 11


@pytest.mark.parametrize("n", [10, 30, 100, 1000])
@pytest.mark.parametrize("start", [0.0, 5.0, -1.0])
def test_times_rounded_to_float32_make_no_extra_steps(n, start):
    ts = torch.linspace(start, start + 1, n + 1)
    stats = Integrator(Euler(), Constant(1 / n))(ODE(lambda t, y: y), torch.ones(1, 1), ts).stats
    assert stats.accepted.tolist() == [n]
    exact = Integrator(Euler(), Constant(1 / n))(ODE(lambda t, y: y), torch.ones(1, 1), ts.double()).stats
    assert n <= exact.accepted.item() <= 2 * n


@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.floats(0.05, 1e4))
def test_steps_are_equal_monotone_and_not_too_long(t0, t1, dt):
    if abs(t1 - t0) < 1e-6:
        return
    times = planned(Constant(dt), [t0, t1])
    assert (times[0], times[-1]) == (t0, t1)
    sizes = torch.tensor(times, dtype=torch.float64).diff()
    assert (sizes.sign() == (1 if t1 > t0 else -1)).all()
    assert sizes.abs().max() <= dt * (1 + 2e-9) + 1e-12
    torch.testing.assert_close(sizes, sizes.mean().expand_as(sizes), rtol=1e-6, atol=1e-12)
    assert len(sizes) == 1 or abs(t1 - t0) / (len(sizes) - 1) >= dt * (1 - 1e-8)


def test_times_do_not_accumulate_rounding():
    times = planned(Constant(0.1), [0.0, 1e4])
    assert times[12345] == pytest.approx(1234.5, abs=3e-13)
    assert len(times) == 100_001


def test_without_dt_each_interval_is_one_step():
    assert planned(Constant(), [0.0, 1.0, 1.5]) == [0.0, 1.0, 1.5]


def test_each_span_is_cut_for_itself():
    assert planned(Constant(0.5), [1.0, 0.0, -0.6]) == [1.0, 0.5, 0.0, -0.3, -0.6]


@pytest.mark.parametrize("dt", [0, -0.1, float("nan"), float("inf")])
def test_a_step_size_must_be_positive_and_finite(dt):
    with pytest.raises(ValueError, match=r"finite dt > 0, got .*direction of time comes from the order of ts"):
        Constant(dt)


@pytest.mark.parametrize("dt", ["0.1", True, torch.tensor(0.1)])
def test_a_step_size_must_be_a_number(dt):
    with pytest.raises(TypeError, match="dt as a number or None"):
        Constant(dt)


@pytest.mark.parametrize("dt", [1e-5, 5e-324])
def test_more_steps_than_the_budget_are_refused_before_the_first(dt):
    calls = []
    with pytest.raises(
        ValueError, match=r"needs \d+ steps from t=0 to 1 .2 output times., max_steps is 4096: take larger"
    ):
        Integrator(Euler(), Constant(dt))(ODE(lambda t, y: calls.append(t) or y), torch.ones(1, 1), [0, 1])
    assert calls == []
    Integrator(Euler(), Constant(1e-4), max_steps=10_000)(ODE(lambda t, y: y), torch.ones(1, 1), [0, 1])
