"""Drawing samples by their keys: a sample depends on model, sampler and key, on nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from ndeflow.flows.model import FlowModel
from ndeflow.flows.samplers.base import Sample, Sampler


@torch.no_grad()
def draw(
    sampler: Sampler,
    model: FlowModel,
    keys: Tensor,
    shape: tuple[int, ...],
    cond: Tensor | None = None,
    micro_batch: int = 64,
) -> Sample:
    """Draw one sample per key.

    The net always sees `micro_batch` samples; the last batch is filled up with copies. Kernels round differently for
    different batch sizes, so this alone makes a sample the same, bit for bit on a CPU, whatever the number, the order
    and the neighbors of the samples asked for.

    Args:
        sampler: from source to data.
        model: in evaluation mode; states have the dtype of its parameters, float32 without any.
        keys: one per sample, int64 (n,), on the device of the model; `fold(seed, "sample", index)` by convention.
        shape: of one sample.
        cond: conditions, one per sample, (n, …), for a conditional model.
        micro_batch: samples solved together; part of a sample's address, since it changes rounding.

    Returns:
        The samples in the order of the keys, without the nodes of the grid.

    Raises:
        ValueError: there are no keys, the model is in training mode, or shapes do not fit.
    """
    _check(model, keys, cond, micro_batch)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    parts = []
    for rows in torch.arange(len(keys), device=keys.device).split(micro_batch):
        padded = torch.cat((rows, rows[:1].expand(micro_batch - len(rows))))
        x = model.path.prior(keys[padded], tuple(shape), dtype)
        x, nfe, _ = sampler(model, x, None if cond is None else cond[padded])
        parts.append((x[: len(rows)], nfe[: len(rows)]))
    x, nfe = zip(*parts, strict=True)
    return Sample(torch.cat(x), torch.cat(nfe), None)


def _check(model: FlowModel, keys: Tensor, cond: Tensor | None, micro_batch: int) -> None:
    """Refuse what would fail later, or silently depend on the batch."""
    if keys.ndim != 1 or not len(keys):
        raise ValueError(f"draw needs one key per sample, int64 (n,) with n >= 1, got shape {tuple(keys.shape)}")
    if cond is not None and cond.shape[:1] != keys.shape:
        raise ValueError(f"draw needs one condition per key, got cond {tuple(cond.shape)} for {len(keys)} keys")
    if micro_batch < 1:
        raise ValueError(f"draw needs micro_batch >= 1, got {micro_batch}")
    if model.training:
        raise ValueError("draw needs a model in evaluation mode (dropout would change the samples): call model.eval()")
