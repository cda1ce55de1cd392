import subprocess
import sys
import textwrap

import pytest

from ndeflow.config import ConfigError
from ndeflow.training import files
from ndeflow.training.rundir import Run, RunDirectory, decide, differences, is_rank_zero, run_name

CONFIG = {
    "module": {"_target_": "m.A", "lr": 1},
    "trainer": {"max_steps": 10, "devices": 1},
    "data": {"batch_size": 4},
    "resume": "auto",
}


def save(run, step, config=CONFIG):
    files.write(
        {"ndeflow": {"format": 1, "config": config}, "global_step": step}, run.checkpoints / files.step_name(step)
    )


@pytest.fixture
def run(tmp_path):
    directory = RunDirectory(tmp_path / "runs" / "a")
    directory.open(overwrite=False)
    yield directory
    directory.close()


def test_a_fresh_directory_starts_afresh(run):
    assert decide(run, CONFIG, False).step == 0
    assert not run.used


def test_auto_goes_on_from_the_newest(run):
    save(run, 3), save(run, 5)
    start = decide(run, CONFIG, False)
    assert (start.step, start.checkpoint.name) == (5, files.step_name(5))


@pytest.mark.parametrize(
    "free",
    [
        {"trainer": {"max_steps": 20, "devices": 4}},
        {"data": {"batch_size": 4, "workers": 2, "root": "x"}},
        {"wandb": {"mode": "online"}, "checkpoints": {"every": 7}, "report": {}, "run": {"name": "b"}},
    ],
)
def test_auto_ignores_what_makes_no_other_experiment(run, free):
    save(run, 5)
    assert decide(run, {**CONFIG, **free}, False).step == 5


def test_another_config_is_refused_with_the_differing_keys_and_three_ways_on(run):
    save(run, 5)
    other = {**CONFIG, "module": {"_target_": "m.A", "lr": 2}, "seed": 1}
    with pytest.raises(ConfigError) as error:
        decide(run, other, False)
    text = str(error.value)
    assert "another config (module.lr 1 -> 2; seed unset -> 1)" in text
    assert all(way in text for way in ("run.name=NEW", f"resume={run.path}", "run.overwrite=true"))
    assert decide(run, {**other, "resume": str(run.path)}, False).step == 5


def test_none_refuses_a_used_directory_unless_overwritten(run):
    save(run, 5)
    with pytest.raises(ConfigError, match="holds a run already"):
        decide(run, {**CONFIG, "resume": "none"}, False)
    assert decide(run, {**CONFIG, "resume": "none"}, True).step == 0


def test_a_path_takes_the_newest_not_the_best_and_must_be_there(run, tmp_path):
    save(run, 3), save(run, 5)
    files.write({"ndeflow": {"format": 1, "config": CONFIG}, "global_step": 3}, run.checkpoints / "best.ckpt")
    assert decide(run, {**CONFIG, "resume": str(run.path)}, False).step == 5
    assert decide(run, {**CONFIG, "resume": str(run.checkpoints / files.step_name(3))}, False).step == 3
    with pytest.raises(ConfigError, match="no checkpoint or run directory"):
        decide(run, {**CONFIG, "resume": str(tmp_path / "nowhere")}, False)


def test_a_checkpoint_of_another_class_is_refused(run):
    save(run, 5)
    other = {**CONFIG, "module": {"_target_": "m.B"}, "resume": str(run.path)}
    with pytest.raises(ConfigError, match=r"is a checkpoint of m\.A, the config builds m\.B"):
        decide(run, other, False)


def test_a_damaged_newest_falls_back_and_is_retired(run):
    save(run, 3), save(run, 5)
    (run.checkpoints / files.step_name(5)).write_bytes(b"torn")
    with pytest.warns(UserWarning, match="trying the one before"):
        assert decide(run, CONFIG, False).step == 3
    assert [p.name for p in files.step_files(run.checkpoints)] == [files.step_name(3)]


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(run):
    with pytest.raises(ConfigError, match=r"in use by another process \(process \d+ on "):
        RunDirectory(run.path).open(overwrite=False)
    run.close()
    code = f"""
        import os, signal
        from ndeflow.training.rundir import RunDirectory
        d = RunDirectory({str(run.path)!r}); d.open(False)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False).returncode == -9
    run.open(overwrite=False)


def test_a_start_that_comes_to_nothing_takes_away_what_it_made_and_no_more(tmp_path):
    path = tmp_path / "runs" / "b"
    for left, stays in ((None, False), ("state", True), (None, True)):  # the last start finds what the second left
        directory = RunDirectory(path)
        directory.open(overwrite=False)
        if left:
            (path / left).touch()
        directory.close()
        assert path.exists() == stays
    (tmp_path / "empty").mkdir()
    directory = RunDirectory(tmp_path / "empty")
    directory.open(overwrite=False)
    directory.close()
    assert (tmp_path / "empty").is_dir()


def test_overwrite_deletes_runs_only(run):
    (run.path / "thesis.tex").write_text("years of work")
    run.close()
    with pytest.raises(ConfigError, match="holds no run"):
        run.open(overwrite=True)
    run.close()
    run.write_state("finished")
    save(run, 3)
    run.open(overwrite=True)
    assert [p.name for p in run.path.iterdir()] == ["lock"]


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write run directory .*: set run\.root=DIR"):
        RunDirectory(tmp_path / "file" / "a").open(overwrite=False)


def test_names(monkeypatch):
    assert run_name(Run(), "digits") == "digits"
    assert run_name(Run(name="x"), "digits") == "x"
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    monkeypatch.setenv("WANDB_RUN_ID", "t1")
    assert run_name(Run(), "digits") == "digits-t1"


def test_rank_zero_under_every_launcher(monkeypatch):
    assert is_rank_zero()
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.setenv(name, "1")
        assert not is_rank_zero()
        monkeypatch.delenv(name)


def test_differences_walk_lists_and_missing_keys():
    old = {"a": {"b": [1, 2]}, "run": {"name": 1}}
    assert list(differences(old, {"a": {"b": [1, 3]}, "c": None})) == ["a.b[1] 2 -> 3"]
