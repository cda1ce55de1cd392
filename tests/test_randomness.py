import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ndeflow import randomness
from ndeflow.randomness import fold, normal, permutation, seed_all, uniform

INT64 = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(INT64, min_size=1, max_size=3), INT64)
def test_fold_of_a_tensor_is_the_fold_of_its_integers(ids, seed):
    keys = fold(seed, "train", torch.tensor(ids), 5)
    assert keys.tolist() == [fold(seed, "train", i, 5) for i in ids]


def test_fold_depends_on_every_word_and_on_their_order():
    words = [(0,), (0, 0), (0, 0, 0), (1, 2), (2, 1), ("a", "b"), ("b", "a"), ("ab",), (-1,), (0, -1)]
    assert len({fold(*w) for w in words}) == len(words)


def test_fold_is_the_same_in_another_process():
    code = "from ndeflow.randomness import fold; print(fold(3, 'order', 7))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out) == fold(3, "order", 7)


def test_fold_broadcasts_tensor_words():
    grid = fold(torch.arange(3)[:, None], torch.arange(4))
    assert grid.shape == (3, 4)
    assert grid[2, 3].item() == fold(2, 3)


@pytest.mark.parametrize("word", [1.5, True, None, torch.zeros(2)])
def test_fold_refuses_what_is_no_key(word):
    with pytest.raises(TypeError, match="fold takes"):
        fold(word)


def test_folded_bits_are_fair_and_flip_by_halves():
    keys = fold(torch.arange(20_000), "x")
    flipped = fold(torch.arange(20_000) ^ 1, "x")
    for bit in range(64):
        share = ((keys >> bit) & 1).double().mean().item()
        change = (((keys ^ flipped) >> bit) & 1).double().mean().item()
        assert abs(share - 0.5) < 4.5 * 0.5 / 20_000**0.5
        assert abs(change - 0.5) < 4.5 * 0.5 / 10_000**0.5  # pairs are counted twice


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keys", ["neighbors", "folded"])
def test_laws(dtype, keys):
    k = torch.arange(4_000) if keys == "neighbors" else fold(1, torch.arange(4_000))
    u = uniform(k, (25,), dtype)
    z = normal(k, (25,), dtype)
    assert u.dtype == z.dtype == dtype
    assert ((u >= 0) & (u < 1)).all()
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    # along samples, along elements, and between the two normals of one hash
    for a, b in ((z[1:], z[:-1]), (z[:, 1:], z[:, :-1]), (z[:, 0::2][:, :12], z[:, 1::2])):
        correlation = torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1].abs()
        assert correlation < 4.5 / a.numel() ** 0.5


def test_the_law_test_has_power():
    z = normal(torch.arange(4_000), (25,)).flatten() * 1.02
    assert stats.kstest(z.numpy(), "norm").pvalue < 1e-3


@given(INT64, st.integers(1, 40))
def test_a_draw_depends_on_its_key_and_element_alone(key, n):
    keys = torch.tensor([3, key, -7])
    whole = normal(keys, (40,))
    assert torch.equal(normal(torch.tensor([key]), (n,))[0], whole[1, :n])
    assert torch.equal(normal(keys, (5, 8)), whole.reshape(3, 5, 8))
    assert torch.equal(uniform(keys, (n,))[1], uniform(torch.tensor(key), (n,)))


def test_draws_do_not_touch_the_global_generators():
    seed_all(0)
    before = torch.get_rng_state()
    normal(torch.arange(3), (4,))
    permutation(10, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_keys_and_dtypes_are_refused():
    with pytest.raises(TypeError, match="int64"):
        normal(torch.zeros(3), (2,))
    with pytest.raises(TypeError, match="draw in float32 and cast"):
        uniform(torch.arange(3), (2,), torch.bfloat16)


def test_seed_all_seeds_every_library():
    def draw():
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    seed_all(1, "train", 5)
    first = draw()
    assert draw() != first
    seed_all(1, "train", 5)
    assert draw() == first
    seed_all(1, "train", 6)
    assert draw() != first


def test_permutation_is_one_and_keyed():
    order = permutation(100, 0, "order", 3)
    assert sorted(order.tolist()) == list(range(100))
    assert torch.equal(order, permutation(100, 0, "order", 3))
    assert not torch.equal(order, permutation(100, 0, "order", 4))


def test_large_and_small_draws_have_all_digits():
    z = normal(torch.arange(200_000), (10,))
    assert 4.5 < z.abs().max() < 6.8
    assert randomness.uniform(torch.arange(1_000_000)).min() < 1e-5
