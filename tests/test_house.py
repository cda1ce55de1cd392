"""The structure of the house: imports only downward, and its countable marks."""

import ast
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "ndeflow").rglob("*.py"))

# A room may import the rooms listed for it, and itself.
LAYERS = {
    "tensors": set(),
    "randomness": set(),
    "config": set(),
    "nets": {"tensors", "randomness"},
    "data": {"tensors", "randomness"},
    "metrics": {"tensors", "randomness"},
    "diffeq": {"tensors", "randomness"},
    "flows": {"tensors", "randomness", "diffeq"},
    "modules": {"tensors", "randomness", "diffeq", "flows", "nets", "data", "metrics"},
    "training": {"tensors", "randomness", "config", "diffeq", "flows", "nets", "data", "metrics", "modules"},
    "cli": {"randomness", "config", "data", "flows", "modules", "training"},
}
CONFIG_READERS = {"training", "cli"}


def room(path):
    return path.relative_to(ROOT / "ndeflow").parts[0].removesuffix(".py")


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ndeflow":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [a.name for a in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("ndeflow."))
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"relative import in {path}"


def test_imports_go_downward_only():
    wrong = []
    for path in FILES:
        if (here := room(path)) != "__init__":
            allowed = LAYERS[here] | {here, "__version__"}
            wrong += [f"{path}: {r}" for r in imported_rooms(path) if r not in allowed]
    assert not wrong


def test_the_layers_have_no_cycle():
    order = list(LAYERS)
    assert all(order.index(below) < order.index(above) for above, belows in LAYERS.items() for below in belows)
    assert {above for above, belows in LAYERS.items() if "config" in belows} == CONFIG_READERS


def imported_packages(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize(
    ("here", "banned"), [("config", "torch"), ("diffeq", "pytorch_lightning"), ("flows", "pytorch_lightning")]
)
def test_rooms_stay_free_of_what_they_must_not_know(here, banned):
    assert not [path for path in FILES if room(path) == here and banned in imported_packages(path)]


def functions(paths):
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield path, node


def test_files_are_short():
    lengths = {p: len(p.read_text().splitlines()) for p in FILES if p.name != "tableaus.py"}
    assert not {p: n for p, n in lengths.items() if n > 400}
    assert sum(n <= 300 for n in lengths.values()) >= 0.9 * len(lengths)


def test_functions_are_short():
    lengths = sorted(node.end_lineno - node.lineno + 1 for _, node in functions(FILES))
    assert statistics.median(lengths) <= 8
    assert lengths[int(0.95 * len(lengths))] <= 40
    assert lengths[-1] <= 80


def test_no_drawers():
    assert not [p for p in FILES if p.stem in ("utils", "helpers", "common", "misc")]


def test_constructors_take_named_arguments_only():
    wrong = [
        f"{path}:{node.lineno}"
        for path, node in functions(FILES)
        if node.name == "__init__" and node.args.kwarg is not None
    ]
    assert not wrong


def test_tests_and_library_are_of_a_size():
    def count(paths):
        return sum(len(p.read_text().splitlines()) for p in paths)

    assert 0.8 <= count((ROOT / "tests").rglob("*.py")) / count(FILES) <= 1.2
