"""The README's snippets and commands do what they say, at the size they have there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
SHELL = [line.split("#")[0].strip() for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
COMMANDS = [line for line in SHELL if line and not line.startswith("make ")]  # make is what runs this test


def test_it_is_short_and_begins_with_something_to_run():
    lines = TEXT.splitlines()
    assert len(lines) <= 120
    assert "```python" in lines[:25]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(SHELL), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    for variable in ("TORCH", "PYTHON"):
        assert f"{variable} ?=" in makefile


def test_the_paths_it_names_exist():
    for path in re.findall(r"\]\((experiments/[^)]+)\)", TEXT):
        assert (ROOT / path).exists(), path


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder that looks like a clone, so that runs/ lands in it."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("train.py", "configs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_commands_and_snippets_run_as_written(workplace):
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "WANDB_MODE": "offline"}
    assert len(COMMANDS) == 8
    for command in COMMANDS:
        done = subprocess.run(shlex.split(command), cwd=workplace, env=env, capture_output=True, text=True, check=False)
        expected = 2 if command == "python train.py" else 0
        assert done.returncode == expected, f"{command}: {done.stdout}{done.stderr}"
    for block in (block for kind, block in BLOCKS if kind == "python"):
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=workplace, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
