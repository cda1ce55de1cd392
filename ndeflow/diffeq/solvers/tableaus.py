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
              e = \textstyle\sum_i (b_i - \hat b_i)\, k_i

    Args:
        c: s nodes, the sums of the rows of `a`.
        a: s rows, row i with the i coefficients of the stages before it, the first row empty.
        b: s weights of the solution, sum 1.
        b_hat: s weights of the embedded solution of lower order, sum 1, or None without one.

    Attributes:
        stages: the non-zero coefficients (j, a_ij) of each row, all a step iterates over.
        solution: the non-zero weights (i, b_i).
        error: the non-zero weights (i, b_i − b̂_i), or None.

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
    stages: tuple[Terms, ...] = field(init=False)
    solution: Terms = field(init=False)
    error: Terms | None = field(init=False)

    def __post_init__(self) -> None:
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
        difference = None if self.b_hat is None else [x - y for x, y in zip(self.b, self.b_hat, strict=True)]
        object.__setattr__(self, "stages", tuple(map(_terms, self.a)))
        object.__setattr__(self, "solution", _terms(self.b))
        object.__setattr__(self, "error", None if difference is None else _terms(difference))


def _terms(row: Sequence[float]) -> Terms:
    """The non-zero entries of a row with their places."""
    return tuple((j, weight) for j, weight in enumerate(row) if weight)


EULER = Tableau(c=(0.0,), a=((),), b=(1.0,))
MIDPOINT = Tableau(c=(0.0, 1 / 2), a=((), (1 / 2,)), b=(0.0, 1.0), b_hat=(1.0, 0.0))
HEUN = Tableau(c=(0.0, 1.0), a=((), (1.0,)), b=(1 / 2, 1 / 2), b_hat=(1.0, 0.0))
RK4 = Tableau(
    c=(0.0, 1 / 2, 1 / 2, 1.0),
    a=((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
    b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
)
