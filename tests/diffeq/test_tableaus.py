"""Order conditions of Butcher's theory: Φ(tree) = 1/γ(tree) for every rooted tree up to the order."""

from functools import cache
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ndeflow.diffeq import ODE
from ndeflow.diffeq.solvers import RungeKutta, Tableau


def grafts(tree):
    """All trees with one more leaf; a tree is the sorted tuple of its root's subtrees."""
    yield tuple(sorted((*tree, ())))
    for i, child in enumerate(tree):
        yield from (tuple(sorted((*tree[:i], grown, *tree[i + 1 :]))) for grown in grafts(child))


@cache
def trees(vertices):
    return {()} if vertices == 1 else {grown for tree in trees(vertices - 1) for grown in grafts(tree)}


def size(tree):
    return 1 + sum(map(size, tree))


def density(tree):
    return size(tree) * prod(map(density, tree))


def stage_weights(tree, a):
    return prod((a @ stage_weights(child, a) for child in tree), start=np.ones(len(a)))


def residuals(b, a, order):
    return [b @ stage_weights(tree, a) - 1 / density(tree) for tree in trees(order)]


def matrix(tableau):
    stages = len(tableau.c)
    return np.array([[*row, *(0.0,) * (stages - len(row))] for row in tableau.a])


def assert_order(b, a, order):
    for p in range(1, min(order, 5) + 1):
        np.testing.assert_allclose(residuals(b, a, p), 0, atol=1e-9)
    assert max(np.abs(residuals(b, a, order + 1))) > 1e-6


def test_there_are_as_many_rooted_trees_as_cayley_counted():
    assert [len(trees(n)) for n in range(1, 7)] == [1, 1, 2, 4, 9, 20]


def test_the_weights_have_their_order_and_no_higher(solver):
    tableau = solver.tableau
    assert_order(np.array(tableau.b), matrix(tableau), solver.order)


def test_the_embedded_weights_have_their_order_and_no_higher(solver):
    tableau = solver.tableau
    assert (tableau.b_hat is None) == (solver.error_order is None)
    if tableau.b_hat is not None:
        assert_order(np.array(tableau.b_hat), matrix(tableau), solver.error_order)


def test_a_wrong_coefficient_fails_the_conditions(solver):
    b = np.array(solver.tableau.b)
    b[0] += 1e-3
    with pytest.raises(AssertionError):
        assert_order(b, matrix(solver.tableau), solver.order)


coefficient = st.one_of(st.just(0.0), st.floats(-2, 2).filter(lambda x: abs(x) > 1e-3))


@st.composite
def tableaus(draw):
    """Explicit tableaus with zeros in all places."""
    stages = draw(st.integers(1, 5))
    a = tuple(tuple(draw(coefficient) for _ in range(i)) for i in range(stages))
    rows = [[draw(coefficient) for _ in range(stages - 1)] for _ in range(2)]
    b, b_hat = ((*row, 1 - sum(row)) for row in rows)
    return Tableau(c=tuple(sum(row) for row in a), a=a, b=b, b_hat=b_hat)


@settings(max_examples=60, deadline=None)
@given(tableaus(), st.complex_numbers(max_magnitude=2))
def test_a_step_realizes_its_tableau(tableau, z):
    """On y' = zy a step of size 1 gives the stability function 1 + z bᵀ(I − zA)⁻¹1."""

    class Method(RungeKutta):
        pass

    Method.tableau = tableau
    t0, dt = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    step = Method().step(ODE(lambda t, y: z * y), t0, dt, torch.ones(1, 1, dtype=torch.complex128), None)
    a, ones = matrix(tableau), np.ones(len(tableau.c))
    stages = np.linalg.solve(np.eye(len(a)) - z * a, ones)
    scale = 1e-12 * max(1, np.abs(stages).max())
    np.testing.assert_allclose(step.y1.item(), 1 + z * np.array(tableau.b) @ stages, atol=scale)
    np.testing.assert_allclose(step.error.item(), z * np.subtract(tableau.b, tableau.b_hat) @ stages, atol=scale)
    np.testing.assert_allclose([k.item() for k in step.stages], z * stages, atol=scale)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a": ((), (0.5, 0.0))}, r"rows of 0, 1, …, 1 entries, got \[0, 2\]"),
        ({"a": ((), (0.4,))}, "row 1 of a Tableau sums to 0.4, its node c is 0.5"),
        ({"b": (0.0, 0.9)}, "b of a Tableau has 2 weights of sum 1"),
        ({"b": (1.0,)}, "b of a Tableau has 2 weights of sum 1"),
        ({"b_hat": (0.5, 0.6)}, "b_hat of a Tableau has 2 weights of sum 1"),
    ],
)
def test_an_inconsistent_tableau_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Tableau(**{"c": (0.0, 0.5), "a": ((), (0.5,)), "b": (0.0, 1.0), **change})
