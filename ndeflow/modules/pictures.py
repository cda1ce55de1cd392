"""Samples as pictures: a grid of images, or a scatter plot of points in the plane."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def picture(x: Tensor) -> np.ndarray | None:
    """Return samples as one picture, uint8 (H, W) or (H, W, 3), or None for data that has no picture.

    Args:
        x: images in [−1, 1] (values outside are clamped), (n, C, H, W) with C = 1 or 3, or points (n, 2).
    """
    x = x.detach().float().cpu()
    if x.ndim == 4 and x.shape[1] in (1, 3):
        return image_grid(x)
    if x.ndim == 2 and x.shape[1] == 2:
        return scatter(x)
    return None


def image_grid(x: Tensor) -> np.ndarray:
    """Tile images row by row into the squarest grid; small ones are enlarged by whole factors."""
    gray = ((x + 1) / 2).clamp(0, 1).mul(255).round().to(torch.uint8)
    n, channels, height, width = gray.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    tiles = torch.zeros(rows * columns, channels, height + 1, width + 1, dtype=torch.uint8)
    tiles[:n, :, :height, :width] = gray
    grid = tiles.reshape(rows, columns, channels, height + 1, width + 1).permute(0, 3, 1, 4, 2)
    grid = grid.reshape(rows * (height + 1), columns * (width + 1), channels)[:-1, :-1]
    enlarge = max(1, round(64 / height))
    grid = grid.repeat_interleave(enlarge, 0).repeat_interleave(enlarge, 1).numpy()
    return grid[..., 0] if channels == 1 else grid


def scatter(x: Tensor) -> np.ndarray:
    """Draw points in the plane with equal axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.scatter(*x.numpy().T, s=4, alpha=0.5, linewidths=0)
    axes.set_aspect("equal")
    axes.spines[["top", "right"]].set_visible(False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
