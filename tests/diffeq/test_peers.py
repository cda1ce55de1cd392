"""The answers of torchdiffeq: to rounding where the steps are the same, else to the tolerance."""

import pytest
import torch
import torchdiffeq

from ndeflow.diffeq import ODE, PID, RK38, Bosh3, Constant, Dopri5, Dopri8, Euler, Heun, Integrator, Midpoint

ADAPTIVE = [(Dopri5(shampine=True), "dopri5"), (Bosh3(), "bosh3"), (Dopri8(), "dopri8")]
FIXED = [(Euler(), "euler"), (Midpoint(), "midpoint"), (Heun(), "heun2"), (RK38(), "rk4")]  # its "rk4" is the 3/8 rule
adaptive = pytest.mark.parametrize(("method", "name"), ADAPTIVE, ids=[name for _, name in ADAPTIVE])
directed = pytest.mark.parametrize("forward", [True, False], ids=["forward", "backward"])


class Field(torch.nn.Module):
    """Counts its calls."""

    def __init__(self):
        super().__init__()
        made = torch.Generator().manual_seed(1)
        self.weight = torch.nn.Parameter(torch.randn(3, 3, generator=made, dtype=torch.float64))
        self.calls = 0

    def forward(self, t, y):
        self.calls += 1
        return torch.tanh(y @ self.weight) * torch.cos(t) - 0.3 * y


START = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def both(solver, controller, name, times, forward, landing="auto", **options):
    """Outputs (B, T, 3), gradients and field calls of ours and of torchdiffeq's."""
    ts = torch.tensor(times if forward else times[::-1], dtype=torch.float64)
    found = []
    for its in (False, True):
        field, y0 = Field(), START.clone().requires_grad_()
        if its:
            ys = torchdiffeq.odeint(field, y0, ts, method=name, **options).transpose(0, 1)
        else:
            ys = Integrator(solver, controller, landing=landing)(ODE(field), y0, ts).ys
        gradients = torch.autograd.grad(ys[:, 1:].square().sum(), (y0, field.weight))
        found.append((ys.detach(), gradients, field.calls))
    return found


def check_equal(mine, its, tolerance):
    torch.testing.assert_close(mine[0], its[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(mine[1], its[1], rtol=10 * tolerance, atol=10 * tolerance)


@directed
@adaptive
def test_equal_steps_give_equal_states_gradients_and_costs(method, name, forward):
    """Steps of 1/8, which no error shortens and no rounding splits, and outputs at their ends."""
    times = [0.0, 0.25, 1.0, 2.5]
    steps = {"first_step": 1 / 8, "max_step": 1 / 8, "step_t": torch.tensor(times[1:] if forward else times[2::-1])}
    mine, its = both(
        method,
        PID(1.0, 1.0, dt0=1 / 8, dt_max=1 / 8),
        name,
        times,
        forward,
        landing="step",
        rtol=1.0,
        atol=1.0,
        options=steps,
    )
    check_equal(mine, its, 1e-12)
    assert mine[2] == its[2]


@directed
def test_outputs_within_the_steps_of_dopri5_are_equal(forward):
    mine, its = both(
        Dopri5(shampine=True),
        PID(1.0, 1.0, dt0=1 / 8, dt_max=1 / 8),
        "dopri5",
        [0.0, 0.3, 0.33, 1.0, 2.5],
        forward,
        rtol=1.0,
        atol=1.0,
        options={"first_step": 1 / 8, "max_step": 1 / 8},
    )
    check_equal(mine, its, 1e-12)


@directed
@adaptive
@pytest.mark.parametrize("tolerance", [1e-5, 1e-8])
def test_own_steps_give_the_same_answers(method, name, tolerance, forward):
    """Its interpolants of bosh3 and dopri8 lose up to a thousand tolerances, so it lands on the outputs here."""
    times = [0.0, 0.3, 1.0, 2.5]
    stops = {"step_t": torch.tensor(times[1:] if forward else times[2::-1], dtype=torch.float64)}
    mine, its = both(
        method, PID(tolerance, tolerance), name, times, forward, rtol=tolerance, atol=tolerance, options=stops
    )
    check_equal(mine, its, 30 * tolerance)


@directed
@pytest.mark.parametrize("dt", [0.1, None])
@pytest.mark.parametrize(("method", "name"), FIXED, ids=[name for _, name in FIXED])
def test_equal_steps_of_a_given_size_give_equal_states(method, name, dt, forward):
    times = [0.0, 0.3, 1.0, 2.5]
    mine, its = both(method, Constant(dt), name, times, forward, options={"step_size": dt} if dt else {})
    check_equal(mine, its, 1e-12)
    assert mine[2] == its[2]
