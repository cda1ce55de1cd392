r"""What a model predicts, read as data, noise, velocity, v or score.

All readings are linear in D = E[x1 | x_t] and E = E[x0 | x_t], together with x_t = αD + σE:

=========  ===============  ====================
reading    value y          y = pD + qE
=========  ===============  ====================
data       D                (p, q) = (1, 0)
noise      E                (0, 1)
velocity   E[ẋ_t | x_t]     (α̇, σ̇)
v          αE − σD          (−σ, α)
score      −E/σ             (0, −1/σ)
=========  ===============  ====================

so that one reading gives all by D = (qx − σy)/(αq − σp), E = (αy − px)/(αq − σp).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ndeflow.flows.paths import Path
from ndeflow.flows.schedules import Coefficients
from ndeflow.tensors import expand_time

Reading: TypeAlias = Literal["data", "noise", "velocity", "v", "score"]

READINGS: tuple[Reading, ...] = get_args(Reading)


class NotAScore(ValueError):
    """The score was asked of a model for which −E[x0 | x_t]/σ is not the score."""


class UndefinedReading(ValueError):
    """A reading was asked at an end of the path where it does not follow from what the model predicts."""


@dataclass(frozen=True)
class Provenance:
    """What a model was trained on, as far as its readings depend on it.

    Args:
        independent: whether source and data were independent; False after optimal-transport coupling or reflow, when
            −E[x0 | x_t]/σ is no score.
    """

    independent: bool = True


def _as_data(predicts: Reading, c: Coefficients) -> tuple[Tensor, Tensor]:
    """The coefficients of x and y in D."""
    alpha, sigma, d_alpha, d_sigma = c
    match predicts:
        case "data":
            return torch.zeros_like(alpha), torch.ones_like(alpha)
        case "noise":
            return 1 / alpha, -sigma / alpha
        case "score":
            return 1 / alpha, sigma.square() / alpha
        case "velocity":
            det = alpha * d_sigma - d_alpha * sigma
            return d_sigma / det, -sigma / det
        case "v":
            det = alpha.square() + sigma.square()
            return alpha / det, -sigma / det


def _as_noise(predicts: Reading, c: Coefficients) -> tuple[Tensor, Tensor]:
    """The coefficients of x and y in E."""
    alpha, sigma, d_alpha, d_sigma = c
    match predicts:
        case "data":
            return 1 / sigma, -alpha / sigma
        case "noise":
            return torch.zeros_like(alpha), torch.ones_like(alpha)
        case "score":
            return torch.zeros_like(alpha), -sigma
        case "velocity":
            det = alpha * d_sigma - d_alpha * sigma
            return -d_alpha / det, alpha / det
        case "v":
            det = alpha.square() + sigma.square()
            return sigma / det, alpha / det


def conversion(predicts: Reading, reading: Reading, c: Coefficients) -> tuple[Tensor, Tensor]:
    """Return (a, b) such that reading = a·x + b·y for a model whose output y is `predicts`.

    At the ends of a path these are the limits where they exist, and not finite where they do not.

    Args:
        predicts: what y is.
        reading: what is wanted.
        c: coefficients of the path at t.

    Returns:
        Two float64 tensors of the shape of t.
    """
    if predicts == reading:
        return torch.zeros_like(c.alpha), torch.ones_like(c.alpha)
    match reading:
        case "data":
            return _as_data(predicts, c)
        case "noise":
            return _as_noise(predicts, c)
        case "score":  # needs E alone: D may be undefined here
            a, b = _as_noise(predicts, c)
            return -a / c.sigma, -b / c.sigma
        case "velocity" | "v":
            p, q = (c.d_alpha, c.d_sigma) if reading == "velocity" else (-c.sigma, c.alpha)
            (a, b), (a0, b0) = _as_data(predicts, c), _as_noise(predicts, c)
            return p * a + q * a0, p * b + q * b0


def require_reading(path: Path, predicts: Reading, reading: Reading, t: float) -> None:
    """Refuse a reading that does not exist at a time; called once where an interval or a grid is given.

    Args:
        path: of the model.
        predicts: what the model predicts.
        reading: what will be read.
        t: a time in the path's own clock.

    Raises:
        UndefinedReading: the reading does not follow from the prediction at t; says which predictions give it there.
    """
    c = path.coefficients(torch.tensor(t, dtype=torch.float64))

    def exists(source: Reading) -> bool:
        return all(bool(w.isfinite()) for w in conversion(source, reading, c))

    if not exists(predicts):
        others = ", ".join(source for source in READINGS if exists(source))
        raise UndefinedReading(
            f"{reading} does not follow from a model that predicts {predicts} at t={t:g}, where alpha={c.alpha:g} and "
            f"sigma={c.sigma:g}: stay inside the interval, or use a model that predicts one of {others}"
        )


@dataclass(frozen=True)
class Prediction:
    """One evaluation of a model, readable in every way; each reading is computed when it is asked for.

    Values are never inspected: where a reading does not exist (an end of the path), it is not finite. Whoever plans
    an interval or a grid asks `require_reading` once.

    Args:
        t: times, float64, () or (B,).
        x: states, (B, *).
        value: what the model predicts there, (B, *).
        predicts: what that is.
        path: of the model.
        provenance: of the model.
    """

    t: Tensor
    x: Tensor
    value: Tensor
    predicts: Reading
    path: Path
    provenance: Provenance

    @property
    def data(self) -> Tensor:
        """D = E[x1 | x_t], (B, *)."""
        return self.read("data")

    @property
    def noise(self) -> Tensor:
        """E = E[x0 | x_t], (B, *), whatever the law of the source."""
        return self.read("noise")

    @property
    def velocity(self) -> Tensor:
        """E[ẋ_t | x_t] = α̇D + σ̇E in the path's own time, (B, *)."""
        return self.read("velocity")

    @property
    def v(self) -> Tensor:
        """αE − σD, (B, *)."""
        return self.read("v")

    @property
    def score(self) -> Tensor:
        """∇ log p_t = −E/σ, (B, *); raises NotAScore unless the source is Gaussian and independent of the data."""
        return self.read("score")

    def read(self, reading: Reading) -> Tensor:
        """Return a reading by its name, (B, *), in the dtype of the states.

        What the model predicts is returned untouched.

        Raises:
            NotAScore: the score is asked of a model that has none.
        """
        if reading == "score":
            self._check_score()
        if reading == self.predicts:
            return self.value
        a, b = conversion(self.predicts, reading, self.path.coefficients(self.t))
        x = self.x
        return expand_time(a.to(x.dtype), x) * x + expand_time(b.to(x.dtype), x) * self.value

    def _check_score(self) -> None:
        """Refuse the score where it is something else."""
        if not self.path.gaussian_source:
            raise NotAScore("the source of this path is not Gaussian, so -E[x0|x_t]/sigma is not the score: use ODEs")
        if not self.provenance.independent:
            raise NotAScore(
                "this model was trained on dependent source and data (optimal transport or reflow), so "
                "-E[x0|x_t]/sigma is not the score: use samplers of the ODE, or a model trained on independent noise"
            )
