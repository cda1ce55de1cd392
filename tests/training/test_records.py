import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ndeflow.diffeq import SolverError
from ndeflow.training.health import Health
from ndeflow.training.records import Records, Rows, read_rows
from ndeflow.training.tracking import Tracker, Wandb, run_id


def history(folder):
    """The rows of an offline W&B run, read back by W&B's own program."""
    (segment,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(segment)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    records = map(json.loads, out.splitlines())
    return [record["history"]["item"] for record in records if record["type"] == "history"]


@pytest.fixture
def open_records(tmp_path):
    """Open records of the run in tmp_path, and close them at the end."""
    opened = []

    def make(*args, **kwargs):
        opened.append(Records(tmp_path, *args, **kwargs))
        return opened[-1]

    yield make
    for records in opened:
        records.close(0)


def test_rows_hold_step_time_and_numbers_and_non_finite_ones_as_text(tmp_path, open_records):
    records = open_records()
    records.log_metrics({"a": 1.5, "epoch": 3}, step=2)
    records.log_metrics({"a": math.nan, "b": -math.inf}, step=4)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert (first["step"], first["a"]) == (2, 1.5)
    assert "epoch" not in first
    assert (second["a"], second["b"]) == ("nan", "-inf")


def test_pictures_are_files_named_in_a_row(tmp_path, open_records):
    records = open_records()
    records.log_pictures({"samples": np.arange(64, dtype=np.uint8).reshape(8, 8)}, step=10)
    (row,) = records.rows()
    assert row["media"] == {"samples": "media/samples_00000010.png"}
    assert np.asarray(Image.open(tmp_path / row["media"]["samples"]))[7, 7] == 63


def test_resuming_cuts_back_to_the_checkpoint_and_ignores_a_torn_line(tmp_path, open_records):
    records = open_records()
    for step in (1, 2, 3, 4):
        records.log_metrics({"a": step}, step)
    records.close(0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "a"')
    assert [r["step"] for r in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    again = open_records(resumed_at=2)
    again.log_metrics({"a": 30}, 3)
    assert [(r["step"], r["a"]) for r in again.rows()] == [(1, 1), (2, 2), (3, 30)]


def test_a_fresh_run_begins_with_no_rows(tmp_path, open_records):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1}\n')
    assert open_records().rows() == []


def test_training_writes_rows_at_the_interval_and_means_after_validation(fit, toy, numbers, tmp_path, open_records):
    records = open_records()
    health = Health()
    fit(toy, numbers, [health, Rows(records, 5, health)], steps=12, logger=records)
    rows = records.rows()
    assert [r["step"] for r in rows if "train/loss" in r] == [1, 5, 10, 12]
    assert [r["step"] for r in rows if "val/loss" in r] == [5, 10]
    last = rows[-1]
    assert last["train/lr"] == 1e-2
    assert last["train/loss"] == pytest.approx(float(toy.terms["fit"]))
    assert last["train/grad_norm"] > 0


def test_pictures_whose_solve_fails_are_skipped_or_end_the_run(fit, toy, numbers, open_records):
    class Fails(type(toy)):
        def preview(self):
            raise SolverError("planned")

    records = open_records()
    for policy, expected in (
        ("skip", pytest.warns(UserWarning, match="no pictures, failed solve: planned")),
        ("stop", pytest.raises(SolverError)),
    ):
        health = Health(policy)
        with expected:
            fit(Fails(), numbers, [health, Rows(records, 5, health)], steps=5, logger=records)
    assert not any("media" in row for row in records.rows())


def test_values_that_a_module_logs_itself_are_rows_too(fit, toy, numbers, tmp_path, open_records):
    class Logging(type(toy)):
        def training_step(self, batch, batch_idx):
            self.log("mine", 7.0)
            return super().training_step(batch, batch_idx)

    records = open_records()
    fit(Logging(), numbers, [], steps=4, log_every_n_steps=2, logger=records)
    assert [r["mine"] for r in records.rows() if "mine" in r] == [7.0, 7.0]


@pytest.mark.parametrize(
    ("variable", "logged_in", "mode"),
    [("online", False, "online"), ("dryrun", True, "offline"), (None, True, "online"), (None, False, "offline")],
)
def test_auto_mode(monkeypatch, variable, logged_in, mode):
    monkeypatch.delenv("WANDB_MODE")
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    monkeypatch.setattr("wandb.login", lambda prompt, verify: logged_in and not prompt and not verify)
    assert Wandb().resolve()[0] == mode
    assert Wandb("disabled").resolve()[0] == "disabled"


def test_an_unknown_mode_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "of")
    with pytest.raises(ValueError, match="WANDB_MODE=of: allowed are online, offline, disabled"):
        Wandb().resolve()


def test_the_id_is_written_once(tmp_path, monkeypatch):
    first = run_id(tmp_path)
    assert run_id(tmp_path) == first
    monkeypatch.setenv("WANDB_RUN_ID", "from-sweep")
    assert run_id(tmp_path) == first
    (tmp_path / "b").mkdir()
    assert run_id(tmp_path / "b") == "from-sweep"


def test_an_offline_run_holds_all_rows_once_after_two_restarts(tmp_path, open_records):
    for begin, end, kept in ((0, 4, 0), (3, 7, 2), (6, 9, 5)):
        tracker = Tracker(Wandb(), "offline", tmp_path, {"seed": 1})
        records = open_records(tracker, resumed_at=kept)
        for step in range(begin, end):
            if step > kept or kept == 0:
                records.log_metrics({"a": step}, step)
        records.close(0)
    assert [(r["trainer/global_step"], r["a"]) for r in history(tmp_path)] == [(s, float(s)) for s in range(9)]
    assert len(list((tmp_path / "wandb-old").iterdir())) == 2


def test_a_deleted_offline_folder_does_not_end_the_run(tmp_path, open_records):
    records = open_records(Tracker(Wandb(), "offline", tmp_path, {}))
    records.log_metrics({"a": 1}, 1)
    shutil.rmtree(tmp_path / "wandb")
    records.log_metrics({"a": 2}, 2)
    records.close(0)
    assert [row["a"] for row in records.rows()] == [1, 2]
