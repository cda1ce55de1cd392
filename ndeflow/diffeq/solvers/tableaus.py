"""Butcher tableaus of explicit Runge–Kutta methods, as data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
        ValueError: a length or a sum is wrong, or weights say nothing.

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
        if self.b_hat == self.b:
            raise ValueError("b_hat of a Tableau equals b: leave it out, or every error is estimated as 0")
        for row in self.d or ():
            if len(row) != stages or not any(row):
                raise ValueError(f"each row d of a Tableau has {stages} weights, not all zero, got {row}")
        for i, column in enumerate(zip(*self.d, strict=True) if self.d else ()):
            if not math.isclose(math.fsum(column), self.b[i], abs_tol=1e-12):
                raise ValueError(
                    f"column {i} of d of a Tableau sums to {math.fsum(column)}, b is {self.b[i]}: they must be equal"
                )


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


def _through(middle: tuple[float, ...], b: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    """Rows of the quartic through both ends, their fields k₀ and k₁, and y₀ + M at θ = ½, where M = Σ mᵢ kᵢ.

    With Δy = Σ bᵢ kᵢ it is y₀ + θ k₀ + θ² (16 M − 5 Δy − 4 k₀ + k₁) + θ³ (14 Δy − 32 M + 5 k₀ − 3 k₁)
    + θ⁴ (16 M − 8 Δy − 2 k₀ + 2 k₁).
    """
    stages = len(b)
    columns = [(m, w, float(i == 0), float(i == stages - 1)) for i, (m, w) in enumerate(zip(middle, b, strict=True))]
    return (
        tuple(s for _, _, s, _ in columns),
        tuple(16 * m - 5 * w - 4 * s + e for m, w, s, e in columns),
        tuple(14 * w - 32 * m + 5 * s - 3 * e for m, w, s, e in columns),
        tuple(16 * m - 8 * w - 2 * s + 2 * e for m, w, s, e in columns),
    )


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
RALSTON = Tableau(c=(0.0, 2 / 3), a=((), (2 / 3,)), b=(1 / 4, 3 / 4), b_hat=(1.0, 0.0))
RK38 = Tableau(
    c=(0.0, 1 / 3, 2 / 3, 1.0),
    a=((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
    b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
)

_BOSH3 = (2 / 9, 1 / 3, 4 / 9)
BOSH3 = Tableau(
    c=(0.0, 1 / 2, 3 / 4, 1.0),
    a=((), (1 / 2,), (0.0, 3 / 4), _BOSH3),
    b=(*_BOSH3, 0.0),
    b_hat=(7 / 24, 1 / 4, 1 / 3, 1 / 8),
)

_DOPRI5 = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
_DOPRI5_MIDDLE = (
    6025192743 / 60171106304,
    0.0,
    51252292925 / 130801643196,
    -2691868925 / 90256659456,
    187940372067 / 3189068634112,
    -1776094331 / 39487288512,
    11237099 / 470086768,
)
DOPRI5 = Tableau(
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        _DOPRI5,
    ),
    b=(*_DOPRI5, 0.0),
    b_hat=(5179 / 57600, 0.0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40),
    d=_through(_DOPRI5_MIDDLE, (*_DOPRI5, 0.0)),
)
DOPRI5_SHAMPINE = replace(
    DOPRI5, b_hat=(1951 / 21600, 0.0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60)
)

_TSIT5 = (
    0.09646076681806523,
    0.01,
    0.4798896504144996,
    1.379008574103742,
    -3.290069515436081,
    2.324710524099774,
)
TSIT5 = Tableau(
    c=(0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
    a=(
        (),
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
        _TSIT5,
    ),
    b=(*_TSIT5, 0.0),
    b_hat=(
        0.09468075576583945,
        0.009183565540343254,
        0.4877705284247616,
        1.234297566930479,
        -2.7077123499835256,
        1.866628418170587,
        1 / 66,
    ),
    d=(
        (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        (
            -2.7637061972748259,
            0.1317,
            3.9302962368947515,
            -12.411077166933677,
            37.509313416511039,
            -27.896526289197288,
            1.5,
        ),
        (
            2.9132554618219127,
            -0.2234,
            -5.9410338721315047,
            30.338188630282322,
            -88.178904894766401,
            65.091894674793672,
            -4.0,
        ),
        (
            -1.0530884977290216,
            0.1017,
            2.4906272856512528,
            -16.548102889244903,
            47.379521962819281,
            -34.87065786149661,
            2.5,
        ),
    ),
)

_DOPRI8 = (
    14005451 / 335480064,
    0.0,
    0.0,
    0.0,
    0.0,
    -59238493 / 1068277825,
    181606767 / 758867731,
    561292985 / 797845732,
    -1041891430 / 1371343529,
    760417239 / 1151165299,
    118820643 / 751138087,
    -528747749 / 2220607170,
    1 / 4,
)
DOPRI8 = Tableau(
    c=(
        0.0,
        1 / 18,
        1 / 12,
        1 / 8,
        5 / 16,
        3 / 8,
        59 / 400,
        93 / 200,
        5490023248 / 9719169821,
        13 / 20,
        1201146811 / 1299019798,
        1.0,
        1.0,
        1.0,
    ),
    a=(
        (),
        (1 / 18,),
        (1 / 48, 1 / 16),
        (1 / 32, 0.0, 3 / 32),
        (5 / 16, 0.0, -75 / 64, 75 / 64),
        (3 / 80, 0.0, 0.0, 3 / 16, 3 / 20),
        (29443841 / 614563906, 0.0, 0.0, 77736538 / 692538347, -28693883 / 1125000000, 23124283 / 1800000000),
        (
            16016141 / 946692911,
            0.0,
            0.0,
            61564180 / 158732637,
            22789713 / 633445777,
            545815736 / 2771057229,
            -180193667 / 1043307555,
        ),
        (
            39632708 / 573591083,
            0.0,
            0.0,
            -433636366 / 683701615,
            -421739975 / 2616292301,
            100302831 / 723423059,
            790204164 / 839813087,
            800635310 / 3783071287,
        ),
        (
            246121993 / 1340847787,
            0.0,
            0.0,
            -37695042795 / 15268766246,
            -309121744 / 1061227803,
            -12992083 / 490766935,
            6005943493 / 2108947869,
            393006217 / 1396673457,
            123872331 / 1001029789,
        ),
        (
            -1028468189 / 846180014,
            0.0,
            0.0,
            8478235783 / 508512852,
            1311729495 / 1432422823,
            -10304129995 / 1701304382,
            -48777925059 / 3047939560,
            15336726248 / 1032824649,
            -45442868181 / 3398467696,
            3065993473 / 597172653,
        ),
        (
            185892177 / 718116043,
            0.0,
            0.0,
            -3185094517 / 667107341,
            -477755414 / 1098053517,
            -703635378 / 230739211,
            5731566787 / 1027545527,
            5232866602 / 850066563,
            -4093664535 / 808688257,
            3962137247 / 1805957418,
            65686358 / 487910083,
        ),
        (
            403863854 / 491063109,
            0.0,
            0.0,
            -5068492393 / 434740067,
            -411421997 / 543043805,
            652783627 / 914296604,
            11173962825 / 925320556,
            -13158990841 / 6184727034,
            3936647629 / 1978049680,
            -160528059 / 685178525,
            248638103 / 1413531060,
            0.0,
        ),
        _DOPRI8,
    ),
    b=(*_DOPRI8, 0.0),
    b_hat=(
        13451932 / 455176623,
        0.0,
        0.0,
        0.0,
        0.0,
        -808719846 / 976000145,
        1757004468 / 5645159321,
        656045339 / 265891186,
        -3867574721 / 1518517206,
        465885868 / 322736535,
        53011238 / 667516719,
        2 / 45,
        0.0,
        0.0,
    ),
)
