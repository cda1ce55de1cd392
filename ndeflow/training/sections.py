"""The sections of a config: which class is the schema of each, and what ndeflow decides itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch

from ndeflow import config as configs
from ndeflow.config import ConfigError
from ndeflow.modules.base import Optim
from ndeflow.training.ema import EMA
from ndeflow.training.finetuning import WarmStart
from ndeflow.training.health import Health
from ndeflow.training.report import Report
from ndeflow.training.rundir import Run
from ndeflow.training.saving import Checkpoints
from ndeflow.training.tracking import Wandb

SCHEMAS: dict[str, type] = {
    "run": Run,
    "optim": Optim,
    "ema": EMA,
    "checkpoints": Checkpoints,
    "health": Health,
    "wandb": Wandb,
    "report": Report,
    "init": WarmStart,
    "trainer": pl.Trainer,
}

# Arguments of Lightning's Trainer that ndeflow decides, and what to set instead.
OWNED = {
    "max_epochs": "trainer.max_steps (everything is counted in optimizer steps)",
    "min_epochs": "trainer.max_steps (everything is counted in optimizer steps)",
    "max_time": "trainer.max_steps, or by a SIGTERM of the job scheduler (the run saves and can go on)",
    "logger": "the section wandb",
    "callbacks": "the section callbacks",
    "enable_checkpointing": "the section checkpoints",
    "enable_model_summary": "the summary at the start",
    "use_distributed_sampler": "the data module, which shards by itself",
    "num_sanity_val_steps": "trainer.val_check_interval",
    "check_val_every_n_epoch": "trainer.val_check_interval, in optimizer steps",
    "default_root_dir": "run.root and run.name",
    "fast_dev_run": "trainer.max_steps=2",
    "limit_train_batches": "trainer.max_steps (training has no epochs to shorten)",
    "overfit_batches": "a data module with few samples",
    "barebones": "trainer.enable_progress_bar=false",
    "reload_dataloaders_every_n_epochs": "the data module, whose order is a function of the step",
}
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true")


def build(config: Mapping[str, Any], name: str) -> Any:
    """Build the object of a section from its schema; an absent section means its defaults."""
    return configs.section(config.get(name), SCHEMAS[name], name, plugins=config.get("plugins") or ())


def check(config: Mapping[str, Any]) -> None:
    """Check every section by name, type and rule before anything is built, written or downloaded.

    Raises:
        ConfigError: with the key, what is allowed, and what to do.
    """
    for name in ("module", "data", "optim", "trainer", "checkpoints"):
        if name not in config:
            raise ConfigError(f"section {name} is missing; see configs/ for complete examples")
    if isinstance(config.get("seed"), bool) or not isinstance(config.get("seed"), int):
        raise ConfigError(f"seed={config.get('seed')}: give an integer; it derives every random draw of the run")
    plugins = config.get("plugins") or ()
    for name, schema in SCHEMAS.items():
        if name == "init" and not config.get("init"):
            continue
        configs.validate(config.get(name), name, plugins, schema, OWNED if name == "trainer" else ())
    configs.validate(config["module"], "module", plugins)
    configs.validate(config["data"], "data", plugins, given=("seed",))
    for name, node in (config.get("callbacks") or {}).items():
        if not isinstance(node, dict) or "_target_" not in node:
            raise ConfigError(f"callbacks.{name}={node}: expected a callback, {{_target_: its class, …}}")
        configs.validate(node, f"callbacks.{name}", plugins)
    _check_trainer(config["trainer"])


def _check_trainer(trainer: Mapping[str, Any]) -> None:
    """Refuse what ndeflow cannot do, and what this machine does not have."""
    steps, interval = trainer.get("max_steps"), trainer.get("val_check_interval")
    if not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"trainer.max_steps={steps}: give the number of optimizer steps to train, at least 1")
    if interval is not None and (not isinstance(interval, int) or interval < 1):
        raise ConfigError(f"trainer.val_check_interval={interval}: give optimizer steps between validations, an int")
    every = trainer.get("log_every_n_steps", 50)
    if every is None or every < 1:
        raise ConfigError(f"trainer.log_every_n_steps={every}: give optimizer steps between rows, at least 1")
    strategy = trainer.get("strategy", "auto")
    if isinstance(strategy, str) and strategy not in STRATEGIES:
        raise ConfigError(
            f"trainer.strategy={strategy} is not supported (allowed: {', '.join(STRATEGIES)}): checkpoints and "
            "averaged weights are not made for sharded or forked processes"
        )
    _check_devices(trainer.get("accelerator", "auto"), trainer.get("devices", "auto"))


def _check_devices(accelerator: Any, devices: Any) -> None:
    """Refuse devices that this machine lacks, by Lightning's own detection."""
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"trainer.accelerator={accelerator}, but torch {torch.__version__} sees no CUDA device; use "
            "trainer.accelerator=cpu or install a CUDA build of torch"
        )
    try:
        asked = int(devices)
    except (TypeError, ValueError):
        return
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    if asked == 0:
        raise ConfigError("trainer.devices=0: give the number of devices, at least 1, or auto")
    there = (os.cpu_count() or 1) if on_cpu else torch.cuda.device_count()
    if asked > there:
        what = "CPU cores" if on_cpu else "CUDA devices"
        raise ConfigError(
            f"trainer.devices={asked}, but this machine has {there} {what}; trainer.devices={there} is the same "
            "experiment, because data.batch_size is the global batch"
        )


def trainer_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `pl.Trainer` that the config asks for, in Lightning's units."""
    arguments: dict[str, Any] = dict(configs.build(config["trainer"], "trainer", plugins=config.get("plugins") or ()))
    accumulate = arguments.get("accumulate_grad_batches", 1)
    # Lightning counts validation intervals in micro-batches.
    interval = arguments.get("val_check_interval") or arguments["max_steps"]
    arguments["val_check_interval"] = interval * accumulate
    if arguments.get("accelerator", "auto") == "auto" and not torch.cuda.is_available():
        arguments["accelerator"] = "cpu"  # MPS has no float64, which times of solves need
    return arguments
