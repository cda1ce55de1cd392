"""Processes that torchrun has started begin together or not at all: none waits for one that has refused."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from ndeflow.config import ConfigError
from ndeflow.training.signals import CONFIG, FAILURE

PATIENCE = timedelta(minutes=30)  # one process may have to download the data first


class Refused(BaseException):
    """Another process has refused to begin, and said why.

    Args:
        exit_code: its exit code, with which to leave too.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"another process left with exit code {exit_code}")
        self.exit_code = exit_code


def _store() -> dist.Store | None:
    """The store that torchrun keeps for its processes from the first; other launchers have none."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=PATIENCE)
    return dist.PrefixStore(f"ndeflow/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


@contextmanager
def together() -> Iterator[None]:
    """Tell the other processes if this one leaves the block by an error, with which exit code."""
    try:
        yield
    except BaseException as error:
        if store := _store():
            # The first to leave makes torchrun send SIGTERM to the others: leave with our own code all the same.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            store.set(os.environ["RANK"], str(CONFIG if isinstance(error, ConfigError) else FAILURE))
        raise


def ready() -> None:
    """Say that this process can begin, and wait until all can.

    Raises:
        Refused: another process cannot.
    """
    if (store := _store()) is None:
        return
    store.set(os.environ["RANK"], "0")
    for rank in map(str, range(int(os.environ["WORLD_SIZE"]))):
        if code := int(store.get(rank)):
            raise Refused(code)
