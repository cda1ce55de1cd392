"""Preconditions: what a net sees of time and state, and how its output becomes a prediction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from ndeflow.flows.paths import Path


class Precondition(ABC):
    """The only owner of a net's time input and of the scales around it; part of the model, never of a sampler."""

    @abstractmethod
    def time_input(self, path: Path, t: Tensor) -> Tensor:
        """Return what the net is told of the time.

        Args:
            path: of the model, for inputs such as log(α/σ).
            t: times in the path's own clock, float64, any shape.

        Returns:
            float64, the shape of t.
        """

    @abstractmethod
    def __call__(self, net: nn.Module, path: Path, t: Tensor, x: Tensor, cond: Tensor | None) -> Tensor:
        """Evaluate the net once.

        Args:
            net: called as net(time input (B,), x, cond).
            path: of the model.
            t: times, float64, (B,).
            x: states, (B, *).
            cond: conditions, or None.

        Returns:
            The quantity that the model predicts, (B, *).
        """


@dataclass(frozen=True)
class Identity(Precondition):
    r"""The net as it is: prediction = net(time_scale · t, x, cond).

    Args:
        time_scale: factor of the time shown to the net, e.g. 999 for nets made for 1,000 discrete steps.

    Raises:
        ValueError: `time_scale` is zero, so that the net would not know the time.
    """

    time_scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.time_scale:
            raise ValueError("Identity needs time_scale != 0: the net would not know the time")

    def time_input(self, path: Path, t: Tensor) -> Tensor:
        """Return time_scale · t."""
        return t * self.time_scale

    def __call__(self, net: nn.Module, path: Path, t: Tensor, x: Tensor, cond: Tensor | None) -> Tensor:
        """Return net(time_scale · t, x, cond), the time in the dtype of x."""
        return net(self.time_input(path, t).to(x.dtype), x, cond)
