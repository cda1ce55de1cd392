"""The contract of every data module, and what the base does with the trainer it is attached to."""

from itertools import islice
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch

from ndeflow.data import MNIST, Checkerboard, DataModule, Digits, EightGaussians, Labeled, Pinwheel, Spirals, TwoMoons
from ndeflow.randomness import fold

SMALL = {"batch_size": 12, "cond": "label"}
MAKERS = {
    "Digits": lambda **kw: Digits(**SMALL | kw),
    "MNIST": lambda **kw: MNIST(**SMALL | kw),
    **{
        toy.__name__: lambda toy=toy, **kw: toy(**SMALL | {"n": 100} | kw)
        for toy in (TwoMoons, EightGaussians, Pinwheel, Checkerboard, Spirals)
    },
}


@pytest.fixture(params=MAKERS)
def make(request, tmp_path, monkeypatch, write_mnist, tiny_arrays):
    if request.param == "MNIST":
        monkeypatch.setenv("NDEFLOW_DATA", str(write_mnist(tmp_path / "mnist", tiny_arrays, "raw")))
    return MAKERS[request.param]


def trainer(rank=0, world=1, accumulate=1, step=0):
    return SimpleNamespace(global_rank=rank, world_size=world, accumulate_grad_batches=accumulate, global_step=step)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_batches_have_the_promised_entries(make):
    data = make(seed=3)
    for loader, slots in ((data.train_dataloader(), 12), (data.val_dataloader(), None), (data.test_dataloader(), None)):
        batch = next(iter(loader))
        n = len(batch["x1"])
        assert batch["x1"].shape == (n, *data.shape)
        assert batch["x1"].dtype == torch.float32
        assert {batch[k].dtype for k in ("cond", "key", "slot", "slots")} == {torch.int64}
        assert {batch[k].shape for k in ("cond", "key", "slot", "slots")} == {(n,)}
        assert set(batch["cond"].tolist()) <= set(range(data.classes))
        assert batch["slots"].unique().tolist() == [slots or len(loader.dataset.dataset)]
        assert len(batch["key"].unique()) == n
    assert "cond" not in next(iter(make(cond=None).train_dataloader()))


def test_splits_are_disjoint_and_do_not_move_with_the_seed_of_the_run(make):
    first, other = make(seed=0), make(seed=1)
    rows = []
    for split in ("train", "val", "test"):
        whole = first.arrays(split)
        assert equal(whole, other.arrays(split))
        rows += whole["x1"].flatten(1).tolist()
    assert len({tuple(row) for row in rows}) == len(rows)


def test_batches_hold_the_samples_that_their_keys_name(make):
    data = make(seed=3)
    whole = data.arrays("train")
    keys = {fold(3, 0, i): i for i in range(len(whole["x1"]))}
    for batch in data.train_dataloader():
        ids = [keys[k] for k in batch["key"].tolist()]
        assert torch.equal(batch["x1"], whole["x1"][ids])
        assert torch.equal(batch["cond"], whole["label"][ids])


def test_evaluation_keys_and_slots_are_those_of_the_index(make):
    data = make(seed=3)
    whole = data.arrays("test")
    batches = list(data.test_dataloader())
    joined = {k: torch.cat([b[k] for b in batches]) for k in batches[0]}
    assert torch.equal(joined["x1"], whole["x1"])
    assert joined["slot"].tolist() == list(range(len(whole["x1"])))
    assert joined["key"].tolist() == [fold(3, "test", i) for i in range(len(whole["x1"]))]


def test_workers_do_not_change_a_batch(make):
    alone, helped = make(seed=2), make(seed=2, workers=2)
    for loaders in ((d.train_dataloader() for d in (alone, helped)), (d.val_dataloader() for d in (alone, helped))):
        assert all(equal(a, b) for a, b in zip(*loaders, strict=True))


def test_info_scales_raw_values_to_x1(make):
    data = make()
    data.setup()
    raw, info = data.load()["test"].raw.double(), data.info
    assert torch.allclose(info["scale"] * raw + info["shift"], data.arrays("test")["x1"].double(), atol=1e-6)
    assert info["shape"] == list(raw.shape[1:])
    assert info["classes"] == data.classes
    assert {type(info[k]) for k in ("scale", "shift")} == {float}


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (2, 3)])
def test_ranks_and_parts_together_see_the_batches_of_one_process(world, accumulate):
    whole, shares = Digits(12), []
    whole.trainer = trainer(step=5)
    for rank in range(world):
        data = Digits(12)
        data.trainer = trainer(rank, world, accumulate, step=5)
        data.setup()
        shares.append(list(islice(data.train_dataloader(), 4 * accumulate)))
    for step, batch in enumerate(islice(whole.train_dataloader(), 4)):
        parts = [share[step * accumulate + part] for share in shares for part in range(accumulate)]
        assert equal(batch, {k: torch.cat([p[k] for p in parts]) for k in batch})


def test_evaluation_is_shared_without_repeats():
    whole, seen = Digits(12).arrays("val")["x1"], []
    for rank in range(2):
        data = Digits(12)
        data.trainer = trainer(rank, 2)
        seen += [b for b in data.val_dataloader()]
    slots = torch.cat([b["slot"] for b in seen])
    assert sorted(slots.tolist()) == list(range(135))
    assert torch.equal(torch.cat([b["x1"] for b in seen]), whole[slots])


def test_a_notebook_advances_the_position_itself():
    data = Digits(256)
    loader = data.train_dataloader()
    first = [b["key"] for b in loader]
    data.position += len(first)
    second = [b["key"] for b in loader]
    assert len(first) == len(second) == 4
    assert not set(torch.cat(first).tolist()) & set(torch.cat(second).tolist())


class Recorder(pl.LightningModule):
    """Remembers the keys of its batches."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen, self.judged = torch.nn.Parameter(torch.zeros(())), [], []

    def training_step(self, batch, _):
        self.seen.append(batch["key"].tolist())
        return self.weight * batch["x1"].mean()

    def validation_step(self, batch, _):
        self.judged += batch["key"].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(data, module, folder, steps, resume=None):
    worker = pl.Trainer(
        max_steps=steps, max_epochs=-1, accumulate_grad_batches=2, use_distributed_sampler=False,
        val_check_interval=8, check_val_every_n_epoch=None,
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        default_root_dir=folder, num_sanity_val_steps=1, accelerator="cpu",
    )  # fmt: skip
    worker.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    worker.save_checkpoint(folder / "last.ckpt", weights_only=False)
    return module


quiet = pytest.mark.filterwarnings("ignore:.*does not have many workers")


@quiet
@pytest.mark.parametrize("workers", [0, 2])
def test_lightning_resumes_inside_an_epoch(tmp_path, workers):
    def make():
        return TwoMoons(16, n=80, workers=workers)

    whole = fit(make(), Recorder(), tmp_path, 10).seen
    assert len(whole) == 20
    assert len({key for batch in whole for key in batch}) == 20 * 8
    begun = fit(make(), Recorder(), tmp_path, 6).seen
    ended = fit(make(), Recorder(), tmp_path, 10, tmp_path / "last.ckpt").seen
    assert begun + ended == whole
    with pytest.raises(ValueError, match=r"batch_size=8, the checkpoint was written with 16.*set data.batch_size=16"):
        fit(TwoMoons(8, n=80), Recorder(), tmp_path, 12, tmp_path / "last.ckpt")


@quiet
def test_every_validation_has_the_same_keys(tmp_path):
    judged = fit(TwoMoons(16, n=80), Recorder(), tmp_path, 8).judged
    once = [fold(0, "val", i) for i in range(8)]
    assert judged == once * (len(judged) // 8)
    assert len(judged) >= 16


def test_resuming_needs_the_same_samples_and_the_same_global_batch():
    state = Digits(64).state_dict()
    assert state == {"n": 1212, "global_batch": 64}
    Digits(64, seed=9, workers=1).load_state_dict(state)
    loader = Digits(64).train_dataloader()
    loader.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match="has 80 samples, the checkpoint's had 1212: the data order cannot continue"):
        TwoMoons(64, n=100).load_state_dict(state)
    with pytest.raises(ValueError, match="batch_size=32"):
        Digits(32).train_dataloader().load_state_dict(state)


class Mine(DataModule):
    """A user's data, loaded as told."""

    shape = (3,)
    given: dict

    def load(self):
        return self.given


def mine(cond=None, **changes):
    data = Mine(2, cond=cond)
    part = Labeled(torch.zeros(4, 3))
    data.given = {"train": part, "val": part, "test": part} | changes
    return data


def test_a_module_that_does_not_fit_its_own_words_is_refused():
    assert mine().summary() == "Mine, 4 train + 4 val + 4 test, shape (3,), 2 a step, 2 steps an epoch"
    assert mine().arrays("val").keys() == {"x1"}
    missing = mine()
    del missing.given["val"]
    for data, text in {
        missing: "Mine.load gives train, test: val is missing",
        mine(test=Labeled(torch.zeros(4, 2))): r"test samples have shape \(2,\), expected \(3,\)",
        mine(cond="label"): "cond='label', but Mine has no labels in train",
        mine(train=Labeled(torch.zeros(4, 3), torch.zeros(5))): r"float32 \(5,\), expected int64 \(4,\)",
    }.items():
        with pytest.raises(ValueError, match=text):
            data.train_dataloader()
    with pytest.raises(ValueError, match="no split 'tset': expected one of train, val, test"):
        mine().arrays("tset")


class Jitter:
    """Samples with noise of their own."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return {"x1": i + torch.rand(3)}


class Augmented(Mine):
    def dataset(self, split):
        return Jitter()


def test_noise_of_a_data_set_is_seeded_by_batch_in_whichever_process():
    assert Augmented(2).summary().endswith("own noise: resumes exactly on as many processes only")
    alone, helped = list(Augmented(2).train_dataloader()), list(Augmented(2, workers=2).train_dataloader())
    assert all(equal(a, b) for a, b in zip(alone, helped, strict=True))
    noise = [torch.cat([b["x1"] % 1 for b in Augmented(2, seed=seed).train_dataloader()]) for seed in (0, 1)]
    assert len(torch.cat(noise).unique()) == 72


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"batch_size": 8, "workers": -1}, {"batch_size": 8, "cond": "y"}])
def test_bad_arguments_are_refused(bad):
    with pytest.raises(ValueError, match=r"must be at least|expected null or label"):
        Digits(**bad)
