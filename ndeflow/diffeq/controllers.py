"""Controllers: how large the steps of a solve are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from ndeflow.diffeq.solvers.base import Step

_MOST = 2**62  # a count beyond every budget, where the quotient would overflow


class Controller(ABC):
    """Decides how large the steps of a solve are."""

    @abstractmethod
    def cuts(self, t0: float, t1: float, resolution: float) -> int:
        """Return into how many equal steps the span between two neighboring stops is cut.

        Args:
            t0: a stop of the solve.
            t1: the next one, before or after it.
            resolution: how far the stops may lie from what was meant: the spacing of numbers near them
                in the dtype in which the output times were given.
        """

    @abstractmethod
    def error(self, y0: Tensor, step: Step) -> Tensor | None:
        """Return the scaled error norm of a step from y0, shape (B,), differentiable, or None without tolerances."""


@dataclass(frozen=True)
class Constant(Controller):
    r"""Equal steps between stops, not longer than dt.

    .. math:: n = \bigl\lceil (|t_1 - t_0| - 2\rho)/\Delta t \cdot (1 - 10^{-9}) \bigr\rceil, \qquad
              t_i = t_0 + (t_1 - t_0)\, i/n

    with ρ the resolution of the stops, so that n steps of 1/n cover [0, 1] whatever the rounding, in
    float32 too. Every output time is reached by a step; nothing is interpolated.

    Args:
        dt: longest step, > 0, in units of t; for a solve backward in time as well. None takes one step
            per interval of the output times, which is how a given grid is integrated.

    Raises:
        TypeError: `dt` is not a number.
        ValueError: `dt` is not positive and finite.

    >>> Constant(0.1).cuts(0.0, 1.0, resolution=0.0), Constant().cuts(0.0, 1.0, resolution=0.0)
    (10, 1)
    """

    dt: float | None = None

    def __post_init__(self) -> None:
        if self.dt is None:
            return
        if isinstance(self.dt, bool) or not isinstance(self.dt, int | float):
            raise TypeError(f"Constant takes dt as a number or None, got {type(self.dt).__name__} {self.dt!r}")
        if not (math.isfinite(self.dt) and self.dt > 0):
            raise ValueError(
                f"Constant takes a finite dt > 0, got {self.dt}; the direction of time comes from the order of ts, and "
                "None takes one step per interval of ts"
            )

    def cuts(self, t0: float, t1: float, resolution: float) -> int:
        """Return n of the equation above, at least 1."""
        if self.dt is None:
            return 1
        return max(1, math.ceil(min((abs(t1 - t0) - 2 * resolution) / self.dt * (1 - 1e-9), _MOST)))

    def error(self, y0: Tensor, step: Step) -> None:
        """Return None: there is no tolerance to measure an error by."""
