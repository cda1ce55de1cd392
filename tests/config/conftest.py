"""A user's package `mypkg` and a folder of configs, written to a temporary working directory."""

import sys

import pytest

PACKAGE = {
    "__init__.py": "from mypkg.schedules import Linear\n",
    "schedules.py": '''
class Schedule:
    """Abstract."""

class Linear(Schedule):
    """A straight line."""
    def __init__(self, slope: float = 1.0):
        self.slope = slope

class Callable(Linear):
    def __call__(self, t):
        return t

class Named(Schedule):
    def __repr__(self):
        return "<line>"

LINE = Named()

def promised(slope: float) -> Schedule:
    return Linear(slope)

def unknown():
    return 3
''',
    "nets.py": '''
from __future__ import annotations
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from mypkg.schedules import LINE, Schedule
if TYPE_CHECKING:
    from nowhere import Ghost

built = []
constant = 3
walk = os

class Wide:
    """A wide net.

    More about it.
    """
    def __init__(self, width: int, rtol: float = 1e-3, act: Literal["tanh", "relu"] = "tanh", name: str | None = None,
                 betas: tuple[float, float] = (0.9, 0.99), schedule: Schedule | None = None,
                 make: Callable[..., object] | None = None, parts: Mapping[str, Schedule] | None = None,
                 names: Sequence[str] = (), ghost: Ghost = None, debug: bool = False):
        if rtol <= 0:
            raise ValueError(f"rtol={rtol} must be > 0")
        self.__dict__.update(vars(), self=None)
        built.append("Wide")

@dataclass
class Pair:
    left: Wide
    right: Wide | None = None

class Drawn:
    def __init__(self, line: Schedule = LINE):
        self.line = line

class Open:
    def __init__(self, first: int, /, second: int = 2, *rest, third: int = 3, **more):
        self.got = (first, second, rest, third, more)
''',
    "broken.py": "import mypk\n",
    "invalid.py": "def f(:\n",
    "_inner.py": "class Hidden: pass\n",
}


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    root = tmp_path_factory.mktemp("user")
    (root / "mypkg").mkdir()
    for name, text in PACKAGE.items():
        (root / "mypkg" / name).write_text(text)
    sys.path.insert(0, str(root))
    yield ["mypkg"]
    sys.path.remove(str(root))
    for name in [name for name in sys.modules if name.partition(".")[0] == "mypkg"]:
        del sys.modules[name]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write `name=text` files below a fresh working directory."""
    monkeypatch.chdir(tmp_path)

    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    return write
