"""Explicit Runge–Kutta methods: one step function over the data of a tableau."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ndeflow.diffeq.equations import Equation, Field, real_dtype
from ndeflow.diffeq.solvers import tableaus
from ndeflow.diffeq.solvers.base import Solver, Step
from ndeflow.diffeq.solvers.tableaus import Tableau, Terms
from ndeflow.tensors import rms


class RungeKutta(Solver):
    r"""An explicit Runge–Kutta method; a subclass names its tableau and states the facts of `Solver`.

    .. math:: k_i = f\bigl(t_0 + c_i\,\Delta t,\; y_0 + \textstyle\sum_{j<i} a_{ij} k_j\bigr)\,\Delta u, \qquad
              y_1 = y_0 + \textstyle\sum_i b_i k_i, \qquad
              e = \textstyle\sum_i (b_i - \hat b_i)\, k_i

    The field is multiplied by the increment once per stage, and the products are combined with
    constants of the tableau, because that is the cheapest form in eager mode, serves every equation
    and turns into constants of a compiled graph.
    """

    _tableau: ClassVar[Tableau]

    def __init_subclass__(cls, tableau: Tableau) -> None:
        """Keep the tableau of `class Method(RungeKutta, tableau=…)`, and read off what a step costs and adds up."""
        cls._tableau = tableau
        cls.evaluations = len(tableau.c) - 1
        cls.weights = tableau.solution

    @property
    def tableau(self) -> Tableau:
        """The coefficients; an option of a method may choose other weights of the error, nothing else."""
        return self._tableau

    def init(self, eq: Equation, t0: Tensor, y0: Tensor) -> Field:
        """Return the field at the start."""
        return eq.field(t0, y0)

    def step(self, eq: Equation, t0: Tensor, dt: Tensor, y0: Tensor, state: Field) -> Step:
        """Evaluate the stages in turn and combine them."""
        tableau, dtype = self.tableau, real_dtype(y0)
        t1 = t0 + dt
        du = eq.increment(t0, t1).to(dtype)
        fields, k, g = [state], [eq.apply_field(state, du)], y0
        if len(tableau.c) > 1:
            times = _stage_times(tableau.c, t0, t1, dt, dtype)
            for t, terms in zip(times[1:], tableau.stages[1:], strict=True):
                g = _add(y0, terms, k)
                fields.append(eq.field(t, g))
                k.append(eq.apply_field(fields[-1], du))
        y1 = g if tableau.fsal else _add(y0, tableau.solution, k)
        error = None if tableau.error is None else _sum(tableau.error, k)
        return Step(y1, error, fields[-1] if tableau.fsal else None, tuple(k), tuple(fields))

    def finish(self, eq: Equation, t0: Tensor, dt: Tensor, y0: Tensor, step: Step) -> Step:
        """Evaluate the field at the end, if the interpolant needs it and the step has not."""
        tableau = self.tableau
        if max(i for row in tableau.interpolant for i, _ in row) < len(step.stages):
            return step
        t1 = t0 + dt
        end = eq.field(t1.to(real_dtype(y0)), step.y1)
        product = eq.apply_field(end, eq.increment(t0, t1).to(real_dtype(y0)))
        return step._replace(state=end, stages=(*step.stages, product), fields=(*step.fields, end))

    def polynomial(self, step: Step) -> tuple[Tensor, ...]:
        """Combine the stages with the weights of the interpolant."""
        return tuple(_sum(terms, step.stages) for terms in self.tableau.interpolant)

    def stiffness(self, dt: Tensor, y0: Tensor, step: Step) -> Tensor | None:
        r"""Compare two stages i, j at the same time.

        .. math:: \hat\rho = \|k_j - k_i\| \big/ \bigl(|\Delta t|\,\|g_j - g_i\|\bigr)

        with g their states: for a linear field the norm of ∂f/∂y along the difference. 0 where they are equal.

        Reference:
            Hairer, Wanner, "Solving Ordinary Differential Equations II", 1996, section IV.2, equation 2.27.
        """
        if self.tableau.twins is None:
            return None
        i, j = self.tableau.twins
        k, rows = step.stages, self.tableau.stages
        moved = _add(y0, rows[j], k) - _add(y0, rows[i], k)  # rounded as the field saw them: else noise over nothing
        change, distance = rms(k[j] - k[i]), rms(moved)
        size = distance * dt.abs().to(distance.dtype)
        still = size == 0
        return torch.where(still, 0.0, change / torch.where(still, 1.0, size)) / self.stability_size


def _add(y: Tensor, terms: Terms, k: Sequence[Tensor]) -> Tensor:
    """Return y + Σ wᵢ kᵢ."""
    for i, weight in terms:
        y = torch.add(y, k[i], alpha=weight)
    return y


def _sum(terms: Terms, k: Sequence[Tensor]) -> Tensor:
    """Return Σ wᵢ kᵢ."""
    first, weight = terms[0]
    return _add(k[first] * weight, terms[1:], k)


def _stage_times(c: tuple[float, ...], t0: Tensor, t1: Tensor, dt: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
    """Return t0 + cᵢ Δt, computed in float64 and cast after the sum, one tensor of the shape of t0 per stage."""
    if set(c) <= {0.0, 1.0}:  # both ends are known
        return [(t1 if node else t0).to(dtype) for node in c]
    nodes = _new_nodes(c, dt.device) if torch.compiler.is_compiling() else _nodes(c, dt.device)
    if dt.ndim:
        nodes = nodes.unsqueeze(-1)
    return torch.addcmul(t0, nodes, dt).to(dtype).unbind()


def _new_nodes(c: tuple[float, ...], device: torch.device) -> Tensor:
    """Return the nodes as a float64 tensor."""
    return torch.tensor(c, dtype=torch.float64, device=device)


@lru_cache(maxsize=256)
def _nodes(c: tuple[float, ...], device: torch.device) -> Tensor:
    """Return the nodes, copied once per device: a copy per step would wait for the device."""
    with torch.inference_mode(False):  # else a cache filled while sampling could not be used in training
        return _new_nodes(c, device)


@dataclass(frozen=True)
class Euler(RungeKutta, tableau=tableaus.EULER):
    r"""Euler's method.

    .. math:: y_1 = y_0 + f(t_0, y_0)\,\Delta t

    >>> from ndeflow.diffeq import ODE
    >>> t0, dt = torch.tensor(0.0, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    >>> eq, y0, euler = ODE(lambda t, y: -y), torch.ones(1, 1), Euler()
    >>> euler.step(eq, t0, dt, y0, euler.init(eq, t0, y0)).y1
    tensor([[0.9000]])
    """

    order: ClassVar[float] = 1
    error_order: ClassVar[float | None] = None
    interpolation_order: ClassVar[int] = 1
    stability_size: ClassVar[float] = 2.0


@dataclass(frozen=True)
class Midpoint(RungeKutta, tableau=tableaus.MIDPOINT):
    r"""The explicit midpoint rule with an embedded Euler step.

    .. math:: y_1 = y_0 + f\bigl(t_0 + \tfrac12\Delta t,\; y_0 + \tfrac12 f(t_0, y_0)\,\Delta t\bigr)\,\Delta t

    A step never evaluates the field at its end.
    """

    order: ClassVar[float] = 2
    error_order: ClassVar[float | None] = 1
    interpolation_order: ClassVar[int] = 3
    stability_size: ClassVar[float] = 2.0


@dataclass(frozen=True)
class Heun(RungeKutta, tableau=tableaus.HEUN):
    r"""Heun's method (explicit trapezoidal rule) with an embedded Euler step.

    .. math:: \hat y_1 = y_0 + f(t_0, y_0)\,\Delta t, \qquad
              y_1 = y_0 + \tfrac12\bigl(f(t_0, y_0) + f(t_1, \hat y_1)\bigr)\,\Delta t, \qquad
              e = y_1 - \hat y_1
    """

    order: ClassVar[float] = 2
    error_order: ClassVar[float | None] = 1
    interpolation_order: ClassVar[int] = 3
    stability_size: ClassVar[float] = 2.0


@dataclass(frozen=True)
class Ralston(RungeKutta, tableau=tableaus.RALSTON):
    r"""Ralston's method with an embedded Euler step: of the methods of two stages, that of the least error bound.

    .. math:: y_1 = y_0 + \tfrac14 f(t_0, y_0)\,\Delta t
              + \tfrac34 f\bigl(t_0 + \tfrac23\Delta t,\; y_0 + \tfrac23 f(t_0, y_0)\,\Delta t\bigr)\,\Delta t

    Reference:
        Ralston, "Runge–Kutta methods with minimum error bounds", 1962.
    """

    order: ClassVar[float] = 2
    error_order: ClassVar[float | None] = 1
    interpolation_order: ClassVar[int] = 3
    stability_size: ClassVar[float] = 2.0


@dataclass(frozen=True)
class RK4(RungeKutta, tableau=tableaus.RK4):
    r"""The classical Runge–Kutta method.

    .. math:: k_1 &= f(t_0, y_0)\,\Delta t, &
              k_2 &= f(t_0 + \tfrac12\Delta t,\, y_0 + \tfrac12 k_1)\,\Delta t, \\
              k_3 &= f(t_0 + \tfrac12\Delta t,\, y_0 + \tfrac12 k_2)\,\Delta t, &
              k_4 &= f(t_0 + \Delta t,\, y_0 + k_3)\,\Delta t, \\
              y_1 &= y_0 + \tfrac16 (k_1 + 2 k_2 + 2 k_3 + k_4)

    The stability size is the real root of 1 + z + z²/2 + z³/6 + z⁴/24 = 1.
    """

    order: ClassVar[float] = 4
    error_order: ClassVar[float | None] = None
    interpolation_order: ClassVar[int] = 3
    stability_size: ClassVar[float] = 2.785293563405282


@dataclass(frozen=True)
class RK38(RungeKutta, tableau=tableaus.RK38):
    r"""The 3/8 rule of Kutta.

    .. math:: k_1 &= f(t_0, y_0)\,\Delta t, &
              k_2 &= f(t_0 + \tfrac13\Delta t,\, y_0 + \tfrac13 k_1)\,\Delta t, \\
              k_3 &= f(t_0 + \tfrac23\Delta t,\, y_0 - \tfrac13 k_1 + k_2)\,\Delta t, &
              k_4 &= f(t_0 + \Delta t,\, y_0 + k_1 - k_2 + k_3)\,\Delta t, \\
              y_1 &= y_0 + \tfrac18 (k_1 + 3 k_2 + 3 k_3 + k_4)

    Reference:
        Kutta, "Beitrag zur näherungsweisen Integration totaler Differentialgleichungen", 1901.
    """

    order: ClassVar[float] = 4
    error_order: ClassVar[float | None] = None
    interpolation_order: ClassVar[int] = 3
    stability_size: ClassVar[float] = 2.785293563405282


@dataclass(frozen=True)
class Bosh3(RungeKutta, tableau=tableaus.BOSH3):
    r"""The pair of orders 3(2) of Bogacki and Shampine: three field calls per step, for loose tolerances.

    .. math:: y_1 = y_0 + \tfrac19 (2 k_1 + 3 k_2 + 4 k_3), \qquad
              \hat y_1 = y_0 + \tfrac1{24} (7 k_1 + 6 k_2 + 8 k_3 + 3 k_4)

    with k₂ and k₃ at ½ and ¾ of the step and k₄ at its end, where the next step begins.

    Reference:
        Bogacki, Shampine, "A 3(2) pair of Runge–Kutta formulas", 1989.
    """

    order: ClassVar[float] = 3
    error_order: ClassVar[float | None] = 2
    interpolation_order: ClassVar[int] = 3
    stability_size: ClassVar[float] = 2.5127453266183286


@dataclass(frozen=True)
class Dopri5(RungeKutta, tableau=tableaus.DOPRI5):
    """The pair of orders 5(4) of Dormand and Prince: six field calls per step, the seventh begins the next one.

    The solution is y₁ = y₀ + Σ bᵢ kᵢ of order 5, the error estimate its difference from an embedded
    formula of order 4. Between the ends it is the quartic polynomial through both ends, their fields
    and a formula of order 4 in the middle of the step.

    Args:
        shampine: which embedded formula: that of Dormand and Prince (False), as in SciPy and in Hairer's code, or that
            of Shampine (True), as in torchdiffeq, whose error estimate is ⅔ of the other. The solution of a step is
            the same, the steps that a controller chooses are not.

    Raises:
        TypeError: `shampine` is not a bool.

    References:
        Dormand, Prince, "A family of embedded Runge–Kutta formulae", 1980.
        Shampine, "Some practical Runge–Kutta formulas", 1986 (the middle of the step; the other embedded formula).
        Hairer, Nørsett, Wanner, "Solving Ordinary Differential Equations I", 1993, section II.5, table 5.2.
    """

    shampine: bool = False
    order: ClassVar[float] = 5
    error_order: ClassVar[float | None] = 4
    interpolation_order: ClassVar[int] = 4
    stability_size: ClassVar[float] = 3.3065678926349465

    def __post_init__(self) -> None:
        if not isinstance(self.shampine, bool):
            raise TypeError(f"Dopri5 takes shampine=True or False, got {self.shampine!r}")

    @property
    def tableau(self) -> Tableau:
        """The coefficients, with the embedded formula chosen."""
        return tableaus.DOPRI5_SHAMPINE if self.shampine else self._tableau


@dataclass(frozen=True)
class Tsit5(RungeKutta, tableau=tableaus.TSIT5):
    """The pair of orders 5(4) of Tsitouras: as many field calls as `Dopri5`, smaller errors for most problems.

    The solution is y₁ = y₀ + Σ bᵢ kᵢ of order 5, the error estimate its difference from an embedded
    formula of order 4. Between the ends the stages themselves give a quartic of order 4, y₀ + Σ bᵢ(θ) kᵢ
    with bᵢ(1) = bᵢ.

    Reference:
        Tsitouras, "Runge–Kutta pairs of order 5(4) satisfying only the first column simplifying assumption", 2011.
    """

    order: ClassVar[float] = 5
    error_order: ClassVar[float | None] = 4
    interpolation_order: ClassVar[int] = 4
    stability_size: ClassVar[float] = 3.506846993804948


@dataclass(frozen=True)
class Dopri8(RungeKutta, tableau=tableaus.DOPRI8):
    """The pair of orders 8(7) of Prince and Dormand: thirteen field calls per step, for tight tolerances.

    The solution is y₁ = y₀ + Σ bᵢ kᵢ of order 8 by thirteen stages, the error estimate its difference from
    an embedded formula of order 7; a fourteenth stage at the end of the step begins the next one.

    Between the ends it is only the cubic of Hermite, of order 3: an output inside a step loses the
    accuracy that the steps have. Outputs that steps land on are exact to order 8.

    Reference:
        Prince, Dormand, "High order embedded Runge–Kutta formulae", 1981 (their formula RK8(7)13M).
    """

    order: ClassVar[float] = 8
    error_order: ClassVar[float | None] = 7
    interpolation_order: ClassVar[int] = 3
    stability_size: ClassVar[float] = 5.166633619968107
