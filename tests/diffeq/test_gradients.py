import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import hessian, jacobian

from ndeflow.diffeq import ODE, RK4, Backprop, Constant, Euler, Gradient, Heun, Integrator

START = torch.tensor([[1.0], [0.5]], dtype=torch.float64)


def leaf(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def field(t, y, a):
    return torch.sin(a * y) + torch.cos(t) * y


def test_gradients_of_state_and_args_equal_finite_differences(solver):
    integrator = Integrator(solver, Constant(0.3), Backprop())

    def outputs(y0, a):
        return integrator(ODE(field, a), y0, [0.0, 0.5, 1.0]).ys

    assert gradcheck(outputs, (START.clone().requires_grad_(), leaf([0.7], [1.3])))


def test_second_derivatives_equal_finite_differences():
    def outputs(y0, a):
        return Integrator(Heun(), Constant(0.5))(ODE(field, a), y0, [0.0, 1.0]).ys

    assert gradgradcheck(outputs, (START.clone().requires_grad_(), leaf([0.7], [1.3])))


def test_gradients_reach_parameters_and_closures():
    net, shift = nn.Linear(1, 1, dtype=torch.float64), leaf(0.1)
    Integrator(Euler(), Constant(0.5))(ODE(lambda t, y: net(y) + shift), START, [0, 1]).ys.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in (*net.parameters(), shift))


def test_the_gradient_of_decay_is_the_closed_form():
    rate = leaf([1.5])
    y1 = Integrator(RK4(), Constant(0.005))(ODE(lambda t, y, a: -a * y, rate), START[:1], [0, 1]).ys[0, -1]
    y1.sum().backward()
    assert rate.grad.item() == pytest.approx(-torch.exp(-rate).item(), rel=1e-9)


def rational(t, y):
    """y' = ¼ cos(t) y², solved by 1/y = 1/y₀ − ¼(sin t − sin t₀)."""
    return torch.cos(t) * y**2 / 4


def exact(ts, y0):
    return 1 / (1 / y0 - (torch.sin(ts)[None] - torch.sin(ts[0])) / 4)


def solved(ts, y0):
    return Integrator(RK4(), Constant(0.0201))(ODE(rational), y0, ts).ys[..., 0]  # no span is near a multiple


TIMES = [(0.2, 0.7, 1.3), (1.3, 0.7, 0.2)]


@pytest.mark.parametrize("times", TIMES, ids=["forward", "backward"])
def test_gradients_of_all_times_are_those_of_the_exact_solution(times):
    ts = leaf(*times)
    torch.testing.assert_close(jacobian(solved, (ts, START)), jacobian(exact, (ts, START)), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("times", TIMES, ids=["forward", "backward"])
def test_hessians_in_times_and_state_are_those_of_the_exact_solution(times):
    ts = leaf(*times)
    mine, theirs = (hessian(lambda *x, f=f: f(*x).square().sum(), (ts, START)) for f in (solved, exact))
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("times", TIMES, ids=["forward", "backward"])
def test_gradients_of_times_equal_finite_differences(times):
    weights = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    ts = leaf(*times)
    (solved(ts, START) @ weights).sum().backward()
    for i in range(3):
        step = 1e-5 * torch.eye(3, dtype=torch.float64)[i]
        difference = (solved(ts + step, START) - solved(ts - step, START)) @ weights / 2e-5
        assert ts.grad[i].item() == pytest.approx(difference.sum().item(), rel=1e-6)


def test_gradients_of_times_change_no_value_and_are_counted():
    ts = leaf(0.0, 0.5, 1.0)
    integrator, eq = Integrator(RK4(), Constant(0.1)), ODE(rational)
    with_times, plain = integrator(eq, START, ts), integrator(eq, START, ts.detach())
    assert torch.equal(with_times.ys, plain.ys)
    assert with_times.ts is not plain.ts
    assert (with_times.ts == ts).all()
    assert (with_times.stats.nfe - plain.stats.nfe).tolist() == [6, 6]
    with torch.no_grad():
        assert integrator(eq, START, ts).stats.nfe.tolist() == plain.stats.nfe.tolist()


def test_gradients_of_times_reach_float32_leaves():
    ts = torch.tensor([0.2, 0.7], requires_grad=True)
    Integrator(RK4(), Constant(0.1))(ODE(rational), START.float(), ts).ys[:, -1].sum().backward()
    slopes = torch.autograd.grad(exact(at := leaf(0.2, 0.7), START)[:, -1].sum(), at)[0]
    torch.testing.assert_close(ts.grad, slopes.float(), rtol=1e-5, atol=1e-6)


def test_a_gradient_method_is_a_value_and_an_interface():
    assert Backprop() == Backprop()
    with pytest.raises(TypeError, match="abstract"):
        Gradient()
