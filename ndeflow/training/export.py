"""Weights for other programs: a safetensors file that says what it holds, and that `ndeflow.load` reads back."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, uint8

from ndeflow.training.files import FORMAT, CheckpointError, NoCheckpoint

SUFFIX = ".safetensors"
_FACTS = ("version", "commit", "config", "data", "run")


def write(
    checkpoint: Mapping[str, Any], state: Mapping[str, Tensor], weights: Literal["ema", "raw"], path: str | Path
) -> None:
    """Write weights and what they mean, atomically: a temporary file in the same folder, fsync, rename.

    The metadata `ndeflow` is JSON: format, code version and commit, config, data (shape and scaling), run, step,
    which weights, a checksum, and `tied`. Tied weights are stored once, under their first name; `tied` maps the
    other names to it, for programs that load the file without ndeflow.

    Args:
        checkpoint: where the weights come from.
        state: the state dict to store.
        weights: whether `state` holds the averaged or the raw weights.
        path: of the file; an earlier export there is replaced.

    Raises:
        CheckpointError: another file is there, or a tensor has a type that safetensors lacks.
        OSError: the folder cannot be written, or the disk is full; an earlier export is untouched.
    """
    path = Path(path)
    _refuse_other_files(path)
    aliases = tied(state)
    # Copies, because safetensors takes neither strided tensors nor different parts of one storage.
    tensors = {name: value.detach().contiguous().clone() for name, value in state.items() if name not in aliases}
    facts = {
        "format": FORMAT,
        **{name: checkpoint["ndeflow"][name] for name in _FACTS},
        "step": checkpoint["global_step"],
        "weights": weights,
        "tied": aliases,
        "checksum": _checksum(tensors),
    }
    _replace(path, _encoded(tensors, facts))


def tied(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return for each name whose tensor is that of an earlier name the earlier one.

    >>> import torch
    >>> w = torch.ones(2, 2)
    >>> tied({"in.weight": w, "mid.weight": w.clone(), "out.weight": w})
    {'out.weight': 'in.weight'}
    """
    first: dict[tuple[Any, ...], str] = {}
    places = {
        name: (t.untyped_storage().data_ptr(), t.storage_offset(), t.shape, t.stride(), t.dtype)
        for name, t in state.items()
        if t.numel()  # empty tensors share the null pointer
    }
    return {name: first[place] for name, place in places.items() if first.setdefault(place, name) != name}


def read(path: str | Path) -> dict[str, Any]:
    """Read an export as what it has of a checkpoint: `ndeflow`, `state_dict` and `global_step`.

    Raises:
        CheckpointError: damaged or of a newer format.
        NoCheckpoint: no export.
    """
    facts = _facts(Path(path))
    tensors = load_file(path)
    if _checksum(tensors) != facts["checksum"]:
        raise CheckpointError(f"{path} is damaged: its checksum does not match; export it again")
    state = {**tensors, **{name: tensors[owner] for name, owner in facts["tied"].items()}}
    return {"ndeflow": facts, "state_dict": state, "global_step": facts["step"]}


def _facts(path: Path) -> dict[str, Any]:
    """What an export says of itself."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("ndeflow")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error})") from error
    if text is None:
        raise NoCheckpoint(f"{path} is a safetensors file of another program: it holds no config of ndeflow")
    facts = json.loads(text)
    if facts["format"] > FORMAT:
        raise CheckpointError(f"{path}: export format {facts['format']} is newer than this ndeflow ({FORMAT}); upgrade")
    return facts


def _refuse_other_files(path: Path) -> None:
    """Refuse to replace anything but an export."""
    if not path.exists():
        return
    try:
        _facts(path)
    except CheckpointError as error:
        raise CheckpointError(f"not overwritten: {error}; give another name, or delete it yourself") from error


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of names and bytes: safetensors itself returns silently altered weights for a flipped bit."""
    total = 0
    for name in sorted(tensors):
        data: Any = tensors[name].reshape(-1).view(uint8).numpy()
        total = zlib.crc32(data, zlib.crc32(name.encode(), total))
    return total


def _encoded(tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> bytes:
    """The bytes of the file."""
    try:
        return save(tensors, {"ndeflow": json.dumps(facts)})
    except KeyError as error:
        names = ", ".join(name for name, value in tensors.items() if value.dtype == error.args[0])
        raise CheckpointError(f"safetensors has no type {error.args[0]}, which {names} has: not exported") from error


def _replace(path: Path, data: bytes) -> None:
    """Write a file whole or not at all. (safetensors' own writer leaves files that only their owner can read.)"""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
