"""Random ends of time."""

from __future__ import annotations

import torch
from torch import Tensor

from ndeflow.randomness import fold, uniform


class Steer:
    r"""Train with a random last time, so that the dynamics are simple around it.

    .. math:: T \sim U(t_1 - b,\, t_1 + b)

    It is no term of the loss and has no weight; validation and prediction keep t₁.

    Args:
        width: b > 0, smaller than the distance of t₁ from the output before it.

    Raises:
        ValueError: `width` not positive.

    Reference:
        Ghosh, Behl, Dupont, Torr, Namboodiri, "STEER: simple temporal regularization for neural ODEs", 2020, section 3.
    """

    def __init__(self, width: float) -> None:
        if not width > 0:
            raise ValueError(f"width={width} must be positive")
        self.width = width

    def times(self, ts: Tensor, keys: Tensor) -> Tensor:
        """Return output times with another last one: one for the batch if ts is (T,), one per sample if (B, T).

        Raises:
            ValueError: the random end could come before the output before it.
        """
        gap = (ts[..., -1] - ts[..., -2]).abs().min()
        if not bool(gap > self.width):
            raise ValueError(
                f"Steer(width={self.width}) could move the last time before the one before it, {float(gap):g} away: "
                "choose a smaller width"
            )
        draws = uniform(fold(keys if ts.ndim == 2 else keys[0], "steer"), dtype=torch.float64)
        moved = ts[..., -1:] + self.width * (2.0 * draws - 1.0).unsqueeze(-1).to(ts)
        return torch.cat([ts[..., :-1], moved], dim=-1)
