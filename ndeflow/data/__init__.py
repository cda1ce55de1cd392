"""Data sets as LightningDataModules that yield dict batches, exact to resume on any number of processes."""

from ndeflow.data.digits import Digits
from ndeflow.data.loading import Arrays, DataModule, Labeled
from ndeflow.data.mnist import MNIST
from ndeflow.data.stream import Seeded, Shard, Stream, micro_batch
from ndeflow.data.toys import Checkerboard, EightGaussians, Pinwheel, Spirals, TwoMoons

__all__ = [
    "MNIST",
    "Arrays",
    "Checkerboard",
    "DataModule",
    "Digits",
    "EightGaussians",
    "Labeled",
    "Pinwheel",
    "Seeded",
    "Shard",
    "Spirals",
    "Stream",
    "TwoMoons",
    "micro_batch",
]
