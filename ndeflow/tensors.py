"""Broadcasting of times over states: the only place where shapes of `t` and `y` meet."""

from __future__ import annotations

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
