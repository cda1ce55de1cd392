"""Distances against closed forms and an independent solver, and the floors that belong to them."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from ndeflow.metrics import Distance, nearest_distance, wasserstein2, wasserstein2_distance, wasserstein2_floor
from ndeflow.randomness import fold, normal


def gauss(n, d, name="x", scale=1.0, shift=0.0):
    return normal(fold(name, torch.arange(n)), (d,), torch.float64).numpy() * scale + shift


def assignment(x, y):
    cost = cdist(x, y, "sqeuclidean")
    return math.sqrt(cost[linear_sum_assignment(cost)].mean())


@pytest.mark.parametrize(("n", "d"), [(1, 1), (7, 3), (60, 2), (200, 16)])
def test_w2_is_the_best_assignment(n, d):
    x, y = gauss(n, d), gauss(n, d, "y", scale=2, shift=1)
    assert wasserstein2(x, y) == pytest.approx(assignment(x, y), rel=1e-12)
    assert wasserstein2(x, y) == pytest.approx(wasserstein2(y, x), rel=1e-12)


def test_w2_in_one_dimension_sorts():
    x, y = gauss(300, 1)[:, 0], gauss(300, 1, "y", scale=3)[:, 0]
    assert wasserstein2(x, y) == pytest.approx(np.sqrt(np.mean((np.sort(x) - np.sort(y)) ** 2)), rel=1e-12)


def test_w2_of_a_translation_is_its_length():
    x = gauss(120, 3)
    assert wasserstein2(x, x + np.array([3.0, 0, 4.0])) == pytest.approx(5, rel=1e-12)
    assert wasserstein2(x, x[::-1].copy()) == 0.0
    assert wasserstein2(x + 1e6, x + 1e6 + 1e-3) == pytest.approx(1e-3 * math.sqrt(3), rel=1e-4)


def test_w2_of_sets_of_different_sizes():
    x, y = gauss(40, 2), gauss(60, 2, "y")
    repeated = assignment(np.repeat(x, 3, axis=0), np.repeat(y, 2, axis=0))
    assert wasserstein2(x, y) == pytest.approx(repeated, rel=1e-12)
    assert wasserstein2(x, np.zeros((1, 2))) == pytest.approx(math.sqrt((x**2).sum(1).mean()), rel=1e-12)


def test_w2_of_gaussians_approaches_the_closed_form():
    sigma, shift, n = np.array([2.0, 0.5]), np.array([1.0, -2.0]), 1500
    exact = math.sqrt((shift**2).sum() + ((1 - sigma) ** 2).sum())
    found = wasserstein2(gauss(n, 2), gauss(n, 2, "y", sigma, shift))
    assert found == pytest.approx(exact, rel=0.03)
    assert found != pytest.approx(math.sqrt((shift**2).sum()), rel=0.03)  # the spread is seen, not the means alone


def test_images_are_flattened_and_tensors_welcome():
    x, y = torch.tensor(gauss(20, 12)).reshape(20, 1, 3, 4), torch.tensor(gauss(20, 12, "y")).reshape(20, 1, 3, 4)
    expected = wasserstein2(x.flatten(1).numpy(), y.flatten(1).numpy())
    assert wasserstein2(x.requires_grad_(), y.float()) == pytest.approx(expected, rel=1e-6)
    assert type(wasserstein2(x, y)) is float
    assert wasserstein2(torch.ones(3, dtype=torch.uint8), np.zeros(3, dtype=int)) == 1.0


def test_the_floor_is_what_samples_of_the_law_get():
    train, test = gauss(400, 2, "train"), gauss(100, 2, "test")
    floor = wasserstein2_floor(train, test, 100, subsets=4)
    fresh = [wasserstein2(gauss(100, 2, f"fresh {i}"), test) for i in range(8)]
    assert floor == pytest.approx(np.mean(fresh), abs=3 * np.std(fresh))
    assert wasserstein2_floor(train, test, 400, subsets=1) == pytest.approx(wasserstein2(train, test), rel=1e-12)
    other = [wasserstein2(gauss(100, 2, f"fresh {i}", scale=1.6), test) for i in range(8)]
    assert abs(floor - np.mean(other)) > 3 * np.std(other)


def test_the_subsets_of_the_floor_are_disjoint_and_seeded():
    train, test = np.arange(12.0), np.array([0.0])
    for seed in range(2):  # every sample once, whatever the order
        assert wasserstein2_floor(train, test, 1, subsets=12, seed=seed) == pytest.approx(train.mean())
    two = {round(wasserstein2_floor(train, test, 3, subsets=2, seed=s), 12) for s in range(5)}
    assert len(two) == 5
    assert wasserstein2_floor(train, test, 3, seed=4) == wasserstein2_floor(train, test, 3, seed=4)


def test_value_and_floor_together():
    train, test = gauss(300, 2, "train"), gauss(100, 2, "test")
    good, bad = (wasserstein2_distance(gauss(100, 2, "x", s), test, train) for s in (1, 3))
    assert good.n == 100
    assert good.floor == bad.floor == wasserstein2_floor(train, test, 100)
    assert good.value == wasserstein2(gauss(100, 2), test)
    assert 0.6 < good.ratio < 1.6 < bad.ratio


def test_the_ratio_is_defined_at_a_floor_of_zero():
    assert [Distance(v, f, 1).ratio for v, f in ((3.0, 2.0), (0.0, 0.0), (1.0, 0.0))] == [1.5, 1.0, math.inf]


def test_nearest_distance_by_brute_force():
    x, reference, held_out = gauss(30, 5), gauss(80, 5, "r"), gauss(20, 5, "h")
    found = nearest_distance(torch.tensor(x), reference, held_out)
    assert found.value == pytest.approx(cdist(x, reference).min(1).mean(), rel=1e-12)
    assert found.floor == pytest.approx(cdist(held_out, reference).min(1).mean(), rel=1e-12)
    assert found.n == 30


def test_nearest_distance_tells_memory_from_sampling_from_noise():
    train, test = gauss(400, 3, "train", shift=1e3), gauss(100, 3, "test", shift=1e3)
    memorized = nearest_distance(train[:50], train, test)
    assert memorized.value == 0
    assert memorized.ratio == 0
    assert nearest_distance(gauss(100, 3, shift=1e3), train, test).ratio == pytest.approx(1, abs=0.2)
    assert nearest_distance(gauss(100, 3, shift=1e3, scale=4), train, test).ratio > 3


GOOD = np.zeros((4, 2))
BAD = [
    (np.zeros((0, 2)), ValueError, r"y has shape \(0, 2\): expected at least one sample"),
    (np.float64(1.0), TypeError, "y must be a NumPy array or a tensor"),
    (torch.tensor(1.0), ValueError, r"y has shape \(\)"),
    (
        np.array([[0, 0], [math.nan, 0], [0, math.inf]]),
        ValueError,
        "y is not finite in 2 of 3 samples, first in sample 1",
    ),
    (np.zeros((4, 3)), ValueError, "x has samples of 2 numbers, y of 3"),
    (GOOD.astype(complex), TypeError, "y must be .* of real numbers, got complex128"),
    ([[0.0, 0.0]], TypeError, "y must be .* got list"),
    (torch.zeros(4, 2, dtype=torch.bool), TypeError, "real numbers, got bool"),
]


@pytest.mark.parametrize(("bad", "error", "text"), BAD)
def test_bad_sets_are_refused(bad, error, text):
    with pytest.raises(error, match=text):
        wasserstein2(GOOD, bad)
    with pytest.raises(error):
        nearest_distance(GOOD, bad, GOOD)
    with pytest.raises(error):
        nearest_distance(GOOD, GOOD, bad)


@pytest.mark.parametrize(("size", "subsets"), [(3, 2), (0, 1), (1, 0)])
def test_too_few_samples_for_a_floor_are_refused(size, subsets):
    with pytest.raises(ValueError, match=f"{subsets} disjoint subsets of {size} samples need .* there are 4"):
        wasserstein2_floor(GOOD, GOOD, size, subsets)


def test_a_solver_that_gives_up_is_heard(monkeypatch):
    monkeypatch.setattr("ndeflow.metrics.distances._PIVOTS", 2)
    with (
        pytest.warns(UserWarning, match="numItermax"),
        pytest.raises(RuntimeError, match="50 to 50 samples failed: numIt"),
    ):
        wasserstein2(gauss(50, 2), gauss(50, 2, "y"))
