"""The differential equations of a flow model."""

from __future__ import annotations

from torch import Tensor, nn

from ndeflow.diffeq import ODE
from ndeflow.flows.model import FlowModel
from ndeflow.flows.prediction import require_reading


class _Velocity(nn.Module):
    """The velocity of a model as a field f(t, x) or f(t, x, cond), whose parameters an equation owns."""

    def __init__(self, model: FlowModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, t: Tensor, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.model(t, x, cond).velocity


def probability_flow(model: FlowModel, cond: Tensor | None = None, interval: tuple[float, float] | None = None) -> ODE:
    r"""Build the ordinary equation along which the law of the state is that of the path.

    .. math:: \frac{dx}{dt} = E[\dot x_t | x_t = x] = α̇ D + σ̇ E

    Args:
        model: gives the velocity, whatever it predicts.
        cond: conditions, one per sample of the solve, (B, …).
        interval: the times between which it will be solved, in either order; by default the path's interval.

    Returns:
        The equation, in the path's own time; from source to data it is solved over `model.path.interval`.

    Raises:
        UndefinedReading: at one end the velocity does not follow from what the model predicts; a solver may ask for it
            there.

    Reference:
        Liu, Gong, Liu, 2022, equation 2; Song et al., "Score-based generative modeling through stochastic differential
        equations", 2021, equation 13, for Gaussian sources.
    """
    for t in model.path.interval if interval is None else interval:
        require_reading(model.path, model.predicts, "velocity", t)
    return ODE(_Velocity(model), args=cond)
