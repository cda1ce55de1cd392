"""The toy densities: their moments by quadrature of the stated laws, their supports, their keys."""

import math

import numpy as np
import pytest
import torch

from ndeflow.data import Checkerboard, EightGaussians, Pinwheel, Spirals, TwoMoons

TOYS = [TwoMoons, EightGaussians, Pinwheel, Checkerboard, Spirals]


def raw(toy, **kwargs):
    parts = toy(64, n=kwargs.pop("n", 40_000), **kwargs).load()
    return torch.cat([p.raw for p in parts.values()]).double(), torch.cat([p.label for p in parts.values()])


@pytest.mark.parametrize("toy", TOYS)
def test_every_toy_has_mean_zero_and_mean_square_one(toy):
    data = toy(64, n=40_000)
    x = torch.cat([data.arrays(split)["x1"] for split in ("train", "val", "test")]).double()
    error = x.square().sum(1).std() / math.sqrt(len(x))
    assert abs(x.square().sum(1).mean() - 2) < 4 * error + 1e-4
    assert x.mean(0).abs().max() < 4 / math.sqrt(len(x))


@pytest.mark.parametrize(("toy", "noise"), [(TwoMoons, 0.4), (EightGaussians, 0.1), (Pinwheel, 0.3), (Spirals, 0.3)])
def test_the_scale_follows_the_noise(toy, noise):
    x = toy(64, n=40_000, noise=noise).arrays("train")["x1"]
    assert x.square().mean() == pytest.approx(1, abs=0.02)
    assert toy(64).scale != toy(64, noise=noise).scale


@pytest.mark.parametrize("toy", TOYS)
def test_classes_are_balanced_and_points_keyed(toy):
    points, label = raw(toy, n=800)
    assert label.bincount().tolist() == [800 // toy.classes] * toy.classes
    short = toy(64, n=400).load()["train"].raw
    assert torch.equal(short, points[:320].float())
    assert not torch.equal(short, toy(64, n=400, data_seed=1).load()["train"].raw)


def noise_of(toy):
    with_noise, without = raw(toy, noise=1.0)[0], raw(toy, noise=0.0)[0]
    return with_noise - without, without


def test_noise_is_standard_normal_and_independent_of_the_place_and_of_other_toys():
    squares = []
    for toy in (TwoMoons, EightGaussians, Spirals):
        z, place = noise_of(toy)
        assert torch.allclose(z.T.cov(), torch.eye(2).double(), atol=0.04)
        squares += [z.square().sum(1), place.norm(dim=1) + place[:, 1].abs()]
    correlation = torch.stack(squares).corrcoef() - torch.eye(6)
    assert correlation.abs().max() < 4.5 / math.sqrt(40_000)


def test_moons_lie_on_their_half_circles():
    x, label = raw(TwoMoons, noise=0.0)
    sign = 1 - 2.0 * label[:, None]
    circle = sign * x + torch.tensor([0.5, 0.25])
    assert torch.allclose(circle.norm(dim=1), torch.ones(len(x)).double(), atol=1e-6)
    assert circle[:, 1].min() > -1e-6
    angle = torch.atan2(circle[:, 1], circle[:, 0]).sort().values / math.pi
    assert (angle - torch.linspace(0, 1, len(x))).abs().max() < 1.63 / math.sqrt(len(x))  # Kolmogorov, 1 %


def test_modes_of_the_gaussians_are_round_and_in_place():
    x, label = raw(EightGaussians)
    for k in range(8):
        mode = x[label == k]
        center = 4 * torch.tensor([math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)])
        assert (mode.mean(0) - center).abs().max() < 4 * 0.5 / math.sqrt(len(mode))
        assert torch.allclose(mode.T.cov(), 0.25 * torch.eye(2).double(), atol=0.02)


def test_pinwheel_arms_are_turned_copies():
    x, label = raw(Pinwheel, noise=0.0)
    radius = x.norm(dim=1)
    angle = torch.atan2(x[:, 1], x[:, 0])
    offset = angle - label * 2 * math.pi / 5 - radius.exp() / 4
    behind = (offset.cos() - 1).abs() > 1e-4  # 1 + 0.3 z < 0: on the far side of the origin
    expected = 0.5 * math.erfc(1 / 0.3 / math.sqrt(2))
    assert behind.double().mean() == pytest.approx(expected, abs=4 * math.sqrt(expected / len(x)))
    assert radius.square().mean() == pytest.approx(1.09, abs=0.02)


def test_checkerboard_fills_the_dark_squares_evenly():
    x, label = raw(Checkerboard)
    cell = (x + 2).floor().long()
    assert cell.min() == 0
    assert cell.max() == 3
    assert (cell.sum(1) % 2 == 0).all()
    squares = cell[:, 0] * 4 + cell[:, 1]
    assert all(squares[label == k].unique().numel() == 1 for k in range(8))
    assert squares.unique().numel() == 8
    inside = (x + 2) % 1
    counts = np.histogram2d(*inside.T.numpy(), bins=10)[0]
    assert ((counts - 400) ** 2 / 400).sum() < 134.6  # chi-squared with 99 degrees of freedom, 1 %


def test_spirals_wind_one_and_a_half_turns():
    x, label = raw(Spirals, noise=0.0)
    x = x * (1 - 2.0 * label[:, None])
    radius = x.norm(dim=1)
    assert radius.max() <= 1 + 1e-6
    along = torch.stack((torch.cos(3 * math.pi * radius), torch.sin(3 * math.pi * radius)), 1)
    assert torch.allclose(x, radius[:, None] * along, atol=1e-4)
    assert radius.square().mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("toy", "bad"), [(TwoMoons, {"noise": -0.1}), (Spirals, {"n": 9}), (Checkerboard, {"n": 0})])
def test_bad_arguments_are_refused(toy, bad):
    with pytest.raises(ValueError, match="at least"):
        toy(64, **bad)
