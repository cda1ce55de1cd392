"""Checkpoint files: written atomically, read with their checksums, found newest first."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from ndeflow.config import ConfigError

FORMAT = 1


class CheckpointError(Exception):
    """A checkpoint file cannot be written, read, or used; the message says which and what to do."""


class NoCheckpoint(CheckpointError, ConfigError):
    """A path leads to no checkpoint of ndeflow: what is wrong is the path."""


class DiskFull(CheckpointError):
    """No room for a checkpoint; earlier files are untouched."""


def step_name(step: int) -> str:
    """Return the file name of the checkpoint after `step` optimizer steps; names sort by step."""
    return f"step_{step:08d}.ckpt"


def step_of(path: Path) -> int:
    """Return the number of optimizer steps in the name of a step file."""
    return int(path.stem.removeprefix("step_"))


def step_files(folder: Path) -> list[Path]:
    """Return the step files of a checkpoint folder, oldest first."""
    found = (p for p in folder.glob("step_*.ckpt") if p.stem.removeprefix("step_").isdigit())
    return sorted(found, key=step_of)


def _no_space(error: BaseException | None) -> bool:
    """Whether ENOSPC is the error or what led to it: torch.save hides it behind a RuntimeError."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return True
        error = error.__cause__ or error.__context__
    return False


def _disk_full(path: Path, obj: Any) -> DiskFull:
    """The message for a full disk, with the bytes needed and free."""
    need = sum(t.numel() * t.element_size() for t in _tensors(obj))
    free = shutil.disk_usage(path.parent).free
    earlier = step_files(path.parent)
    last = f"last good checkpoint {earlier[-1].name}" if earlier else "no earlier checkpoint exists"
    return DiskFull(f"disk full writing {path} (needs {need / 1e9:.3g} GB, {free / 1e9:.3g} GB free); {last}")


def _tensors(obj: Any) -> list[torch.Tensor]:
    """All tensors inside nested plain containers."""
    if isinstance(obj, torch.Tensor):
        return [obj]
    if isinstance(obj, dict):
        return [t for value in obj.values() for t in _tensors(value)]
    if isinstance(obj, list | tuple):
        return [t for value in obj for t in _tensors(value)]
    return []


def write(obj: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint atomically: a temporary file in the same folder, fsync, rename.

    Raises:
        DiskFull: no room; the temporary file is removed and every earlier file is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # Through an open file, errno of a full disk stays findable; torch.save(path) loses it.
        with open(temporary, "wb") as file:
            torch.save(obj, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if _no_space(error):
            raise _disk_full(path, obj) from error
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint on the CPU, verifying checksums first.

    `torch.load` ignores the checksums of its own zip container and returns silently altered weights
    for a flipped bit; `testzip` finds it.

    Raises:
        CheckpointError: the file is damaged or of a newer format.
        NoCheckpoint: it is missing, or not a checkpoint of ndeflow.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        raise NoCheckpoint(f"no checkpoint {path}" + (f"; that folder has: {', '.join(near)}" if near else ""))
    try:
        with zipfile.ZipFile(path) as archive:
            if (bad := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"checksum of {bad} does not match")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every way a damaged or foreign file can fail: zip, pickle, torch, OS
        pickled = isinstance(error, pickle.UnpicklingError)
        reason = "it holds pickled objects, not plain tensors" if pickled else str(error).partition("\n")[0]
        raise CheckpointError(
            f"checkpoint {path} is unreadable ({type(error).__name__}: {reason}); give a run directory or another file "
            "of its ckpt/ folder"
        ) from error
    return _checked(checkpoint, path)


def _checked(checkpoint: Any, path: Path) -> dict[str, Any]:
    """The checkpoint, if it is one of ndeflow's and of a format known here."""
    if not isinstance(checkpoint, dict) or "ndeflow" not in checkpoint:
        what = (
            "a Lightning checkpoint of another program"
            if isinstance(checkpoint, dict) and ("pytorch-lightning_version" in checkpoint)
            else "some other torch file"
        )
        raise NoCheckpoint(
            f"{path} is not a checkpoint of ndeflow but {what}: it holds no config to rebuild the model from; "
            "give a run directory or a file from its ckpt/ folder"
        )
    found = checkpoint["ndeflow"]["format"]
    if found > FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {found} is newer than this ndeflow ({FORMAT}); upgrade")
    return checkpoint


def latest(folder: str | Path, retire: bool = False) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest readable step file of a folder and its contents, or None if there is no step file.

    Args:
        folder: the `ckpt` folder of a run.
        retire: rename unreadable files to `*.bad`, so that they never count as kept checkpoints.

    Raises:
        CheckpointError: step files exist, but none can be read.
    """
    files = step_files(Path(folder))
    for path in reversed(files):
        try:
            return path, read(path)
        except CheckpointError as error:
            warnings.warn(f"{error}; trying the one before", stacklevel=2)
            if retire:
                path.rename(path.with_suffix(".ckpt.bad"))
    if files:
        raise CheckpointError(
            f"none of the {len(files)} checkpoints in {folder} can be read; give another one by resume=PATH, or start "
            "again with run.overwrite=true"
        )
    return None


def locate(path: str | Path) -> Path:
    """Return the checkpoint file meant by a path: a file, a run directory, or a ckpt folder.

    A directory means its best checkpoint where one was kept, else the newest.

    Raises:
        CheckpointError: step files are there, but none can be read.
        NoCheckpoint: nothing is there.
    """
    path = Path(path)
    if path.is_file():
        return path
    for folder in (path / "ckpt", path):
        if (folder / "best.ckpt").is_file():
            return folder / "best.ckpt"
        if found := latest(folder):
            return found[0]
    if path.is_dir():
        raise NoCheckpoint(f"{path} holds no checkpoint (looked for ckpt/best.ckpt and ckpt/step_*.ckpt)")
    siblings = sorted(p.name for p in path.parent.iterdir() if p.is_dir()) if path.parent.is_dir() else []
    known = f"; {path.parent} has: {', '.join(siblings)}" if siblings else ""
    raise NoCheckpoint(f"no checkpoint or run directory {path}{known}")
