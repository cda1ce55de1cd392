"""MNIST and Fashion-MNIST: 28×28 gray images of ten classes, from IDX files or an .npz file."""

from __future__ import annotations

import gzip
import lzma
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ndeflow.data.files import cache_folder, check_sha256, download
from ndeflow.data.loading import DataModule, Labeled
from ndeflow.data.stream import Split

Variant = Literal["mnist", "fashion_mnist"]
_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
_MIRRORS = {
    "mnist": (
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
    ),
    "fashion_mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
}
# SHA-256 of the .gz files as recorded by TensorFlow Datasets (url_checksums/mnist.txt, fashion_mnist.txt).
_SHA256 = {
    "mnist": {
        "x_train": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "y_train": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "x_test": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "y_test": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    },
    "fashion_mnist": {
        "x_train": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "y_train": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "x_test": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "y_test": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    },
}


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of bytes (magic number 0, 0, 8, rank; big-endian sizes; the bytes), gzipped or not.

    Raises:
        ValueError: the file is no such file or is cut short; the message names it, what it holds and what it should.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): get it again") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise ValueError(
            f"{path} begins with {data[:4].hex(' ')}, expected 00 00 08 and the rank: no IDX file of bytes"
        )
    start = 4 + 4 * data[3]
    shape = struct.unpack(f">{data[3]}I", data[4:start])
    body = np.frombuffer(data, np.uint8, offset=start)
    if body.size != np.prod(shape):
        raise ValueError(f"{path} holds {body.size} bytes after its header, expected {np.prod(shape)} for {shape}")
    return body.reshape(shape)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """The four arrays of an .npz file, each decoded once."""
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in _FILES if key not in file]
            if not missing:
                return {key: file[key] for key in _FILES}
            found = ", ".join(file) or "nothing"
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): get it again") from error
    raise ValueError(f"{path} holds {found}; expected {', '.join(_FILES)}: missing {', '.join(missing)}")


def _check(arrays: Mapping[str, np.ndarray], where: Mapping[str, Path]) -> None:
    """Refuse images that are not 28×28 bytes and labels that do not fit them."""
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.dtype != np.uint8 or x.ndim != 3 or x.shape[1:] != (28, 28):
            raise ValueError(f"{where[f'x_{part}']}: images are {x.dtype} {x.shape}, expected uint8 (n, 28, 28)")
        if y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer):
            raise ValueError(f"{where[f'y_{part}']}: labels are {y.dtype} {y.shape}, expected integers {x.shape[:1]}")
        if y.size and (y.min() < 0 or y.max() > 9):
            raise ValueError(f"{where[f'y_{part}']}: labels run from {y.min()} to {y.max()}, expected 0 to 9")


class MNIST(DataModule):
    """70,000 gray images of ten classes: digits (`mnist`) or articles of clothing (`fashion_mnist`).

    x1 has shape (1, 28, 28) and range [−1, 1] (gray levels / 127.5 − 1; kept as bytes and scaled per batch). The last
    twelfth of the training file (5,000 of 60,000) is for validation, the test file for testing.

    A folder may hold the four IDX files (train-images-idx3-ubyte and so on), raw or with .gz, or `mnist.npz`
    (`fashion_mnist.npz`) with x_train, y_train, x_test, y_test. Files with .gz must be the published ones and are
    checked against their SHA-256; raw and .npz files are checked for shape and range only and may hold fewer images.
    Folders are searched in this order: `root` alone if given; $NDEFLOW_DATA; the cache, $XDG_CACHE_HOME/ndeflow/VARIANT
    (~/.cache/ndeflow/VARIANT), into which the files are downloaded if nobody has them.

    Args:
        batch_size: the global batch of an optimizer step.
        seed: of the order and the keys.
        workers: loading processes per rank.
        cond: "label" hands the class to the model.
        root: folder of the files; nothing is downloaded into it.
        variant: which of the two sets.
        train_size: train on the first so many images only; validation and test stay whole.

    Raises:
        ValueError: the variant is unknown or train_size < 1.

    Reference:
        LeCun, Bottou, Bengio, Haffner: "Gradient-based learning applied to document recognition", 1998;
        Xiao, Rasul, Vollgraf: "Fashion-MNIST", arXiv:1708.07747.
    """

    shape = (1, 28, 28)
    scale, shift = 1 / 127.5, -1.0
    classes = 10

    def __init__(
        self,
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        cond: Literal["label"] | None = None,
        root: str | None = None,
        variant: Variant = "mnist",
        train_size: int | None = None,
    ) -> None:
        super().__init__(batch_size, seed, workers, cond)
        if variant not in _SHA256:
            raise ValueError(f"variant={variant!r}: expected one of {', '.join(_SHA256)}")
        if train_size is not None and train_size < 1:
            raise ValueError(f"train_size={train_size} must be at least 1, or null for all images")
        self.root, self.variant, self.train_size = root, variant, train_size

    def prepare_data(self) -> None:
        """Download the files if no folder has them (Lightning calls this in one process per machine)."""
        if self._find():
            return
        folder = cache_folder(self.variant)
        try:
            for key, file in _FILES.items():
                download(file + ".gz", _MIRRORS[self.variant], folder, _SHA256[self.variant][key])
        except OSError as error:
            raise FileNotFoundError(f"{self._missing(folder)}. The download failed: {error}") from error

    def load(self) -> Mapping[Split, Labeled]:
        """Read and check the files."""
        where = self._find()
        if not where:
            raise FileNotFoundError(self._missing(cache_folder(self.variant)))
        arrays = self._read(where)
        _check(arrays, where)
        train, test = ((arrays[f"x_{part}"][:, None], arrays[f"y_{part}"]) for part in ("train", "test"))
        cut = len(train[0]) - len(train[0]) // 12
        size = cut if self.train_size is None else self.train_size
        if size > cut:
            raise ValueError(f"train_size={size}, but there are {cut} training images in {where['x_train']}")
        pieces: dict[Split, tuple[tuple[np.ndarray, np.ndarray], slice]] = {
            "train": (train, slice(size)),
            "val": (train, slice(cut, None)),
            "test": (test, slice(None)),
        }
        return {
            split: Labeled(torch.tensor(x[rows]), torch.tensor(y[rows], dtype=torch.int64))
            for split, ((x, y), rows) in pieces.items()
        }

    def _read(self, where: Mapping[str, Path]) -> dict[str, np.ndarray]:
        """The four arrays; published files are checked first."""
        if where["x_train"].suffix == ".npz":
            return _read_npz(where["x_train"])
        for key, path in where.items():
            if path.suffix == ".gz":
                check_sha256(path, _SHA256[self.variant][key])
        return {key: read_idx(path) for key, path in where.items()}

    def _find(self) -> dict[str, Path] | None:
        """The file of each array in the first folder that has them all; None if the cache is to be filled."""
        variable = os.environ.get("NDEFLOW_DATA")
        option, folder = ("root", self.root) if self.root else ("NDEFLOW_DATA", variable)
        if folder:
            if not Path(folder).is_dir():
                raise FileNotFoundError(f"{option}={folder} does not exist. {self._wanted(folder)}")
            if (found := self._files(Path(folder))) or self.root is None:
                return found or self._files(cache_folder(self.variant))
            raise FileNotFoundError(f"root={folder} does not hold the data. {self._wanted(folder)}")
        return self._files(cache_folder(self.variant))

    def _files(self, folder: Path) -> dict[str, Path] | None:
        """The file of each array in a folder, if it has them all."""
        if (npz := folder / f"{self.variant}.npz").is_file():
            return dict.fromkeys(_FILES, npz)
        found = {key: p for key, file in _FILES.items() for p in (folder / f"{file}.gz", folder / file) if p.is_file()}
        return found if len(found) == len(_FILES) else None

    def _wanted(self, folder: Path | str) -> str:
        """What to put where."""
        return (
            f"Put {self.variant}.npz (with {', '.join(_FILES)}) or {', '.join(f + '.gz' for f in _FILES.values())} "
            f"into {folder}, or set data.root or the environment variable NDEFLOW_DATA to a folder that has them"
        )

    def _missing(self, folder: Path) -> str:
        """The message for data that is nowhere."""
        return f"no folder has the data set {self.variant}. {self._wanted(folder)}"
