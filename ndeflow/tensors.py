"""Shapes of states: broadcasting of times, norms per sample, packing of several leaves into one tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def expand_time(t: Tensor, y: Tensor) -> Tensor:
    """Reshape a time so that it broadcasts over a batch of states.

    Args:
        t: shape () (one time for the batch) or (B,) (one per sample).
        y: state, shape (B, *).

    Returns:
        `t` with shape () or (B, 1, …, 1).

    Raises:
        ValueError: `t` has another shape; broadcasting it would spread time along a data axis.

    >>> import torch
    >>> expand_time(torch.zeros(3), torch.zeros(3, 1, 8, 8)).shape
    torch.Size([3, 1, 1, 1])
    """
    if t.ndim == 0:
        return t
    if t.ndim != 1 or t.shape[0] != y.shape[0]:
        raise ValueError(
            f"a time must have shape () or (B,) = ({y.shape[0]},), got {tuple(t.shape)} for a state of shape "
            f"{tuple(y.shape)}"
        )
    return t.reshape(-1, *(1,) * (y.ndim - 1))


def rms(x: Tensor) -> Tensor:
    """Return the root mean square of each sample of x (B, *), real, shape (B,); its gradient at 0 is 0."""
    x = x.flatten(1)
    return torch.linalg.vector_norm(x, dim=1) / x.shape[1] ** 0.5
