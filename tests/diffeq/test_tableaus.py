"""Order conditions of Butcher's theory: Φ(tree) = 1/γ(tree) for every rooted tree up to the order."""

from functools import cache
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchdiffeq._impl.odeint import SOLVERS

from ndeflow.diffeq import ODE, Bosh3, Dopri5, Dopri8
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


def residuals(b, a, order, theta=1.0):
    """Of the weights b of y(t₀ + θ Δt) for all trees of an order."""
    return [b @ stage_weights(tree, a) - theta**order / density(tree) for tree in trees(order)]


def matrix(tableau):
    stages = len(tableau.c)
    return np.array([[*row, *(0.0,) * (stages - len(row))] for row in tableau.a])


def assert_order(b, a, order, theta=1.0, atol=1e-9):
    for p in range(1, order + 1):
        np.testing.assert_allclose(residuals(b, a, p, theta), 0, atol=atol)
    assert max(np.abs(residuals(b, a, order + 1, theta))) > 1e-6


def interpolant(tableau):
    """Its rows as an array, and the matrix of the stages it takes: without fsal, the field at the end is one more."""
    a = matrix(tableau)
    if not tableau.fsal:
        a = np.block([[a, np.zeros((len(a), 1))], [np.array(tableau.b), 0.0]])
    d = np.zeros((len(tableau.interpolant), len(a)))
    for row, terms in enumerate(tableau.interpolant):
        for i, weight in terms:
            d[row, i] = weight
    return d, a


def test_there_are_as_many_rooted_trees_as_cayley_counted():
    assert [len(trees(n)) for n in range(1, 10)] == [1, 1, 2, 4, 9, 20, 48, 115, 286]


def test_the_weights_have_their_order_and_no_higher(solver):
    tableau = solver.tableau
    assert_order(np.array(tableau.b), matrix(tableau), solver.order)


def test_the_embedded_weights_have_their_order_and_no_higher(solver):
    tableau = solver.tableau
    assert (tableau.b_hat is None) == (solver.error_order is None)
    if tableau.b_hat is not None:
        assert_order(np.array(tableau.b_hat), matrix(tableau), solver.error_order)


@pytest.mark.parametrize("theta", [0.3, 0.7])
def test_the_interpolant_has_its_order_and_no_higher(solver, theta):
    """From an exact start, it is of the order of the method where that is lower."""
    d, a = interpolant(solver.tableau)
    weights = theta ** np.arange(1, len(d) + 1) @ d
    assert_order(weights, a, min(solver.order, solver.interpolation_order), theta, atol=1e-13)


def test_the_interpolant_begins_with_the_field_and_ends_with_the_solution(solver):
    d, a = interpolant(solver.tableau)
    np.testing.assert_array_equal(d[0], np.eye(len(a))[0])
    np.testing.assert_allclose(d.sum(0), [*solver.tableau.b, 0.0][: len(a)], atol=4e-15)
    if solver.interpolation_order > 1:  # and with the field there
        np.testing.assert_allclose(np.arange(1, len(d) + 1) @ d, np.eye(len(a))[-1], atol=1e-13)


def test_the_stability_size_is_where_the_stability_function_leaves_the_unit_disk(solver):
    """R(z) = 1 + z bᵀ(I − zA)⁻¹1 is the polynomial Σ z^(k+1) bᵀA^k 1."""
    b, a = np.array(solver.tableau.b), matrix(solver.tableau)
    powers = [b @ np.linalg.matrix_power(a, k) @ np.ones(len(b)) for k in range(len(b))]
    z = -np.linspace(0, 8, 80001)
    growth = np.abs(np.polyval([*powers[::-1], 1.0], z))
    assert -z[np.argmax(growth > 1 + 1e-12)] == pytest.approx(solver.stability_size, abs=2e-4)
    assert abs(np.polyval([*powers[::-1], 1.0], -solver.stability_size)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(Bosh3(), "bosh3"), (Dopri5(shampine=True), "dopri5"), (Dopri8(), "dopri8")], ids=repr
)
def test_tableaus_equal_those_of_torchdiffeq(ours, theirs):
    """Which leaves out the first stage."""
    mine, other = ours.tableau, SOLVERS[theirs].tableau
    np.testing.assert_allclose(mine.c[1:], other.alpha, rtol=1e-15)
    for row, expected in zip(mine.a[1:], other.beta, strict=True):
        np.testing.assert_allclose(row, expected, rtol=1e-15)
    np.testing.assert_allclose(mine.b, other.c_sol, rtol=1e-15)
    np.testing.assert_allclose(np.subtract(mine.b, mine.b_hat), other.c_error, atol=1e-16)


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
    return Tableau(c=tuple(sum(row) for row in a), a=a, b=b, b_hat=None if b == b_hat else b_hat)


@settings(max_examples=60, deadline=None)
@given(tableaus(), st.complex_numbers(max_magnitude=2))
def test_a_step_realizes_its_tableau(tableau, z):
    """On y' = zy a step of size 1 gives the stability function 1 + z bᵀ(I − zA)⁻¹1."""

    class Method(RungeKutta, tableau=tableau):
        pass

    t0, dt = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    eq, y0 = ODE(lambda t, y: z * y), torch.ones(1, 1, dtype=torch.complex128)
    step = Method().step(eq, t0, dt, y0, Method().init(eq, t0, y0))
    a, ones = matrix(tableau), np.ones(len(tableau.c))
    stages = np.linalg.solve(np.eye(len(a)) - z * a, ones)
    scale = 1e-12 * max(1, np.abs(stages).max())
    np.testing.assert_allclose(step.y1.item(), 1 + z * np.array(tableau.b) @ stages, atol=scale)
    if tableau.b_hat is not None:
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
        ({"b_hat": (0.0, 1.0)}, "b_hat of a Tableau equals b: leave it out"),
        ({"d": ((0.0, 1.0), (0.0,))}, r"row d of a Tableau has 2 weights, not all zero, got \(0.0,\)"),
        ({"d": ((0.0, 1.0), (0.0, 0.0))}, r"row d of a Tableau has 2 weights, not all zero, got \(0.0, 0.0\)"),
        ({"d": ((1.0, 0.0), (-1.0, 0.9))}, "column 1 of d of a Tableau sums to 0.9, b is 1.0"),
    ],
)
def test_an_inconsistent_tableau_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Tableau(**{"c": (0.0, 0.5), "a": ((), (0.5,)), "b": (0.0, 1.0), **change})
