"""A residual multilayer perceptron for states of any shape."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from ndeflow.nets.embeddings import ConditionEmbedding, zero_init


class MLP(nn.Module):
    r"""Residual multilayer perceptron in (t, x), optionally class-conditional.

    .. math:: h_0 = A x, \qquad h_k = h_{k-1} + W_k\,\mathrm{silu}\bigl(\mathrm{norm}(h_{k-1}) + V_k e(t, c)\bigr),
              \qquad y = B\,\mathrm{silu}(h_{depth})

    with e of `ConditionEmbedding`. One matrix per block and conditions that enter by one product for all blocks
    keep it cheap: a block costs width² multiplications per sample. B starts at zero, so y = 0 at first.

    Args:
        shape: shape of one sample.
        width: of the hidden layers.
        depth: number of residual blocks.
        classes: number of labels, None for an unconditional net.
        features: length of the embedding e, even.

    Raises:
        ValueError: a size is not positive.

    >>> import torch
    >>> MLP((1, 8, 8), width=32, depth=2)(torch.rand(5), torch.randn(5, 1, 8, 8)).shape
    torch.Size([5, 1, 8, 8])
    """

    def __init__(
        self, shape: tuple[int, ...], width: int, depth: int, classes: int | None = None, features: int = 64
    ) -> None:
        super().__init__()
        if width < 1 or depth < 1:
            raise ValueError(f"MLP needs width >= 1 and depth >= 1, got width={width}, depth={depth}")
        self.shape, self.classes = tuple(shape), classes
        size = math.prod(self.shape)
        self.embedding = ConditionEmbedding(features, self.shape, classes, owner="MLP")
        self.condition = nn.Linear(features, depth * width)
        self.first = nn.Linear(size, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(depth))
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = zero_init(nn.Linear(width, size))

    def forward(self, t: Tensor, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Evaluate the net.

        Args:
            t: time inputs, (B,).
            x: states, (B, *shape).
            cond: labels, int64 (B,), exactly for a class-conditional net.

        Returns:
            (B, *shape).

        Raises:
            ValueError: shapes do not fit, or labels are missing or superfluous.
        """
        shifts = self.condition(self.embedding(t, x, cond)).chunk(len(self.blocks), dim=-1)
        h = self.first(x.flatten(1))
        for norm, block, shift in zip(self.norms, self.blocks, shifts, strict=True):
            h = h + block(F.silu(norm(h) + shift))
        return self.last(F.silu(h)).reshape(x.shape)
