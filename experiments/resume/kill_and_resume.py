"""Kill training runs with SIGKILL at random moments, resume them until done, and compare with the uninterrupted run.

    python experiments/resume/kill_and_resume.py 100 > experiments/resume/table.md

Each run trains a small rectified flow on digits for 60 steps (15 epochs; a checkpoint every 4 steps, a validation
every 6). The moment of a kill is uniform over the duration of a run, start-up included, drawn by a fixed seed; a
second launch is killed as well in every second run, and every tenth run loads its data with two workers. Equal means:
the same rows in metrics.jsonl but for the time, and the same raw and averaged weights, bit for bit.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

HOME = Path(__file__).parent.parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
OVERRIDES = [
    "module.model.net.width=16",
    "module.model.net.depth=1",
    "module.pictures=4",
    "module.sampler.grid.steps=2",
    "vars.steps=60",
    "optim.schedule.warmup=2",
    "trainer.val_check_interval=6",
    "trainer.log_every_n_steps=1",
    "checkpoints.every=4",
    "wandb.mode=disabled",
    "report.evaluate=false",
    "run.name=run",
]


class Result(NamedTuple):
    """How one killed and resumed run went."""

    kills: list[float]
    steps_at_kill: list[int]
    launches: int
    equal: bool


def train(root: str, overrides: list[str]) -> None:
    """Run train.py's main in a child process and leave with its exit code."""
    torch.set_num_threads(1)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    from train import main

    sys.exit(main(["flow/digits", *OVERRIDES, f"run.root={root}", *overrides]))


def launch(root: str, overrides: list[str], kill_after: float | None = None) -> int:
    """Train in a process of its own; SIGKILL it after some seconds unless it is done by then.

    The process is forked from a server that has done the imports, except with loader workers: those of a forked
    child take a minute to shut down, those of a plain process none.
    """
    if any(o.startswith("data.workers=") and o != "data.workers=0" for o in overrides):
        return launch_plainly(root, overrides, kill_after)
    process = CONTEXT.Process(target=train, args=(root, overrides))
    process.start()
    process.join(kill_after)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode is not None
    return process.exitcode


def launch_plainly(root: str, overrides: list[str], kill_after: float | None = None) -> int:
    """The same by the command line."""
    command = [sys.executable, str(HOME / "train.py"), "flow/digits", *OVERRIDES, f"run.root={root}", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=HOME, env=environment, stdout=subprocess.DEVNULL)
    try:
        return process.wait(kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def history(root: str) -> list[dict[str, Any]]:
    """The rows of a run without their times; a torn last line of a killed run is left out."""
    path = Path(root, "run", "metrics.jsonl")
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


def outcome(root: str) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Rows and final weights, raw and averaged, of a run none of whose checkpoints was unreadable."""
    folder = Path(root, "run", "ckpt")
    assert not list(folder.glob("*.bad")), "a checkpoint was unreadable"
    checkpoint = torch.load(folder / "step_00000060.ckpt", weights_only=True)
    weights = {f"raw/{k}": v for k, v in checkpoint["state_dict"].items()}
    return history(root), weights | {f"ema/{k}": v for k, v in checkpoint["ema"]["weights"].items()}


def same(a: tuple[Any, dict[str, torch.Tensor]], b: tuple[Any, dict[str, torch.Tensor]]) -> bool:
    """Whether rows and weights are equal, bit for bit."""
    return a[0] == b[0] and a[1].keys() == b[1].keys() and all(torch.equal(v, b[1][k]) for k, v in a[1].items())


def killed_run(reference: Any, durations: list[float], seed: int) -> Result:
    """One run, killed once or twice and resumed until done."""
    draw = random.Random(seed)
    workers = 2 if seed % 10 == 9 else 0
    overrides = [f"data.workers={workers}"]
    kills = [draw.uniform(0.0, durations[workers > 0]) for _ in range(1 + seed % 2)]
    steps, launches = [], 0
    root = tempfile.mkdtemp()
    try:
        for after in kills:
            launches += 1
            if launch(root, overrides, after) == 0:
                break
            steps.append(max((row["step"] for row in history(root)), default=0))
        while launch(root, overrides) != 0:
            launches += 1
            if launches > 5:
                return Result(kills, steps, launches, equal=False)
        return Result(kills, steps, launches + 1, same(outcome(root), reference))
    finally:
        shutil.rmtree(root, ignore_errors=True)


def study(runs: int) -> list[Result]:
    """Kill and resume `runs` runs, seeds 0, 1, …"""
    CONTEXT.set_forkserver_preload(["train", "ndeflow.training.fitting", "ndeflow.modules.flow", __name__])
    outcomes, durations = [], []
    for workers in (0, 0, 2):  # the first launch also pays for the imports of the fork server
        with tempfile.TemporaryDirectory() as root:
            began = time.monotonic()
            assert launch(root, [f"data.workers={workers}"]) == 0
            durations.append(time.monotonic() - began)
            outcomes.append(outcome(root))
    assert all(same(o, outcomes[0]) for o in outcomes), "uninterrupted runs differ"
    return [killed_run(outcomes[0], durations[1:], seed) for seed in range(runs)]


def main(runs: int) -> int:
    """Print the table of a study."""
    results = study(runs)
    equal = sum(r.equal for r in results)
    print(f"{equal} of {len(results)} runs equal the uninterrupted one, bit for bit.\n")
    print("| seed | killed after, s | at step | launches | equal |\n|---|---|---|---|---|")
    for seed, r in enumerate(results):
        kills = ", ".join(f"{k:.2f}" for k in r.kills)
        print(f"| {seed} | {kills} | {', '.join(map(str, r.steps_at_kill)) or 'done'} | {r.launches} | {r.equal} |")
    return 0 if equal == len(results) else 1


if __name__ == "__main__":
    sys.path.insert(0, str(HOME))
    from experiments.resume import kill_and_resume  # a module that the fork server can import, not __main__

    sys.exit(kill_and_resume.main(int(sys.argv[1]) if len(sys.argv) > 1 else 100))
