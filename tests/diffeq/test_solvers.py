"""The contract of every solver that ndeflow.diffeq exports."""

import dataclasses

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from ndeflow.diffeq import ODE, RK4, Constant, Integrator
from ndeflow.diffeq.solvers.runge_kutta import _nodes


class Net(nn.Module):
    def __init__(self, width=2, dtype=torch.float64):
        super().__init__()
        self.layer = nn.Linear(width + 1, width, dtype=dtype)

    def forward(self, t, y):
        time = t.expand(len(y)) if t.ndim == 0 else t
        return torch.tanh(self.layer(torch.cat((y, time[:, None]), dim=1)))


def one_step(solver, eq, t0, dt, y0):
    return solver.step(eq, t0, dt, y0, solver.init(eq, t0, y0))


def time(*values):
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def test_solvers_are_frozen_values(solver):
    assert type(solver)() == solver
    assert hash(type(solver)()) == hash(solver)
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.order = 3


def test_solvers_are_documented_with_their_equation(solver):
    assert ".. math::" in type(solver).__doc__


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("shape", [(3, 1), (2, 3, 4, 4)])
def test_a_step_keeps_shape_and_dtype(solver, dtype, shape):
    step = one_step(solver, ODE(lambda t, y: -y * (1 + t)), time(0.5), time(0.1), torch.ones(shape, dtype=dtype))
    tensors = [step.y1, *step.stages, *([] if step.error is None else [step.error])]
    assert {(x.shape, x.dtype) for x in tensors} == {(torch.Size(shape), dtype)}


def test_a_step_makes_the_field_calls_it_says(solver):
    calls = []
    one_step(solver, ODE(lambda t, y: calls.append(t) or -y), time(0.0), time(0.1), torch.ones(1, 1))
    assert len(calls) == solver.evaluations


def test_the_first_stage_is_the_field_at_the_start(solver, net):
    y0 = torch.randn(3, 2, dtype=torch.float64)
    step = one_step(solver, ODE(net), time(0.5), time(0.1), y0)
    torch.testing.assert_close(step.stages[0], 0.1 * net(time(0.5), y0))


def test_a_step_writes_to_nothing_it_is_given(solver, net):
    given = (time(0.5), time(0.1), torch.randn(3, 2, dtype=torch.float64))
    before = [x.clone() for x in given]
    first = one_step(solver, ODE(net), *given)
    again = one_step(solver, ODE(net), *given)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))
    assert torch.equal(first.y1, again.y1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_step_per_sample_equals_each_sample_alone(solver, net, dtype):
    net = net.to(dtype)
    y0, t0, dt = torch.randn(3, 2, dtype=dtype), time(0.0, 0.4, 2.0), time(0.3, -0.1, 0.02)
    together = one_step(solver, ODE(net), t0, dt, y0)
    assert together.y1.dtype == dtype
    for i in range(3):
        alone = one_step(solver, ODE(net), t0[i], dt[i], y0[i : i + 1])
        torch.testing.assert_close(together.y1[i : i + 1], alone.y1)
        if alone.error is not None:
            torch.testing.assert_close(together.error[i : i + 1], alone.error)


def test_a_step_on_images_spreads_time_over_samples(solver):
    """With B = C = H = W a careless broadcast would put time along an image axis."""
    t0, dt, y0 = time(0.0, 1.0, 2.0), time(0.1, 0.2, 0.3), torch.zeros(3, 3, 3, 3, dtype=torch.float64)
    y1 = one_step(solver, ODE(lambda t, y: torch.ones_like(y)), t0, dt, y0).y1
    torch.testing.assert_close(y1, dt.reshape(-1, 1, 1, 1).expand(3, 3, 3, 3))


def test_all_parameters_get_gradients(solver, net):
    one_step(solver, ODE(net), time(0.5), time(0.1), torch.randn(3, 2, dtype=torch.float64)).y1.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_a_step_is_differentiable_in_time_and_step_size(solver, net):
    y0 = torch.randn(2, 2, dtype=torch.float64)

    def step(t0, dt):
        return one_step(solver, ODE(net), t0, dt, y0).y1

    assert torch.autograd.gradcheck(step, (time(0.5).requires_grad_(), time(0.1).requires_grad_()))


def test_a_step_made_while_sampling_spoils_no_training(solver, net):
    """What a step caches must not be an inference tensor."""
    _nodes.cache_clear()
    y0 = torch.ones(1, 2, dtype=torch.float64)
    with torch.inference_mode():
        one_step(solver, ODE(net), time(0.5), time(0.1), y0)
    dt = time(0.1).requires_grad_()
    one_step(solver, ODE(net), time(0.5), dt, y0).y1.sum().backward()
    assert dt.grad.isfinite()


@pytest.mark.parametrize("batched", [False, True], ids=["shared", "per_sample"])
def test_a_step_is_one_graph_whatever_its_times(solver, net, batched):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(solver.step, fullgraph=True, backend=counter)
    eq, y0 = ODE(net), torch.randn(3, 2, dtype=torch.float64)
    for t0, dt in ((0.0, 0.1), (0.5, 0.2), (0.7, -0.3)):
        times = [time(x).expand(3).clone() if batched else time(x) for x in (t0, dt)]
        expected = one_step(solver, eq, *times, y0)
        torch.testing.assert_close(compiled(eq, *times, y0, solver.init(eq, times[0], y0)).y1, expected.y1)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
def test_a_compiled_step_has_the_values_and_gradients_of_the_eager_one():
    torch._dynamo.reset()
    net, y0 = Net(dtype=torch.float32), torch.randn(5, 2)
    results = []
    for step in (RK4().step, torch.compile(RK4().step, fullgraph=True)):
        y1 = step(ODE(net), time(0.5), time(0.1), y0, None).y1
        results.append((y1, *torch.autograd.grad(y1.square().sum(), list(net.parameters()))))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_backward_in_time_undoes_forward(solver, net):
    y0 = torch.randn(4, 2, dtype=torch.float64)
    integrator, eq = Integrator(solver, Constant(0.01)), ODE(net)
    there = integrator(eq, y0, [0.0, 1.0]).ys[:, -1]
    back = integrator(eq, there, [1.0, 0.0]).ys[:, -1]
    bound = {1: 0.05, 2: 1e-4}.get(solver.order, 1e-7)
    assert (back - y0).abs().max() < bound
    assert (there - y0).abs().max() > 2 * bound
