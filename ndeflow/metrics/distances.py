r"""Distances between sets of samples, each beside the value that perfect samples would get.

A distance between finite sets is not zero even when both come from one law; that *floor* depends on the law, the
metric and the sizes, and a distance without it says nothing. Images are compared as vectors of their pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.metrics import pairwise_distances_argmin
from torch import Tensor

from ndeflow.randomness import permutation

Array = np.ndarray | Tensor

_PIVOTS = 10_000_000  # of the network simplex; POT's default of 100,000 does not suffice from about 1,000 points on


class Distance(NamedTuple):
    """A distance, the one that real held-out data has in its place, and the number of samples."""

    value: float
    floor: float
    n: int

    @property
    def ratio(self) -> float:
        """How many times the floor the value is; infinite where the floor is zero and the value is not."""
        if self.floor == 0:
            return 1.0 if self.value == 0 else float("inf")
        return self.value / self.floor


def points(x: Array, name: str) -> np.ndarray:
    """Return samples (n, *) as finite float64 vectors (n, d); shape (n,) counts as d = 1.

    Raises:
        TypeError: x is no real array or tensor.
        ValueError: x is empty or not finite.
    """
    array = x.detach().cpu().numpy() if isinstance(x, Tensor) else x
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        kind = getattr(array, "dtype", type(array).__name__)
        raise TypeError(f"{name} must be a NumPy array or a tensor of real numbers, got {kind}")
    if array.size == 0 or array.ndim == 0:
        raise ValueError(f"{name} has shape {array.shape}: expected at least one sample along the first axis")
    array = array.reshape(len(array), -1).astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if bad.size:
        raise ValueError(f"{name} is not finite in {bad.size} of {len(array)} samples, first in sample {bad[0]}")
    return array


def _pair(x: Array, y: Array, names: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of vectors of one dimension."""
    a, b = points(x, names[0]), points(y, names[1])
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{names[0]} has samples of {a.shape[1]} numbers, {names[1]} of {b.shape[1]}: nothing to compare"
        )
    return a, b


def wasserstein2(x: Array, y: Array) -> float:
    r"""Compute W₂ between two empirical measures exactly.

    .. math:: W_2 = \sqrt{\min_P \sum_{ij} P_{ij} |x_i - y_j|^2}

    over all P ≥ 0 with row sums 1/n and column sums 1/m, by the network simplex (O(n³) at worst: seconds for 2,000
    points, too slow beyond 10,000). The distance itself, not its square.

    Args:
        x: samples (n, *).
        y: samples (m, *) of the same size.

    Returns:
        W₂ ≥ 0, in the units of x.

    Raises:
        TypeError: an argument is no real array.
        ValueError: a set is empty or not finite, or dimensions differ.
        RuntimeError: the solver gave up.

    Reference:
        Bonneel, van de Panne, Paris, Heidrich: "Displacement interpolation using Lagrangian mass transport", 2011
        (the network simplex of POT's `emd`).

    >>> wasserstein2(np.array([0.0, 1.0]), np.array([4.0, 3.0]))
    3.0
    """
    import ot  # seconds of imports, which a training run need not wait for

    a, b = _pair(x, y, ("x", "y"))
    plan, log = ot.emd(ot.unif(len(a)), ot.unif(len(b)), ot.dist(a, b), numItermax=_PIVOTS, log=True)
    if log["warning"] is not None:
        raise RuntimeError(
            f"optimal transport of {len(a)} to {len(b)} samples failed: {log['warning']}; use fewer samples"
        )
    rows, columns = plan.nonzero()
    # The cost matrix rounds like |x|² ε, the differences of the few matched pairs do not: recompute their cost.
    cost = np.square(a[rows] - b[columns]).sum(axis=1)
    return float(np.sqrt(plan[rows, columns] @ cost))


def wasserstein2_floor(train: Array, test: Array, size: int, subsets: int = 2, seed: int = 0) -> float:
    """Compute the mean W₂ to the test set of disjoint subsets of the training set: what perfect samples would get.

    Args:
        train: real samples (n, *).
        test: real samples (m, *) that are in no way among them.
        size: samples in a subset; equal to the number of generated ones.
        subsets: number of subsets.
        seed: of their choice.

    Raises:
        ValueError: the training set is too small for so many subsets, or the arrays are as `wasserstein2` refuses.
    """
    a, b = _pair(train, test, ("train", "test"))
    if size < 1 or subsets < 1 or size * subsets > len(a):
        raise ValueError(
            f"{subsets} disjoint subsets of {size} samples need {subsets * size} training samples, there are {len(a)}: "
            "ask for fewer or smaller subsets (at least one of each)"
        )
    chosen = permutation(len(a), seed, "floor").numpy()[: size * subsets].reshape(subsets, size)
    return float(np.mean([wasserstein2(a[rows], b) for rows in chosen]))


def wasserstein2_distance(x: Array, test: Array, train: Array, subsets: int = 2, seed: int = 0) -> Distance:
    """Compute W₂ of generated samples to the test set, and its floor for as many training samples.

    Args:
        x: generated samples (n, *).
        test: real samples that the model has not seen.
        train: real samples (≥ subsets · n, *) for the floor.
        subsets: as in `wasserstein2_floor`.
        seed: as in `wasserstein2_floor`.

    Raises:
        ValueError: as `wasserstein2` and `wasserstein2_floor`.
    """
    value = wasserstein2(x, test)
    return Distance(value, wasserstein2_floor(train, test, len(x), subsets, seed), len(x))


def _nearest(a: np.ndarray, b: np.ndarray) -> float:
    """Mean distance from the points of a to their nearest ones in b."""
    return float(np.linalg.norm(a - b[pairwise_distances_argmin(a, b)], axis=1).mean())


def nearest_distance(x: Array, reference: Array, held_out: Array) -> Distance:
    """Compute the mean distance of samples to their nearest reference point, and that of held-out real ones.

    With the training set as reference, a ratio far below 1 means memorized training data, far above 1 samples
    away from the data.

    Args:
        x: generated samples (n, *).
        reference: real samples (m, *), usually the training set.
        held_out: other real samples (k, *), usually the test set; they give the floor.

    Raises:
        TypeError: an argument is no real array.
        ValueError: a set is empty or not finite, or dimensions differ.
    """
    a, b = _pair(x, reference, ("x", "reference"))
    real, _ = _pair(held_out, b, ("held_out", "reference"))
    return Distance(_nearest(a, b), _nearest(real, b), len(a))
