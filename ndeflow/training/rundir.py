"""A run is a directory: what is in it, who may use it, and whether a command continues it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ndeflow.config import ConfigError
from ndeflow.training import files

State = Literal["running", "preempted", "interrupted", "finished", "failed"]

# Differences in these keys do not make another experiment.
_FREE = (
    *("run", "vars", "checkpoints", "wandb", "report", "resume", "data.root", "data.workers"),
    *("trainer.max_steps", "trainer.devices", "trainer.num_nodes", "trainer.accelerator", "trainer.strategy"),
    "trainer.accumulate_grad_batches",
)


@dataclass(frozen=True)
class Run:
    """Where a run lives: the `run` section of a config.

    Args:
        name: name of the run directory, by default that of the config file.
        root: folder of run directories.
        overwrite: delete what an earlier run left in the directory.

    Raises:
        ValueError: a name that is not one component of a path.
    """

    name: str | None = None
    root: str = "runs"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.name is not None and (self.name in ("", ".", "..") or "/" in self.name):
            raise ValueError(f"name={self.name!r}: give the name of one folder in run.root, or leave it out")


def is_rank_zero() -> bool:
    """Whether this process is the one that writes, under any launcher and before it is set up."""
    return all(os.environ.get(k, "0") == "0" for k in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK"))


class RunDirectory:
    """The directory of a run.

    `config.yaml command.txt state wandb_id metrics.jsonl train.log`, `ckpt/` (`step_*.ckpt`, `best.ckpt`), `media/`,
    `report/` and `wandb/`. `state` is one word: running, preempted, interrupted, finished or failed.

    Args:
        path: the directory; made by `open`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._made = False
        self._lock: Any = None

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "ckpt"

    @property
    def report(self) -> Path:
        """The folder of the final report."""
        return self.path / "report"

    @property
    def state(self) -> str:
        """The word in `state`, empty in a directory that no run was started in."""
        path = self.path / "state"
        return path.read_text().strip() if path.is_file() else ""

    @property
    def used(self) -> bool:
        """Whether an earlier start got as far as a checkpoint."""
        return bool(files.step_files(self.checkpoints))

    def open(self, overwrite: bool) -> None:
        """Make and lock the directory.

        Raises:
            ConfigError: the directory cannot be written, another process uses it, or `overwrite` would
                delete something that is no run.
        """
        self._made = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            if overwrite:
                self._clear()
        except OSError as error:
            raise ConfigError(
                f"cannot write run directory {self.path} ({error.strerror}): set run.root=DIR to a folder you may write"
            ) from error

    def _take_lock(self) -> None:
        """Hold a lock that the kernel drops with the process, however it ends."""
        self._lock = (self.path / "lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "unknown"
            self._lock.close()
            self._lock = None
            raise ConfigError(
                f"{self.path} is in use by another process ({owner}): wait for it, or run.name=NEW starts another run"
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {os.uname().nodename}")
        self._lock.flush()

    def _clear(self) -> None:
        """Delete an earlier run, and nothing that is not one."""
        found = [p for p in self.path.iterdir() if p.name != "lock"]
        if found and not (self.path / "state").is_file():
            raise ConfigError(f"run.overwrite=true, but {self.path} holds no run: delete it yourself, or run.name=NEW")
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def write_state(self, state: State) -> None:
        """Say how the run stands, for job scripts."""
        temporary = self.path / "state.tmp"
        temporary.write_text(state + "\n")
        os.replace(temporary, self.path / "state")

    def close(self) -> None:
        """Release the lock; a directory that a start has made for nothing goes with it."""
        if self._lock is None:
            return
        if self._made and [p.name for p in self.path.glob("*")] == ["lock"]:
            (self.path / "lock").unlink()
            self.path.rmdir()
        self._lock.close()
        self._lock = None


def run_name(settings: Run, default: str) -> str:
    """Return the run's name: as set, else the default, with the trial's id inside a sweep."""
    name = settings.name or default
    return f"{name}-{os.environ['WANDB_RUN_ID']}" if os.environ.get("WANDB_SWEEP_ID") else name


@dataclass(frozen=True)
class Start:
    """Where a run begins: afresh, or after the checkpoint of `step` optimizer steps, with what it says of itself."""

    checkpoint: Path | None = None
    step: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)


def decide(directory: RunDirectory, config: Mapping[str, Any], overwrite: bool) -> Start:
    """Decide from the directory and `config["resume"]` where the run begins; the same on every process.

    `auto` continues a directory that holds checkpoints of the same config, else begins afresh. `none`
    begins afresh and refuses a used directory. A path continues that checkpoint with the values of the
    config as it is now.

    Raises:
        ConfigError: the directory holds another run, or a named checkpoint is missing or of another model.
        CheckpointError: a checkpoint is unreadable.
    """
    resume = str(config.get("resume", "auto"))
    if resume not in ("auto", "none"):
        path = files.locate(resume) if Path(resume).is_file() else _newest(Path(resume))
        checkpoint = files.read(path)
        _same_class(checkpoint["ndeflow"]["config"], config, path)
        if config.get("init") and "parent" not in checkpoint["ndeflow"]:
            raise ConfigError(f"resume={resume} goes on with a run, init.from begins a new one: give one of them")
        return Start(path, checkpoint["global_step"], checkpoint["ndeflow"])
    if overwrite or not directory.used:
        return Start()
    if resume == "none":
        raise ConfigError(
            f"{directory.path} holds a run already: run.name=NEW starts another, resume=auto continues this one, "
            "run.overwrite=true deletes it"
        )
    found = files.latest(directory.checkpoints, retire=is_rank_zero())
    assert found is not None
    path, checkpoint = found
    if changes := list(differences(checkpoint["ndeflow"]["config"], config)):
        raise ConfigError(
            f"{directory.path} holds a run with another config ({'; '.join(changes)}): run.name=NEW starts another, "
            f"resume={directory.path} continues this one with the new values, run.overwrite=true deletes it"
        )
    return Start(path, checkpoint["global_step"], checkpoint["ndeflow"])


def _newest(path: Path) -> Path:
    """The newest step file of a run directory or ckpt folder: training goes on from there, not from the best."""
    for folder in (path / "ckpt", path):
        if found := files.latest(folder):
            return found[0]
    return files.locate(path)


def _same_class(stored: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> None:
    """Refuse a checkpoint of another class."""
    was, now = stored["module"]["_target_"], config["module"]["_target_"]
    if was != now:
        raise ConfigError(f"{path} is a checkpoint of {was}, the config builds {now}: they cannot be the same run")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yield `key old -> new` for every value that makes the configs different experiments."""
    a, b = dict(_flat(old)), dict(_flat(new))
    for key in sorted({*a, *b}):
        if not any(key == free or key.startswith(f"{free}.") for free in _FREE) and a.get(key) != b.get(key):
            yield f"{key} {a.get(key, 'unset')} -> {b.get(key, 'unset')}"


def _flat(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested containers with their dotted keys."""
    if isinstance(node, Mapping) and node:
        for name, value in node.items():
            yield from _flat(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list | tuple) and node:
        for i, value in enumerate(node):
            yield from _flat(value, f"{key}[{i}]")
    else:
        yield key, node
