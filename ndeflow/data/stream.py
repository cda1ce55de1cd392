r"""The order of training as a pure function of (seed, optimizer step): batch samplers, and keys for every sample.

An optimizer step consumes one *global batch* of G = `batch_size` samples, cut into contiguous slices of
G / (world size · accumulation), one per rank and micro-batch. Which samples step k sees follows from the
seed and k alone, so that no worker, restart or number of processes changes it, and a checkpoint needs
nothing but the step. Every sample carries a key, `fold(seed, epoch, sample id)`, from which a module draws
its noise, and its place (`slot`) among the `slots` = G samples of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from ndeflow.randomness import fold, permutation, seed_all

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
Item = tuple[int | str, int, int, int, int]
"""(epoch, or the name of an evaluated split; step; part of the step; slot; sample id)"""


def micro_batch(global_batch: int, world_size: int, accumulate: int) -> int:
    """Return the samples that one rank sees at once: G / (world size · accumulation).

    Args:
        global_batch: G, samples of one optimizer step over all ranks.
        world_size: number of ranks.
        accumulate: micro-batches of one rank in one optimizer step.

    Raises:
        ValueError: G cannot be cut so; the message lists what it can be cut into.

    >>> micro_batch(256, world_size=8, accumulate=2)
    16
    """
    shares = world_size * accumulate
    if global_batch % shares:
        divisors = ", ".join(str(d) for d in range(1, global_batch + 1) if global_batch % d == 0)
        raise ValueError(
            f"batch_size={global_batch} is the global batch of one optimizer step and cannot be cut into {shares} "
            f"equal parts ({world_size} processes × {accumulate} accumulated batches): processes × accumulation must "
            f"be one of {divisors}, or change batch_size"
        )
    return global_batch // shares


class Stream(Sampler[list[Item]]):
    r"""Batch sampler of a rank whose batches are a pure function of (seed, optimizer step).

    Epoch e visits the samples in the order `permutation(n, seed, "order", e)` and has ⌊n/G⌋ steps; the ragged tail
    is left out, so that a sample is seen at most once per epoch. Part p of a step of rank r owns the slots from
    (r · accumulate + p) · micro on.

    Args:
        n: samples in the training set.
        global_batch: G, samples of one optimizer step over all ranks.
        seed: of the run.
        rank: of this process, 0 … world_size − 1.
        world_size: number of processes.
        accumulate: micro-batches per optimizer step.
        position: returns the number of optimizer steps done; read whenever an iteration begins.
        endless: go on with the next epochs instead of ending with this one, for a trainer that counts steps:
            its batch numbers are then those of the run, and no epoch border restarts workers.

    Raises:
        ValueError: G > n, G cannot be cut into equal shares, or no such rank.
    """

    def __init__(
        self,
        n: int,
        global_batch: int,
        seed: int,
        rank: int,
        world_size: int,
        accumulate: int,
        position: Callable[[], int],
        endless: bool = False,
    ) -> None:
        self.micro = micro_batch(global_batch, world_size, accumulate)
        self.per_epoch = n // global_batch
        if self.per_epoch == 0:
            raise ValueError(
                f"the training set has {n} samples, less than one global batch of batch_size={global_batch} "
                f"({world_size} processes × {accumulate} accumulated batches × {self.micro}): lower batch_size"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is none of the {world_size} ranks 0 … {world_size - 1}")
        self.n, self.global_batch, self.seed = n, global_batch, seed
        self.rank, self.accumulate, self.position, self.endless = rank, accumulate, position, endless

    def __len__(self) -> int:
        if self.endless:
            raise TypeError("an endless stream has no length")
        return self.per_epoch * self.accumulate

    def __iter__(self) -> Iterator[list[Item]]:
        # Not a generator function: the position must be read now, not when a worker first asks for a batch.
        return self._epochs(self.position()) if self.endless else self._batches(self.position())

    def _epochs(self, start: int) -> Iterator[list[Item]]:
        """The micro-batches from step `start` on, epoch after epoch."""
        while True:
            yield from self._batches(start)
            start += self.per_epoch - start % self.per_epoch

    def _batches(self, start: int) -> Iterator[list[Item]]:
        """The micro-batches from step `start` to the end of its epoch."""
        epoch, first = divmod(start, self.per_epoch)
        order = permutation(self.n, self.seed, "order", epoch)
        for row in range(first, self.per_epoch):
            step = epoch * self.per_epoch + row
            for part in range(self.accumulate):
                low = (self.rank * self.accumulate + part) * self.micro
                ids = order[row * self.global_batch + low :][: self.micro].tolist()
                yield [(epoch, step, part, low + j, i) for j, i in enumerate(ids)]

    def facts(self) -> dict[str, int]:
        """Return what must not change when a run is resumed."""
        return {"n": self.n, "global_batch": self.global_batch}


class Shard(Sampler[list[Item]]):
    """Batch sampler of a rank's share of a set that is evaluated: samples rank, rank + world_size, …, each once.

    Args:
        split: name of the set; it takes the place of the epoch in the keys.
        n: samples in the set.
        size: samples in a batch (the last one may be smaller).
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(self, split: Split, n: int, size: int, rank: int, world_size: int) -> None:
        self.split: Split = split
        self.ids, self.size = range(rank, n, world_size), size

    def __len__(self) -> int:
        return -(-len(self.ids) // self.size)

    def __iter__(self) -> Iterator[list[Item]]:
        for step in range(len(self)):
            yield [(self.split, step, 0, i, i) for i in self.ids[step * self.size :][: self.size]]


class Seeded(Dataset[dict[str, Tensor]]):
    """Data set of dict samples, fetched a batch at a time with key, slot and slots.

    A data set that draws from the global generators (augmentation) finds them seeded by the place of the batch in
    the run, so that its noise does not depend on the worker that loads it. One that draws nothing says so by an
    attribute `noisy = False` and is spared the seeding.

    Args:
        dataset: gives dicts of tensors, by `__getitem__(id)` or, faster, a whole batch by `__getitems__(ids)`.
        seed: of the run.
        slots: size of the global batch, or of the set that is evaluated.
        rank: of this process.
    """

    def __init__(self, dataset: Dataset[Any], seed: int, slots: int, rank: int = 0) -> None:
        self.dataset, self.seed, self.slots, self.rank = dataset, seed, slots, rank
        self.noisy = getattr(dataset, "noisy", True)

    def __getitems__(self, items: list[Item]) -> dict[str, Tensor]:
        epoch, step, part = items[0][:3]
        if self.noisy:
            seed_all(self.seed, "items", epoch, self.rank, step, part)
        ids = [item[4] for item in items]
        slot = torch.tensor([item[3] for item in items])
        key = fold(self.seed, epoch, torch.tensor(ids))
        return {**self._fetch(ids), "key": key, "slot": slot, "slots": torch.full_like(slot, self.slots)}

    def _fetch(self, ids: list[int]) -> dict[str, Tensor]:
        """The samples as one dict of stacked tensors."""
        whole = getattr(self.dataset, "__getitems__", None)
        samples = whole(ids) if whole else [self.dataset[i] for i in ids]
        return samples if isinstance(samples, dict) else default_collate(samples)
