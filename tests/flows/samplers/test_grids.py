import pytest
import torch

from ndeflow.flows import Affine, Linear
from ndeflow.flows.samplers import GridSpec, UniformGrid
from ndeflow.flows.samplers.grids import lay


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 49, 1000])
def test_ends_are_exact_and_steps_equal(schedule, steps):
    grid = UniformGrid(steps)(Affine(schedule))
    source, data = schedule.interval
    assert grid.t.dtype == torch.float64
    assert grid.t.shape == (steps + 1,)
    assert (grid.t[0].item(), grid.t[-1].item()) == (source, data)
    torch.testing.assert_close(grid.t.diff(), torch.full((steps,), (data - source) / steps, dtype=torch.float64))


def test_nodes_lead_from_source_to_data(schedule):
    grid = UniformGrid(20)(Affine(schedule))
    assert ((grid.alpha / grid.sigma).diff() > 0).all()
    assert grid.sigma[-1] < 1e-12


def test_grid_holds_the_coefficients_of_its_nodes(schedule):
    path = Affine(schedule)
    grid = UniformGrid(5)(path)
    c = path.coefficients(grid.t)
    assert torch.equal(grid.alpha, c.alpha)
    assert torch.equal(grid.sigma, c.sigma)


def test_given_times_are_kept_as_they_are():
    t = [0.0, 0.3, 0.95, 1.0]
    grid = lay(Affine(Linear()), torch.tensor(t, dtype=torch.float64))
    assert grid.t.tolist() == t
    assert grid.sigma.tolist() == [1 - x for x in t]


@pytest.mark.parametrize(
    ("t", "message"),
    [
        ([0.0, 0.5, 0.5, 1.0], r"from 0 to 0 at node 2 \(t=0.5\)"),
        ([0.0, 0.75, 0.25, 1.0], r"from 1.09861 to -1.09861 at node 2"),
        ([1.0, 0.0], r"from inf to -inf at node 1 \(t=0\) of Affine"),
        ([0.0, float("nan")], r"to nan at node 1"),
        ([0.0], r"at least two times in one row, got shape \(1,\)"),
        ([[0.0, 1.0]], r"got shape \(1, 2\)"),
    ],
)
def test_times_that_do_not_lead_to_data_are_refused(t, message):
    with pytest.raises(ValueError, match=message):
        lay(Affine(Linear()), torch.tensor(t))


def test_direction_is_that_of_the_path(schedules):
    towards_zero = Affine(schedules["NoiseLevel"])
    assert lay(towards_zero, torch.tensor([80.0, 1.0, 0.0])).sigma.tolist() == [80, 1, 0]
    with pytest.raises(ValueError, match="does not lead from source to data"):
        lay(towards_zero, torch.tensor([0.0, 1.0, 80.0]))


def test_grid_rules_are_values():
    assert UniformGrid(3) == UniformGrid(3)
    with pytest.raises(ValueError, match="steps >= 1, got 0"):
        UniformGrid(0)
    with pytest.raises(TypeError, match="abstract"):
        GridSpec()
