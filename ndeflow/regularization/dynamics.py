"""Regularizers of the trajectory: kinetic energy, Jacobian, higher derivatives in time."""

from __future__ import annotations

import torch
from torch import Tensor

from ndeflow.randomness import fold, uniform
from ndeflow.regularization.terms import DynamicsRegularizer, Field
from ndeflow.regularization.weights import Weight


def _mean_square(x: Tensor) -> Tensor:
    """The mean over a sample's entries of |x|², (B,)."""
    return x.flatten(1).abs().square().mean(1)


class Kinetic(DynamicsRegularizer):
    r"""The kinetic energy of the trajectory, which straight paths of constant speed minimize.

    .. math:: R = \frac1d \int \|f(t, y)\|^2\, dt

    Args:
        weight: ≥ 0, or a schedule.

    Reference:
        Finlay, Jacobsen, Nurbekyan, Oberman, "How to train your neural ODE", 2020, equation 7.
    """

    def integrand(self, f: Field, t: Tensor, y: Tensor, value: Tensor, keys: Tensor) -> Tensor:
        """Return ‖f‖²/d."""
        return _mean_square(value)


class Jacobian(DynamicsRegularizer):
    r"""The Frobenius norm of the field's Jacobian, by one Hutchinson probe per sample and solve.

    .. math:: R = \frac1d \int \|\varepsilon^\top \partial f/\partial y\|^2\, dt, \qquad
              \mathbb{E}\,\|\varepsilon^\top J\|^2 = \|J\|_F^2

    with ε of independent signs.

    Args:
        weight: ≥ 0, or a schedule.

    Reference:
        Finlay, Jacobsen, Nurbekyan, Oberman, 2020, equation 9.
    """

    def integrand(self, f: Field, t: Tensor, y: Tensor, value: Tensor, keys: Tensor) -> Tensor:
        """Return ‖εᵀJ‖²/d."""
        draws = uniform(fold(keys, "jacobian", "probe"), tuple(y.shape[1:]))
        probe = torch.where(draws < 0.5, -1.0, 1.0).to(y.dtype)
        watched = torch.is_grad_enabled()
        with torch.enable_grad():
            start = y if y.requires_grad else y.detach().requires_grad_()
            (pulled,) = torch.autograd.grad(f(t, start), start, probe, create_graph=watched, materialize_grads=True)
        return _mean_square(pulled)


class Taylor(DynamicsRegularizer):
    r"""The size of a higher derivative of the trajectory in time: what an adaptive solver of that order has to resolve.

    .. math:: R = \frac1d \int \Bigl\|\frac{d^k y}{dt^k}\Bigr\|^2 dt, \qquad
              \frac{d^{j+1} y}{dt^{j+1}} = \Bigl(\partial_t + f \cdot \nabla\Bigr) \frac{d^j y}{dt^j}

    by nested forward-mode derivatives, whose cost doubles with each order.

    Args:
        weight: ≥ 0, or a schedule.
        order: k ≥ 2.

    Raises:
        ValueError: `order` below 2.

    Reference:
        Kelly, Bettencourt, Johnson, Duvenaud, "Learning differential equations that are easy to solve", 2020,
        equation 5.
    """

    def __init__(self, weight: float | Weight, order: int) -> None:
        super().__init__(weight)
        if order < 2:
            raise ValueError(f"order={order} must be at least 2; the first derivative's term is Kinetic")
        self.order = order

    def integrand(self, f: Field, t: Tensor, y: Tensor, value: Tensor, keys: Tensor) -> Tensor:
        """Return ‖d^k y/dt^k‖²/d."""
        derivative = f
        for _ in range(self.order - 1):
            derivative = _along(f, derivative)
        return _mean_square(derivative(t, y))


def _along(f: Field, g: Field) -> Field:
    """The derivative in time of g along the trajectories of f."""

    def derivative(t: Tensor, y: Tensor) -> Tensor:
        return torch.func.jvp(g, (t.contiguous(), y), (torch.ones_like(t), f(t, y)))[1]

    return derivative
