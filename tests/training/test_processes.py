"""Many processes make the same run as one: real launches of train.py by torchrun on gloo, signals and failures."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ndeflow.config import ConfigError
from ndeflow.training import files
from ndeflow.training.rundir import RunDirectory
from train import main

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TINY = [
    "plugins=[process_plugin]",
    "callbacks.probe={_target_: process_plugin.Probe}",
    "module.model.net.width=16",
    "module.model.net.depth=1",
    "module.pictures=0",
    "vars.steps=12",
    "optim.schedule.warmup=2",
    "trainer.val_check_interval=6",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "trainer.precision=64-true",
    "checkpoints.every=4",
    "wandb.mode=disabled",
    "report.evaluate=false",
    "run.name=tiny",
]
TWO = ["trainer.devices=2", "trainer.strategy=ddp"]
pytestmark = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two processes need two cores")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**more):
    paths = [str(HERE), str(ROOT)]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **more}


def start(command, folder, log=None, **env):
    """Start a command, its output in a file, so that no full pipe can stop it."""
    out = ((log or folder) / f"out{time.monotonic_ns()}.txt").open("w+")
    return subprocess.Popen(command, cwd=folder, env=environment(**env), stdout=out, stderr=subprocess.STDOUT), out


def finish(process, out, limit=100):
    """Wait, and never leave a process behind; returns exit code and output."""
    try:
        process.wait(limit)
    finally:
        if process.poll() is None:
            for pid in [*children(process.pid), process.pid]:
                os.kill(pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        text = out.read()
        out.close()
    return process.returncode, text


def children(pid):
    """Worker processes of a launcher, by rank; they live in sessions of their own."""
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def launch(folder, *overrides, config="flow/digits", **env):
    """Run two processes by torchrun."""
    return finish(*start(torchrun(*overrides, config=config), folder, **env))


def torchrun(*overrides, config="flow/digits"):
    module = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    return [*module, str(ROOT / "train.py"), config, *TINY, *TWO, *overrides]


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """Run one process, this one, in a folder of its own."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    variables = dict(os.environ)
    monkeypatch.chdir(tmp_path)

    def run(*overrides, config="flow/digits", **env):
        with monkeypatch.context() as context:
            for name, value in env.items():
                context.setenv(name, value)
            return main([config, *TINY, *overrides])

    yield run
    os.environ.clear()
    os.environ.update(variables)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.fixture
def troubled(tmp_path):
    """A config whose loss can go wrong on one rank, and takes more evaluations there."""
    text = (ROOT / "configs/flow/digits.yaml").read_text()
    path = tmp_path / "troubled.yaml"
    path.write_text(text.replace("ndeflow.modules.flow.RectifiedFlow", "process_plugin.Uneven"))
    return str(path)


def rows(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


def newest(run):
    return files.latest(run / "ckpt")[1]


def distance(run, other):
    """The largest difference of raw and of averaged weights."""
    a, b = newest(run), newest(other)
    assert a["global_step"] == b["global_step"]
    pairs = [(v, b["state_dict"][k]) for k, v in a["state_dict"].items()]
    pairs += [(v, b["ema"]["weights"][k]) for k, v in a["ema"]["weights"].items()]
    assert all(v.dtype == torch.float64 for v, _ in pairs)
    return max(float((v - w).abs().max()) for v, w in pairs)


def assert_same_rows(run, other, tolerance=1e-10):
    mine, theirs = rows(run), rows(other)
    assert [list(row) for row in mine] == [list(row) for row in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)


def state(run):
    return (run / "state").read_text().strip()


# -- the same run


def test_two_processes_are_the_same_run_as_one(alone, tmp_path):
    for name in ("probe1", "probe2"):
        (tmp_path / name).mkdir()
    code, text = launch(tmp_path, "run.name=two", PROBE=str(tmp_path / "probe2"))
    assert code == 0, text
    assert alone("run.name=one", PROBE=str(tmp_path / "probe1")) == 0
    one, two = tmp_path / "runs/one", tmp_path / "runs/two"
    assert_same_rows(two, one)
    assert distance(two, one) < 1e-10
    # Gradients after averaging are those of the whole batch, on both ranks.
    whole = torch.load(tmp_path / "probe1/gradients0.pt")
    for rank in (0, 1):
        shared = torch.load(tmp_path / f"probe2/gradients{rank}.pt")
        assert max(float((shared[k] - v).abs().max()) for k, v in whole.items()) < 1e-10
    # Every validation sample is seen once, in shares that differ by one.
    seen = [torch.load(tmp_path / f"probe2/seen{rank}.pt") for rank in (0, 1)]
    assert (len(seen[0]), len(seen[1])) == (68, 67)
    assert sorted(seen[0] + seen[1]) == torch.load(tmp_path / "probe1/seen0.pt") == list(range(135))
    # One rank writes.
    assert [row["step"] for row in rows(two) if "train/loss" in row] == list(range(1, 13))
    assert not (two / "wandb").exists()
    assert newest(two)["ndeflow"]["run"]["id"] == (two / "wandb_id").read_text()
    assert {p.name for p in (two / "ckpt").iterdir()} == {"step_00000008.ckpt", "step_00000012.ckpt"}
    assert text.count("ndeflow run two: fresh run") == text.count("finished runs/two") == 1


def test_more_and_fewer_processes_in_the_middle_of_an_epoch(alone, tmp_path):
    assert alone("run.name=whole") == 0
    elastic, whole = tmp_path / "runs/tiny", tmp_path / "runs/whole"
    assert alone(DISTURB="SIGTERM 0 2") == 85
    code, text = launch(tmp_path, DISTURB="SIGTERM 1 6")  # step 6 is in epoch 1 of 4 steps
    assert code == 1, text  # torchrun's own
    assert "2, were 1: data order and keyed draws continue exactly" in text
    assert "stopped by SIGTERM after step 7" in text
    assert (state(elastic), newest(elastic)["global_step"]) == ("preempted", 7)
    assert alone() == 0
    assert_same_rows(elastic, whole, 1e-11)
    assert distance(elastic, whole) < 1e-12


def test_changed_accumulation_at_an_odd_step(alone, tmp_path):
    assert alone("run.name=whole") == 0
    assert alone(DISTURB="SIGTERM 0 4") == 85
    assert alone("trainer.accumulate_grad_batches=2", DISTURB="SIGTERM 0 8") == 85
    assert newest(tmp_path / "runs/tiny")["global_step"] == 9
    assert alone() == 0
    assert_same_rows(tmp_path / "runs/tiny", tmp_path / "runs/whole", 1e-11)
    assert distance(tmp_path / "runs/tiny", tmp_path / "runs/whole") < 1e-12


def test_accumulation_clipping_and_mixed_precision(alone, tmp_path):
    short = ["trainer.max_steps=4", "trainer.gradient_clip_val=0.1"]
    assert alone(*short, "run.name=whole") == 0
    assert alone(*short, "run.name=parts", "trainer.accumulate_grad_batches=4") == 0
    assert distance(tmp_path / "runs/parts", tmp_path / "runs/whole") < 1e-12
    assert_same_rows(tmp_path / "runs/parts", tmp_path / "runs/whole", 1e-12)
    assert alone("trainer.max_steps=4", "run.name=free") == 0
    assert distance(tmp_path / "runs/free", tmp_path / "runs/whole") > 1e-6
    assert alone(*short, "run.name=mixed", "trainer.precision=bf16-mixed", "trainer.accumulate_grad_batches=2") == 0
    mixed, whole = newest(tmp_path / "runs/mixed")["state_dict"], newest(tmp_path / "runs/whole")["state_dict"]
    assert all(v.dtype == torch.float32 for v in mixed.values())
    assert 1e-7 < max(float((v - whole[k]).abs().max()) for k, v in mixed.items()) < 0.02


# -- one process is in trouble


@pytest.mark.parametrize("kind", ["nan", pytest.param("solver", marks=pytest.mark.slow)])
def test_one_bad_process_makes_all_skip_the_step(tmp_path, troubled, kind):
    code, text = launch(tmp_path, "health.nonfinite=skip", config=troubled, DISTURB=f"{kind} 1 5")
    assert code == 0, text
    run = tmp_path / "runs/tiny"
    assert newest(run)["health"] == {"skipped": 1, "in_a_row": 0}
    assert all(bool(v.isfinite().all()) for v in newest(run)["state_dict"].values())
    bad = [row["step"] for row in rows(run) if row.get("train/loss") == "nan"]
    assert bad == [6]
    assert text.count("skipped: step 6") == 1
    assert ("failed solve: planned" in text) == (kind == "solver")


@pytest.mark.slow
def test_a_solve_that_fails_in_the_validation_of_one_process_ends_none(tmp_path, troubled):
    code, text = launch(tmp_path, "health.nonfinite=skip", config=troubled, DISTURB="validation 1 6")
    assert code == 0, text
    assert "validation batch 0 is left out of the means, failed solve: planned" in text
    first, second = (row for row in rows(tmp_path / "runs/tiny") if "val/loss" in row)
    assert first["val/failed_solves"] == 1
    assert first.keys() - second.keys() == {"val/failed_solves"}


@pytest.mark.filterwarnings("ignore:failed solve:UserWarning", "ignore:skipped:UserWarning")
def test_a_failed_solve_in_one_of_two_accumulated_batches(alone, tmp_path, troubled):
    arguments = ["health.nonfinite=skip", "trainer.accumulate_grad_batches=2"]
    assert alone(*arguments, config=troubled, DISTURB="solver 0 5") == 0
    run = tmp_path / "runs/tiny"
    assert [row["step"] for row in rows(run) if row.get("train/loss") == "nan"] == [6]
    assert newest(run)["health"]["skipped"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nan", "solver"])
def test_one_bad_process_makes_all_stop(tmp_path, troubled, kind):
    code, text = launch(tmp_path, config=troubled, DISTURB=f"{kind} 1 5")
    assert code == 1
    run = tmp_path / "runs/tiny"
    if kind == "nan":
        assert "error: step 6: the loss is finite on this process, its gradient is not" in text
        assert "error on rank 1: step 6: loss term velocity = nan" in text
    else:
        assert "error on rank 1: planned" in text
    assert (state(run), newest(run)["global_step"]) == ("failed", 4)
    assert all(bool(v.isfinite().all()) for v in newest(run)["state_dict"].values())
    code, text = launch(tmp_path, config=troubled)
    assert (code, state(run)) == (0, "finished"), text
    assert [row["step"] for row in rows(run) if "train/loss" in row] == list(range(1, 13))


# -- signals


def wait_for_step(run, step, process):
    """Wait until a run has written a row of a step beyond `step`."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        path = run / "metrics.jsonl"
        if path.exists() and f'{{"step": {step + 1},' in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"{run} never came to step {step}")


@pytest.mark.slow
def test_signals_to_any_process_stop_all_and_the_same_command_goes_on(tmp_path):
    long = ["vars.steps=240", "trainer.val_check_interval=30"]
    assert launch(tmp_path, *long, "run.name=whole")[0] == 0
    run = tmp_path / "runs/tiny"
    reached = 0
    for name, target in (("SIGTERM", "rank 1"), ("SIGUSR1", "rank 0"), ("SIGTERM", "launcher")):
        process, out = start(torchrun(*long), tmp_path)
        wait_for_step(run, reached + 10, process)
        ranks = {rank_of(pid): pid for pid in children(process.pid)}
        os.kill(process.pid if target == "launcher" else ranks[target[-1]], getattr(signal, name))
        code, text = finish(process, out)
        assert code != 0  # torchrun's own
        assert (state(run), text.count(f"stopped by {name} after step")) == ("preempted", 1), text
        was, reached = reached, newest(run)["global_step"]
        assert was + 10 < reached < 240
        assert f"step {reached}; the same command goes on" in text
        assert text.count("exitcode  : 85") == 2 or target == "launcher", text  # both ranks left by themselves
    code, text = launch(tmp_path, *long)
    assert (code, state(run)) == (0, "finished"), text
    assert rows(run) == rows(tmp_path / "runs/whole")
    assert distance(run, tmp_path / "runs/whole") == 0


def rank_of(pid):
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return next(e.removeprefix("RANK=") for e in entries if e.startswith("RANK="))


# -- launchers


@pytest.mark.slow
def test_the_cluster_script_on_one_node_and_on_two(alone, tmp_path):
    assert alone("run.name=one") == 0
    script = str(ROOT / "experiments/cluster/torchrun.sh")
    arguments = ["flow/digits", *TINY, "trainer.strategy=ddp", f"run.root={tmp_path}/runs"]
    for name, nodes, processes in (("node", 1, 2), ("nodes", 2, 1)):
        settings = {"NODES": str(nodes), "PROCESSES": str(processes), "PORT": str(free_port()), "ACCELERATOR": "cpu"}
        settings["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        command = ["bash", script, *arguments, f"run.name={name}"]
        agents = [start(command, ROOT, log=tmp_path, RANK_OF_NODE=str(i), **settings) for i in range(nodes)]
        results = [finish(*agent) for agent in agents]
        assert [code for code, _ in results] == [0] * nodes, results
        assert "2 × cpu" in results[0][1]
        assert_same_rows(tmp_path / "runs" / name, tmp_path / "runs/one")
        assert distance(tmp_path / "runs" / name, tmp_path / "runs/one") < 1e-10


@pytest.mark.slow
def test_lightning_starts_the_processes_itself(alone, tmp_path):
    assert alone("run.name=one") == 0
    command = [sys.executable, str(ROOT / "train.py"), "flow/digits", *TINY, *TWO, "wandb.mode=offline"]
    code, text = finish(*start(command, tmp_path, DISTURB="SIGTERM 1 6"))
    assert (code, state(tmp_path / "runs/tiny")) == (85, "preempted"), text
    code, text = finish(*start(command, tmp_path))
    assert (code, state(tmp_path / "runs/tiny")) == (0, "finished"), text
    assert_same_rows(tmp_path / "runs/tiny", tmp_path / "runs/one")
    assert distance(tmp_path / "runs/tiny", tmp_path / "runs/one") < 1e-10
    for folder in ("wandb", "wandb-old"):  # one segment a start, from rank 0 alone
        assert len(list((tmp_path / "runs/tiny" / folder).glob("offline-run-*"))) == 1


def slurm(tasks, rank):
    """What srun tells a task on a node."""
    task = {"PROCID": rank, "LOCALID": rank, "NODEID": 0, "NTASKS": tasks, "JOB_ID": 7, "NODELIST": "127.0.0.1"}
    per_node = {"NTASKS_PER_NODE": tasks} if tasks > 1 else {}
    return {f"SLURM_{name}": str(value) for name, value in (task | per_node).items()}


@pytest.mark.slow
def test_tasks_as_srun_starts_them(alone, tmp_path):
    assert alone("run.name=one") == 0
    command = [sys.executable, str(ROOT / "train.py"), "flow/digits", *TINY, *TWO]
    for disturb, expected in (("SIGUSR1 1 6", 85), ("none 0 0", 0)):
        port = str(free_port())
        tasks = [start(command, tmp_path, DISTURB=disturb, MASTER_PORT=port, **slurm(2, rank)) for rank in (0, 1)]
        results = [finish(*task) for task in tasks]
        assert [code for code, _ in results] == [expected] * 2, results
    assert_same_rows(tmp_path / "runs/tiny", tmp_path / "runs/one")


# -- refusals


def test_one_task_cannot_be_two_processes(alone):
    with pytest.raises(ConfigError, match=r"asked for 2 processes, got 1: .*srun --ntasks-per-node=2, or unset SLURM"):
        alone(*TWO, **slurm(1, 0))


def test_a_batch_that_two_processes_cannot_share_is_refused(alone, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be cut into 2 equal parts \(2 processes × 1 accumulated"):
        alone(*TWO, "data.batch_size=99")
    assert not list((tmp_path / "runs/tiny").glob("ckpt/*"))


def test_fewer_validation_samples_than_processes_are_refused(alone, tmp_path):
    few = ["data._target_=process_plugin.Few", "data.batch_size=256", "trainer.max_steps=2"]
    with pytest.raises(ConfigError, match=r"1 validation samples for 2 processes: each needs one"):
        alone(*few, *TWO)
    assert alone(*few, "run.name=one") == 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "data", "code"), [("held", "Digits", 2), ("free", "MNIST", 1)])
def test_what_one_process_refuses_ends_all_at_once_with_its_exit_code(tmp_path, name, data, code):
    (tmp_path / "mnist.npz").write_bytes(b"torn")
    held = RunDirectory(tmp_path / "runs/held")
    held.open(overwrite=False)
    node = [f"data._target_=ndeflow.data.{data}", "data.batch_size=256"]
    text = launch(tmp_path, f"run.name={name}", *node, NDEFLOW_DATA=str(tmp_path))[1]
    held.close()
    assert text.count(f"exitcode  : {code}") == 2, text
    assert "Signal" not in text  # nobody was killed, which torchrun does half a minute after the first has left
    assert text.count("error: ") == 1, text


@pytest.mark.slow
def test_a_second_process_on_the_same_directory_is_refused(alone, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "flow/digits", *TINY, "vars.steps=100000"]
    first, out = start(command, tmp_path)
    wait_for_step(tmp_path / "runs/tiny", 1, first)
    with pytest.raises(ConfigError, match=rf"runs/tiny is in use by another process \(process {first.pid} on .*\)"):
        alone("run.overwrite=true")
    first.send_signal(signal.SIGTERM)
    assert finish(first, out)[0] == 85
    assert alone("trainer.max_steps=1", "vars.steps=100000") == 0  # free again, and nothing of the first is lost
    assert newest(tmp_path / "runs/tiny")["global_step"] > 1
