"""Finding data files: the user's folders, the cache, and downloads that are checked and atomic."""

from __future__ import annotations

import hashlib
import os
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path

_BLOCK = 1 << 20


def cache_folder(name: str) -> Path:
    """Return where downloads of the data set `name` are kept: $XDG_CACHE_HOME/ndeflow/name, else ~/.cache/…."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ndeflow" / name


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file with another SHA-256 checksum.

    Raises:
        ValueError: naming the file, the checksum found and the one expected.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ValueError(
            f"{path} has SHA-256 {found}, expected {expected}: it is damaged or another file; delete it and get it "
            "again"
        )


def download(name: str, mirrors: Sequence[str], folder: Path, sha256: str) -> Path:
    """Fetch a file into a folder from the first mirror that has it; nothing is left behind unless it is whole.

    The file is written under another name, checked and then renamed, so that processes that start together
    cannot read each other's halves.

    Args:
        name: of the file.
        mirrors: addresses to which `name` is appended.
        folder: created if need be.
        sha256: of the file.

    Returns:
        The path of the file.

    Raises:
        ConnectionError: no mirror gave the file; the message has the reason of each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    reasons = []
    for mirror in mirrors:
        handle, part = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
        try:
            with os.fdopen(handle, "wb") as out, urllib.request.urlopen(mirror + name, timeout=60) as source:
                while block := source.read(_BLOCK):
                    out.write(block)
            check_sha256(Path(part), sha256)
            os.replace(part, folder / name)
            return folder / name
        except (OSError, ValueError) as error:
            reasons.append(f"{mirror + name}: {error}")
        finally:
            Path(part).unlink(missing_ok=True)
    raise ConnectionError("; ".join(reasons))
