"""What a solve returns, records and costs."""

import pytest
import scipy.integrate
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ndeflow.diffeq import ODE, RK4, Constant, Euler, Heun, Integrator, Midpoint


def swing(t, y):
    return torch.stack((y[:, 1], -torch.sin(y[:, 0]) - 0.1 * t * y[:, 1]), dim=1)


START = torch.tensor([[1.0, 0.0], [0.2, 0.5], [-2.0, 0.1]], dtype=torch.float64)


@pytest.mark.parametrize("ts", [[0.0, 0.3, 1.0, 2.5], [2.5, 1.1, 0.0], [-1.0, 1.0]], ids=["forward", "backward", "two"])
def test_outputs_are_those_of_scipy(ts):
    ys = Integrator(RK4(), Constant(0.01))(ODE(swing), START, ts).ys
    assert ys.shape == (3, len(ts), 2)
    for start, mine in zip(START, ys, strict=True):
        exact = scipy.integrate.solve_ivp(
            lambda t, y: swing(t, torch.from_numpy(y)[None])[0].numpy(),
            (ts[0], ts[-1]),
            start.numpy(),
            t_eval=ts,
            rtol=1e-11,
            atol=1e-12,
        ).y.T
        torch.testing.assert_close(mine, torch.from_numpy(exact), rtol=1e-7, atol=1e-7)


def test_an_output_is_a_landing_not_an_interpolation():
    ts = torch.linspace(0, 1, 5, dtype=torch.float64)
    all_at_once = Integrator(Heun(), Constant())(ODE(swing), START, ts).ys
    y = START
    for i in range(4):
        y = Integrator(Heun(), Constant())(ODE(swing), y, ts[i : i + 2]).ys[:, -1]
        assert torch.equal(all_at_once[:, i + 1], y)
    assert torch.equal(all_at_once[:, 0], START)


@pytest.mark.parametrize("shape", [(2, 1), (2, 3, 4, 4), (0, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_a_solution_keeps_shape_and_dtype_of_the_state(shape, dtype):
    solution = Integrator(Euler(), Constant(0.5))(ODE(lambda t, y: -y), torch.ones(shape, dtype=dtype), [0, 1, 2])
    assert solution.ys.shape == (shape[0], 3, *shape[1:])
    assert solution.ys.dtype == dtype
    assert solution.ts.tolist() == [0.0, 1.0, 2.0]
    assert solution.steps is None


def test_stats_count_what_was_called(solver):
    calls = []
    eq = ODE(lambda t, y: calls.append(t) or -y)
    stats = Integrator(solver, Constant(0.1))(eq, torch.ones(3, 1), [0.0, 0.35, 1.0]).stats
    assert all(x.dtype == torch.int64 for x in stats)
    assert stats.accepted.tolist() == [4 + 7] * 3
    assert stats.nfe.tolist() == [len(calls)] * 3
    assert stats.rejected.tolist() == stats.nfe_backward.tolist() == [0] * 3
    stats.nfe_backward[0] += 1
    assert stats.nfe_backward.tolist() == [1, 0, 0]


def test_recorded_steps_say_where_they_were(solver):
    solution = Integrator(solver, Constant(0.25))(ODE(swing), START, [1.0, 0.5, 0.0], record=True)
    steps = solution.steps
    assert steps.t.shape == steps.dt.shape == steps.accepted.shape == (4, 3)
    torch.testing.assert_close(steps.t[:, 0], torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64))
    torch.testing.assert_close(steps.dt, torch.full((4, 3), -0.25, dtype=torch.float64))
    assert steps.accepted.all()
    assert steps.error is None
    assert (steps.raw_error is None) == (solver.error_order is None)
    plain = Integrator(solver, Constant(0.25))(ODE(swing), START, [1.0, 0.5, 0.0])
    assert torch.equal(plain.ys, solution.ys)


@pytest.mark.parametrize("method", [Heun(), Midpoint()], ids=["Heun", "Midpoint"])
def test_the_raw_error_is_the_distance_from_euler(method):
    """The embedded formula of both is Euler's, so the estimate is known from another solver."""
    ts = [0.0, 0.2]
    second = Integrator(method, Constant())(ODE(swing), START, ts, record=True)
    first = Integrator(Euler(), Constant())(ODE(swing), START, ts)
    rms = (second.ys - first.ys)[:, -1].square().mean(1).sqrt()
    torch.testing.assert_close(second.steps.raw_error[0], rms)


def test_recorded_errors_are_differentiable_even_where_they_vanish():
    rate = torch.zeros(2, 1, dtype=torch.float64)
    rate[1] = 1.0
    rate.requires_grad_()
    integrator = Integrator(Heun(), Constant(0.5))
    solution = integrator(ODE(lambda t, y, a: a * y, rate), torch.ones(2, 1, dtype=torch.float64), [0, 1], record=True)
    error = solution.steps.raw_error
    assert error[0, 0] == 0
    error.sum().backward()
    assert rate.grad[0] == 0
    # The first step has error ½(a/2)², the second the same times the growth 1 + a/2 + a²/8 at a = 1.
    assert rate.grad[1].item() == pytest.approx(0.25 + 0.25 * 1.625 + 0.125 * 0.75)


class Syncs(TorchDispatchMode):
    """Counts how often a value leaves a tensor, which is where a GPU would be waited for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def syncs(solver, field, steps):
    with Syncs() as mode:
        Integrator(solver, Constant(1 / steps))(ODE(field), torch.ones(2, 1), [0.0, 1.0], record=True)
    return mode.count


def test_the_number_of_syncs_does_not_grow_with_steps(solver):
    assert syncs(solver, torch.sub, 5) == syncs(solver, torch.sub, 50) <= 3


def test_the_sync_counter_sees_a_sync():
    def waiting(t, y):
        return -y * float(t)

    assert syncs(Euler(), waiting, 50) == syncs(Euler(), waiting, 5) + 45
