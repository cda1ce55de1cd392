"""Butcher tableaus of explicit Runge–Kutta methods, as data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

Terms: TypeAlias = tuple[tuple[int, float], ...]
"""Coefficients that are not zero, each with the stage it belongs to."""


@dataclass(frozen=True)
class Tableau:
    r"""Coefficients of an explicit Runge–Kutta method of s stages.

    .. math:: k_i = f\bigl(t_0 + c_i\,\Delta t,\; y_0 + \textstyle\sum_{j<i} a_{ij} k_j\bigr)\,\Delta t, \qquad
              y_1 = y_0 + \textstyle\sum_i b_i k_i, \qquad
              e = \textstyle\sum_i (b_i - \hat b_i)\, k_i, \qquad
              y(t_0 + \theta\,\Delta t) = y_0 + \textstyle\sum_j \theta^j \sum_i d_{ji}\, k_i

    Args:
        c: s nodes, the sums of the rows of `a`.
        a: s rows, row i with the i coefficients of the stages before it, the first row empty.
        b: s weights of the solution, sum 1.
        b_hat: s weights of the embedded solution of lower order, sum 1, or None without one.
        d: rows d_1, d_2, … of the interpolant, each of s weights; summed over the rows they are b. None takes the
            cubic of Hermite through both ends and their fields.

    Attributes:
        stages: the non-zero coefficients (j, a_ij) of each row, all a step iterates over.
        solution: the non-zero weights (i, b_i).
        error: the non-zero weights (i, b_i − b̂_i), or None.
        fsal: whether the last stage is the field at the end of the step, which the next one begins with.
        interpolant: the non-zero weights (i, d_ji) of each row; without `fsal`, stage s is the field at the end.
        twins: the last two stages at the same time and at states that differ, or None.

    Raises:
        ValueError: a length or a sum is wrong.

    >>> Tableau(c=(0.0, 0.5), a=((), (0.4,)), b=(0.0, 1.0))
    Traceback (most recent call last):
        ...
    ValueError: row 1 of a Tableau sums to 0.4, its node c is 0.5: they must be equal
    """

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    b_hat: tuple[float, ...] | None = None
    d: tuple[tuple[float, ...], ...] | None = None
    stages: tuple[Terms, ...] = field(init=False)
    solution: Terms = field(init=False)
    error: Terms | None = field(init=False)
    fsal: bool = field(init=False)
    interpolant: tuple[Terms, ...] = field(init=False)
    twins: tuple[int, int] | None = field(init=False)

    def __post_init__(self) -> None:
        self._check()
        difference = None if self.b_hat is None else [x - y for x, y in zip(self.b, self.b_hat, strict=True)]
        fsal = self.b[-1] == 0 and self.a[-1] == self.b[:-1]
        facts = {
            "stages": tuple(map(_terms, self.a)),
            "solution": _terms(self.b),
            "error": None if difference is None else _terms(difference),
            "fsal": fsal,
            "interpolant": tuple(map(_terms, self.d or _hermite(self.b, fsal))),
            "twins": _twins(self.c),
        }
        for name, value in facts.items():
            object.__setattr__(self, name, value)

    def _check(self) -> None:
        """Refuse lengths and sums that cannot be right."""
        stages = len(self.c)
        lengths = [len(row) for row in self.a]
        if lengths != list(range(stages)):
            raise ValueError(f"a Tableau of {stages} nodes c has rows of 0, 1, …, {stages - 1} entries, got {lengths}")
        for i, (row, node) in enumerate(zip(self.a, self.c, strict=True)):
            if not math.isclose(math.fsum(row), node, abs_tol=1e-12):
                raise ValueError(
                    f"row {i} of a Tableau sums to {math.fsum(row)}, its node c is {node}: they must be equal"
                )
        for name, weights in (("b", self.b), ("b_hat", self.b_hat)):
            if weights is not None and (len(weights) != stages or not math.isclose(math.fsum(weights), 1)):
                raise ValueError(f"{name} of a Tableau has {stages} weights of sum 1, got {weights}")
        for i, column in enumerate(zip(*self.d, strict=True) if self.d else ()):
            if not math.isclose(math.fsum(column), self.b[i], abs_tol=1e-12):
                raise ValueError(f"column {i} of d of a Tableau sums to {math.fsum(column)}, b is {self.b[i]}")


def _terms(row: Sequence[float]) -> Terms:
    """The non-zero entries of a row with their places."""
    return tuple((j, weight) for j, weight in enumerate(row) if weight)


def _hermite(b: tuple[float, ...], fsal: bool) -> tuple[tuple[float, ...], ...]:
    """Rows of the cubic y₀ + θ k₀ + θ² (3 Δy − 2 k₀ − k₁) + θ³ (k₀ + k₁ − 2 Δy), where Δy = Σ bᵢ kᵢ."""
    weights = b if fsal else (*b, 0.0)
    stages = len(weights)
    start = [float(i == 0) for i in range(stages)]
    end = [float(i == stages - 1) for i in range(stages)]
    columns = list(zip(weights, start, end, strict=True))
    return tuple(start), tuple(3 * w - 2 * s - e for w, s, e in columns), tuple(s + e - 2 * w for w, s, e in columns)


def _twins(c: tuple[float, ...]) -> tuple[int, int] | None:
    """The last pair of stages at the same time."""
    pairs = ((i, j) for j in reversed(range(len(c))) for i in reversed(range(j)) if c[i] == c[j])
    return next(pairs, None)


EULER = Tableau(c=(0.0,), a=((),), b=(1.0,), d=((1.0,),))
MIDPOINT = Tableau(c=(0.0, 1 / 2), a=((), (1 / 2,)), b=(0.0, 1.0), b_hat=(1.0, 0.0))
HEUN = Tableau(c=(0.0, 1.0), a=((), (1.0,)), b=(1 / 2, 1 / 2), b_hat=(1.0, 0.0))
RK4 = Tableau(
    c=(0.0, 1 / 2, 1 / 2, 1.0),
    a=((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
    b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
)
