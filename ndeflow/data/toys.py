r"""Toy densities in the plane: fixed seeded sets of points, drawn from keys.

Point i has class i mod K, so that the classes are balanced, and is computed from U ~ U[0, 1)² and z ~ N(0, I₂) drawn
by the key `fold(data_seed, name, i)`: the set follows from (name, data_seed) alone, a longer one begins with a shorter
one, and the seed of a run does not touch it. Of `n` points, a tenth each is for validation and test. `raw` holds the
textbook coordinates given below; x1 = scale · raw with scale = √(2 / E|raw|²), so that every toy has mean square 1 per
coordinate, like a standard normal source.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from ndeflow.data.loading import DataModule, Labeled
from ndeflow.data.stream import Split
from ndeflow.randomness import fold, normal, uniform

Points = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Label (n,), U (n, 2), z (n, 2) to points (n, 2)."""


def _splits(name: str, n: int, data_seed: int, classes: int, points: Points) -> Mapping[Split, Labeled]:
    """Draw n points in float64, keep them in float32, and cut them 8 : 1 : 1."""
    index = torch.arange(n)
    keys: Tensor = fold(data_seed, name, index)
    label = index % classes
    u, z = (draw(fold(keys, word), (2,), torch.float64) for draw, word in ((uniform, "u"), (normal, "z")))
    raw = points(label, u, z).float()
    cuts = (n - 2 * (n // 10), n // 10, n // 10)
    train, val, test = map(Labeled, raw.split(cuts), label.split(cuts))
    return {"train": train, "val": val, "test": test}


def _check(n: int, noise: float) -> None:
    """Refuse sets too small to split and negative noise."""
    if n < 10:
        raise ValueError(f"n={n}: a toy needs at least 10 points, a tenth each goes to validation and test")
    if not noise >= 0:
        raise ValueError(f"noise={noise} is a standard deviation and must be at least 0")


def _scale(mean_square: float) -> float:
    """√(2 / E|raw|²): the factor that gives mean square 1 per coordinate."""
    return math.sqrt(2 / mean_square)


def _polar(radius: Tensor | float, angle: Tensor) -> Tensor:
    """Points (n, 2) at the given radius and angle."""
    return torch.stack((angle.cos(), angle.sin()), dim=-1) * torch.as_tensor(radius).unsqueeze(-1)


class TwoMoons(DataModule):
    r"""Two interleaved half circles: raw = ±(cos θ − 1/2, sin θ − 1/4) + noise · z, θ = πU, the sign is the class.

    E|raw|² = 21/16 − 1/π + 2 noise²; without noise raw spans [−3/2, 3/2] × [−3/4, 3/4].

    Args:
        batch_size: the global batch of an optimizer step.
        seed: of the order and the keys.
        workers: loading processes per rank.
        cond: "label" hands the class to the model.
        n: points in all.
        noise: standard deviation around the curves.
        data_seed: of the points.

    Raises:
        ValueError: n < 10 or noise < 0.
    """

    shape = (2,)
    classes: int = 2

    def __init__(
        self,
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        cond: Literal["label"] | None = None,
        n: int = 20_000,
        noise: float = 0.1,
        data_seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, workers, cond)
        _check(n, noise)
        self.n, self.noise, self.data_seed = n, noise, data_seed
        self.scale = _scale(21 / 16 - 1 / math.pi + 2 * noise**2)

    def load(self) -> Mapping[Split, Labeled]:
        """Draw the points."""
        return _splits("two moons", self.n, self.data_seed, self.classes, self._points)

    def _points(self, label: Tensor, u: Tensor, z: Tensor) -> Tensor:
        moon = _polar(1.0, math.pi * u[:, 0]) - torch.tensor([0.5, 0.25])
        return (1 - 2 * label).unsqueeze(-1) * moon + self.noise * z


class EightGaussians(DataModule):
    r"""Eight normal modes on a circle: raw = 4 (cos φ, sin φ) + noise · z, φ = πk/4, k the class.

    E|raw|² = 16 + 2 noise²; neighboring means are 3.06 apart.

    Args:
        batch_size: the global batch of an optimizer step.
        seed: of the order and the keys.
        workers: loading processes per rank.
        cond: "label" hands the mode to the model.
        n: points in all.
        noise: standard deviation of a mode.
        data_seed: of the points.

    Raises:
        ValueError: n < 10 or noise < 0.
    """

    shape = (2,)
    classes: int = 8

    def __init__(
        self,
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        cond: Literal["label"] | None = None,
        n: int = 20_000,
        noise: float = 0.5,
        data_seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, workers, cond)
        _check(n, noise)
        self.n, self.noise, self.data_seed = n, noise, data_seed
        self.scale = _scale(16 + 2 * noise**2)

    def load(self) -> Mapping[Split, Labeled]:
        """Draw the points."""
        return _splits("eight Gaussians", self.n, self.data_seed, self.classes, self._points)

    def _points(self, label: Tensor, u: Tensor, z: Tensor) -> Tensor:
        return _polar(4.0, label * (math.pi / 4)) + self.noise * z


class Pinwheel(DataModule):
    r"""Five bent arms: (1 + 0.3 z₁, noise · z₂), turned by 2πk/5 + exp(1 + 0.3 z₁)/4, k the class.

    E|raw|² = 1.09 + noise², since turning keeps lengths.

    Args:
        batch_size: the global batch of an optimizer step.
        seed: of the order and the keys.
        workers: loading processes per rank.
        cond: "label" hands the arm to the model.
        n: points in all.
        noise: standard deviation across an arm.
        data_seed: of the points.

    Raises:
        ValueError: n < 10 or noise < 0.
    """

    shape = (2,)
    classes: int = 5

    def __init__(
        self,
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        cond: Literal["label"] | None = None,
        n: int = 20_000,
        noise: float = 0.1,
        data_seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, workers, cond)
        _check(n, noise)
        self.n, self.noise, self.data_seed = n, noise, data_seed
        self.scale = _scale(1.09 + noise**2)

    def load(self) -> Mapping[Split, Labeled]:
        """Draw the points."""
        return _splits("pinwheel", self.n, self.data_seed, self.classes, self._points)

    def _points(self, label: Tensor, u: Tensor, z: Tensor) -> Tensor:
        along, across = 1 + 0.3 * z[:, 0], self.noise * z[:, 1]
        angle = label * (2 * math.pi / 5) + along.exp() / 4
        return _polar(along, angle) + _polar(across, angle + math.pi / 2)


class Checkerboard(DataModule):
    r"""Uniform on the 8 dark unit squares of a 4 × 4 board on [−2, 2]²; the class is the square.

    E|raw|² = 8/3: each coordinate alone is uniform on [−2, 2].

    Args:
        batch_size: the global batch of an optimizer step.
        seed: of the order and the keys.
        workers: loading processes per rank.
        cond: "label" hands the square to the model.
        n: points in all.
        data_seed: of the points.

    Raises:
        ValueError: n < 10.
    """

    shape = (2,)
    classes: int = 8
    scale = _scale(8 / 3)

    def __init__(
        self,
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        cond: Literal["label"] | None = None,
        n: int = 20_000,
        data_seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, workers, cond)
        _check(n, noise=0.0)
        self.n, self.data_seed = n, data_seed

    def load(self) -> Mapping[Split, Labeled]:
        """Draw the points."""
        return _splits("checkerboard", self.n, self.data_seed, self.classes, self._points)

    @staticmethod
    def _points(label: Tensor, u: Tensor, z: Tensor) -> Tensor:  # noqa: ARG004
        column = label // 2
        row = 2 * (label % 2) + column % 2
        return torch.stack((column, row), dim=-1) - 2 + u


class Spirals(DataModule):
    r"""Two arms of one and a half turns: raw = ±√U (cos 3π√U, sin 3π√U) + noise · z, the sign is the class.

    E|raw|² = 1/2 + 2 noise²; without noise the arms end on the unit circle.

    Args:
        batch_size: the global batch of an optimizer step.
        seed: of the order and the keys.
        workers: loading processes per rank.
        cond: "label" hands the arm to the model.
        n: points in all.
        noise: standard deviation around the arms.
        data_seed: of the points.

    Raises:
        ValueError: n < 10 or noise < 0.
    """

    shape = (2,)
    classes: int = 2

    def __init__(
        self,
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        cond: Literal["label"] | None = None,
        n: int = 20_000,
        noise: float = 0.02,
        data_seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, workers, cond)
        _check(n, noise)
        self.n, self.noise, self.data_seed = n, noise, data_seed
        self.scale = _scale(0.5 + 2 * noise**2)

    def load(self) -> Mapping[Split, Labeled]:
        """Draw the points."""
        return _splits("spirals", self.n, self.data_seed, self.classes, self._points)

    def _points(self, label: Tensor, u: Tensor, z: Tensor) -> Tensor:
        radius = u[:, 0].sqrt()
        return (1 - 2 * label).unsqueeze(-1) * _polar(radius, 3 * math.pi * radius) + self.noise * z
