"""Class shares on well-separated classes and on real digits."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from ndeflow.metrics import class_shares

CENTERS = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])


def cloud(labels, name):
    rng = np.random.default_rng(name)
    return CENTERS[labels] + rng.normal(size=(len(labels), 2))


@pytest.fixture
def real():
    train, test = np.repeat(range(3), 20), np.repeat(range(3), 5)
    return {"train_x": cloud(train, 0), "train_y": train, "test_x": cloud(test, 1), "test_y": test, "classes": 3}


def test_shares_are_counts_of_clear_classes(real):
    found = class_shares(torch.tensor(cloud([0, 0, 0, 2], 2)), **real)
    assert found == ([0.75, 0.0, 0.25], 1.0, 4)


def test_the_accuracy_is_measured_on_the_test_images(real):
    real["test_y"] = np.roll(real["test_y"], 1)  # three of fifteen labels are wrong now
    assert class_shares(cloud([1], 2), **real).accuracy == pytest.approx(12 / 15)


def test_digits_are_told_apart_and_shares_are_deterministic():
    x, y = load_digits(return_X_y=True)
    new, test, train = (np.arange(len(x)) % 5 == k for k in (0, 1, 2))
    args = (x[train], y[train], x[test].reshape(-1, 1, 8, 8), y[test], 10)
    found = class_shares(x[new], *args)
    assert found == class_shares(x[new], *args)
    assert found.accuracy > 0.95
    assert np.abs(np.array(found.shares) - np.bincount(y[new]) / new.sum()).max() < 0.02
    fours = class_shares(x[new & (y == 4)], *args)
    assert fours.shares[4] > 0.9


def test_a_class_that_never_occurs_has_share_zero(real):
    assert class_shares(cloud([0, 1], 2), **real | {"classes": 5}).shares == [0.5, 0.5, 0.0, 0.0, 0.0]


def test_two_training_images_are_enough(real):
    real |= {"train_x": CENTERS[:2], "train_y": np.array([0, 1])}
    assert class_shares(CENTERS[:1], **real).n == 1


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": np.zeros((0, 2))}, ValueError, "x has shape"),
        ({"x": np.full((2, 2), np.nan)}, ValueError, "x is not finite in 2 of 2"),
        ({"test_x": np.zeros((15, 3))}, ValueError, "x 2 numbers, train_x 2 numbers, test_x 3 numbers"),
        ({"train_y": np.zeros(7, int)}, ValueError, r"train_y is int64 \(7,\), expected integers \(60,\)"),
        ({"test_y": np.zeros(15)}, ValueError, "test_y is float64"),
        ({"classes": 2}, ValueError, "train_y runs from 0 to 2, expected 0 to 1"),
        ({"train_x": [[0.0]]}, TypeError, "train_x must be a NumPy array or a tensor"),
    ],
)
def test_bad_input_is_refused(real, change, error, text):
    with pytest.raises(error, match=text):
        class_shares(**{"x": np.zeros((2, 2))} | real | change)
