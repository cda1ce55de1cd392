import os
import re
import sys

import pytest
import torch
from torch import nn

from ndeflow import cli
from ndeflow.cli import run_command
from ndeflow.config import ConfigError
from ndeflow.diffeq import Euler
from ndeflow.training import doctor, files
from ndeflow.training.doctor import BAD, checkpoint_bytes, gradient_errors
from ndeflow.training.ema import EMA
from ndeflow.training.saving import Checkpoints
from ndeflow.training.signals import StopFlag
from train import ROOT

TINY = ["module.model.net.width=16", "module.model.net.depth=1"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Work in an empty folder, with an import path and random generators of one's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("NDEFLOW_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with torch.random.fork_rng(devices=[]):
        yield


def lines(capsys):
    """Return the rows of a printed report by name."""
    return dict(re.findall(r"^  (\S+) +(.*)$", capsys.readouterr().out, re.MULTILINE))


# -- the machine


def test_the_report_on_a_machine(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "all_reduce", lambda: "fine")
    assert run_command(["doctor"]) == 0
    rows = lines(capsys)
    assert rows["torch"] == str(torch.__version__)
    assert rows["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert {"lightning", "wandb", "numpy", "omegaconf", "cpu", "cuda", "mps", "data"} <= rows.keys()
    assert rows["W&B"] == "offline (WANDB_MODE=offline)"
    assert rows["all-reduce"] == "fine"
    assert re.fullmatch(r"[\d.]+ ms per field evaluation .*", rows["solve"])
    assert "runs can be written" in rows["runs"]
    assert os.listdir() == []


def test_whatever_fails_is_reported_and_the_rest_goes_on(monkeypatch, capsys):
    def broken():
        raise MemoryError("no room")

    monkeypatch.setattr(doctor, "time_solve", broken)
    monkeypatch.setattr(doctor, "all_reduce", lambda: "fine")
    assert run_command(["doctor"]) == 1
    rows = lines(capsys)
    assert (rows["solve"], rows["all-reduce"]) == ("BAD: MemoryError: no room", "fine")


def test_a_wrong_wandb_mode_is_bad(monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "onlin")
    monkeypatch.setattr(doctor, "all_reduce", lambda: "fine")
    assert run_command(["doctor"]) == 1
    assert lines(capsys)["W&B"].startswith("BAD: ValueError: WANDB_MODE=onlin: allowed are")


def test_two_processes_sum():
    assert doctor.all_reduce().startswith("two processes over gloo, ")


def test_two_processes_that_do_not(monkeypatch):
    monkeypatch.setattr(doctor, "_SUM", "import time; time.sleep(60)")
    assert doctor.all_reduce(timeout=0.2) == "BAD: two processes did not find each other in 0.2 s"
    monkeypatch.setattr(doctor, "_SUM", "print('trace'); raise SystemExit('no network interface')")
    assert doctor.all_reduce() == "BAD: no network interface"


def test_a_solve_that_is_wrong_is_bad(monkeypatch):
    assert not doctor.time_solve().startswith(BAD)
    monkeypatch.setattr(doctor, "RK4", Euler)
    assert doctor.time_solve().startswith(BAD)


def test_data_sets_are_found_where_they_are(tmp_path, monkeypatch):
    assert doctor.data_sets().startswith("none (NDEFLOW_DATA not set, cache ")
    monkeypatch.setenv("NDEFLOW_DATA", str(tmp_path / "own"))
    assert doctor.data_sets() == f"BAD: NDEFLOW_DATA={tmp_path}/own does not exist"
    for folder, name in (("own", "mnist"), ("cache/ndeflow/fashion_mnist", "fashion_mnist")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"{name}.npz").touch()
    found = f"mnist in {tmp_path}/own, fashion_mnist in {tmp_path}/cache/ndeflow/fashion_mnist ("
    assert doctor.data_sets().startswith(found)


def test_room_for_runs(tmp_path):
    assert not doctor.space(tmp_path / "a" / "b").startswith(BAD)
    assert doctor.space(tmp_path, needed=1e18).startswith(BAD)
    (tmp_path / "file").touch()
    assert doctor.space(tmp_path / "file" / "runs").endswith("file cannot be written: set run.root=DIR")
    assert os.listdir() == ["file"]


# -- a config


def test_a_config_is_rehearsed_and_nothing_is_left(capsys):
    assert run_command(["doctor", str(ROOT / "flow/digits.yaml"), *TINY]) == 0
    rows = lines(capsys)
    assert rows["module"] == "ndeflow.modules.flow.RectifiedFlow, 3,456 trained"
    assert "x1 float32 (256, 1, 8, 8), key int64 (256,)" in rows["batch"]
    assert re.fullmatch(r"loss [\d.]+, [\d.]+ s \(the first one\)", rows["step"])
    assert max(float(e) for e in re.findall(r"[\d.]+e-\d+", rows["gradient"])) < 1e-6
    raw = sum(map(float, re.findall(r"raw ([\d.]+)", rows["checkpoint"])))
    assert raw == pytest.approx(3456 * 4 / 1e6, abs=0.005)
    assert os.listdir() == []


NETS = """
import torch
from ndeflow.nets import MLP

class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient

class Wrong(MLP):
    def forward(self, t, x, cond=None):
        return super().forward(t, Double.apply(x), cond) + Double.apply(self.last.bias).reshape(x.shape[1:])

class Broken(MLP):
    def forward(self, t, x, cond=None):
        return super().forward(t, x, cond) / 0
"""


@pytest.mark.parametrize(
    ("net", "row", "text"),
    [("Wrong", "gradient", "BAD: the backward pass is wrong or cut off: "), ("Broken", "stopped", "BAD: NonFinite: ")],
)
def test_a_net_of_ones_own_that_is_wrong_is_found(net, row, text, tmp_path, capsys):
    (tmp_path / "nets_of_mine.py").write_text(NETS)
    node = f"module.model.net={{_target_: nets_of_mine.{net}, shape: [1, 8, 8], width: 16, depth: 1}}"
    assert run_command(["doctor", str(ROOT / "flow/digits.yaml"), "plugins=[nets_of_mine]", node]) == 1
    assert lines(capsys)[row].startswith(text)


def test_data_that_is_missing_is_bad_and_what_came_before_is_shown(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run_command(["doctor", str(ROOT / "flow/mnist.yaml"), "data.root=empty"]) == 1
    rows = lines(capsys)
    assert rows["stopped"].startswith("BAD: DataError: data (MNIST): root=empty does not hold the data")
    assert "trained" in rows["module"]


def test_weights_to_start_from_are_looked_for():
    with pytest.raises(ConfigError, match="no checkpoint or run directory runs/a"):
        run_command(["doctor", str(ROOT / "flow/digits.yaml"), *TINY, "init.from=runs/a"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["flow/digit"], "there is no config flow/digit in configs"),
        (["DIGITS", "module.model.net.widht=3"], r"did you mean width\? \(in override"),
        (["DIGITS", "data.batch_size=0"], r"data \(ndeflow\.data\.Digits\): batch_size=0"),
        (["DIGITS", "flow/moons"], "at most one config"),
        (["seed=1"], "at most one config"),
    ],
)
def test_wrong_configs_and_commands(arguments, text):
    with pytest.raises(ConfigError, match=text):
        run_command(["doctor", *(a.replace("DIGITS", str(ROOT / "flow/digits.yaml")) for a in arguments)])


def test_a_wrong_config_exits_with_code_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ndeflow", "doctor", "nowhere"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2


# -- its parts


def test_the_expected_size_of_a_checkpoint_is_its_size(fit, toy, numbers, tmp_path):
    toy.net = nn.Sequential(nn.Linear(3, 4000), nn.BatchNorm1d(4000), nn.Linear(4000, 3))
    saver = Checkpoints(2).attach(tmp_path, lambda: {"config": {}}, StopFlag())
    trainer = fit(toy, numbers, [EMA(0.9), saver], steps=2)
    expected = checkpoint_bytes(toy, trainer.optimizers[0], ema=True)
    assert (tmp_path / files.step_name(2)).stat().st_size == pytest.approx(sum(expected.values()), rel=0.03)
    assert checkpoint_bytes(toy, trainer.optimizers[0], ema=False)["ema"] == 0


@pytest.fixture
def batch(numbers):
    numbers.setup()
    return next(iter(numbers.train_dataloader()))


def test_a_right_gradient_passes_and_the_module_stays_as_it_was(toy, batch):
    before = {name: tensor.clone() for name, tensor in toy.state_dict().items()}
    errors = gradient_errors(toy, batch)
    assert len(errors) == 3
    assert max(errors) < 1e-6
    assert errors == gradient_errors(toy, batch)
    assert all(torch.equal(toy.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(p.grad is None for p in toy.parameters())


class Cut(nn.Linear):
    """A layer whose weights no gradient reaches."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.detach(), self.bias)


@pytest.mark.parametrize("zero", [False, True])
def test_a_cut_gradient_is_found_also_behind_a_last_layer_of_zeros(toy, batch, zero):
    toy.net[0] = Cut(3, 8)
    if zero:
        nn.init.zeros_(toy.net[3].weight)
        nn.init.zeros_(toy.net[3].bias)
    assert min(gradient_errors(toy, batch)) > 1e-3


def test_a_loss_without_weights_is_found(toy, batch, monkeypatch):
    monkeypatch.setattr(type(toy), "loss", lambda self, batch: {"fit": 0 * self.net(batch["x1"]).sum()})
    assert gradient_errors(toy, batch) == [torch.inf] * 3


def test_frozen_weights_are_left_out(toy, batch):
    toy.net[0] = Cut(3, 8)
    toy.net[0].weight.requires_grad_(False)
    assert max(gradient_errors(toy, batch)) < 1e-6
