"""From a checkpoint to a ready model: in a notebook, for sampling, for evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ndeflow import config as configs
from ndeflow.modules.base import Module
from ndeflow.training import export, files

Weights = Literal["ema", "raw"]


def load(
    path: str | Path,
    weights: Weights = "ema",
    map_location: str | torch.device = "cpu",
    plugins: Sequence[str] = (),
) -> Module:
    """Return the module of a checkpoint, in eval mode, with the averaged or the raw weights.

    Loading draws no random numbers from the global generators.

    Args:
        path: a checkpoint file, a run directory (its best checkpoint where one was kept, else the newest), or a
            file of `ndeflow export`, which holds one kind of weights.
        weights: `"ema"` or `"raw"`.
        map_location: device of the result.
        plugins: packages of your own that the checkpoint may build from. A checkpoint that needs others is
            refused: its config would otherwise decide which code runs here.

    Raises:
        CheckpointError: nothing there, damaged, not of ndeflow, or without the weights asked for.
        ConfigError: the stored config names a class that is not allowed or no longer fits.
    """
    return restore(read(path), weights, str(path), plugins).to(map_location)


def read(path: str | Path) -> dict[str, Any]:
    """Read the checkpoint meant by a path, or an export as what it has of one.

    Raises:
        CheckpointError: nothing there, damaged, or not of ndeflow.
    """
    path = files.locate(path)
    return export.read(path) if path.suffix == export.SUFFIX else files.read(path)


def trusted(checkpoint: Mapping[str, Any], source: str, plugins: Sequence[str]) -> dict[str, Any]:
    """Return the config of a checkpoint, if the caller agrees to the packages that it needs.

    Raises:
        CheckpointError: it needs others.
    """
    config = checkpoint["ndeflow"]["config"]
    if unknown := [name for name in config.get("plugins") or () if name not in plugins]:
        raise files.CheckpointError(
            f"{source} runs code of {', '.join(unknown)}: if you trust it, say so by plugins=[{','.join(unknown)}]"
        )
    return config


def restore(checkpoint: dict[str, Any], weights: Weights, source: str, plugins: Sequence[str] = ()) -> Module:
    """Build the module that a checkpoint describes and put its weights in."""
    config = trusted(checkpoint, source, plugins)
    with torch.random.fork_rng(devices=[]):
        module = configs.build(config["module"], "module", plugins)
    if not isinstance(module, Module):
        raise files.CheckpointError(f"{source}: module is a {type(module).__name__}, not a module of ndeflow")
    module.load_state_dict(pick(checkpoint, weights, source))
    module.data_info = checkpoint["ndeflow"]["data"]
    return module.eval()


def pick(checkpoint: dict[str, Any], weights: Weights, source: str) -> dict[str, torch.Tensor]:
    """Return the state dict asked for: raw, or raw with the averaged parameters over it; tied weights stay tied.

    Raises:
        CheckpointError: the source does not have the weights asked for.
    """
    state = dict(checkpoint["state_dict"])
    held = checkpoint["ndeflow"].get("weights", weights)  # only an export holds one kind alone
    if held != weights:
        raise files.CheckpointError(f"{source} holds {held} weights only: use weights={held}, or export {weights} ones")
    if weights == "raw" or "weights" in checkpoint["ndeflow"]:
        return state
    if "ema" not in checkpoint:
        raise files.CheckpointError(f"{source} has no averaged weights (the run had no ema.decay): use weights=raw")
    average, aliases = checkpoint["ema"]["weights"], export.tied(state)
    state |= {name: value.to(state[name].dtype) for name, value in average.items()}
    return state | {name: state[owner] for name, owner in aliases.items()}
