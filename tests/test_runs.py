"""Whole runs through the command lines: train, refuse, interrupt, go on, sample, evaluate."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
from PIL import Image

import ndeflow
from ndeflow import config as configs
from ndeflow.cli import run_command
from ndeflow.config import ConfigError
from ndeflow.training import files
from train import ROOT, main

TINY = [
    "flow/digits",
    "module.model.net.width=16",
    "module.model.net.depth=1",
    "module.pictures=9",
    "vars.steps=12",
    "optim.schedule.warmup=2",
    "trainer.val_check_interval=6",
    "trainer.log_every_n_steps=2",
    "checkpoints.every=4",
    "checkpoints.monitor=loss",
    "run.name=tiny",
]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Run the tiny config in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}

    def run(*overrides):
        return main([*TINY, "wandb.mode=disabled", "report.evaluate=false", *overrides])

    yield run
    for signum, handler in before.items():
        signal.signal(signum, handler)


def rows(folder="runs/tiny"):
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


def image(path):
    with Image.open(path) as opened:
        return opened.size, opened.mode


def weights(folder="runs/tiny"):
    return files.latest(f"{folder}/ckpt")[1]["state_dict"]


def test_the_demo_at_tiny_size_leaves_all_that_is_promised(tiny, tmp_path, capsys):
    assert main([*TINY, "wandb.mode=auto"]) == 0
    run = tmp_path / "runs" / "tiny"
    out = capsys.readouterr().out
    for word in ("module", "data", "device", "steps", "wandb", "offline", "wandb sync", "next: ndeflow sample"):
        assert word in out
    assert out.splitlines()[-1].startswith("finished runs/tiny in ")
    assert (run / "state").read_text() == "finished\n"
    assert [files.step_of(p) for p in files.step_files(run / "ckpt")] == [8, 12]
    assert (run / "ckpt" / "best.ckpt").is_file()
    assert image(run / "media" / "samples_00000012.png") == ((3 * 72 - 8, 3 * 72 - 8), "L")
    assert {p.name for p in (run / "report").iterdir()} == {"loss.png", "samples.png", "report.json"}
    report = json.loads((run / "report" / "report.json").read_text())
    assert report["weights"] == "ema"
    assert set(report["by_steps"]) == {"1", "2", "5", "20", "100"}
    assert list((run / "wandb").glob("offline-run-*"))
    assert configs.load(run / "config.yaml")["data"]["batch_size"] == 256
    assert (run / "command.txt").read_text().strip()
    assert "finished runs/tiny" in (run / "train.log").read_text()
    assert [r["step"] for r in rows() if "train/loss" in r] == [1, 2, 4, 6, 8, 10, 12]
    checkpoint = files.read(run / "ckpt" / files.step_name(12))
    assert checkpoint["ndeflow"]["config"] == configs.load(run / "config.yaml") | {"vars": {"steps": 12}}


def test_two_runs_of_one_seed_are_equal_and_another_seed_is_not(tiny):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert tiny(f"run.name={name}", f"seed={seed}") == 0
    assert rows("runs/a") == rows("runs/b") != rows("runs/c")
    assert all(torch.equal(v, weights("runs/b")[k]) for k, v in weights("runs/a").items())


def test_interrupted_twice_and_resumed_it_is_the_same_run(tiny, capsys):
    assert tiny("run.name=whole") == 0
    for after in (3, 8):
        timer = threading.Thread(target=_interrupt, args=("runs/tiny", after))
        timer.start()
        assert tiny() == 130
        timer.join()
        assert Path("runs/tiny/state").read_text() == "interrupted\n"
    assert "the same command goes on" in capsys.readouterr().out
    assert tiny() == 0
    assert rows() == rows("runs/whole")
    assert all(torch.equal(v, weights("runs/whole")[k]) for k, v in weights().items())
    assert tiny() == 0
    assert "already finished (step 12 of 12)" in capsys.readouterr().out


def _interrupt(folder, after):
    """Send Ctrl-C once the run has written a row of a step beyond `after`."""
    for _ in range(1000):
        time.sleep(0.01)
        if os.path.exists(f"{folder}/metrics.jsonl") and any(r["step"] > after for r in rows(folder)):
            break
    os.kill(os.getpid(), signal.SIGINT)


def test_another_config_in_the_same_directory_is_refused(tiny):
    assert tiny() == 0
    with pytest.raises(ConfigError, match=r"holds a run with another config \(seed 0 -> 1\)"):
        tiny("seed=1")
    assert tiny("seed=1", "run.overwrite=true") == 0


def test_another_global_batch_cannot_continue_the_order(tiny, capsys):
    assert tiny() == 0
    assert tiny("data.batch_size=128", "resume=runs/tiny", "trainer.max_steps=14") == 1
    assert "batch_size=128, the checkpoint was written with 256" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"holds other weights than the config builds \(first: .*init\.from"):
        tiny("module.model.net.width=8", "resume=runs/tiny", "trainer.max_steps=14")


def test_a_path_without_a_checkpoint_is_a_wrong_config_and_a_damaged_checkpoint_a_failure(tiny, capsys):
    Path("damaged.ckpt").write_bytes(b"torn")
    for key in ("resume", "init.from"):
        with pytest.raises(ConfigError, match=r"no checkpoint or run directory runs/nowhere"):
            tiny("run.name=a", f"{key}=runs/nowhere")
        assert tiny("run.name=a", f"{key}=damaged.ckpt") == 1
        assert "checkpoint damaged.ckpt is unreadable" in capsys.readouterr().err
        # Where nothing was begun, nothing is left.
        assert Path("runs/a").exists() == (key == "init.from")
    assert Path("runs/a/state").read_text() == "failed\n"


def test_the_commands_it_prints_work_when_pasted(tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "net_of_my_own.py").write_text("from ndeflow.nets import MLP\n\n\nclass Net(MLP):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    net = "module.model.net={_target_: net_of_my_own.Net, shape: [1, 8, 8], width: 16, depth: 1}"
    assert tiny("plugins=[net_of_my_own]", net, "run.root=my runs") == 0
    commands = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
    assert [shlex.split(line)[2] for line in commands] == ["sample", "evaluate"]
    for line in commands:
        assert run_command([*shlex.split(line)[2:], "steps=[2]" if "evaluate" in line else "n=4"]) == 0, line


def test_sampling_has_an_address(tiny, capsys):
    assert tiny() == 0
    assert run_command(["sample", "runs/tiny", "n=5", "steps=3", "sampler=Midpoint", "seed=7"]) == 0
    assert run_command(["sample", "runs/tiny/ckpt/best.ckpt", "n=70", "steps=3", "sampler=Midpoint", "seed=7"]) == 0
    few = np.load("runs/tiny/samples/Midpoint_3_seed7_n5.npz")
    many = np.load("runs/tiny/samples/Midpoint_3_seed7_n70.npz")
    assert np.array_equal(few["x"], many["x"][:5])
    assert few["x"].shape == (5, 1, 8, 8)
    assert image("runs/tiny/samples/Midpoint_3_seed7_n70.png")[1] == "L"
    assert "NFE 6, weights ema" in capsys.readouterr().out
    assert run_command(["sample", "runs/tiny", "n=5", "steps=3", "sampler=Midpoint", "seed=7", "weights=raw"]) == 0
    assert not np.array_equal(np.load("runs/tiny/samples/Midpoint_3_seed7_n5.npz")["x"], few["x"])


def test_evaluate_prints_and_writes_numbers_with_their_floor(tiny, capsys):
    assert tiny() == 0
    assert run_command(["evaluate", "runs/tiny", "n=50", "steps=[1,4]", "seeds=[0]"]) == 0
    result = json.loads(Path("runs/tiny/report/evaluation.json").read_text())
    assert result["w2"] > result["w2_floor"] > 1
    assert result["n"] == 50
    assert sum(result["class_shares"]) == pytest.approx(1)
    assert "× floor" in capsys.readouterr().out


def test_wandb_that_cannot_be_used_is_no_reason_to_stop_and_a_wrong_mode_is_one(tiny, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "of")
    with pytest.raises(ConfigError, match="WANDB_MODE=of: allowed are"):
        tiny("wandb.mode=auto")
    monkeypatch.delenv("WANDB_MODE")
    variables = {"BASE_URL": "http://127.0.0.1:9", "API_KEY": "x" * 40, "INIT_TIMEOUT": "2"}
    for name, value in variables.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb.teardown()  # settings of earlier tests
    with pytest.warns(UserWarning, match="W&B is offline from here to the next start"):
        assert tiny("wandb.mode=auto") == 0
    wandb.teardown()
    assert "offline (the server cannot be used); upload later: " in capsys.readouterr().out


def test_evaluating_with_damaged_data_is_a_failure_of_one_line(tiny, capsys):
    assert tiny() == 0
    checkpoint = files.read("runs/tiny/ckpt/best.ckpt")
    checkpoint["ndeflow"]["config"]["data"] = {"_target_": "ndeflow.data.MNIST", "batch_size": 9, "root": "."}
    files.write(checkpoint, "runs/tiny/ckpt/best.ckpt")
    Path("mnist.npz").write_bytes(b"torn")
    capsys.readouterr()
    assert run_command(["evaluate", "runs/tiny"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: data (MNIST): mnist.npz")


def test_load_in_a_notebook_is_ready_and_draws_nothing_from_the_global_generator(tiny):
    assert tiny() == 0
    before = torch.get_rng_state()
    module = ndeflow.load("runs/tiny")
    assert torch.equal(torch.get_rng_state(), before)
    assert not module.training
    assert module.data_info["shape"] == [1, 8, 8]
    raw = ndeflow.load("runs/tiny", weights="raw")
    assert not torch.equal(raw.model.net.last.weight, module.model.net.last.weight)
    assert all(torch.equal(v, weights()[k]) for k, v in raw.state_dict().items())


def test_ema_asked_for_where_there_is_none(tiny):
    assert tiny("ema=null") == 0
    with pytest.raises(files.CheckpointError, match=r"no averaged weights .* use weights=raw"):
        ndeflow.load("runs/tiny")


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["optim.foo=1"], r"unknown key optim\.foo for .*Optim; allowed: optimizer, schedule \(in override 'optim"),
        (["wandb.moed=x"], r"unknown key wandb\.moed .* did you mean mode\?"),
        (["run.nmae=y"], r"unknown key run\.nmae .* did you mean name\?"),
        (["run.name="], r"name='': give the name of one folder in run\.root, or leave it out"),
        (["run.name=a/b"], r"name='a/b': give the name of one folder"),
        (["run.name=.."], r"name='\.\.': give the name of one folder"),
        (["vars.stepz=3"], r"vars\.stepz"),
        (["moduel.lr=1"], r"unknown key moduel in override 'moduel\.lr=1'; did you mean module\?"),
        (["module.model.net.widht=3"], r"unknown key module\.model\.net\.widht .* did you mean width\?"),
        (["trainer.max_epochs=3"], r"trainer\.max_epochs is set by trainer\.max_steps"),
        (["data.seed=1"], r"data\.seed is set by the top-level key seed"),
        (["trainer.devices=64", "trainer.accelerator=cpu"], r"asks|trainer\.devices=64, but this machine has"),
        (["trainer.strategy=fsdp"], r"trainer\.strategy=fsdp is not supported \(allowed: auto, ddp"),
        (["trainer.accelerator=gpu"], r"sees no CUDA device"),
        (["trainer.max_steps=0"], r"trainer\.max_steps=0: give the number"),
        (["trainer.val_check_interval=0.5"], r"val_check_interval=0\.5: give optimizer steps"),
        (["module.model.path._target_=os.system"], r"path\._target_=os\.system is not allowed"),
        (["ema.decay=1.5"], r"decay=1\.5 must lie in"),
        (["optim.schedule.warmup=12"], r"warmup=12 must lie in \[0, steps=12\)"),
        (
            ["data.cond=label"],
            r"hands labels to an unconditional net: set module\.model\.net\.classes=10",
        ),
        (["module.model.net.classes=10"], r"classes=10 expects labels: set data\.cond=label"),
        (["module.model.net.shape=[2]"], r"shape=\[2\], but the data has samples of shape \[1, 8, 8\]"),
        (["checkpoints.monitor=acc"], r"checkpoints\.monitor=acc is no validation term; there are: velocity, loss"),
        (["callbacks.foo=1"], r"callbacks\.foo=1: expected a callback"),
        (["trainer.accelerator=bogus"], r"trainer: .*accelerator"),
        (["trainer.log_every_n_steps=0"], r"log_every_n_steps=0: give optimizer steps"),
        (["trainer.devices=0"], r"trainer\.devices=0: give the number"),
        (["checkpoints.every=0"], r"every=0 must be at least 1"),
        (["data.batch_size=5000"], r"less than one global batch of batch_size=5000"),
        (["seed=x"], r"seed=x: expected int, got str"),
        (["data.batch_size=100", "trainer.accumulate_grad_batches=3"], r"cannot be cut into 3 equal parts"),
    ],
)
def test_bad_overrides_are_refused_before_anything_is_written(tiny, tmp_path, overrides, text):
    with pytest.raises(ConfigError, match=text):
        tiny(*overrides)
    left = [p.name for p in (tmp_path / "runs" / "tiny").glob("ckpt/*")] if (tmp_path / "runs").exists() else []
    assert not left


def test_near_configs_are_listed():
    with pytest.raises(ConfigError, match=r"digit.*digits"):
        main(["flow/digit"])


def test_without_a_config_the_list_and_exit_code_2(capsys):
    assert main([]) == 2
    assert "flow/digits" in capsys.readouterr().err


def test_help_lists_the_keys_of_the_classes(capsys):
    assert main(["flow/digits", "--help"]) == 0
    out = capsys.readouterr().out
    for key in ("module.model.net.width=384", "ema.decay=0.999", "checkpoints.keep=2", "wandb.mode"):
        assert key in out
    assert "max_epochs" not in out


def test_missing_data_says_which_file_goes_where(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("NDEFLOW_DATA", raising=False)
    (tmp_path / "empty").mkdir()
    code = main(["flow/mnist", f"data.root={tmp_path}/empty", "run.name=m", "wandb.mode=disabled"])
    assert code == 1
    assert "does not hold the data. Put mnist.npz" in capsys.readouterr().err
    assert (tmp_path / "runs/m/state").read_text() == "failed\n"


def test_a_run_root_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write run directory .*: set run\.root=DIR"):
        tiny(f"run.root={tmp_path}/file")


@pytest.mark.parametrize("command", [["sample"], ["sample", "n=3"], ["smaple", "x"], ["sample", "x", "nn=3"]])
def test_wrong_commands(command):
    with pytest.raises(ConfigError, match=r"needs a run|unknown command|unknown key"):
        run_command(command)


def test_sampling_nothing_and_wrong_names(tiny, capsys):
    with pytest.raises(ConfigError, match="no checkpoint or run directory"):
        run_command(["sample", "runs/nowhere"])
    assert tiny() == 0
    for arguments, text in ((["sampler=Huen"], "did you mean Heun"), (["label=3"], "unconditional"), (["n=0"], "n=0")):
        with pytest.raises(ConfigError, match=text):
            run_command(["sample", "runs/tiny", *arguments])


@pytest.mark.slow
def test_sigterm_of_a_real_process_exits_85_and_the_same_command_goes_on(tmp_path):
    command = [sys.executable, str(ROOT.parent / "train.py"), *TINY, "vars.steps=2000", "wandb.mode=disabled"]
    process = subprocess.Popen(command, cwd=tmp_path)
    while not (tmp_path / "runs/tiny/metrics.jsonl").exists() or len(rows(tmp_path / "runs/tiny")) < 20:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 85
    assert (tmp_path / "runs/tiny/state").read_text() == "preempted\n"
    assert subprocess.run(command, cwd=tmp_path, check=False, capture_output=True).returncode == 0
