"""A tiny MNIST in each of its formats."""

import gzip

import numpy as np
import pytest

FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}


@pytest.fixture(scope="session")
def tiny_arrays():
    rng = np.random.default_rng(0)
    images = {f"x_{s}": rng.integers(0, 256, (n, 28, 28), dtype=np.uint8) for s, n in (("train", 60), ("test", 20))}
    labels = {f"y_{s}": np.arange(n, dtype=np.uint8) % 10 for s, n in (("train", 60), ("test", 20))}
    return images | labels


def idx(array):
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


@pytest.fixture
def write_mnist():
    def write(folder, arrays, form):
        folder.mkdir(exist_ok=True)
        if form == "npz":
            np.savez_compressed(folder / "mnist.npz", **arrays)
        for key, file in FILES.items():
            if form == "raw":
                (folder / file).write_bytes(idx(arrays[key]))
            elif form == "gz":
                (folder / f"{file}.gz").write_bytes(gzip.compress(idx(arrays[key]), mtime=0))
        return folder

    return write
