"""What every test starts from: no account, no network, nothing left behind."""

import os
from pathlib import Path

import pytest

DATA = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """Hide the developer's W&B login and settings, and keep W&B offline."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))


@pytest.fixture
def real_data():
    """The folder of real data sets, or a skip that says how to have it."""
    folder = Path(os.environ.get("NDEFLOW_DATA", DATA))
    if not folder.is_dir():
        pytest.skip("no real data here: set NDEFLOW_DATA to a folder with mnist.npz")
    return folder
