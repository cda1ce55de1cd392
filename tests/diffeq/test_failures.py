"""A failed solve says for which sample, where, probably why, and what to do."""

import re

import pytest
import torch

from ndeflow.diffeq import ODE, RK4, Constant, Heun, Integrator, Midpoint, SolverError

RATES = torch.tensor([[0.1], [0.1], [40.0], [60.0]])


def explosive(t, y, a):
    """y' = a y²: y = 1/(1/y₀ − a t) blows up at t = 1/(a y₀)."""
    return a * y**2


def message(solver, eq, y0, ts, dt=0.1):
    with pytest.raises(SolverError) as caught:
        Integrator(solver, Constant(dt))(eq, y0, ts)
    return str(caught.value)


def test_a_blow_up_names_solver_sample_time_cost_and_cause(solver):
    text = message(solver, ODE(explosive, RATES), torch.ones(4, 1), [0.0, 0.2, 1.0])
    assert text.startswith(f"{type(solver).__name__}: sample ")
    assert "2 samples failed" in text
    assert "too stiff for this step, or the solution itself blows up" in text
    assert "on_failure='nan'" in text
    sample, t, steps, nfe = re.findall(r"sample (\d) of 4 .* t=(\S+) of .*\((\d+) accepted.* NFE (\d+)", text)[0]
    assert int(sample) in (2, 3)
    assert int(steps) == round(float(t) / 0.1)
    calls = []
    counted = ODE(lambda t, y: calls.append(t) or y)
    Integrator(solver, Constant(0.1))(counted, torch.ones(1, 1), [0.0, int(steps) / 10])
    assert int(nfe) == len(calls)


def test_the_failing_step_is_the_first_bad_one_of_a_step_by_step_solve():
    eq, y = ODE(explosive, RATES), torch.ones(4, 1)
    for i in range(100):
        before, y = y, Integrator(Heun(), Constant(), on_failure="nan")(eq, y, [i / 100, (i + 1) / 100]).ys[:, -1]
        if y.isnan().any():
            break
    text = message(Heun(), eq, torch.ones(4, 1), [0.0, 0.02, 1.0], dt=0.01)
    assert f"at t={(i + 1) / 100:g} of [0, 1]" in text
    assert f"({i + 1} accepted" in text
    assert f"|y| {before[3].item():.3g}" in text
    assert "last dt 0.01" in text


def test_backward_in_time_dt_is_negative():
    eq = ODE(lambda t, y: -(y**2))
    assert "last dt -0.1" in message(Heun(), eq, 30 * torch.ones(1, 1), [1.0, 0.0])


@pytest.mark.parametrize("hole", [lambda t: torch.log(0.55 - t), lambda t: torch.where(t > 0.55, torch.inf, 1.0)])
def test_a_hole_in_the_field_is_told_from_a_blow_up(solver, hole):
    text = message(solver, ODE(lambda t, y: -y + 0.1 * hole(t)), torch.ones(2, 1), [0.0, 0.4, 1.0])
    assert "the field is not finite at a state of ordinary size; look for a division, log" in text
    assert re.search(r"t=0\.[67] of", text)


def test_a_random_failure_is_called_random():
    calls = []

    def flaky(t, y):
        calls.append(t)
        return y * (torch.nan if len(calls) == 5 else 1.0)

    text = message(RK4(), ODE(flaky), torch.ones(2, 1), [0.0, 0.5, 1.0])
    assert "2 of 2 samples, first sample 0, are not finite, yet the same steps made again are" in text
    assert "the field is random" in text


def test_a_field_that_is_not_finite_at_an_output_whose_time_has_a_gradient():
    ts = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    eq = ODE(lambda t, y: y / (1 - t).clamp(min=0))
    text = message(Midpoint(), eq, torch.ones(1, 1), ts, dt=1.0)
    assert "where ts requires gradients, not finite at an output time" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_failed_samples_turn_nan_and_the_others_stay(dtype):
    y0, ts, alive = torch.ones(4, 1, dtype=dtype), [0.0, 0.2, 1.0], [0, 1]
    ys = Integrator(Heun(), Constant(0.1), on_failure="nan")(ODE(explosive, RATES), y0, ts).ys
    alone = Integrator(Heun(), Constant(0.1))(ODE(explosive, RATES[alive]), y0[alive], ts).ys
    assert torch.equal(ys[alive], alone)
    assert ys[2:].isnan().all()
