"""Metrics on arrays and tensors only; distances come with their sampling floor."""

from ndeflow.metrics.distances import (
    Distance,
    nearest_distance,
    wasserstein2,
    wasserstein2_distance,
    wasserstein2_floor,
)
from ndeflow.metrics.shares import ClassShares, class_shares

__all__ = [
    "ClassShares",
    "Distance",
    "class_shares",
    "nearest_distance",
    "wasserstein2",
    "wasserstein2_distance",
    "wasserstein2_floor",
]
