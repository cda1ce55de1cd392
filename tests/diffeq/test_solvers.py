"""The contract of every solver that ndeflow.diffeq exports."""

import dataclasses
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from ndeflow.diffeq import ODE, RK4
from ndeflow.diffeq.solvers.runge_kutta import _nodes
from ndeflow.tensors import expand_time


class Net(nn.Module):
    def __init__(self, width=2, dtype=torch.float64):
        super().__init__()
        self.layer = nn.Linear(width + 1, width, dtype=dtype)

    def forward(self, t, y):
        time = t.expand(len(y)) if t.ndim == 0 else t
        return torch.tanh(self.layer(torch.cat((y, time[:, None]), dim=1)))


def one_step(solver, eq, t0, dt, y0):
    return solver.step(eq, t0, dt, y0, solver.init(eq, t0, y0))


def everything(solver, eq, t0, dt, y0, state):
    """All tensors of a finished step, in one row; with its interpolant and its stiffness."""
    step = solver.finish(eq, t0, dt, y0, solver.step(eq, t0, dt, y0, state))
    optional = (step.error, step.state, solver.stiffness(dt, y0, step))
    return (step.y1, *step.stages, *step.fields, *solver.polynomial(step), *(x for x in optional if x is not None))


def cubic(t, y):
    """A field of elementary operations alone, which round alike in a batch of any size."""
    return expand_time(t, y) * y - 0.3 * y * y * y


def time(*values):
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def test_solvers_are_frozen_values(solver):
    assert dataclasses.replace(solver) == solver
    assert hash(dataclasses.replace(solver)) == hash(solver)
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.order = 3


def test_switches_are_part_of_the_value(solver):
    flipped = dataclasses.replace(solver, **{name: not value for name, value in vars(solver).items()})
    assert (flipped == solver) == (not vars(solver))


def test_solvers_are_documented_with_their_equation_or_its_source(solver):
    assert any(word in type(solver).__doc__ for word in (".. math::", "Reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("shape", [(3, 1), (2, 3, 4, 4)])
def test_a_step_keeps_shape_and_dtype(solver, dtype, shape):
    step = one_step(solver, ODE(lambda t, y: -y * (1 + t)), time(0.5), time(0.1), torch.ones(shape, dtype=dtype))
    tensors = [step.y1, *step.stages, *([] if step.error is None else [step.error])]
    assert {(x.shape, x.dtype) for x in tensors} == {(torch.Size(shape), dtype)}


def test_a_step_makes_the_field_calls_it_says(solver):
    calls, y0 = [], torch.ones(1, 1)
    eq = ODE(lambda t, y: calls.append(t) or -y)
    state = solver.init(eq, time(0.0), y0)
    assert len(calls) == 1
    solver.step(eq, time(0.0), time(0.1), y0, state)
    assert len(calls) == 1 + solver.evaluations


def test_the_products_of_a_step_are_those_of_its_fields_and_add_up_to_it(solver, net):
    y0, t0, dt = torch.randn(3, 2, dtype=torch.float64), time(0.5), time(0.1)
    eq = ODE(net)
    step = one_step(solver, eq, t0, dt, y0)
    torch.testing.assert_close(step.stages[0], 0.1 * net(t0, y0))
    torch.testing.assert_close(step.y1, y0 + sum(weight * step.stages[i] for i, weight in solver.weights))
    for product, field in zip(step.stages, step.fields, strict=True):
        assert torch.equal(product, eq.apply_field(field, eq.increment(t0, t0 + dt)))


@pytest.mark.parametrize("batched", [False, True], ids=["shared", "per_sample"])
def test_to_finish_a_step_costs_the_next_first_field_at_most(solver, batched):
    """The state of a finished step, or of one that is finished by itself, is what `init` returns at its end."""
    calls, y0 = [], torch.randn(3, 2)
    t0, dt = (time(1 / 3, 0.1, 0.7), time(0.1, -0.3, 1 / 3)) if batched else (time(1 / 3), time(0.1))
    eq = ODE(lambda t, y: calls.append(t) or cubic(t, y))
    step = one_step(solver, eq, t0, dt, y0)
    calls.clear()
    done = solver.finish(eq, t0, dt, y0, step)
    assert len(calls) == (step.state is None and done.state is not None)
    assert len(calls) == len(done.stages) - len(step.stages) == len(done.fields) - len(step.fields)
    assert solver.finish(eq, t0, dt, y0, done) is done
    assert done.y1 is step.y1
    assert (done.state is None) == (solver.interpolation_order == 1)
    if done.state is not None:
        assert torch.equal(done.state, solver.init(eq, t0 + dt, step.y1))


def test_the_interpolant_joins_the_ends_of_a_step_smoothly(solver, net):
    y0, t0, dt = torch.randn(3, 2, dtype=torch.float64), time(0.5), time(0.3)
    step = solver.finish(ODE(net), t0, dt, y0, one_step(solver, ODE(net), t0, dt, y0))
    terms = solver.polynomial(step)
    torch.testing.assert_close(y0 + sum(terms), step.y1, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(terms[0], dt * net(t0, y0), rtol=1e-14, atol=1e-15)
    if solver.interpolation_order > 1:
        speed = sum(j * term for j, term in enumerate(terms, start=1))
        torch.testing.assert_close(speed, dt * net(t0 + dt, step.y1), rtol=1e-12, atol=1e-13)


def test_a_step_writes_to_nothing_it_is_given(solver, net):
    given = (time(0.5), time(0.1), torch.randn(3, 2, dtype=torch.float64))
    before = [x.clone() for x in given]
    first = one_step(solver, ODE(net), *given)
    again = one_step(solver, ODE(net), *given)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))
    assert torch.equal(first.y1, again.y1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128])
def test_a_step_per_sample_equals_each_sample_alone(solver, dtype):
    """Bit for bit; except products of complex numbers, which torch rounds differently in batches."""
    torch.manual_seed(0)
    y0, t0, dt = 0.5 * torch.randn(9, 3, dtype=dtype), torch.rand(9).double(), torch.rand(9).double() - 0.5
    together = everything(solver, ODE(cubic), t0, dt, y0, solver.init(ODE(cubic), t0, y0))
    for i, row in enumerate(y0.split(1)):
        alone = everything(solver, ODE(cubic), t0[i], dt[i], row, solver.init(ODE(cubic), t0[i], row))
        for x, y in zip(together, alone, strict=True):
            if dtype.is_complex:
                torch.testing.assert_close(x[i : i + 1], y)
            else:
                assert torch.equal(x[i : i + 1], y)


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
    compiled = torch.compile(partial(everything, solver), fullgraph=True, backend=counter)
    eq, y0 = ODE(net.requires_grad_(False)), torch.randn(3, 2, dtype=torch.float64)
    for t0, dt in ((0.0, 0.1), (0.5, 0.2), (0.7, -0.3)):
        times = [time(x).expand(3).clone() if batched else time(x) for x in (t0, dt)]
        given = (eq, *times, y0, solver.init(eq, times[0], y0))
        for x, y in zip(compiled(*given), everything(solver, *given), strict=True):
            assert torch.equal(x, y)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
def test_a_compiled_step_has_the_values_and_gradients_of_the_eager_one():
    torch._dynamo.reset()
    net, y0 = Net(dtype=torch.float32), torch.randn(5, 2)
    results = []
    eager = partial(one_step, RK4())
    for step in (eager, torch.compile(eager, fullgraph=True)):
        y1 = step(ODE(net), time(0.5), time(0.1), y0).y1
        results.append((y1, *torch.autograd.grad(y1.square().sum(), list(net.parameters()))))
    for expected, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, expected)


def test_backward_in_time_undoes_forward(solver, net):
    def walk(y, start, dt):
        for i in range(20):
            y = one_step(solver, ODE(net), time(start + i * dt), time(dt), y).y1
        return y

    y0 = torch.randn(4, 2, dtype=torch.float64)
    there = walk(y0, 0.0, 0.05)
    back = walk(there, 1.0, -0.05)
    bound = {1: 0.2, 2: 2e-3}.get(solver.order, 1e-4)
    assert (back - y0).abs().max() < bound
    assert (there - y0).abs().max() > 2 * bound
