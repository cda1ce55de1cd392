"""How good samples are: distances to held-out data beside their floors, memorizing, classes."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from ndeflow.data.loading import DataModule
from ndeflow.flows.samplers import named
from ndeflow.metrics import class_shares, nearest_distance, wasserstein2, wasserstein2_floor
from ndeflow.randomness import fold, permutation

if TYPE_CHECKING:
    from ndeflow.modules.flow import RectifiedFlow

MOST = 1000  # exact optimal transport takes seconds for a thousand samples, hours for ten thousand


def evaluate_samples(
    module: RectifiedFlow,
    data: DataModule,
    n: int | None,
    steps: tuple[int, ...],
    sampler: str,
    seeds: tuple[int, ...],
) -> dict[str, Any]:
    """Compare n samples with n test samples, for several numbers of steps, averaged over sampling seeds.

    Args:
        module: draws the samples with the weights it holds now.
        data: gives training and test samples.
        n: by default all test samples, at most 1000; a subset is drawn by a fixed key.
        steps: numbers of sampler steps; memorizing and classes are judged at the largest.
        sampler: class name in `ndeflow.flows.samplers`.
        seeds: sampling seeds.

    Returns:
        Plain numbers: `w2_floor` (mean exact W2 of two disjoint sets of n training samples to the same
        test samples), `w2` and `w2_ratio` (at the largest number of steps), `nearest_ratio` (mean distance
        to the nearest training sample over that of test samples: below 0.9 is memorizing), `by_steps`,
        and with labels `class_shares` and the `classifier_accuracy` on test samples.

    Raises:
        ValueError: no steps or seeds, or fewer than 2n training samples.
    """
    if not steps or not seeds:
        raise ValueError(f"steps={steps} and seeds={seeds} must hold at least one number each")
    train, test = data.arrays("train"), data.arrays("test")
    size = min(n or MOST, len(test["x1"]), len(train["x1"]) // 2)
    real = test["x1"][permutation(len(test["x1"]), "evaluate")[:size]] if size < len(test["x1"]) else test["x1"]
    floor = wasserstein2_floor(train["x1"], real, size)
    by_steps: dict[str, dict[str, float]] = {}
    drawn = torch.empty(0)
    for count in sorted(steps):
        batches = [_draw(module, size, sampler, count, seed) for seed in seeds]
        drawn = torch.cat(batches)
        w2 = fmean(wasserstein2(x, real) for x in batches)
        by_steps[str(count)] = {"w2": w2, "w2_ratio": w2 / floor}
    nearest = nearest_distance(drawn, train["x1"], test["x1"])
    last = by_steps[str(max(steps))]
    result: dict[str, Any] = {**last, "w2_floor": floor, "nearest_ratio": nearest.ratio, "by_steps": by_steps}
    if "label" in train and data.classes is not None:
        shares = class_shares(drawn, train["x1"], train["label"], test["x1"], test["label"], data.classes)
        result |= {"class_shares": shares.shares, "classifier_accuracy": shares.accuracy}
    return result | {"n": size, "seeds": list(seeds), "sampler": sampler, "steps": max(steps)}


def _draw(module: RectifiedFlow, n: int, sampler: str, steps: int, seed: int) -> torch.Tensor:
    """Draw n samples with the keys that `ndeflow sample seed=…` uses, on the CPU."""
    keys = fold(seed, "sample", torch.arange(n)).to(module.device)
    return module.sample(keys, module.labels(n), named(sampler, steps)).x.float().cpu()


def table(result: Mapping[str, Any]) -> str:
    """Return the result of `evaluate_samples` as text."""
    lines = [
        f"{result['n']} samples × {len(result['seeds'])} seeds, {result['sampler']}, "
        f"exact W2 to {result['n']} test samples; floor {result['w2_floor']:.4f}",
        *(f"  {k:>4} steps  W2 {v['w2']:.4f}  = {v['w2_ratio']:.3f} × floor" for k, v in result["by_steps"].items()),
        f"  distance to the nearest training sample: {result['nearest_ratio']:.3f} × that of test samples",
    ]
    if "class_shares" in result:
        shares = " ".join(f"{100 * share:.1f}" for share in result["class_shares"])
        accuracy = 100 * result["classifier_accuracy"]
        lines.append(f"  classes, %: {shares}  (classifier {accuracy:.1f} % on test samples)")
    return "\n".join(lines)
