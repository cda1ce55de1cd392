"""Embeddings of what conditions a net: its time input and, for class-conditional nets, a label."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class TimeEmbedding(nn.Module):
    r"""Embed a time by cosines and sines of geometrically spaced frequencies.

    .. math:: e(t) = \bigl[\cos ω_1 t, …, \cos ω_n t, \sin ω_1 t, …, \sin ω_n t\bigr], \qquad
              ω_k = ω_{min} (ω_{max}/ω_{min})^{(k-1)/(n-1)}, \quad n = features/2

    The frequencies are facts of the class, not weights: they are not stored in a checkpoint.

    Args:
        features: length of the embedding, even and at least 4.
        low, high: ω_min and ω_max in radians per unit of t, 0 < low < high; the defaults suit t in [0, 1].

    Raises:
        ValueError: an argument is out of its range.

    >>> TimeEmbedding(4, low=1.0, high=2.0)(torch.zeros(1))
    tensor([[1., 1., 0., 0.]])
    """

    def __init__(self, features: int, low: float = 1.0, high: float = 1000.0) -> None:
        super().__init__()
        if features < 4 or features % 2:
            raise ValueError(f"TimeEmbedding needs an even number of features, at least 4, got {features}")
        if not 0 < low < high:
            raise ValueError(f"TimeEmbedding needs 0 < low < high, got low={low}, high={high}")
        n = features // 2
        ratio = math.log(high / low) / (n - 1)
        self.frequencies: Tensor
        frequencies = torch.tensor([low * math.exp(k * ratio) for k in range(n)])
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """Embed times of shape (B,) as (B, features), computed in the wider dtype of `t` and the frequencies."""
        angle = t.unsqueeze(-1) * self.frequencies
        return torch.cat((angle.cos(), angle.sin()), dim=-1)


class ConditionEmbedding(nn.Module):
    r"""Embed a time input and, for a class-conditional net, a label: e = time(t) + E[cond].

    It is the door of every net here: times, labels and states that do not fit together are refused.

    Args:
        features: length of the embedding.
        shape: shape of one sample, (*).
        classes: number of labels, None for an unconditional net.
        owner: name of the net, for its errors.

    Raises:
        ValueError: `classes` is not positive, or `shape` is empty or has an axis without elements.
    """

    def __init__(self, features: int, shape: tuple[int, ...], classes: int | None, owner: str) -> None:
        super().__init__()
        if not shape or min(shape) < 1:
            raise ValueError(f"{owner} needs the shape of one sample, e.g. (2,) or (1, 28, 28), got {shape}")
        if classes is not None and classes < 1:
            raise ValueError(f"{owner} needs classes >= 1, or None for an unconditional net, got {classes}")
        self.shape, self.classes, self.owner = shape, classes, owner
        self.time = TimeEmbedding(features)
        self.label = None if classes is None else nn.Embedding(classes, features)

    def forward(self, t: Tensor, x: Tensor, cond: Tensor | None) -> Tensor:
        """Embed the conditions of a batch.

        Args:
            t: time inputs, any real dtype, (B,).
            x: states, (B, *shape); gives the dtype of the embedding.
            cond: labels in [0, classes), int64 (B,); None for an unconditional net.

        Returns:
            (B, features).

        Raises:
            ValueError: a shape does not fit, or labels are missing or superfluous.
            TypeError: labels are not int64.
        """
        self._check(t, x, cond)
        embedded = self.time(t).to(x.dtype)
        return embedded if self.label is None else embedded + self.label(cond)

    def _check(self, t: Tensor, x: Tensor, cond: Tensor | None) -> None:
        """Refuse what does not fit, by name."""
        if x.shape[1:] != self.shape:
            raise ValueError(f"{self.owner} was built for samples of shape {self.shape}, got x {tuple(x.shape)}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"{self.owner} takes one time per sample, t ({len(x)},), got t {tuple(t.shape)}")
        if self.classes is None and cond is not None:
            raise ValueError(f"{self.owner} is unconditional but got cond: build it with classes=K, or leave cond out")
        if self.classes is not None:
            self._check_labels(x, cond)

    def _check_labels(self, x: Tensor, cond: Tensor | None) -> None:
        """Refuse labels that are missing or malformed."""
        if cond is None:
            raise ValueError(f"{self.owner}(classes={self.classes}) needs cond: int64 labels of shape ({len(x)},)")
        if cond.dtype != torch.int64:
            raise TypeError(f"{self.owner} takes int64 labels, got cond of {cond.dtype}")
        if cond.shape != x.shape[:1]:
            raise ValueError(f"{self.owner} takes one label per sample, cond ({len(x)},), got {tuple(cond.shape)}")


def zero_init(layer: nn.Module) -> nn.Module:
    """Set all parameters of a net's last layer to zero, so that training starts from the output 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
