import signal
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from ndeflow import config as configs
from ndeflow.cli import run_command
from ndeflow.config import ConfigError
from ndeflow.modules.base import Optim
from ndeflow.training import files
from ndeflow.training.ema import EMA
from ndeflow.training.finetuning import FrozenInEval, WarmStart, WarmStartError
from ndeflow.training.loading import pick
from ndeflow.training.saving import Checkpoints
from ndeflow.training.signals import StopFlag
from train import main

WARM = WarmStart("source")


class Body(nn.Module):
    """A frozen body with all that must stand still in it, and a head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 3))
        self.head = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 3))

    def forward(self, x):
        return self.head(self.body(x))


@pytest.fixture
def partly_frozen(toy):
    toy.net = Body()
    WarmStart("source", freeze=("net.body.*",)).prepare(toy)
    return toy


def other(width=8):
    return nn.ModuleDict({"net": nn.Sequential(nn.Linear(3, width), nn.Identity(), nn.SiLU(), nn.Linear(width, 3))})


def ones(module, value=1.0):
    return {name: torch.full_like(tensor, value) for name, tensor in module.state_dict().items()}


# -- what is taken over


def test_everything_fits(toy):
    report = WARM.take(toy, ones(other()))
    assert str(report) == "4 loaded, 0 other shape, 0 missing, 0 unexpected"
    assert all(bool((p == 1).all()) for p in toy.parameters())


def test_each_tensor_is_accounted_for(toy):
    before = {name: tensor.clone() for name, tensor in toy.state_dict().items()}
    weights = ones(other())
    weights["net.9.weight"] = weights.pop("net.3.weight")
    weights["net.0.bias"] = torch.ones(5)
    report = WarmStart("source", allow_shape=True).take(toy, weights)
    assert (report.loaded, report.unexpected) == (["net.0.weight", "net.3.bias"], ["net.9.weight"])
    assert report.shape == {"net.0.bias": "(5,) -> (8,)"}
    assert report.missing == ["net.3.weight"]
    text = str(report)
    assert text.startswith("2 loaded, 1 other shape, 1 missing, 1 unexpected")
    assert "net.0.bias (5,) -> (8,)" in text
    assert "net.3.weight  (stay at their initial values)" in text
    for name in ("net.0.bias", "net.3.weight"):
        assert torch.equal(toy.state_dict()[name], before[name])


def test_another_shape_is_refused_and_nothing_is_loaded(toy):
    before = {name: tensor.clone() for name, tensor in toy.state_dict().items()}
    with pytest.raises(WarmStartError, match=r"net\.0\.weight \(4, 3\) -> \(8, 3\)[^$]*init\.allow_shape=true"):
        WARM.take(toy, ones(other(width=4)))
    assert all(torch.equal(toy.state_dict()[name], tensor) for name, tensor in before.items())
    assert len(WarmStart("source", skip=("net.0.*", "*.weight")).take(toy, ones(other(width=4))).loaded) == 1


def test_nothing_in_common_is_refused(toy):
    with pytest.raises(WarmStartError, match=r"nothing fits the model[^$]*init\.rename"):
        WARM.take(toy, {"encoder.weight": torch.ones(1)})


def test_names_are_changed_in_order(toy):
    weights = {f"old.{name}": tensor for name, tensor in ones(other()).items()}
    rename = {r"^old\.": "", r"^net\.(\d)": r"body.\1", r"^body": "net"}
    assert len(WarmStart("source", rename=rename).take(toy, weights).loaded) == 4


def test_two_names_made_one_are_refused(toy):
    with pytest.raises(WarmStartError, match=r"gives net\.0\.weight and net\.3\.weight one name, net\.weight"):
        WarmStart("source", rename={r"\.\d\.": "."}).take(toy, ones(other()))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"skip": ("net.0.*", "head.*")}, r"init\.skip='head\.\*' matches no key of the checkpoint; they start with"),
        ({"rename": {"^model": "net"}}, r"init\.rename='\^model' matches no key of the checkpoint"),
        ({"rename": {"net": r"\7"}}, r"bad replacement '\\\\7' \(invalid group reference"),
    ],
)
def test_what_would_silently_not_happen_to_the_weights_is_an_error(toy, settings, text):
    with pytest.raises(WarmStartError, match=text):
        WarmStart("source", **settings).take(toy, ones(other()))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"freeze": ("body.*",)}, r"init\.freeze='body\.\*' matches no parameter of the model; .*: net\.0\.bias"),
        ({"lr": {"body.*": 0.1}}, r"init\.lr='body\.\*' matches no parameter of the model"),
        ({"lr": {"net.0.*": 0.1}, "freeze": ("net.0.*",)}, r"init: .*'net\.0\.\*' matches no trained parameter"),
        ({"freeze": ("*",)}, "init: no parameter is trained"),
    ],
)
def test_what_would_silently_not_happen_to_the_model_is_an_error(toy, settings, text):
    with pytest.raises(WarmStartError, match=text):
        WarmStart("source", **settings).prepare(toy)


@pytest.mark.parametrize(
    ("settings", "text"),
    [({"lr": {"*": 0.0}}, "positive factor"), ({"lr": {"*": -1.0}}, "positive"), ({"rename": {"(": ""}}, "no regular")],
)
def test_settings_that_mean_nothing_are_config_errors(settings, text):
    with pytest.raises(ConfigError, match=text):
        configs.section({"from": "source", **settings}, WarmStart, "init")


def test_compiled_modules_have_the_names_of_plain_ones(toy):
    toy.net = torch.compile(toy.net, backend="eager")
    warm = WarmStart("source", freeze=("net.0.*",), lr={"net.3.bias": 0.5})
    assert len(warm.take(toy, ones(other())).loaded) == 4
    warm.prepare(toy)
    frozen = {name for name, p in toy.named_parameters() if not p.requires_grad}
    assert frozen == {"net._orig_mod.0.weight", "net._orig_mod.0.bias"}
    assert all(bool((p == 1).all()) for p in toy.parameters())


# -- what is trained


def test_learning_rates_go_by_the_first_pattern_that_matches(toy):
    toy.optim = Optim(
        partial(torch.optim.AdamW, lr=0.01), partial(torch.optim.lr_scheduler.ConstantLR, factor=0.5, total_iters=9)
    )
    WarmStart("source", freeze=("net.0.bias",), lr={"net.3.bias": 2.0, "net.3.*": 0.1}).prepare(toy)
    optimizer = toy.configure_optimizers()["optimizer"]
    rates = {group["name"]: (group["lr"], [p.shape for p in group["params"]]) for group in optimizer.param_groups}
    assert rates == {
        "net.3.bias": (0.01, [(3,)]),
        "net.3.*": (pytest.approx(0.0005), [(3, 8)]),
        "*": (0.005, [(8, 3)]),
    }


class Modes(pl.Callback):
    """Note the modes of body and head in every step."""

    def __init__(self):
        self.seen = set()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.add((*(m.training for m in pl_module.net.body), *(m.training for m in pl_module.net.head)))


FROZEN = {(False,) * 4 + (True,) * 3}


def test_frozen_parts_stand_still_bit_for_bit_also_after_validations_and_resuming(
    fit, partly_frozen, numbers, tmp_path
):
    before = {name: tensor.clone() for name, tensor in partly_frozen.state_dict().items()}
    saver = Checkpoints(7).attach(tmp_path, lambda: {"config": {}}, StopFlag())
    modes, resumed = Modes(), Modes()
    fit(partly_frozen, numbers, [FrozenInEval(), modes, EMA(0.9), saver], steps=7)
    for module in partly_frozen.modules():
        module.train()
    path = str(tmp_path / files.step_name(7))
    fit(
        partly_frozen,
        numbers,
        [FrozenInEval(), resumed, EMA(0.9)],
        steps=12,
        ckpt_path=path,
    )
    assert modes.seen == resumed.seen == FROZEN
    for name, tensor in partly_frozen.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("net.body"), name


def test_without_the_callback_they_do_not(fit, partly_frozen, numbers):
    """The negative control: moving statistics move though nothing is trained, and dropout drops."""
    before = partly_frozen.net.body[2].running_mean.clone()
    modes = Modes()
    fit(partly_frozen, numbers, [modes], steps=2)
    assert modes.seen == {(True,) * 7}
    assert not torch.equal(partly_frozen.net.body[2].running_mean, before)


# -- whole runs

NET = ["module.model.net.width=16", "module.model.net.depth=1"]
SHORT = ["vars.steps=4", "optim.schedule.warmup=2", "trainer.val_check_interval=4", "checkpoints.every=4"]
QUIET = ["module.pictures=0", "wandb.mode=disabled", "report.evaluate=false", "trainer.enable_progress_bar=false"]
COMMON = ["flow/digits", *NET, *SHORT, *QUIET]
# A class-conditional net has other tensors in the embedding of conditions.
LABELED = ["data.cond=label", "module.model.net.classes=10", "init.from=runs/a", "run.name=b"]


@pytest.fixture
def parent(tmp_path, monkeypatch):
    """Train run a in a folder of its own, and leave the signal handlers as they were."""
    monkeypatch.chdir(tmp_path)
    before = {s: signal.getsignal(s) for s in StopFlag.signals}
    assert main([*COMMON, "run.name=a"]) == 0
    yield files.read(files.locate("runs/a"))
    for signum, handler in before.items():
        signal.signal(signum, handler)


def last(name):
    found = files.latest(f"runs/{name}/ckpt")
    assert found is not None
    return found[1]


def test_a_conditional_model_is_finetuned_from_an_unconditional_one(parent, capsys):
    frozen = ["init.freeze=[model.net.first.*]", "init.lr={model.net.last.*: 0.5}"]
    assert main([*COMMON, *LABELED, *frozen]) == 0
    out = capsys.readouterr().out
    assert "init from runs/a/ckpt/step_00000004.ckpt (ema): " in out
    assert "0 other shape, 1 missing, 0 unexpected" in out
    assert "0 to 4, seed 0" in out
    checkpoint, average = last("b"), pick(parent, "ema", "runs/a")
    assert Path("runs/b/wandb_id").read_text() != Path("runs/a/wandb_id").read_text()
    assert checkpoint["ndeflow"]["parent"]["run"] == parent["ndeflow"]["run"]
    assert checkpoint["ndeflow"]["parent"]["config"] == parent["ndeflow"]["config"]
    assert checkpoint["ndeflow"]["parent"]["step"] == parent["global_step"] == 4
    assert (checkpoint["global_step"], checkpoint["ema"]["step"]) == (4, 4)
    for name, tensor in average.items():
        still = name.startswith("model.net.first.")
        assert torch.equal(checkpoint["state_dict"][name], tensor) == still, name
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    assert {group["name"]: group["initial_lr"] for group in groups} == {"model.net.last.*": 1.5e-3, "*": 3e-3}


def test_averaging_starts_from_the_loaded_weights(parent):
    """At learning rate 0 the average of n equal weights is them, unless it began from other ones."""
    assert main([*COMMON, *LABELED, "optim.optimizer.lr=0.0"]) == 0
    averaged = last("b")["ema"]["weights"]
    expected = pick(parent, "ema", "runs/a")
    assert all(torch.equal(averaged[name], tensor) for name, tensor in expected.items() if name in averaged)
    assert len(averaged) == len(expected) + 1


def test_the_same_command_goes_on_and_does_not_load_again(parent, capsys):
    command = [*COMMON, *LABELED, "init.freeze=[model.net.first.*]", "vars.steps=8"]
    assert main([*command, "run.name=whole"]) == 0
    assert main([*command, "trainer.max_steps=4"]) == 0
    capsys.readouterr()
    Path("runs/a").rename("runs/gone")
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "init from" not in out
    assert "resuming from runs/b/ckpt/step_00000004.ckpt" in out
    whole, resumed = last("whole"), last("b")
    assert resumed["ndeflow"]["parent"] == whole["ndeflow"]["parent"]
    assert all(torch.equal(tensor, whole["state_dict"][name]) for name, tensor in resumed["state_dict"].items())


def test_an_export_is_a_source_too(parent, capsys):
    assert run_command(["export", "runs/a", "a.safetensors", "weights=raw"]) == 0
    assert main([*COMMON, *LABELED, "init.from=a.safetensors", "init.weights=raw", "optim.optimizer.lr=0.0"]) == 0
    finetuned = last("b")
    assert all(torch.equal(finetuned["state_dict"][k], v) for k, v in parent["state_dict"].items())
    assert finetuned["ndeflow"]["parent"]["run"]["name"] == "a"


def test_what_cannot_be_is_refused_by_the_command_line(parent, capsys):
    with pytest.raises(ConfigError, match=r"resume=runs/a goes on with a run, init\.from begins a new one: give one"):
        main([*COMMON, *LABELED, "resume=runs/a"])
    assert main([*COMMON, *LABELED, "module.model.net.width=24"]) == 1
    assert "model.net.first.weight (16, 64) -> (24, 64)" in capsys.readouterr().err
    assert Path("runs/b/state").read_text() == "failed\n"
    assert main([*COMMON, *LABELED, "module.model.net.width=24", "init.allow_shape=true"]) == 0
