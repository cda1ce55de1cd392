"""Losses of flow models: which reading is compared, with what weight, by which measure of distance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ndeflow.flows.model import FlowModel
from ndeflow.flows.paths import PathSample
from ndeflow.flows.prediction import READINGS, Prediction, Reading
from ndeflow.flows.schedules import Coefficients
from ndeflow.tensors import expand_time


class Premetric(ABC):
    """A measure of how far a prediction is from its target, one number per sample."""

    @abstractmethod
    def __call__(self, residual: Tensor, sample: PathSample, prediction: Prediction) -> Tensor:
        """Measure residuals.

        Args:
            residual: reading − target, (B, *).
            sample: the points of the path, for measures that depend on them.
            prediction: at these points, for measures of other readings.

        Returns:
            (B,), ≥ 0, and 0 where the residual is 0.
        """


@dataclass(frozen=True)
class Squared(Premetric):
    """The squared residual r, mean over its d entries: Σ r²/d."""

    def __call__(self, residual: Tensor, sample: PathSample, prediction: Prediction) -> Tensor:
        """Return Σ r²/d, (B,)."""
        return residual.square().flatten(1).mean(1)


@dataclass(frozen=True)
class PseudoHuber(Premetric):
    r"""Quadratic for small and linear for large residuals r of d entries.

    .. math:: \bigl(\sqrt{\textstyle\sum r^2 + c^2} - c\bigr) / d

    Args:
        c: residual norm ‖r‖ at which it turns from quadratic to linear, > 0; it refers to the sum over entries.

    Raises:
        ValueError: c is not positive.

    Reference:
        Lee, Lin, Fanti, "Improving the training of rectified flows", 2024, section 4.2 (there c = 0.00054·d).
    """

    c: float

    def __post_init__(self) -> None:
        if not self.c > 0:
            raise ValueError(f"PseudoHuber needs c > 0, got {self.c}; for a quadratic loss use Squared")

    def __call__(self, residual: Tensor, sample: PathSample, prediction: Prediction) -> Tensor:
        """Return (√(Σ r² + c²) − c)/d, (B,); its gradient is finite everywhere."""
        squares = residual.square().flatten(1)
        return ((squares.sum(1) + self.c**2).sqrt() - self.c) / squares.shape[1]


def target(reading: Reading, sample: PathSample) -> Tensor:
    """Return what a reading is the conditional mean of, (B, *): x1, x0, ẋ_t, αx0 − σx1 or −x0/σ."""
    if reading == "data":
        return sample.x1
    if reading == "noise":
        return sample.x0
    if reading == "velocity":
        return sample.velocity
    alpha, sigma = (expand_time(c.to(sample.x1.dtype), sample.x1) for c in sample.coefficients[:2])
    return alpha * sample.x0 - sigma * sample.x1 if reading == "v" else -sample.x0 / sigma


@dataclass(frozen=True)
class FlowLoss:
    r"""Regress a reading of the model on its value for the drawn pair.

    .. math:: ℓ_i = w(t_i)\, ρ\bigl(\mathrm{reading}(t_i, x_{t_i}) - \mathrm{target}_i\bigr)

    At its minimum over functions of (t, x_t) the reading is the conditional mean of the target, if ρ is `Squared`.

    Args:
        reading: "data", "noise", "velocity", "v" or "score"; need not be what the model predicts.
        weight: w as a function of the path's `Coefficients` at t, float64 (B,); None for 1.
        premetric: ρ.

    Raises:
        ValueError: `reading` is no reading.

    >>> FlowLoss(weight=lambda c: c.sigma**2)  # doctest: +ELLIPSIS
    FlowLoss(reading='velocity', weight=<function <lambda> at ...>, premetric=Squared())
    """

    reading: Reading = "velocity"
    weight: Callable[[Coefficients], Tensor] | None = None
    premetric: Premetric = Squared()

    def __post_init__(self) -> None:
        if self.reading not in READINGS:
            raise ValueError(f"FlowLoss compares one of {', '.join(READINGS)}, got {self.reading!r}")

    def __call__(self, model: FlowModel, sample: PathSample, cond: Tensor | None = None) -> Tensor:
        """Evaluate the model at points of its path.

        Args:
            model: the net is called once.
            sample: what `model.path.sample` drew.
            cond: conditions of the data, (B, …), or None.

        Returns:
            Losses, one per sample, (B,).

        Raises:
            NotAScore: the reading is the score, and the model has none.
        """
        prediction = model(sample.t, sample.x_t, cond)
        losses = self.premetric(prediction.read(self.reading) - target(self.reading, sample), sample, prediction)
        return losses if self.weight is None else losses * self.weight(sample.coefficients).to(losses.dtype)
