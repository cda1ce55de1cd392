"""Shapes of states: broadcasting of times, norms per sample, packing of several leaves into one tensor."""

from __future__ import annotations

from typing import Any

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
    """Return the root mean square of each sample of x (B, *), real, shape (B,); its derivatives at x = 0 are 0."""
    x = x.flatten(1)
    root = max(1, x.shape[1]) ** 0.5
    if not x.requires_grad:
        return torch.linalg.vector_norm(x, dim=1) / root
    zero = (x.detach() == 0).all(1)  # the second derivative of a norm is not a number there
    norm = torch.linalg.vector_norm(torch.where(zero.unsqueeze(1), 1.0, x), dim=1)
    return torch.where(zero, 0.0, norm / root)


class Packing:
    """How a state of several leaves lies in one tensor (B, n), leaf after leaf.

    Args:
        example: a tuple, list or dict (by strings) of tensors (B, *), of one dtype and device.

    Attributes:
        slices: where each leaf lies in the last axis, by its name (tuples: "0", "1", …).

    Raises:
        TypeError: it is something else, or the leaves' dtypes or devices differ.
        ValueError: it is empty, or the leaves' batch sizes differ.

    >>> packing = Packing({"x": torch.zeros(3, 2), "logp": torch.zeros(3, 1)})
    >>> packing.slices, packing.pack({"x": torch.zeros(3, 2), "logp": torch.zeros(3, 1)}).shape
    ({'x': slice(0, 2, None), 'logp': slice(2, 3, None)}, torch.Size([3, 3]))
    """

    def __init__(self, example: object) -> None:
        leaves = _leaves(example)
        self._kind: Any = type(example)
        self._shapes = {name: leaf.shape[1:] for name, leaf in leaves.items()}
        self.slices, start = {}, 0
        first_name, first = next(iter(leaves.items()))
        for name, leaf in leaves.items():
            for fact in ("dtype", "device"):
                if getattr(leaf, fact) != getattr(first, fact):
                    raise TypeError(
                        f"leaf {name!r} of the state has {fact} {getattr(leaf, fact)}, leaf {first_name!r} "
                        f"{getattr(first, fact)}: a solve has one"
                    )
            if len(leaf) != len(first):
                raise ValueError(f"leaf {name!r} of the state has {len(leaf)} rows, leaf {first_name!r} {len(first)}")
            size = leaf.shape[1:].numel()
            self.slices[name] = slice(start, start + size)
            start += size

    def pack(self, state: object) -> Tensor:
        """Return the leaves of a state as one tensor (B, n), refusing leaves of other names or shapes."""
        leaves = _leaves(state)
        shapes = {name: leaf.shape[1:] for name, leaf in leaves.items()}
        batches = {name: len(leaf) for name, leaf in leaves.items()}
        if shapes != self._shapes or len(set(batches.values())) > 1:
            given = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
            wanted = ", ".join(f"{name!r}: (B, {', '.join(map(str, s))})" for name, s in self._shapes.items())
            raise ValueError(f"got leaves of shapes {given}, expected those of the state, {{{wanted}}}")
        return torch.cat([leaves[n].reshape(batches[n], s.numel()) for n, s in self._shapes.items()], dim=1)

    def unpack(self, packed: Tensor) -> Any:
        """Return the leaves in a tensor (…, n), each (…, *), as a tuple, list or dict as the example is."""
        lead = packed.shape[:-1]
        leaves = {n: packed[..., s].reshape(*lead, *self._shapes[n]) for n, s in self.slices.items()}
        if hasattr(self._kind, "_make"):  # a named tuple
            return self._kind._make(leaves.values())
        return self._kind(leaves) if issubclass(self._kind, dict) else self._kind(leaves.values())


def _leaves(state: object) -> dict[str, Tensor]:
    """The leaves of a state by name."""
    if not isinstance(state, tuple | list | dict):
        raise TypeError(f"a state is a tensor, or a tuple, list or dict of tensors, got {type(state).__name__}")
    named = dict(state) if isinstance(state, dict) else {str(i): leaf for i, leaf in enumerate(state)}
    if not named:
        raise ValueError("a state has at least one leaf, got none")
    for name, leaf in named.items():
        if not isinstance(name, str):
            raise TypeError(f"the leaves of a state have strings as names, got {name!r}")
        if not isinstance(leaf, Tensor) or leaf.ndim < 1:
            given = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(f"leaf {name!r} of the state must be a tensor of shape (B, *), got {given}")
    return named
