"""Every file under configs/ builds and trains two steps, at full structure and tiny size."""

from pathlib import Path

import numpy as np
import pytest

from ndeflow import config as configs
from ndeflow.training import sections
from train import ROOT, main

NAMES = configs.available(ROOT)
SMALL = {
    "ndeflow.nets.MLP": {"width": 8, "depth": 1},
    "ndeflow.nets.UNet": {"channels": 32, "multipliers": [1, 1], "blocks": 1, "attention": [14]},
}


@pytest.fixture
def fake_mnist(tmp_path_factory, monkeypatch):
    """A folder with images of the right form, for configs whose real data is not here."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 240), ("test", 40)):
        arrays |= {
            f"x_{part}": rng.integers(0, 256, (n, 28, 28), np.uint8),
            f"y_{part}": np.arange(n, dtype=np.uint8) % 10,
        }
    np.savez(folder / "mnist.npz", **arrays)
    monkeypatch.setenv("NDEFLOW_DATA", str(folder))


def small(config):
    """Overrides that shrink the net and the batch."""
    net = config["module"]["model"]["net"]
    overrides = [f"module.model.net.{k}={v}" for k, v in SMALL[net["_target_"]].items()]
    return [
        *overrides,
        "data.batch_size=16",
        "module.pictures=4",
        "module.sampler.grid.steps=2",
        "report.evaluate=false",
        "wandb.mode=disabled",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_config_trains_two_steps(name, tmp_path, fake_mnist, capsys):
    config = configs.load(configs.find(name, ROOT))
    overrides = [
        *small(config),
        *(f"trainer.{k}={v}" for k, v in {"max_steps": 2, "val_check_interval": 2}.items()),
        *(f"vars.{k}=2" for k in config.get("vars", {}) if k == "steps"),
        *(["optim.schedule.warmup=1"] if "schedule" in config["optim"] else []),
        f"run.root={tmp_path}",
    ]
    assert main([name, *overrides]) == 0
    (run,) = tmp_path.iterdir()
    assert (run / "state").read_text() == "finished\n"
    assert configs.load(run / "config.yaml")["module"]["_target_"] == config["module"]["_target_"]
    assert "finished" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_config_is_valid_as_it_stands(name):
    sections.check(configs.load(configs.find(name, ROOT)))


def test_each_config_says_what_it_is():
    for path in Path(ROOT).rglob("*.yaml"):
        assert path.read_text().startswith("# "), path


def test_only_the_devices_change_from_a_laptop_to_eight_gpus():
    laptop = configs.load(configs.find("flow/mnist", ROOT))
    cluster = configs.load(configs.find("flow/mnist", ROOT), ["trainer.accelerator=gpu", "trainer.devices=8"])
    assert {k: v for k, v in laptop.items() if k != "trainer"} == {k: v for k, v in cluster.items() if k != "trainer"}
    assert laptop["data"]["batch_size"] % 8 == 0
