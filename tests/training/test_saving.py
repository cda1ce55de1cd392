import os
import signal

import pytest
import pytorch_lightning as pl
import torch

from ndeflow.config import ConfigError
from ndeflow.diffeq import SolverError
from ndeflow.training import files
from ndeflow.training.ema import EMA
from ndeflow.training.health import Health
from ndeflow.training.saving import CheckpointIO, Checkpoints, code_version
from ndeflow.training.signals import StopFlag, Stopped


def saver(folder, every=2, **settings):
    return Checkpoints(every, **settings).attach(
        folder, lambda: {"config": {"seed": 1}, "run": {"id": "x"}}, StopFlag()
    )


@pytest.fixture(autouse=True)
def handlers():
    """Leave the signal handlers of the test process as they were."""
    before = {s: signal.getsignal(s) for s in StopFlag.signals}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


class Kill(pl.Callback):
    """Send this process a signal at the first micro-batch of a step."""

    def __init__(self, step, signum):
        self.step, self.signum = step, signum

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == (self.step - 1) * trainer.accumulate_grad_batches:
            os.kill(os.getpid(), self.signum)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_every_keep_and_keep_every(fit, toy, numbers, tmp_path):
    fit(toy, numbers, [saver(tmp_path, every=2, keep=2, keep_every=4)], steps=11)
    assert [files.step_of(p) for p in files.step_files(tmp_path)] == [4, 8, 10, 11]


def test_raw_and_averaged_weights_config_and_versions(fit, toy, numbers, tmp_path):
    ema = EMA(0.9)
    fit(toy, numbers, [ema, saver(tmp_path)], steps=6)
    found = files.latest(tmp_path)
    assert found is not None
    checkpoint = found[1]
    assert torch.equal(checkpoint["state_dict"]["net.0.weight"], toy.net[0].weight)
    assert torch.equal(checkpoint["ema"]["weights"]["net.0.weight"], ema.weights["net.0.weight"])
    assert not torch.equal(checkpoint["ema"]["weights"]["net.0.weight"], toy.net[0].weight)
    facts = checkpoint["ndeflow"]
    assert (facts["format"], facts["config"], facts["run"]) == (files.FORMAT, {"seed": 1}, {"id": "x"})
    assert facts["commit"] == code_version()


def test_best_follows_the_monitored_term_and_holds_raw_weights(fit, toy, numbers, tmp_path):
    class Means(pl.Callback):
        def __init__(self):
            self.loss = {}

        def on_validation_end(self, trainer, pl_module):
            self.loss[trainer.global_step] = pl_module.validation_means()["loss"]

    means, ema = Means(), EMA(0.5)
    fit(toy, numbers, [means, ema, saver(tmp_path, every=100, monitor="loss")], steps=30)
    best = files.read(tmp_path / "best.ckpt")
    assert best["global_step"] == min(means.loss, key=means.loss.get)
    assert best["ndeflow"]["best"] == pytest.approx(min(means.loss.values()))
    assert not torch.equal(best["state_dict"]["net.0.weight"], best["ema"]["weights"]["net.0.weight"])


@pytest.mark.filterwarnings("ignore:validation batch 0 is left out")
def test_a_validation_with_failed_solves_is_never_the_best(fit, toy, numbers, tmp_path):
    class Fails(type(toy)):
        def loss(self, batch):
            trouble = not self.training and self.trainer.global_step == 15
            if trouble and 0 in batch["slot"]:
                raise SolverError("planned")
            return {name: value * (not trouble) for name, value in super().loss(batch).items()}

    numbers.batch_size = 8  # two batches in a validation
    fit(Fails(), numbers, [Health("skip"), saver(tmp_path, every=100, monitor="loss")], steps=20)
    assert files.read(tmp_path / "best.ckpt")["global_step"] != 15


def test_an_unknown_monitor_names_the_terms(fit, toy, numbers, tmp_path):
    with pytest.raises(ConfigError, match=r"checkpoints\.monitor=acc is no validation term; there are: fit, loss"):
        fit(toy, numbers, [saver(tmp_path, monitor="acc")], steps=6)


@pytest.mark.parametrize(("signum", "code"), [("SIGTERM", 85), ("SIGUSR1", 85), ("SIGINT", 130)])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_signal_saves_at_the_end_of_the_step_and_leaves(fit, toy, numbers, tmp_path, signum, code, accumulate):
    kill = Kill(5, getattr(signal, signum))
    with pytest.raises(Stopped, match=f"stopped by {signum} after step 5") as stop:
        fit(toy, numbers, [kill, saver(tmp_path, every=100)], accumulate_grad_batches=accumulate)
    assert stop.value.exit_code == code
    assert names(tmp_path) == [files.step_name(5)]


def test_a_second_interrupt_does_not_wait():
    flag = StopFlag()
    flag.install()
    os.kill(os.getpid(), signal.SIGINT)
    assert flag.signum == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_weights_that_are_not_finite_are_never_saved(fit, toy, numbers, tmp_path):
    class Break(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 4:
                pl_module.net[0].weight.data[0, 0] = torch.nan

    with pytest.raises(files.CheckpointError, match=r"net\.0\.weight is not finite: not saved"):
        fit(toy, numbers, [Break(), saver(tmp_path, every=2)])
    assert names(tmp_path) == [files.step_name(2)]


@pytest.mark.filterwarnings("ignore:disk full")
def test_a_full_disk_is_survived_twice(fit, toy, numbers, tmp_path, monkeypatch):
    written = files.write
    broken = {4, 6, 10, 12, 14}

    def write(obj, path):
        if files.step_of(path) in broken:
            raise files.DiskFull(f"disk full writing {path}")
        written(obj, path)

    monkeypatch.setattr("ndeflow.training.files.write", write)
    with pytest.raises(files.DiskFull, match="three checkpoints in a row"):
        fit(toy, numbers, [saver(tmp_path, every=2)])
    assert names(tmp_path) == [files.step_name(2), files.step_name(8)]


def test_compiled_and_plain_modules_read_each_others_checkpoints(fit, toy, numbers, tmp_path):
    toy.net = torch.compile(toy.net, backend="eager")
    fit(toy, numbers, [EMA(0.9), saver(tmp_path)], steps=2)
    checkpoint = files.read(tmp_path / files.step_name(2))
    assert not [k for k in [*checkpoint["state_dict"], *checkpoint["ema"]["weights"]] if "_orig_mod" in k]
    plain = type(toy)()
    plain.load_state_dict(checkpoint["state_dict"])
    fit(plain, numbers, [EMA(0.9), saver(tmp_path)], steps=3, ckpt_path=str(tmp_path / files.step_name(2)))
    compiled = type(toy)()
    compiled.net = torch.compile(compiled.net, backend="eager")
    fit(compiled, numbers, [EMA(0.9), saver(tmp_path)], steps=4, ckpt_path=str(tmp_path / files.step_name(3)))


def test_lightning_reads_through_our_reader(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"torn")
    with pytest.raises(files.CheckpointError, match="unreadable"):
        CheckpointIO().load_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize("bad", [{"every": 0}, {"every": 1, "keep": 0}, {"every": 1, "keep_every": -1}])
def test_counts_are_checked(bad):
    with pytest.raises(ValueError, match="must be at least 1"):
        Checkpoints(**bad)
