"""From a checkpoint to a ready model: in a notebook, for sampling, for evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from ndeflow import config as configs
from ndeflow.modules.base import Module
from ndeflow.training import files

Weights = Literal["ema", "raw"]


def load(path: str | Path, weights: Weights = "ema", map_location: str | torch.device = "cpu") -> Module:
    """Return the module of a checkpoint, in eval mode, with the averaged or the raw weights.

    Loading draws no random numbers from the global generators.

    Args:
        path: a checkpoint file or a run directory (its best checkpoint where one was kept, else the newest).
        weights: `"ema"` or `"raw"`.
        map_location: device of the result.

    Raises:
        CheckpointError: nothing there, damaged, not of ndeflow, or without averaged weights.
        ConfigError: the stored config names a class that is not allowed or no longer fits.
    """
    checkpoint = files.read(files.locate(path))
    return restore(checkpoint, weights, str(path)).to(map_location)


def restore(checkpoint: dict[str, Any], weights: Weights, source: str) -> Module:
    """Build the module that a checkpoint describes and put its weights in."""
    config = checkpoint["ndeflow"]["config"]
    with torch.random.fork_rng(devices=[]):
        module = configs.build(config["module"], "module", plugins=config.get("plugins", ()))
    if not isinstance(module, Module):
        raise files.CheckpointError(f"{source}: module is a {type(module).__name__}, not a module of ndeflow")
    module.load_state_dict(pick(checkpoint, weights, source))
    module.data_info = checkpoint["ndeflow"]["data"]
    return module.eval()


def pick(checkpoint: dict[str, Any], weights: Weights, source: str) -> dict[str, torch.Tensor]:
    """Return the state dict asked for: raw, or raw with the averaged parameters over it.

    Raises:
        CheckpointError: averaged weights are asked for and there are none.
    """
    state = dict(checkpoint["state_dict"])
    if weights == "raw":
        return state
    if "ema" not in checkpoint:
        raise files.CheckpointError(f"{source} has no averaged weights (the run had no ema.decay): use weights=raw")
    average = checkpoint["ema"]["weights"]
    return state | {name: value.to(state[name].dtype) for name, value in average.items()}
