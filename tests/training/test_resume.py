"""Stop it anywhere, start it again with the same command, and it is the same run."""

import signal

import pytest

from experiments.resume import kill_and_resume as killing


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The uninterrupted run."""
    killing.CONTEXT.set_forkserver_preload(["train", "ndeflow.training.fitting", "ndeflow.modules.flow"])
    root = str(tmp_path_factory.mktemp("reference"))
    assert killing.launch(root, []) == 0
    return killing.outcome(root)


@pytest.mark.parametrize(
    ("where", "workers"),
    [("step 22", 0), ("step 32", 2), ("validation 12", 0), ("validation 60", 0), ("save 8", 0)],
)
def test_killed_at_a_chosen_place(reference, tmp_path, where, workers):
    command = [f"data.workers={workers}", "plugins=[tests]", "callbacks.kill._target_=tests.training.suicide.Kill"]
    assert killing.launch(str(tmp_path), [*command, f"callbacks.kill.where={where}"]) == -signal.SIGKILL
    # where it kills is part of the config, hence another experiment: resume says that it is meant
    again = [*command, "callbacks.kill.where=nowhere 0", f"resume={tmp_path}/run"]
    assert killing.launch(str(tmp_path), again) == 0
    assert killing.same(killing.outcome(str(tmp_path)), reference)


def test_another_seed_is_another_run(reference, tmp_path):
    assert killing.launch(str(tmp_path), ["seed=1"]) == 0
    assert not killing.same(killing.outcome(str(tmp_path)), reference)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_hundred_runs_killed_at_random_moments():
    results = killing.study(100)
    assert [seed for seed, r in enumerate(results) if not r.equal] == []
