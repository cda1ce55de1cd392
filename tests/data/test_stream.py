"""The order of training: elastic, resumable, each sample at most once per epoch."""

import pickle
import random
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Subset, TensorDataset

from ndeflow.data import Seeded, Shard, Stream, micro_batch
from ndeflow.randomness import fold


def stream(n=50, batch=12, seed=0, rank=0, world=1, accumulate=1, start=0):
    return Stream(n, batch, seed, rank, world, accumulate, lambda: start)


def follow(n_epochs, **kwargs):
    """The items of the first epochs, as (step, part) -> items."""
    per_epoch = stream(**kwargs).per_epoch
    batches = [b for e in range(n_epochs) for b in stream(**kwargs, start=e * per_epoch)]
    return {batch[0][1:3]: batch for batch in batches}


def test_an_epoch_visits_each_sample_at_most_once_and_leaves_the_tail():
    ids = [item[4] for batch in stream() for item in batch]
    assert len(ids) == len(set(ids)) == 48
    assert set(ids) <= set(range(50))
    assert len(stream()) == 4


def test_epochs_and_seeds_have_different_orders_and_different_tails():
    epochs = [[item[4] for batch in stream(start=4 * e) for item in batch] for e in range(30)]
    assert len({tuple(e) for e in epochs}) == 30
    assert {i for e in epochs for i in e} == set(range(50))
    assert list(stream(seed=0)) != list(stream(seed=1))


def test_items_name_epoch_step_part_and_slot():
    batches = list(stream(accumulate=2, start=9))
    assert [b[0][:3] for b in batches] == [(2, 9, 0), (2, 9, 1), (2, 10, 0), (2, 10, 1), (2, 11, 0), (2, 11, 1)]
    assert [item[3] for item in batches[0] + batches[1]] == list(range(12))


def without_part(item):
    epoch, step, _, slot, i = item
    return epoch, step, slot, i


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 3), (2, 2), (3, 4), (12, 1)])
def test_ranks_and_accumulation_cut_the_same_global_batches(world, accumulate):
    whole = follow(2)
    shares = [follow(2, rank=r, world=world, accumulate=accumulate) for r in range(world)]
    for (step, _), batch in whole.items():
        pieces = [shares[r][step, part] for r in range(world) for part in range(accumulate)]
        assert {len(p) for p in pieces} == {12 // (world * accumulate)}
        assert [without_part(item) for piece in pieces for item in piece] == [without_part(item) for item in batch]


@pytest.mark.parametrize("start", range(9))
def test_resuming_at_any_step_gives_the_tail(start):
    whole = follow(3, accumulate=2)
    tail = list(stream(accumulate=2, start=start))
    assert len(tail) == 2 * (4 - start % 4)
    assert all(batch == whole[batch[0][1:3]] for batch in tail)
    assert tail[0][0][1] == start


def test_the_position_is_read_when_iteration_begins_and_not_later():
    steps = [0]
    s = Stream(50, 12, 0, 0, 1, 1, lambda: steps[0])
    early = iter(s)
    steps[0] = 3
    assert next(early)[0][1] == 0
    assert next(iter(s))[0][1] == 3


def test_refusals_name_all_numbers():
    with pytest.raises(ValueError, match=r"20 equal parts \(4 processes × 5 acc.*one of 1, 2, 3, 4, 6, 12"):
        stream(world=4, accumulate=5)
    with pytest.raises(ValueError, match=r"11 samples.*batch_size=12 \(2 processes × 3 accumulated batches × 2\)"):
        stream(n=11, world=2, accumulate=3)
    with pytest.raises(ValueError, match="rank=2 is none of the 2 ranks"):
        stream(rank=2, world=2)
    assert micro_batch(24, 3, 2) == 4


def test_shards_cover_a_set_once_and_in_order():
    shards = [Shard("val", 11, 3, rank, 4) for rank in range(4)]
    for shard in shards:
        assert len(shard) == len(list(shard))
    items = [item for shard in shards for batch in shard for item in batch]
    assert sorted(item[4] for item in items) == list(range(11))
    assert all(item[0] == "val" and item[3] == item[4] for item in items)
    assert not list(Shard("val", 2, 3, rank=3, world_size=4))


class Noisy:
    """Draws from all three global generators, item by item."""

    def __getitem__(self, i):
        noise = [random.random(), np.random.rand(), torch.rand(()).item()]
        return {"x1": torch.tensor([float(i), *noise], dtype=torch.float64)}


class Still(Noisy):
    noisy = False


def items_at(step, epoch=0, part=0):
    return [(epoch, step, part, j, j + 3) for j in range(4)]


def test_seeded_adds_keys_and_places():
    batch = Seeded(Noisy(), seed=5, slots=12).__getitems__(items_at(1, epoch=7))
    assert batch["key"].tolist() == [fold(5, 7, i) for i in (3, 4, 5, 6)]
    assert batch["slot"].tolist() == [0, 1, 2, 3]
    assert batch["slots"].tolist() == [12] * 4
    assert {batch[k].dtype for k in ("key", "slot", "slots")} == {torch.int64}
    assert batch["x1"].shape == (4, 4)


def test_noise_of_a_data_set_depends_on_the_place_of_the_batch_alone():
    def draw(step, rank=0, part=0, seed=0):
        return Seeded(Noisy(), seed, 12, rank).__getitems__(items_at(step, 0, part))["x1"]

    first = draw(1)
    draw(2)
    assert torch.equal(draw(1), first)
    for other in (draw(2), draw(1, rank=1), draw(1, part=1), draw(1, seed=1)):
        assert (other[:, 1:] != first[:, 1:]).all()


def test_a_data_set_that_draws_nothing_leaves_the_generators_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    still = Seeded(Still(), 0, 12)
    assert not still.noisy
    whole = [still.__getitems__(items_at(1))["x1"][0, 3].float(), still.__getitems__(items_at(1))["x1"][0, 3].float()]
    assert whole[0] == expected[0]
    assert whole[0] != whole[1]


def test_batched_fetching_of_lists_is_collated():
    class Items(TensorDataset):
        def __getitem__(self, i):
            return {"x1": super().__getitem__(i)[0]}

    subset = Subset(Items(torch.arange(20.0)), list(range(10, 20)))
    assert Seeded(subset, 0, 4).__getitems__(items_at(0))["x1"].tolist() == [13.0, 14.0, 15.0, 16.0]


@given(data=st.data(), world=st.integers(1, 4), accumulate=st.integers(1, 3), micro=st.integers(1, 5))
def test_whatever_the_shares_an_epoch_is_cut_once_and_in_order(data, world, accumulate, micro):
    batch = world * accumulate * micro
    n = data.draw(st.integers(batch, 6 * batch))
    start = data.draw(st.integers(0, 40))
    shares = [list(stream(n, batch, 1, r, world, accumulate, start)) for r in range(world)]
    whole = list(stream(n, batch, seed=1, start=start))
    assert {len(share) for share in shares} == {accumulate * len(whole)}
    items = sorted(without_part(item) for share in shares for part in share for item in part)
    assert items == sorted(without_part(item) for part in whole for item in part)
    assert len({i for *_, i in items}) == len(items) == len(whole) * batch


def test_data_sets_can_be_sent_to_workers():
    seeded = Seeded(Noisy(), seed=5, slots=12)
    copy = pickle.loads(pickle.dumps(seeded))
    assert torch.equal(copy.__getitems__(items_at(2))["x1"], seeded.__getitems__(items_at(2))["x1"])


def test_an_endless_stream_is_the_epochs_one_after_another():
    endless = Stream(50, 12, 0, 0, 1, 2, lambda: 6, endless=True)
    expected = [batch for start in (6, 8, 12) for batch in Stream(50, 12, 0, 0, 1, 2, lambda s=start: s)]
    assert list(islice(endless, len(expected))) == expected
    with pytest.raises(TypeError, match="no length"):
        len(endless)
