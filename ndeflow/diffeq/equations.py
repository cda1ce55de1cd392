"""Differential equations as the product of a field and an increment: dy = f(t, y) du(t)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ndeflow.tensors import Packing, expand_time

Field: TypeAlias = Any
"""What `Equation.field` returns: read by `Equation.apply_field` alone, never by a solver."""

States: TypeAlias = Any
"""A tensor (B, *), or a tuple, list or dict of such."""

Increment: TypeAlias = Any
"""What `Equation.increment` returns: read by `apply_field`; it has a method `to(dtype)`, as a tensor has."""


class Equation(nn.Module, ABC):
    r"""A differential equation dy = f(t, y) du(t), the only thing a solver ever sees.

    A solver combines products `apply_field(field(t, y), increment(t0, t1))`; for an ordinary equation
    du is dt, for a stochastic one it holds dt and the increment of the Brownian path. So one step rule
    serves both.

    Attributes:
        args: what each sample's field depends on beside t and y, shape (B, *), or None; a subclass
            sets it. Gradients reach it under every gradient method; a tensor that the field merely
            closes over they reach only where autograd sees the whole solve.
        jumps: times at which the field jumps; steps end before and begin behind them.
    """

    args: Tensor | None
    jumps: tuple[float, ...] = ()

    @abstractmethod
    def field(self, t: Tensor, y: Tensor) -> Field:
        """Evaluate f(t, y), one function evaluation.

        Args:
            t: shape () or (B,); any real dtype, handed on in the state's.
            y: state, shape (B, *).

        Returns:
            f(t, y), in whatever form `apply_field` takes.
        """

    @abstractmethod
    def increment(self, t0: Tensor, t1: Tensor) -> Increment:
        """Return Δu = u(t1) − u(t0).

        Args:
            t0: start of a step, float64, shape () or (B,).
            t1: its end, of the same shape.

        Returns:
            Δu, with a method `to(dtype)`: a step converts it once, after the subtraction.
        """

    @abstractmethod
    def apply_field(self, f: Field, du: Increment) -> Tensor:
        """Return the product f Δu, shape (B, *): what a step adds to the state."""

    @abstractmethod
    def with_args(self, args: Tensor | None) -> Equation:
        """Return the same equation with other `args`."""

    def take(self, rows: Tensor) -> Equation:
        """Return the same equation for some samples of the batch, `rows` int64 of shape (n,)."""
        return self if self.args is None else self.with_args(self.args[rows])


class ODE(Equation):
    r"""An ordinary differential equation.

    .. math:: y' = f(t, y) \quad\text{or}\quad y' = f(t, y, a)

    Args:
        f: the field, a module or a function `f(t, y)`, or `f(t, y, args)` if `args` is given; t has
            shape () (one time for the batch) or (B,) and the state's real dtype, y shape (B, *), the
            result the shape of y. Under autocast it may return a lower precision, which is cast up.
        args: per-sample inputs of the field, shape (B, *), any dtype; differentiable.
        jumps: times at which f jumps, as a control that is switched does; steps do not cross them.

    Raises:
        TypeError: `f` is not callable, or `args` is not a tensor with a batch axis.

    >>> decay = ODE(lambda t, y, rate: -rate * y, args=torch.tensor([[1.0], [2.0]]))
    >>> decay.field(torch.tensor(0.0), torch.ones(2, 1)).squeeze(1)
    tensor([-1., -2.])
    """

    def __init__(self, f: Callable[..., States], args: Tensor | None = None, jumps: Sequence[float] = ()) -> None:
        super().__init__()
        if not callable(f):
            raise TypeError(f"ODE takes a module or a function f(t, y) as field, got {type(f).__name__} {f!r}")
        if args is not None and not (isinstance(args, Tensor) and args.ndim):
            given = tuple(args.shape) if isinstance(args, Tensor) else type(args).__name__
            raise TypeError(
                f"args must be a tensor of shape (B, *), one row per sample, got {given}; what is the same for "
                "all samples belongs into the field"
            )
        if not all(isinstance(t, int | float) and math.isfinite(t) for t in jumps):
            raise TypeError(f"jumps must be finite numbers, the times at which the field jumps, got {jumps!r}")
        self.f = f
        self.args = args
        self.jumps = tuple(float(t) for t in jumps)
        self.packing: Packing | None = None

    def field(self, t: Tensor, y: Tensor) -> Tensor:
        """Return dy/dt = f(t, y), shape and dtype of y; refuse a field of another shape or of higher precision."""
        real = real_dtype(y)
        if t.dtype != real:  # a conversion that does nothing costs as much as an addition
            t = t.to(real)
        packing = self.packing
        state = y if packing is None else packing.unpack(y)
        f = self.f(t, state) if self.args is None else self.f(t, state, self.args)
        if packing is not None:
            f = packing.pack(f)
        if not isinstance(f, Tensor) or f.shape != y.shape or f.dtype != y.dtype:
            return _conform(f, y)
        return f

    def increment(self, t0: Tensor, t1: Tensor) -> Tensor:
        """Return Δt = t1 − t0, float64, shape () or (B,)."""
        return t1 - t0

    def apply_field(self, f: Tensor, du: Tensor) -> Tensor:
        """Return f·Δt, dtype of f."""
        if du.dtype != f.dtype:  # a (B,) float64 increment would promote the state
            du = du.to(f.dtype)
        return f * expand_time(du, f)

    def with_args(self, args: Tensor | None) -> ODE:
        """Return the equation with the same field and other `args`."""
        return self._like(args, self.packing)

    def packed(self, packing: Packing) -> ODE:
        """Return the equation for states packed into one tensor; the field goes on seeing their leaves."""
        return self._like(self.args, packing)

    def _like(self, args: Tensor | None, packing: Packing | None) -> ODE:
        """A copy that shares the field."""
        other = ODE(self.f, args, self.jumps)
        other.packing = packing
        return other


def real_dtype(y: Tensor) -> torch.dtype:
    """Return the dtype of times and step sizes beside a real or complex state."""
    return y.real.dtype if y.is_complex() else y.dtype  # torch.compile does not know dtype.to_real


def _conform(f: Tensor, y: Tensor) -> Tensor:
    """Cast a field of lower precision up to the state's dtype; refuse everything that would spread or promote."""
    if not isinstance(f, Tensor):
        raise TypeError(f"the field must return a tensor of shape {tuple(y.shape)}, got {type(f).__name__}")
    if f.shape != y.shape:
        raise ValueError(
            f"the field returned shape {tuple(f.shape)} for a state of shape {tuple(y.shape)}: dy/dt must have the "
            "shape of y, or broadcasting would couple samples or components"
        )
    if torch.promote_types(f.dtype, y.dtype) != y.dtype:
        raise TypeError(
            f"the field returned {f.dtype} for a state of {y.dtype}: give y0 the dtype {f.dtype}, or the field the "
            "state's (t comes in the state's dtype; a constant of the field may not)"
        )
    return f.to(y.dtype)
