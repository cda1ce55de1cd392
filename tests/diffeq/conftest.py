"""Every exported solver, found by looking: a new one is tested by being exported."""

import inspect
from dataclasses import fields
from itertools import product

import ndeflow.diffeq
from ndeflow.diffeq import Solver


def variants(solver):
    """A solver with every setting of its switches."""
    switches = [f.name for f in fields(solver) if f.type == "bool"]
    return [
        solver(**dict(zip(switches, values, strict=True))) for values in product((False, True), repeat=len(switches))
    ]


def exported_solvers():
    classes = [getattr(ndeflow.diffeq, name) for name in ndeflow.diffeq.__all__]
    solvers = [c for c in classes if inspect.isclass(c) and issubclass(c, Solver) and not inspect.isabstract(c)]
    return [solver for c in solvers for solver in variants(c)]


def pytest_generate_tests(metafunc):
    if "solver" in metafunc.fixturenames:
        metafunc.parametrize("solver", exported_solvers(), ids=repr)
