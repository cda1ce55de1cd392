"""Which classes a model generates, as told by a classifier that has seen real images only."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.neighbors import KNeighborsClassifier

from ndeflow.metrics.distances import Array, points


class ClassShares(NamedTuple):
    """Share of each class among samples, the classifier's accuracy on real test data, and the number of samples."""

    shares: list[float]
    accuracy: float
    n: int


def _labels(y: Array, x: np.ndarray, classes: int, name: str) -> np.ndarray:
    """Labels (n,) in 0 … classes − 1 of the vectors x."""
    label = np.asarray(y)
    if label.shape != (len(x),) or label.dtype.kind not in "iu":
        raise ValueError(f"{name} is {label.dtype} {label.shape}, expected integers ({len(x)},)")
    if label.min() < 0 or label.max() >= classes:
        raise ValueError(f"{name} runs from {label.min()} to {label.max()}, expected 0 to {classes - 1}")
    return label


def class_shares(x: Array, train_x: Array, train_y: Array, test_x: Array, test_y: Array, classes: int) -> ClassShares:
    """Classify samples by their three nearest training images and count.

    Nearest neighbors need no fitting and no seed, and reach 98 % on 8×8 and 97 % on 28×28 digits. A share is as
    trustworthy as the accuracy: an error of 3 % can move a share by as much.

    Args:
        x: generated samples (n, *).
        train_x: real training images (m, *), of the same size.
        train_y: their labels (m,), 0 … classes − 1.
        test_x: other real images (k, *).
        test_y: their labels (k,).
        classes: number of classes.

    Returns:
        Shares of the `classes` classes, which sum to 1, and the accuracy on the test images.

    Raises:
        TypeError: an argument is no real array.
        ValueError: a set is empty, not finite, of another dimension, or labels do not fit.
    """
    images = {"x": points(x, "x"), "train_x": points(train_x, "train_x"), "test_x": points(test_x, "test_x")}
    sizes = {name: array.shape[1] for name, array in images.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"samples have different sizes: {', '.join(f'{k} {v} numbers' for k, v in sizes.items())}")
    known = _labels(train_y, images["train_x"], classes, "train_y")
    truth = _labels(test_y, images["test_x"], classes, "test_y")
    nearest = KNeighborsClassifier(n_neighbors=min(3, len(known)), algorithm="brute").fit(images["train_x"], known)
    counts = np.bincount(nearest.predict(images["x"]), minlength=classes)
    accuracy = float((nearest.predict(images["test_x"]) == truth).mean())
    return ClassShares((counts / counts.sum()).tolist(), accuracy, len(images["x"]))
