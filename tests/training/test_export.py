import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ndeflow
from ndeflow import config as configs
from ndeflow.cli import run_command
from ndeflow.config import ConfigError
from ndeflow.training import export, files
from ndeflow.training.files import CheckpointError
from ndeflow.training.loading import pick
from train import ROOT


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Leave a run directory with one checkpoint, whose averaged parameters are the raw ones plus 1."""
    monkeypatch.chdir(tmp_path)
    sizes = ["module.model.net.width=8", "module.model.net.depth=1"]
    config = configs.load(ROOT / "flow/digits.yaml", sizes)
    module = configs.build(config["module"], "module")
    state = module.state_dict()
    checkpoint = {
        "state_dict": state,
        "ema": {"weights": {name: p.detach() + 1 for name, p in module.named_parameters()}},
        "global_step": 7,
        "ndeflow": {
            "format": files.FORMAT,
            "version": "9.9",
            "commit": "abc",
            "config": config,
            "data": {"shape": [1, 8, 8], "scale": 0.125, "shift": -1.0, "classes": 10},
            "run": {"name": "r", "id": "x"},
        },
    }
    files.write(checkpoint, "r/ckpt/" + files.step_name(7))
    return checkpoint


def facts(checkpoint, **changed):
    """Return a checkpoint whose facts are changed."""
    return {**checkpoint, "ndeflow": {**checkpoint["ndeflow"], **changed}}


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_an_export_is_the_run_again_and_says_what_it_is(run, weights, capsys):
    assert run_command(["export", "r", "out/m.safetensors", f"weights={weights}"]) == 0
    assert f"wrote out/m.safetensors: {weights} weights of step 7" in capsys.readouterr().out
    module, again = ndeflow.load("r", weights), ndeflow.load("out/m.safetensors", weights)
    assert not again.training
    assert again.data_info == module.data_info
    assert module.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in module.state_dict().items())
    with safe_open("out/m.safetensors", "pt") as file:
        said = json.loads(file.metadata()["ndeflow"])
    assert said["config"] == run["ndeflow"]["config"]
    assert (said["weights"], said["step"], said["commit"], said["run"]["id"]) == (weights, 7, "abc", "x")


def test_other_programs_read_the_plain_tensors(run):
    run_command(["export", "r", "m.safetensors"])
    for name, value in load_file("m.safetensors").items():
        assert torch.equal(value, run["ema"]["weights"].get(name, run["state_dict"][name]))


def test_the_kind_of_weights_that_a_file_does_not_hold_is_refused(run):
    run_command(["export", "r", "m.safetensors", "weights=raw"])
    with pytest.raises(CheckpointError, match=r"m\.safetensors holds raw weights only: use weights=raw, or export ema"):
        ndeflow.load("m.safetensors")
    assert run_command(["export", "m.safetensors", "n.safetensors", "weights=ema"]) == 1
    assert not os.path.exists("n.safetensors")


def test_sampling_from_an_export_is_sampling_from_the_run(run, capsys):
    run_command(["export", "r", "m.safetensors"])
    arguments = ["n=2", "steps=1", "sampler=Euler"]
    assert run_command(["sample", "r", *arguments, "out=a"]) == 0
    assert run_command(["sample", "m.safetensors", *arguments, "out=b"]) == 0
    name = "Euler_1_seed0_n2.png"
    assert Path(f"a/{name}").read_bytes() == Path(f"b/{name}").read_bytes()


def test_only_an_export_is_replaced(run, capsys):
    for _ in range(2):
        assert run_command(["export", "r", "m.safetensors"]) == 0
    Path("text.safetensors").write_text("my thesis")
    save_file({"w": torch.ones(2)}, "other.safetensors")
    os.mkdir("folder.safetensors")
    for name, why in (("text", "not a readable"), ("other", "of another program"), ("folder", "not a readable")):
        assert run_command(["export", "r", f"{name}.safetensors"]) == 1
        assert f"not overwritten: {name}.safetensors is" in (said := capsys.readouterr().err)
        assert why in said
    assert Path("text.safetensors").read_text() == "my thesis"
    assert load_file("other.safetensors").keys() == {"w"}


def test_a_write_that_fails_leaves_the_earlier_export_alone(run, monkeypatch):
    run_command(["export", "r", "m.safetensors"])
    before = Path("m.safetensors").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert run_command(["export", "r", "m.safetensors", "weights=raw"]) == 1
    assert Path("m.safetensors").read_bytes() == before
    assert sorted(os.listdir()) == ["m.safetensors", "r"]


def test_others_may_read_the_file(run):
    before = os.umask(0o022)
    try:
        run_command(["export", "r", "m.safetensors"])
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat("m.safetensors").st_mode) == 0o644


def test_tied_weights_are_stored_once_and_come_back_under_both_names(run):
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"a": whole, "tied": whole, "part": whole[1:], "turned": whole.T, "none": torch.ones(0)}
    export.write(run, state, "raw", "m.safetensors")
    assert load_file("m.safetensors").keys() == {"a", "part", "turned", "none"}
    again = export.read("m.safetensors")
    assert again["ndeflow"]["tied"] == {"tied": "a"}
    assert all(torch.equal(again["state_dict"][name], value) for name, value in state.items())


def test_averages_reach_every_name_of_a_tied_weight(run, tmp_path):
    """Modules list a tied parameter once, state dicts twice; a raw second name would undo the average."""
    w = torch.ones(2)
    tied = run | {"state_dict": {"a": w, "b": w, "c": torch.ones(2)}, "ema": {"weights": {"a": torch.full((2,), 3.0)}}}
    files.write(tied, tmp_path / "t.ckpt")
    picked = pick(files.read(tmp_path / "t.ckpt"), "ema", "t")
    assert {name: float(value[0]) for name, value in picked.items()} == {"a": 3, "b": 3, "c": 1}


@pytest.mark.parametrize("place", [-1, -400])
def test_a_flipped_bit_is_found(run, place):
    run_command(["export", "r", "m.safetensors"])
    data = bytearray(Path("m.safetensors").read_bytes())
    data[place] ^= 4
    Path("m.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum does not match; export it again"):
        ndeflow.load("m.safetensors")


def test_files_that_cannot_be_used(run):
    export.write(facts(run), run["state_dict"], "raw", "cut.safetensors")
    data = Path("cut.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(data[:-4])
    save_file({"w": torch.ones(2)}, "other.safetensors")
    save_file({"w": torch.ones(2)}, "new.safetensors", {"ndeflow": json.dumps({"format": files.FORMAT + 1})})
    for name, text in (("cut", "not a readable"), ("other", "of another program"), ("new", "is newer than this")):
        with pytest.raises(CheckpointError, match=text):
            ndeflow.load(f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint or run directory"):
        ndeflow.load("nowhere.safetensors")


def test_a_type_that_safetensors_lacks_is_named(run):
    state = {"fine": torch.ones(1), "modes": torch.ones(2, dtype=torch.complex128)}
    with pytest.raises(CheckpointError, match=r"no type torch\.complex128, which modes has"):
        export.write(run, state, "raw", "m.safetensors")
    assert not os.path.exists("m.safetensors")


def test_code_of_others_needs_consent_to_export_and_to_load(run, capsys):
    foreign = facts(run, config={**run["ndeflow"]["config"], "plugins": ["json"]})
    files.write(foreign, "f.ckpt")
    assert run_command(["export", "f.ckpt", "m.safetensors"]) == 1
    assert "runs code of json" in capsys.readouterr().err
    assert run_command(["export", "f.ckpt", "m.safetensors", "plugins=[json]"]) == 0
    with pytest.raises(CheckpointError, match="runs code of json"):
        ndeflow.load("m.safetensors")


def test_weights_that_do_not_fit_the_config_are_not_exported(run):
    del run["state_dict"]["model.net.first.weight"]
    del run["ema"]["weights"]["model.net.first.weight"]
    files.write(run, "r.ckpt")
    with pytest.raises(RuntimeError, match=r"Missing key.*model\.net\.first\.weight"):
        run_command(["export", "r.ckpt", "m.safetensors"])
    assert not os.path.exists("m.safetensors")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["r"], r"needs a run directory or a checkpoint and FILE\.safetensors"),
        (["r", "weights=raw"], r"needs a run directory or a checkpoint and FILE\.safetensors"),
        (["r", "m.pt"], r"ends with \.safetensors"),
        (["r", "m.safetensors", "weights=best"], "weights=best"),
        (["r", "m.safetensors", "seed=1"], "unknown key"),
    ],
)
def test_wrong_commands_are_refused(run, arguments, text):
    with pytest.raises(ConfigError, match=text):
        run_command(["export", *arguments])
