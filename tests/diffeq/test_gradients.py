"""How solves are differentiated: what holds for every method, through the steps, and in the output times."""

import gc
import math
import weakref

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import hessian, jacobian
from torch.nn.parallel import DistributedDataParallel

from ndeflow.diffeq import (
    ODE,
    PID,
    RK4,
    Adjoint,
    Backprop,
    Bosh3,
    Checkpointed,
    Constant,
    Gradient,
    Integrator,
    Tsit5,
)

START = torch.tensor([[1.0], [0.5]], dtype=torch.float64)
EXACT = [Backprop(), Checkpointed(), Checkpointed(3)]
METHODS = [Backprop(), Checkpointed(3), Adjoint()]
STEPPINGS = ["shared", "per_sample"]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
every_stepping = pytest.mark.parametrize("stepping", STEPPINGS)


def leaf(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


class Net(nn.Module):
    """A field with parameters; args scale it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(1, 6, dtype=torch.float64), nn.Linear(6, 1, dtype=torch.float64)

    def forward(self, t, y, a=None):
        f = self.outer(torch.tanh(self.inner(y)))
        return f if a is None else a * f


def tight(method, stepping, solver=None, controller=None):
    return Integrator(solver or Tsit5(), controller or PID(1e-9, 1e-9), method, stepping=stepping)


def test_a_gradient_method_is_a_value_and_an_interface():
    assert (Backprop(), Checkpointed(3), Adjoint()) == (Backprop(), Checkpointed(3), Adjoint())
    with pytest.raises(TypeError, match="abstract"):
        Gradient()


# -- against finite differences


def field(t, y, a):
    return torch.sin(a * y) + torch.cos(t).reshape(-1, *(1,) * t.ndim) * y


def test_gradients_of_state_and_args_equal_finite_differences(solver):
    integrator = Integrator(solver, Constant(0.3))

    def outputs(y0, a):
        return integrator(ODE(field, a), y0, [0.0, 0.5, 1.0]).ys

    assert gradcheck(outputs, (START.clone().requires_grad_(), leaf([0.7], [1.3])))


@every_stepping
@pytest.mark.parametrize("method", EXACT, ids=repr)
def test_first_and_second_derivatives_equal_finite_differences(method, stepping):
    integrator = Integrator(Bosh3(), Constant(0.4), method, stepping=stepping, landing="interpolate")

    def outputs(y0, a):
        solution = integrator(ODE(field, a), y0, [0.0, 0.5, 1.0], record=True, dense=True)
        return solution.ys, solution.steps.raw_error, solution.at(0.3)

    inputs = (START.clone().requires_grad_(), leaf([0.7], [1.3]))
    assert gradcheck(outputs, inputs)
    assert gradgradcheck(outputs, inputs)


# -- what holds for every method


@every_stepping
@every_method
def test_the_gradient_of_decay_is_the_closed_form(method, stepping):
    rate = leaf([1.5], [0.5])
    tight(method, stepping)(ODE(lambda t, y, a: -a * y, rate), START, [0.0, 1.0]).ys[:, -1].sum().backward()
    torch.testing.assert_close(rate.grad, -START * torch.exp(-rate.detach()), rtol=1e-7, atol=0)


@every_stepping
@every_method
def test_gradients_reach_what_requires_them_and_nothing_else(method, stepping):
    reached = {}
    for start, args, trained in ((1, 1, 1), (0, 0, 1), (0, 1, 0), (1, 0, 0)):
        net, y0, a = Net(), START.clone().requires_grad_(bool(start)), START.clone().requires_grad_(bool(args))
        net.inner.requires_grad_(bool(trained))
        net.outer.requires_grad_(False)
        tight(method, stepping)(ODE(net, a), y0, [0.0, 1.0]).ys.square().sum().backward()
        found = {"y0": y0.grad, "args": a.grad, **{name: p.grad for name, p in net.named_parameters()}}
        wanted = {name for name, wants in (("y0", start), ("args", args)) if wants}
        wanted |= {"inner.weight", "inner.bias"} if trained else set()
        assert {name for name, grad in found.items() if grad is not None} == wanted
        for name in wanted:
            torch.testing.assert_close(found[name], reached.setdefault(name, found[name]), rtol=1e-6, atol=1e-9)
    assert all(grad.abs().sum() > 0.1 for grad in reached.values())


@every_stepping
@every_method
def test_nothing_is_watched_where_nothing_requires_gradients(method, stepping):
    net = Net().requires_grad_(False)
    integrator = tight(method, stepping)
    plain = integrator(ODE(net), START, [0.0, 1.0])
    assert not plain.ys.requires_grad
    assert not plain.stats.nfe_backward.any()
    net.requires_grad_(True)
    with torch.no_grad():
        unwatched = integrator(ODE(net), START.clone().requires_grad_(), leaf(0.0, 1.0), record=True, dense=True)
    assert not any(x.requires_grad for x in (unwatched.ys, unwatched.steps.error, unwatched.at(0.5)))
    with torch.inference_mode():
        inferred = integrator(ODE(net), START, [0.0, 1.0])
    assert inferred.ys.is_inference()
    assert torch.equal(inferred.ys, plain.ys)
    watched = integrator(ODE(net), START, [0.0, 1.0])  # nothing cached in inference mode is in the way
    watched.ys.sum().backward()
    torch.testing.assert_close(watched.ys, plain.ys, rtol=1e-13, atol=0)


@every_stepping
@every_method
def test_a_solution_may_be_used_twice_in_part_and_differentiated_twice(method, stepping):
    net = Net()
    y0 = START.clone().requires_grad_()
    ys = tight(method, stepping)(ODE(net), y0, [0.0, 0.4, 0.7, 1.0]).ys
    losses = [ys[:, 0].sum(), ys[:, 2].square().sum(), ys[:, 3].exp().sum()]
    inputs = [y0, *net.parameters()]

    def gradients(loss):
        found = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]

    each = [gradients(loss) for loss in losses]
    assert torch.equal(each[0][0], torch.ones_like(y0))
    assert not any(g.any() for g in each[0][1:])
    together = gradients(sum(losses))
    for whole, *parts in zip(together, *each, strict=True):
        torch.testing.assert_close(whole, sum(parts), rtol=1e-7, atol=1e-8)
    assert all(torch.equal(a, b) for a, b in zip(gradients(sum(losses)), together, strict=True))


@every_method
def test_what_changes_in_place_before_the_backward_pass_is_an_error(method):
    for name in ("inner.weight", "outer.bias", "outer.weight"):
        net = Net()
        net.outer.weight.requires_grad_(False)
        ys = tight(method, "shared", RK4(), Constant(0.1))(ODE(net), START, [0.0, 1.0]).ys
        with torch.no_grad():
            net.get_parameter(name).mul_(1.1)
        if name == "outer.bias" and method == Backprop():
            ys.sum().backward()  # its graph does not need the value
            continue
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            ys.sum().backward()


@every_stepping
@every_method
def test_memory_is_free_as_soon_as_the_solution_is_let_go(method, stepping):
    gc.collect()
    gc.disable()
    try:
        for differentiate in (False, True):
            eq = ODE(Net())
            solution = tight(method, stepping)(eq, START, [0.0, 1.0])
            if differentiate:
                solution.ys.sum().backward()
            kept = weakref.ref(eq)
            del eq, solution
            assert kept() is None, "a cycle of references waits for the garbage collector"
    finally:
        gc.enable()


@every_method
def test_the_graph_of_a_state_before_the_solve_is_part_of_the_whole(method):
    """As in a model with layers before and behind the solve."""
    net, before = Net(), nn.Linear(1, 1, dtype=torch.float64)
    expected = None
    for gradient in (Backprop(), method):
        ys = tight(gradient, "shared")(ODE(net, before(START)), before(START), [0.0, 1.0]).ys
        found = torch.autograd.grad(ys[:, -1].square().sum(), [*before.parameters(), *net.parameters()])
        expected = expected or found
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


# -- through the steps


@every_stepping
def test_backprop_reaches_closures_and_attributes(stepping):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = leaf(0.3)

        def forward(self, t, y):
            return -self.rate * y

    net, shift, holder = Net(), leaf(0.1), Holder()
    integrator = tight(Backprop(), stepping)
    integrator(ODE(lambda t, y: net(t, y) + shift), START, [0.0, 1.0]).ys.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in (*net.parameters(), shift))
    integrator(ODE(holder), START, [0.0, 1.0]).ys[:, -1].sum().backward()
    assert holder.rate.grad.item() == pytest.approx(-1.5 * math.exp(-0.3))


class Cliff(nn.Module):
    """y' = θ √(y − 0.1 t), hidden behind a clamp; beyond the root of it the derivative is infinite."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))

    def forward(self, t, y):
        return self.theta * torch.sqrt(torch.clamp(y, min=0.0))


@every_method
def test_infinite_derivatives_of_steps_thrown_away_spoil_nothing(method):
    """y' = −√y from 1 is (1 − t/2)²; the first step tried goes below 0, where √ has an infinite derivative."""
    field = Cliff()
    controller = PID(1e-8, 1e-8, dt0=2.5)
    start = torch.tensor([[1.0], [4.0]], dtype=torch.float64, requires_grad=True)
    integrator = Integrator(Tsit5(), controller, method, stepping="per_sample", landing="interpolate")
    solution = integrator(ODE(field), start, [0.0, 1.0])
    assert (solution.stats.rejected > 0).all()
    solution.ys[:, -1].sum().backward()
    ends = (start.detach().sqrt() - 0.5).square()
    torch.testing.assert_close(solution.ys[:, -1].detach(), ends, rtol=1e-6, atol=0)
    torch.testing.assert_close(start.grad, (ends / start.detach()).sqrt(), rtol=1e-5, atol=0)
    # With θ = −c the root falls by c t/2: dy/dθ = √y t.
    assert field.theta.grad.item() == pytest.approx(ends.sqrt().sum().item(), rel=1e-5)


# -- in the output times


def rational(t, y):
    """y' = ¼ cos(t) y², solved by 1/y = 1/y₀ − ¼(sin t − sin t₀)."""
    return torch.cos(t).reshape(-1, *(1,) * t.ndim) * y**2 / 4


def exact(ts, y0):
    return 1 / (1 / y0 - (torch.sin(ts) - torch.sin(ts[..., :1])) / 4)


def solved(ts, y0, method=None, stepping="shared", **options):
    controller = Constant(0.0201)  # no span is near a multiple
    return Integrator(RK4(), controller, method or Backprop(), stepping=stepping)(ODE(rational), y0, ts, **options).ys[
        ..., 0
    ]


TIMES = [(0.2, 0.7, 1.3), (1.3, 0.7, 0.2)]
both_directions = pytest.mark.parametrize("times", TIMES, ids=["forward", "backward"])


@both_directions
@every_stepping
@every_method
def test_gradients_of_all_times_are_those_of_the_exact_solution(method, stepping, times):
    ts = leaf(*times)
    mine = jacobian(lambda *x: solved(*x, method, stepping), (ts, START))
    torch.testing.assert_close(mine, jacobian(exact, (ts, START)), rtol=1e-6, atol=1e-8)


@both_directions
@every_stepping
@every_method
def test_gradients_of_times_equal_finite_differences(method, stepping, times):
    weights = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    ts = leaf(*times)
    (solved(ts, START, method, stepping) @ weights).sum().backward()
    for i in range(3):
        step = 1e-5 * torch.eye(3, dtype=torch.float64)[i]
        with torch.no_grad():
            difference = (solved(ts + step, START) - solved(ts - step, START)) @ weights / 2e-5
        assert ts.grad[i].item() == pytest.approx(difference.sum().item(), rel=1e-6)


@both_directions
@every_stepping
@pytest.mark.parametrize("method", EXACT[:2], ids=repr)
def test_hessians_in_times_and_state_are_those_of_the_exact_solution(method, stepping, times):
    ts = leaf(*times)
    mine = hessian(lambda *x: solved(*x, method, stepping).square().sum(), (ts, START))
    theirs = hessian(lambda *x: exact(*x).square().sum(), (ts, START))
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)


@every_method
def test_gradients_of_the_times_of_each_sample_but_not_of_those_that_fill_up(method):
    ts = leaf([0.2, 0.5, 9.0, 1.3], [0.4, 0.1, 0.0, -1.0])
    mask = torch.tensor([[True, True, False, True], [True, False, True, False]])
    ys = solved(ts, START, method, "per_sample", mask=mask)
    weights = torch.tensor([[0.3, -1.0, 0.0, 2.0], [0.5, 0.0, 1.5, 0.0]], dtype=torch.float64)
    (ys * weights)[mask].sum().backward()
    twin = ts.detach().clone().requires_grad_()
    (exact(twin, START) * weights).sum().backward()
    torch.testing.assert_close(ts.grad, twin.grad, rtol=1e-6, atol=1e-8)


def test_a_sample_that_fails_leaves_gradients_of_times_alone():
    net = nn.Linear(1, 1, dtype=torch.float64)
    ts = leaf(0.0, 0.5, 1.0)

    def explosive(t, y):
        return torch.where(y > 2, y**2, -net(y))

    integrator = Integrator(Tsit5(), PID(1e-6, 1e-6), stepping="per_sample", on_failure="nan", max_steps=50)
    ys = integrator(ODE(explosive), torch.tensor([[1.0], [5.0]], dtype=torch.float64), ts).ys
    assert ys.isfinite().all(-1).tolist() == [[True] * 3, [True, False, False]]
    ys[0].sum().backward()
    slope = -net(ys[0, 1:]).detach()[:, 0]
    torch.testing.assert_close(ts.grad[1:], slope, rtol=1e-5, atol=0)
    assert net.weight.grad.isfinite().all()


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


# -- over processes


class Model(nn.Module):
    """A solve as part of a model."""

    def __init__(self, method):
        super().__init__()
        self.net = Net()
        self.integrator = Integrator(Tsit5(), PID(1e-7, 1e-7), method, stepping="per_sample")

    def forward(self, rates):
        solution = self.integrator(ODE(self.net, rates), torch.ones_like(rates), [0.0, 0.3, 1.0])
        self.nfe = int(solution.stats.nfe.max())
        return solution.ys.square().mean()


RATES = torch.tensor([0.1, 0.2, 0.3, 0.4, 9.0, 12.0, 15.0, 20.0], dtype=torch.float64).unsqueeze(1)


def work(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = []
    for method in METHODS:
        model = DistributedDataParallel(Model(method))
        model(RATES[4 * rank : 4 * rank + 4]).backward()
        results.append((model.module.nfe, [p.grad for p in model.parameters()]))
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_gradients_averaged_over_two_processes_are_those_of_the_whole_batch(tmp_path):
    multiprocessing.start_processes(work, (tmp_path,), nprocs=2, start_method="spawn")
    shared = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for i, method in enumerate(METHODS):
        model = Model(method)
        model(RATES).backward()
        assert shared[0][i][0] < 0.7 * shared[1][i][0]  # evaluations of the two
        for rank in (0, 1):
            for p, mine in zip(model.parameters(), shared[rank][i][1], strict=True):
                assert (p.grad - mine).norm() < 1e-10 * p.grad.norm()
