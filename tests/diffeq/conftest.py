"""Every exported solver, found by looking: a new one is tested by being exported."""

import inspect

import ndeflow.diffeq
from ndeflow.diffeq import Solver


def exported_solvers():
    classes = [getattr(ndeflow.diffeq, name) for name in ndeflow.diffeq.__all__]
    return [c() for c in classes if inspect.isclass(c) and issubclass(c, Solver) and not inspect.isabstract(c)]


def pytest_generate_tests(metafunc):
    if "solver" in metafunc.fixturenames:
        metafunc.parametrize("solver", exported_solvers(), ids=lambda s: type(s).__name__)
