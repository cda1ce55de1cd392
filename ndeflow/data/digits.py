"""Handwritten digits of 8×8 pixels: the smallest real images, shipped with scikit-learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from ndeflow.data.loading import DataModule, Labeled
from ndeflow.data.stream import Split
from ndeflow.randomness import permutation


def stratify(label: Tensor, sizes: tuple[int, ...], *words: int | str) -> tuple[Tensor, ...]:
    """Cut samples at random into disjoint parts that hold the classes in the same proportions.

    The samples of each class are shuffled and spread evenly over [0, 1); the parts are consecutive pieces of
    the line, so that a class's count in a part is off its proportion by one at most.

    Args:
        label: int64 (n,).
        sizes: samples in each part but the last, which takes the rest.
        words: the key of the shuffle.

    Returns:
        Sample ids of each part, ascending.

    >>> [part.tolist() for part in stratify(torch.tensor([0, 0, 0, 0, 1, 1]), (3,), 0)]
    [[2, 3, 5], [0, 1, 4]]
    """
    place = torch.empty(len(label), dtype=torch.float64)
    for k in label.unique().tolist():
        members = (label == k).nonzero().flatten()
        place[members] = (permutation(len(members), *words, k).double() + 0.5) / len(members)
    order = place.argsort(stable=True)
    parts = order.split([*sizes, len(label) - sum(sizes)])
    return tuple(part.sort().values for part in parts)


class Digits(DataModule):
    """The 1,797 digits of `sklearn.datasets.load_digits` in 1,212 training, 135 validation and 450 test images.

    x1 has shape (1, 8, 8) and range [−1, 1] (gray levels 0 … 16, divided by 8, minus 1). A quarter is held out as
    test set and a tenth of the rest for validation, stratified by digit. The split follows from `data_seed` alone:
    if it moved with the seed of the run, the runs of one study would train on each other's test images.

    Args:
        batch_size: the global batch of an optimizer step.
        seed: of the order and the keys.
        workers: loading processes per rank.
        cond: "label" hands the digit to the model.
        data_seed: of the split.
    """

    shape = (1, 8, 8)
    scale, shift = 1 / 8, -1.0
    classes = 10

    def __init__(
        self,
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        cond: Literal["label"] | None = None,
        data_seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, workers, cond)
        self.data_seed = data_seed

    def load(self) -> Mapping[Split, Labeled]:
        """Read the images from scikit-learn and split them."""
        pixels, digit = load_digits(return_X_y=True)
        raw, label = torch.as_tensor(pixels, dtype=torch.uint8).reshape(-1, *self.shape), torch.as_tensor(digit)
        test, val, train = stratify(label, (450, 135), self.data_seed, "digits")
        return {
            "train": Labeled(raw[train], label[train]),
            "val": Labeled(raw[val], label[val]),
            "test": Labeled(raw[test], label[test]),
        }
