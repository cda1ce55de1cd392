"""Learning-rate schedules that torch does not have in one piece; all count optimizer steps."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(optimizer: Optimizer, steps: int, warmup: int = 0, final: float = 0.0) -> LambdaLR:
    r"""Rise linearly over `warmup` steps, then fall along half a cosine to `final` at `steps`.

    The factor of the learning rate at step k is :math:`(k+1)/w` for k < w, then
    :math:`f + \tfrac12 (1-f)(1+\cos \pi \tfrac{k-w}{n-w})`, and f beyond n.

    Args:
        optimizer: its learning rates are the peak.
        steps: n ≥ 1, usually `${trainer.max_steps}`.
        warmup: w in [0, n).
        final: f in [0, 1].

    Raises:
        ValueError: a value outside its range.
    """
    if steps < 1 or not 0 <= warmup < steps:
        raise ValueError(f"warmup={warmup} must lie in [0, steps={steps}), and steps be at least 1")
    if not 0.0 <= final <= 1.0:
        raise ValueError(f"final={final} is a factor in [0, 1], not a learning rate")

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / (steps - warmup))
        return final + 0.5 * (1.0 - final) * (1.0 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


def warmup_constant(optimizer: Optimizer, warmup: int) -> LambdaLR:
    """Rise linearly over `warmup` ≥ 1 steps to the optimizer's learning rates and stay there.

    Raises:
        ValueError: `warmup` below 1.
    """
    if warmup < 1:
        raise ValueError(f"warmup={warmup} must be at least 1 step; leave optim.schedule out for a constant rate")
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
