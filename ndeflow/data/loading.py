"""Data modules: splits in memory or as data sets, loaders that follow the trainer, and what resuming requires."""

from __future__ import annotations

import ctypes
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ndeflow.data.stream import SPLITS, Seeded, Shard, Split, Stream, micro_batch


class Labeled(NamedTuple):
    """One split in memory: raw values (n, *shape) of any real dtype and, where there are any, int64 labels (n,)."""

    raw: Tensor
    label: Tensor | None = None


class Arrays(Dataset[dict[str, Tensor]]):
    """Data set of one split in memory: x1 = scale · raw + shift in float32, computed per batch.

    Args:
        split: the arrays; raw ones may be kept as uint8 to save memory.
        scale: factor.
        shift: summand.
        cond: name of the array that conditions the model, if any.
    """

    noisy = False

    def __init__(self, split: Labeled, scale: float, shift: float, cond: Literal["label"] | None = None) -> None:
        self.split, self.scale, self.shift, self.cond = split, scale, shift, cond

    def __len__(self) -> int:
        return len(self.split.raw)

    def __getitems__(self, ids: list[int]) -> dict[str, Tensor]:
        rows = torch.tensor(ids)
        batch = {"x1": self.scaled(self.split.raw[rows])}
        if self.cond is not None and self.split.label is not None:
            batch["cond"] = self.split.label[rows]
        return batch

    def scaled(self, raw: Tensor) -> Tensor:
        """Return scale · raw + shift in float32."""
        return raw.to(torch.float32) * self.scale + self.shift


class DataError(Exception):
    """The data cannot be had; the message says which file is missing or damaged and what to do."""


class DataOrderError(ValueError):
    """A run cannot go on with these data: the order of the samples would be another one."""


def _check_continues(saved: Mapping[str, int], found: Mapping[str, int]) -> None:
    """Refuse to go on with another number of samples or another global batch."""
    if saved["n"] != found["n"]:
        raise DataOrderError(
            f"the training set has {found['n']} samples, the checkpoint's had {saved['n']}: the data order cannot "
            "continue; use the same data, or start a new run from the weights with init.from=CHECKPOINT"
        )
    if saved["global_batch"] != found["global_batch"]:
        raise DataOrderError(
            f"batch_size={found['global_batch']}, the checkpoint was written with {saved['global_batch']}: the data "
            f"order cannot continue; set data.batch_size={saved['global_batch']} (the global batch of an optimizer "
            "step, whatever the number of processes), or start a new run from the weights with init.from=CHECKPOINT"
        )


class _Loader(DataLoader[Any]):
    """Loader of training batches; Lightning takes a loader with these two hooks to be resumable, which this one is."""

    batch_sampler: Stream

    def state_dict(self) -> dict[str, int]:
        return self.batch_sampler.facts()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        _check_continues(state, self.state_dict())


def _die_with_parent(_: int) -> None:
    """Let a loading process end with the run, however that ends: after a kill -9 it could wait for ever.

    Linux only (PR_SET_PDEATHSIG); elsewhere torch's own watchdog is all there is.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _whole(batch: Any) -> dict[str, Tensor]:
    """Collate function: `Seeded` hands over stacked tensors."""
    return batch


class DataModule(pl.LightningDataModule, ABC):
    """Base of all data modules: give `shape` (and `scale`, `shift`, `classes`) and the arrays by `load`.

    Batches are dicts: x1 float32 (B, *shape), cond int64 (B,) if asked for, and int64 key, slot and slots (B,).
    Processes, accumulation and position are those of the trainer. Without one (in a notebook) there is one process
    and training batches begin at optimizer step `position`, which the caller advances.

    Args:
        batch_size: the global batch: samples of one optimizer step over all processes and accumulated batches.
        seed: of the order and the keys; it does not choose the samples.
        workers: loading processes per rank; batches do not depend on them.
        cond: "label" hands the class labels to the model.

    Raises:
        ValueError: an argument is out of range.
    """

    shape: tuple[int, ...]
    scale: float = 1.0
    shift: float = 0.0
    classes: int | None = None

    def __init__(self, batch_size: int, seed: int = 0, workers: int = 0, cond: Literal["label"] | None = None) -> None:
        super().__init__()
        if batch_size < 1 or workers < 0:
            raise ValueError(f"batch_size={batch_size} must be at least 1 and workers={workers} at least 0")
        if cond not in (None, "label"):
            raise ValueError(f"cond={cond!r}: expected null or label")
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.cond: Literal["label"] | None = cond
        self.position = 0
        self._splits: Mapping[Split, Labeled] | None = None

    @abstractmethod
    def load(self) -> Mapping[Split, Labeled]:
        """Return the arrays of the splits train, val and test; called once per process."""

    @property
    def info(self) -> dict[str, Any]:
        """Shape, scaling x1 = scale · raw + shift and number of classes, as plain numbers and lists."""
        return {"shape": list(self.shape), "scale": self.scale, "shift": self.shift, "classes": self.classes}

    def setup(self, stage: str | None = None) -> None:
        """Load the arrays once, whatever the stage."""
        if self._splits is None:
            self._splits = self._checked(self.load())

    def ready(self) -> None:
        """Fetch and load the data, so that what is missing or damaged shows before anything is computed.

        Raises:
            DataError: they cannot be had.
        """
        try:
            self.prepare_data()
            self.setup("fit")
        except (OSError, ValueError) as error:
            raise DataError(f"data ({type(self).__name__}): {error}") from error

    def summary(self) -> str:
        """Return one line on the samples and the order; it loads them."""
        sizes = {split: self.size(split) for split in SPLITS}
        samples = " + ".join(f"{size} {split}" for split, size in sizes.items())
        order = f"{self.batch_size} a step, {sizes['train'] // self.batch_size} steps an epoch"
        noisy = Seeded(self.dataset("train"), 0, 0).noisy
        noise = "; own noise: resumes exactly on as many processes only" if noisy else ""
        return f"{type(self).__name__}, {samples}, shape {self.shape}, {order}{noise}"

    def dataset(self, split: Split) -> Dataset[Any]:
        """Return the samples of a split; override it where they are not arrays or are augmented (see `Seeded`)."""
        return Arrays(self._split(split), self.scale, self.shift, self.cond)

    def size(self, split: Split) -> int:
        """Return the number of samples in a split."""
        return _size(self.dataset(split))

    def arrays(self, split: Split) -> dict[str, Tensor]:
        """Return a whole split: x1 float32 (n, *shape) and, where there are labels, label int64 (n,)."""
        part = self._split(split)
        whole = {"x1": Arrays(part, self.scale, self.shift).scaled(part.raw)}
        return whole if part.label is None else {**whole, "label": part.label}

    def train_dataloader(self) -> DataLoader[Any]:
        """Return this rank's training batches from the present optimizer step on.

        Under a trainer they never end, because everything is counted in steps; without one they end with the epoch.
        """
        data, (rank, world, accumulate) = self.dataset("train"), self._place()
        endless = self.trainer is not None
        stream = Stream(_size(data), self.batch_size, self.seed, rank, world, accumulate, self._position, endless)
        return self._loader(_Loader, Seeded(data, self.seed, self.batch_size, rank), stream)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return this rank's share of the validation samples, in order, with the same keys every time."""
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return this rank's share of the test samples, in order, with the same keys every time."""
        return self._evaluation("test")

    def state_dict(self) -> dict[str, int]:
        """Return what a resumed run must have in common with this one: n and global_batch."""
        return {"n": self.size("train"), "global_batch": self.batch_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse another number of training samples or another global batch; the position is the trainer's step."""
        _check_continues(state_dict, self.state_dict())

    def _split(self, split: Split) -> Labeled:
        """The arrays of a split, loaded if need be."""
        if self._splits is None:
            if self.trainer is None:
                self.prepare_data()
            self.setup()
        assert self._splits is not None
        if split not in self._splits:
            raise ValueError(f"no split {split!r}: expected one of {', '.join(self._splits)}")
        return self._splits[split]

    def _checked(self, splits: Mapping[Split, Labeled]) -> Mapping[Split, Labeled]:
        """Hold what a subclass loads against what it says of itself, and cond against the labels."""
        name = type(self).__name__
        for split in SPLITS:
            if split not in splits:
                raise ValueError(f"{name}.load gives {', '.join(splits) or 'nothing'}: {split} is missing")
            raw, label = splits[split]
            if raw.shape[1:] != self.shape:
                raise ValueError(f"{name}: {split} samples have shape {tuple(raw.shape[1:])}, expected {self.shape}")
            if label is None and self.cond is not None:
                raise ValueError(f"cond={self.cond!r}, but {name} has no labels in {split}: leave cond out")
            if label is not None and (label.shape != raw.shape[:1] or label.dtype != torch.int64):
                raise ValueError(
                    f"{name}: {split} labels are {label.dtype} {tuple(label.shape)}, expected int64 ({len(raw)},)"
                )
        return splits

    def _place(self) -> tuple[int, int, int]:
        """Rank, number of processes, accumulation."""
        if self.trainer is None:
            return 0, 1, 1
        return self.trainer.global_rank, self.trainer.world_size, self.trainer.accumulate_grad_batches

    def _position(self) -> int:
        """Optimizer steps done."""
        return self.position if self.trainer is None else self.trainer.global_step

    def _evaluation(self, split: Split) -> DataLoader[Any]:
        """Loader of this rank's share of `split`."""
        data, (rank, world, accumulate) = self.dataset(split), self._place()
        shard = Shard(split, _size(data), micro_batch(self.batch_size, world, accumulate), rank, world)
        return self._loader(DataLoader, Seeded(data, self.seed, _size(data), rank), shard)

    def _loader(self, kind: type[DataLoader[Any]], data: Seeded, batches: Stream | Shard) -> DataLoader[Any]:
        """A loader of the batches; pinned memory only serves copies to a CUDA device."""
        return kind(
            data,
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=_whole,
            persistent_workers=self.workers > 0,
            worker_init_fn=_die_with_parent,
            pin_memory=torch.cuda.is_available(),
        )


def _size(dataset: Dataset[Any]) -> int:
    """Number of samples; a map-style data set has one, though torch does not type it."""
    return len(dataset)  # type: ignore[arg-type]
