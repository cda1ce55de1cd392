import numpy as np
import torch

from ndeflow.modules.pictures import image_grid, picture


def test_a_grid_puts_images_row_by_row_with_a_line_between_them():
    x = torch.linspace(-1, 1, 5).reshape(5, 1, 1, 1).expand(5, 1, 64, 64)
    grid = image_grid(x)
    assert grid.shape == (2 * 65 - 1, 3 * 65 - 1)
    assert grid.dtype == np.uint8
    assert [int(grid[10, 10]), int(grid[10, 75]), int(grid[10, 140]), int(grid[75, 10])] == [0, 64, 128, 191]
    assert grid[64].max() == 0


def test_small_images_are_enlarged_and_values_outside_clamped():
    x = torch.full((1, 3, 8, 8), 5.0)
    x[0, 1] = -5.0
    grid = image_grid(x)
    assert grid.shape == (64, 64, 3)
    assert grid[0, 0].tolist() == [255, 0, 255]


def test_points_are_scattered_and_other_data_has_no_picture():
    drawn = picture(torch.randn(50, 2))
    assert drawn is not None
    assert drawn.ndim == 3
    assert drawn.std() > 0
    assert picture(torch.randn(5, 7)) is None
    assert picture(torch.randn(5, 2, 8, 8)) is None
