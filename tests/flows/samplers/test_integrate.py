import inspect
from dataclasses import dataclass

import pytest
import torch

import ndeflow.flows.samplers as samplers
from ndeflow.flows import UndefinedReading
from ndeflow.flows.samplers import RK4, Euler, GridSpec, Heun, Integrate, Midpoint, Sampler, UniformGrid, named
from ndeflow.flows.samplers.grids import lay

X0 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
SOLVERS = {"Euler": (Euler(), 1), "Midpoint": (Midpoint(), 2), "Heun": (Heun(), 2), "RK4": (RK4(), 4)}
each = pytest.mark.parametrize("name", SOLVERS)


@dataclass(frozen=True)
class Times(GridSpec):
    times: tuple[float, ...]

    def __call__(self, path):
        return lay(path, torch.tensor(self.times, dtype=torch.float64))


@each
def test_samples_converge_to_the_exact_map(gaussian_model, name):
    model = gaussian_model(mean=0.5, std=0.8)
    errors = [(named(name, n)(model, X0).x - (0.5 + 0.8 * X0)).abs().max().item() for n in (10, 40)]
    assert errors[1] < errors[0] / 3.5
    assert errors[1] < 0.06


@each
def test_network_calls_are_counted(gaussian_model, name):
    model, calls = gaussian_model(), []
    model.net.register_forward_hook(lambda *_: calls.append(1))
    solver, evaluations = SOLVERS[name]
    sample = Integrate(solver, UniformGrid(6))(model, X0)
    assert sample.nfe.dtype == torch.int64
    assert sample.nfe.tolist() == [6 * evaluations] * 9
    assert len(calls) == 6 * evaluations


def test_nodes_are_the_states_on_the_grid(gaussian_model):
    model = gaussian_model()
    times = (0.0, 0.05, 0.3, 0.8, 1.0)
    sample = Integrate(RK4(), Times(times))(model, X0)
    assert sample.nodes.shape == (9, 5, 1)
    assert torch.equal(sample.nodes[:, 0], X0)
    assert torch.equal(sample.nodes[:, -1], sample.x)
    for i, t in enumerate(times):
        torch.testing.assert_close(sample.nodes[:, i], model.net.flow(0.0, t, X0), rtol=0.02, atol=0.02)


def test_euler_is_the_textbook_loop(gaussian_model):
    model, x = gaussian_model(), X0
    for i in range(5):
        x = x + model(torch.tensor(i / 5, dtype=torch.float64), x).velocity / 5
    torch.testing.assert_close(named("Euler", 5)(model, X0).x, x)


def test_grid_may_stop_short_of_the_data(gaussian_model):
    """A data prediction has no velocity at the data's end; a grid that stops before it is solved."""
    model = gaussian_model(predicts="data")
    sample = Integrate(Heun(), Times(tuple(i / 100 for i in range(100))))(model, X0)
    torch.testing.assert_close(sample.x, model.net.flow(0.0, 0.99, X0), rtol=1e-3, atol=1e-3)
    with pytest.raises(UndefinedReading, match="t=1"):
        named("Heun", 100)(model, X0)


def test_direction_comes_from_the_path(schedules, gaussian_model):
    """On the path from noise level 80 to 0 the same sampler runs down in time."""
    model = gaussian_model(schedules["NoiseLevel"], std=1.0)
    levels = tuple((80 ** (1 / 7) + i / 60 * (0.01 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(61))
    sample = Integrate(Heun(), Times(levels))(model, 80 * X0)
    torch.testing.assert_close(sample.x, model.net.flow(levels[0], levels[-1], 80 * X0), rtol=0.01, atol=0.01)
    assert (sample.nodes.abs().mean((0, 2)).diff() < 0).all()


@pytest.mark.parametrize(("std", "straightness"), [(0.5, 0.2146), (1.0, 0.4292), (2.0, 0.8585)])
def test_straightness_of_a_gaussian_flow(gaussian_model, std, straightness):
    """E∫‖(Z1 − Z0) − u‖² dt, from the nodes of an Euler solve; noise z has E z² = 1, so z = 1 is the mean."""
    model = gaussian_model(mean=0.0, std=std)
    nodes = named("Euler", 2000)(model, torch.ones(1, 1, dtype=torch.float64)).nodes[0, :, 0]
    velocity = nodes.diff() * 2000
    gap = ((nodes[-1] - nodes[0] - velocity) ** 2).mean().item()
    kinetic, transport = (velocity**2).mean().item(), (nodes[-1] - nodes[0]).item() ** 2
    assert gap == pytest.approx(straightness, abs=1e-3)
    assert gap == pytest.approx(kinetic - transport, rel=1e-9)
    assert transport <= kinetic <= 1 + std**2 + 1e-9  # no more than the independent coupling pays


def test_gradients_pass_through_a_sampler(gaussian_model):
    x = X0.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(named("RK4", 50)(gaussian_model(std=0.5), x).x.sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(X0, 0.5), rtol=1e-4, atol=1e-4)


def test_noise_is_refused(gaussian_model):
    with pytest.raises(ValueError, match="deterministic: it takes no noise"):
        named("Euler", 1)(gaussian_model(), X0, noise=lambda q0, q1: q1)


def test_half_precision_states_are_refused(gaussian_model):
    with pytest.raises(TypeError, match="float16"):
        named("Euler", 1)(gaussian_model(), X0.half())


@each
def test_names_are_class_names(name):
    assert named(name, 7) == Integrate(SOLVERS[name][0], UniformGrid(7))
    assert getattr(samplers, name) is type(SOLVERS[name][0])


@pytest.mark.parametrize(
    ("name", "hint"),
    [("heun", "Heun"), ("Huen", "Heun"), ("euler", "Euler"), ("rk4", "RK4"), ("mid_point", "Midpoint")],
)
def test_names_nearly_right_are_corrected(name, hint):
    with pytest.raises(ValueError, match=rf"'{name}' \(did you mean {hint}\?\); there are: Euler, Midpoint, Heun, RK4"):
        named(name, 10)


def test_other_names_get_the_list():
    with pytest.raises(ValueError, match="unknown sampler 'UniformGrid'; there are: Euler"):
        named("UniformGrid", 10)
    with pytest.raises(ValueError, match="steps >= 1, got 0"):
        named("Euler", 0)


def test_every_sampler_keeps_the_signature():
    found = [c for c in vars(samplers).values() if inspect.isclass(c) and issubclass(c, Sampler) and c is not Sampler]
    assert found
    for sampler in found:
        assert list(inspect.signature(sampler.__call__).parameters) == ["self", "model", "x", "cond", "noise"]
    assert set(samplers.__all__) <= set(dir(samplers))
