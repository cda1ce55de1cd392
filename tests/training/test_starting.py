import signal

import pytest
import torch.distributed as dist

from ndeflow.config import ConfigError
from ndeflow.training.starting import Refused, ready, together


@pytest.fixture
def store():
    """What torchrun keeps for its processes."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def as_rank(store, monkeypatch):
    """Be one of three processes of torchrun."""
    handler = signal.getsignal(signal.SIGTERM)
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": "True"}

    def be(rank, restart=0):
        for name, value in {**variables, "TORCHELASTIC_RESTART_COUNT": restart, "RANK": rank, "WORLD_SIZE": 3}.items():
            monkeypatch.setenv(name, str(value))

    yield be
    signal.signal(signal.SIGTERM, handler)


def refuse(error):
    with pytest.raises(type(error)), together():
        raise error


@pytest.mark.parametrize(("error", "code"), [(ConfigError("locked"), 2), (OSError("no data"), 1), (SystemExit(), 1)])
def test_the_refusal_of_one_process_is_the_exit_code_of_all(as_rank, error, code):
    as_rank(0)
    refuse(error)
    for rank in (1, 2):  # neither waits for the other
        as_rank(rank)
        with pytest.raises(Refused) as refused:
            ready()
        assert refused.value.exit_code == code


def test_all_begin_when_all_are_ready_whatever_was_before_a_restart(as_rank, store):
    as_rank(0)
    refuse(OSError())
    for rank in ("0", "2"):
        store.set(f"ndeflow/1/{rank}", "0")
    as_rank(1, restart=1)
    ready()


def test_alone_nobody_is_asked():
    refuse(ConfigError("x"))
    ready()
