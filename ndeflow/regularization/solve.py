"""A solve with its regularizers: what they need is kept, what they integrate is added to the state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ndeflow.diffeq import ODE, PID, Equation, Integrator, Solution
from ndeflow.diffeq.controllers import Norm
from ndeflow.diffeq.equations import States, real_dtype
from ndeflow.regularization.steer import Steer
from ndeflow.regularization.terms import DynamicsRegularizer, Regularizer, SolveRegularizer
from ndeflow.tensors import Packing, rms


class Penalty(NamedTuple):
    """A regularizer's term: its raw value, a scalar, and the weight it has now."""

    raw: Tensor
    weight: float

    @property
    def term(self) -> Tensor:
        """What is added to the loss."""
        return self.weight * self.raw


def regularized_solve(
    integrator: Integrator,
    eq: Equation,
    y0: States,
    ts: Tensor | Sequence[float],
    regularizers: Mapping[str, Regularizer | Steer],
    keys: Tensor,
    step: int = 0,
    **options: Any,
) -> tuple[Solution, dict[str, Penalty]]:
    """Solve, and return the terms of the regularizers by their names.

    Args:
        integrator: solves; what the regularizers need is kept besides.
        eq: the equation.
        y0: states, as for the integrator.
        ts: output times, as for the integrator.
        regularizers: by name; at most one `Steer` among them.
        keys: one per sample, int64 (B,): all that is drawn is a function of them.
        step: optimizer steps done, for weights with a schedule.
        options: `mask`, `dense` and `record` of the integrator.

    Returns:
        The solution of `eq`, and the terms. Terms of weight 0 are not computed and not returned.

    Raises:
        ValueError: an integrator cannot give what a regularizer needs.
    """
    steers = [r for r in regularizers.values() if isinstance(r, Steer)]
    if steers:
        ts = steers[0].times(torch.as_tensor(ts, dtype=None if isinstance(ts, Tensor) else torch.float64), keys)
    weights = {n: r.weight_at(step) for n, r in regularizers.items() if isinstance(r, Regularizer)}
    active = {n: r for n, r in regularizers.items() if weights.get(n)}
    judges = {n: r for n, r in active.items() if isinstance(r, SolveRegularizer)}
    for judge in judges.values():
        judge.check(integrator)
    needs = {judge.needs for judge in judges.values()}
    options["record"] = bool(options.get("record")) or "steps" in needs
    options["dense"] = bool(options.get("dense")) or "dense" in needs
    integrands = {n: r for n, r in active.items() if isinstance(r, DynamicsRegularizer)}
    if integrands:
        solution, sums = _augmented(integrator, eq, y0, ts, list(integrands.values()), keys, options)
    else:
        solution, sums = integrator(eq, y0, ts, **options), ()
    raw = dict(zip(integrands, sums, strict=True)) | {
        n: judge(integrator, eq, solution, keys) for n, judge in judges.items()
    }
    return solution, {n: Penalty(raw[n], weights[n]) for n in active}


def _augmented(
    integrator: Integrator,
    eq: Equation,
    y0: States,
    ts: Tensor | Sequence[float],
    integrands: Sequence[DynamicsRegularizer],
    keys: Tensor,
    options: dict[str, Any],
) -> tuple[Solution, Sequence[Tensor]]:
    """Solve with integrals as more entries of the state, which the error norm leaves out."""
    if not isinstance(eq, ODE):
        raise ValueError(f"{type(integrands[0]).__name__} integrates along an ODE, got {type(eq).__name__}")
    packing = None
    if not isinstance(y0, Tensor):
        packing = Packing(y0)
        y0, eq = packing.pack(y0), eq.packed(packing)
    part = _Part(tuple(y0.shape[1:]), packing)
    start = torch.cat([y0.flatten(1), y0.new_zeros(len(y0), len(integrands))], dim=1)
    controller = integrator.controller.check(integrator.solver, real_dtype(y0), packing)
    if isinstance(controller, PID):
        controller = replace(controller, norm=part.norm(controller.norm))
    augmented = Augmented(eq, part.shape, integrands, keys)
    solution = replace(integrator, controller=controller)(augmented, start, ts, **options)
    integrals = solution.ys[:, -1, part.size :].real if y0.is_complex() else solution.ys[:, -1, part.size :]
    stripped = solution._replace(ys=part.unpack(solution.ys), packing=part)
    return stripped, integrals.mean(0).unbind()


class Augmented(Equation):
    r"""A state with integrals along its trajectory, as one tensor (B, n + m).

    .. math:: y' = f(t, y), \qquad q_i' = g_i(t, y)

    Args:
        eq: the equation of y.
        shape: of one sample's y, of n entries.
        integrands: m of them.
        keys: one per sample, int64 (B,).
    """

    def __init__(
        self, eq: ODE, shape: tuple[int, ...], integrands: Sequence[DynamicsRegularizer], keys: Tensor
    ) -> None:
        super().__init__()
        self.eq, self.shape, self.integrands, self.keys = eq, shape, integrands, keys
        self.args, self.jumps = eq.args, eq.jumps

    def field(self, t: Tensor, y: Tensor) -> Tensor:
        """Return f and the integrands, (B, n + m)."""
        real = real_dtype(y)
        t = t if t.dtype == real else t.to(real)
        state = y[:, : math.prod(self.shape)].reshape(len(y), *self.shape)
        value = self.eq.field(t, state)
        rates = [term.integrand(self.eq.field, t, state, value, self.keys) for term in self.integrands]
        return torch.cat([value.flatten(1), torch.stack(rates, dim=1).to(value.dtype)], dim=1)

    def increment(self, t0: Tensor, t1: Tensor) -> Tensor:
        """Return Δt."""
        return self.eq.increment(t0, t1)

    def apply_field(self, f: Tensor, du: Tensor) -> Tensor:
        """Return f·Δt."""
        return self.eq.apply_field(f, du)

    def with_args(self, args: Tensor | None) -> Augmented:
        """Return the same with other `args`."""
        return Augmented(self.eq.with_args(args), self.shape, self.integrands, self.keys)

    def take(self, rows: Tensor) -> Augmented:
        """Return the same for some samples, with their keys."""
        eq = self.eq if self.args is None else self.eq.with_args(self.args[rows])
        return Augmented(eq, self.shape, self.integrands, self.keys[rows])


class _Part:
    """The state within a state with integrals.

    Args:
        shape: of one sample's state.
        packing: of its leaves, if it has several.
    """

    def __init__(self, shape: tuple[int, ...], packing: Packing | None) -> None:
        self.shape, self.packing, self.size = shape, packing, math.prod(shape)

    def unpack(self, packed: Tensor) -> States:
        """Return the state of (…, n + m)."""
        y = packed[..., : self.size].reshape(*packed.shape[:-1], *self.shape)
        return y if self.packing is None else self.packing.unpack(y)

    def norm(self, norm: Any) -> Norm:
        """The norm of the state alone."""
        inner: Norm = norm or rms
        return lambda x: inner(x[:, : self.size].reshape(len(x), *self.shape))
