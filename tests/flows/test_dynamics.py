import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from ndeflow.diffeq import RK4, Constant, Euler, Heun, Integrator, Midpoint
from ndeflow.flows import Affine, FlowModel, Linear, UndefinedReading, probability_flow

X0 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]


def solve(equation, x, interval, steps, solver=None):
    return Integrator(solver or RK4(), Constant(abs(interval[1] - interval[0]) / steps))(equation, x, interval).ys[
        :, -1
    ]


@pytest.mark.parametrize("predicts", ["data", "noise", "velocity", "v", "score"])
def test_flow_carries_a_gaussian_to_a_gaussian(schedule, gaussian_model, predicts):
    """Along the probability flow each sample keeps its quantile, on every path and for every prediction."""
    model = gaussian_model(schedule, predicts)
    grid = schedule.time_of(torch.linspace(-1.5, 2.5, 161))
    interval = grid[0].item(), grid[-1].item()
    reached = Integrator(RK4(), Constant())(probability_flow(model, interval=interval), X0, grid).ys[:, -1]
    torch.testing.assert_close(reached, model.net.flow(*interval, X0), rtol=1e-7, atol=1e-7)


def test_flow_runs_backward_too(gaussian_model):
    model = gaussian_model()
    there = solve(probability_flow(model), X0, (0.0, 1.0), 200)
    back = solve(probability_flow(model), there, (1.0, 0.0), 200)
    torch.testing.assert_close(back, X0, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("mean", "std"), [(1.5, 0.5), (-1.0, 1.0), (0.0, 2.0)])
def test_rectified_flow_of_gaussians_is_their_transport_map(gaussian_model, mean, std):
    model = gaussian_model(mean=mean, std=std)
    reached = solve(probability_flow(model), X0, (0.0, 1.0), 200)
    torch.testing.assert_close(reached, mean + std * X0, rtol=1e-8, atol=1e-8)


ORDERS = {"Linear": (1, 3, 2, 4), "Trigonometric": (1, 2, 2, 4)}


@pytest.mark.parametrize(("path", "index"), [(path, i) for path in ORDERS for i in range(4)])
def test_each_solver_reaches_the_exact_map_at_its_order(schedules, gaussian_model, path, index):
    """On the linear path the midpoint rule gains an order: its h³ term is (y²)''', and variances are quadratic in t."""
    solver, order = (Euler(), Midpoint(), Heun(), RK4())[index], ORDERS[path][index]
    model = gaussian_model(schedules[path])
    errors = []
    for steps in (40, 80, 160):
        reached = solve(probability_flow(model), X0, (0.0, 0.8), steps, solver)
        errors.append((reached - model.net.flow(0.0, 0.8, X0)).abs().max().item())
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes[-1] == pytest.approx(order, abs=0.15)


def test_one_euler_step_sends_all_noise_to_the_mean(gaussian_model):
    """The velocity at t = 0 is E[x1] − x0: one step is a bad sampler before reflow."""
    reached = solve(probability_flow(gaussian_model(mean=0.7)), X0, (0.0, 1.0), 1, Euler())
    torch.testing.assert_close(reached, torch.full_like(X0, 0.7))


class Towards(nn.Module):
    """Velocity that carries each sample to its class times `unit`."""

    def __init__(self):
        super().__init__()
        self.unit = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, t, x, cond):
        return (self.unit * cond[:, None] - x) / (1 - t)[:, None]


def test_conditions_go_along_with_their_samples():
    cond = torch.arange(9)
    equation = probability_flow(FlowModel(Towards(), Affine(Linear())), cond, (0.0, 0.999))
    reached = solve(equation, X0, (0.0, 0.999), 50, Euler())
    torch.testing.assert_close(reached, 2.0 * cond[:, None].double(), rtol=0.01, atol=0.01)
    rows = torch.tensor([4, 1])
    torch.testing.assert_close(solve(equation.take(rows), X0[rows], (0.0, 0.999), 50, Euler()), reached[rows])


def test_equation_owns_the_parameters_and_solves_are_differentiable():
    model = FlowModel(Towards(), Affine(Linear()))
    equation = probability_flow(model, torch.ones(9, dtype=torch.int64), (0.0, 0.5))
    assert [p is model.net.unit for p in equation.parameters()] == [True]
    reached = solve(equation, X0, (0.0, 0.5), 10)
    (gradient,) = torch.autograd.grad(reached.sum(), model.net.unit)
    assert gradient.item() == pytest.approx(9 * 0.5, rel=1e-6)  # x(½) = x0 + (unit − x0)/2


@pytest.mark.parametrize(
    ("predicts", "interval", "t"),
    [("noise", None, "0"), ("score", (0.0, 0.5), "0"), ("data", None, "1"), ("data", (1.0, 0.5), "1")],
)
def test_ends_without_a_velocity_are_refused(gaussian_model, predicts, interval, t):
    with pytest.raises(UndefinedReading, match=f"velocity does not follow.*{predicts} at t={t}"):
        probability_flow(gaussian_model(predicts=predicts), interval=interval)


@pytest.mark.parametrize(
    ("predicts", "interval"),
    [("velocity", None), ("v", None), ("noise", (0.01, 1.0)), ("score", (0.01, 1.0)), ("data", (0.0, 0.99))],
)
def test_ends_with_a_velocity_are_solved_to(gaussian_model, predicts, interval):
    model = gaussian_model(predicts=predicts)
    t0, t1 = interval or model.path.interval
    reached = solve(probability_flow(model, interval=interval), X0, (t0, t1), 200)
    torch.testing.assert_close(reached, model.net.flow(t0, t1, X0), rtol=1e-6, atol=1e-6)
