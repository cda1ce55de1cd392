"""The split of the digits."""

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from ndeflow.data import Digits
from ndeflow.data.digits import stratify
from ndeflow.randomness import permutation


@pytest.mark.parametrize("data_seed", [0, 1])
def test_parts_hold_the_classes_in_proportion(data_seed):
    label = torch.as_tensor(load_digits().target)
    parts = stratify(label, (450, 135), data_seed)
    assert [len(p) for p in parts] == [450, 135, 1212]
    assert torch.cat(parts).sort().values.tolist() == list(range(1797))
    for part in parts:
        expected = label.bincount() * len(part) / len(label)
        assert (label[part].bincount(minlength=10) - expected).abs().max() <= 1.1


def test_an_unstratified_split_would_be_noticed():
    label = torch.as_tensor(load_digits().target)
    expected = label.bincount() * 450 / len(label)
    for seed in range(3):
        chosen = label[permutation(len(label), seed)[:450]]
        assert (chosen.bincount(minlength=10) - expected).abs().max() > 2


def test_the_split_moves_with_its_own_seed_only():
    def test(**kwargs):
        return Digits(64, **kwargs).arrays("test")["x1"]

    assert torch.equal(test(), test(seed=1, workers=1, cond="label"))
    assert not torch.equal(test(), test(data_seed=1))


def test_images_are_those_of_scikit_learn_on_minus_one_to_one():
    data = Digits(64)
    parts = [data.arrays(split) for split in ("train", "val", "test")]
    images = torch.cat([p["x1"] for p in parts])
    assert (images.min().item(), images.max().item()) == (-1.0, 1.0)
    given = {tuple(row): y for row, y in zip(*load_digits(return_X_y=True), strict=True)}
    labels = torch.cat([p["label"] for p in parts]).tolist()
    back = ((images + 1) * 8).flatten(1).double()
    assert [given[tuple(row)] for row in back.tolist()] == labels


def test_the_training_images_tell_the_test_images_apart():
    data = Digits(64)
    train, test = data.arrays("train"), data.arrays("test")
    nearest = KNeighborsClassifier(1).fit(train["x1"].flatten(1), train["label"])
    assert nearest.score(test["x1"].flatten(1), test["label"]) > 0.97
