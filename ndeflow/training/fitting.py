"""One run from config to report: what `train.py` does, callable from anywhere."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ndeflow import config as configs
from ndeflow.config import ConfigError
from ndeflow.data.loading import DataError, DataModule, DataOrderError
from ndeflow.data.stream import micro_batch
from ndeflow.diffeq import SolverError
from ndeflow.modules.base import Module, clean_name
from ndeflow.modules.flow import RectifiedFlow
from ndeflow.randomness import seed_all
from ndeflow.training import console, sections
from ndeflow.training.ema import EMA
from ndeflow.training.files import CheckpointError, read, step_files
from ndeflow.training.finetuning import FrozenInEval, WarmStart, WarmStartError
from ndeflow.training.health import NonFinite
from ndeflow.training.records import Records, Rows
from ndeflow.training.report import Report, write_report
from ndeflow.training.rundir import RunDirectory, Start, decide, is_rank_zero, run_name
from ndeflow.training.saving import CheckpointIO, Checkpoints, code_version
from ndeflow.training.seeding import Seeds
from ndeflow.training.signals import FAILURE, INTERRUPTED, StopFlag, Stopped
from ndeflow.training.starting import Refused, ready, together
from ndeflow.training.tracking import ResolvedMode, Tracker, Wandb, run_id

# Failures whose message is the whole story; anything else shows its traceback.
EXPLAINED = (
    WarmStartError,
    DataError,
    DataOrderError,
    NonFinite,
    CheckpointError,
    SolverError,
    MisconfigurationException,
)


def fit(config: dict[str, Any], name: str = "run", command: Sequence[str] = ()) -> int:
    """Train, resume or refuse, as config and run directory say, and return the exit code.

    Args:
        config: a resolved config, from `ndeflow.config.load`.
        name: of the run where `run.name` is not set.
        command: the command line, stored beside the config.

    Returns:
        0 finished, 1 failed with the message printed, 85 preempted, 130 interrupted; after the last two
        the same command continues the run.

    Raises:
        ConfigError: the config is wrong, or the directory holds another run.
    """
    console.quiet_lightning()
    flag = StopFlag()
    flag.install()
    sections.check(config)
    settings = sections.build(config, "run")
    directory = RunDirectory(Path(settings.root) / run_name(settings, name))
    try:
        with together():
            if is_rank_zero():
                directory.open(settings.overwrite)
            return _fit_in(directory, config, settings.overwrite, flag, command)
    except ConfigError:
        raise  # also where it is a CheckpointError: a path that leads to none
    except EXPLAINED as error:
        console.fail(error)
        if directory.state:  # else nothing was begun
            saved = step_files(directory.checkpoints)
            text = f"last checkpoint: {saved[-1] if saved else 'none'}; run directory {directory.path}"
            console.say(text, error=True)
        return FAILURE
    finally:
        console.log_to(None)
        directory.close()


def _fit_in(
    directory: RunDirectory, config: dict[str, Any], overwrite: bool, flag: StopFlag, command: Sequence[str]
) -> int:
    """Run in an open directory, whose `state` says `failed` unless the run says otherwise."""
    start = decide(directory, config, overwrite)
    if start.step >= config["trainer"]["max_steps"] and directory.state == "finished":
        done = f"already finished (step {start.step} of {config['trainer']['max_steps']})"
        console.say(f"{directory.path}: {done}; raise trainer.max_steps to go on")
        return 0
    if not is_rank_zero():
        return _Job(config, directory, start, flag).run()
    configs.save(config, directory.path / "config.yaml")
    (directory.path / "command.txt").write_text(shlex.join(command) + "\n")
    directory.write_state("running")
    console.log_to(directory.path / "train.log")
    try:
        return _Job(config, directory, start, flag).run()
    except BaseException:
        directory.write_state("failed")
        raise


class _Job:
    """A run in its directory; built step by step so that each error names the part that is wrong."""

    def __init__(self, config: dict[str, Any], directory: RunDirectory, start: Start, flag: StopFlag) -> None:
        self.config, self.directory, self.start, self.flag = config, directory, start, flag
        self.began = time.monotonic()
        self.settings = {name: sections.build(config, name) for name in ("ema", "health", "wandb", "report", "optim")}
        self.checkpoints: Checkpoints = sections.build(config, "checkpoints")
        self.data = self._data()
        seed_all(config["seed"], "init")
        self.module = self._build("module", Module)
        self.module.optim = self.settings["optim"]
        self.parent = self._warm_start()
        self.mode: ResolvedMode
        self.mode, self.why = self._tracking()
        self.id = run_id(directory.path) if is_rank_zero() else ""  # other ranks would write an id of their own
        self.records = self._records()
        every = config["trainer"].get("log_every_n_steps", 50)
        self.rows = Rows(self.records, every, self.settings["health"])
        self.trainer = self._trainer()
        if self.trainer.precision == "64-true":
            self.module.double()  # Lightning would do so only after it has read the weights of a checkpoint as float32

    def _build(self, name: str, kind: type, **given: Any) -> Any:
        """Build a section with a target, and check that it is what the section is for."""
        built = configs.build(self.config[name], name, plugins=self.config.get("plugins") or (), **given)
        if not isinstance(built, kind):
            raise ConfigError(f"{name}._target_ builds a {type(built).__name__}, expected a {kind.__name__}")
        return built

    def _data(self) -> DataModule:
        """The data module, with its data loaded: what is missing or damaged shows before anything is trained."""
        data = self._build("data", DataModule, seed=self.config["seed"])
        if is_rank_zero():
            data.ready()
        return data

    def _warm_start(self) -> dict[str, Any] | None:
        """Take over the weights of another run at a first start; freeze at every start."""
        if not self.config.get("init"):
            return None
        warm: WarmStart = sections.build(self.config, "init")
        parent = self.start.facts.get("parent")
        if not self.start.step:
            report, parent = warm.load(self.module)
            console.say(f"init from {parent['path']} ({warm.weights}): {report}")
        warm.prepare(self.module)
        return parent

    def _tracking(self) -> tuple[ResolvedMode, str]:
        """The mode of W&B and why; other ranks than zero never open a run."""
        try:
            return self.settings["wandb"].resolve() if is_rank_zero() else ("disabled", "not rank 0")
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _records(self) -> Records:
        """Records with the tracker, if there is one."""
        wandb: Wandb = self.settings["wandb"]
        tracker = None
        if self.mode != "disabled":
            tracker = Tracker(wandb, self.mode, self.directory.path, {**self.config, "commit": code_version()})
        records = Records(self.directory.path, tracker, self.start.step)
        if tracker and tracker.mode != self.mode:
            self.mode, self.why = tracker.mode, "the server cannot be used"
        return records

    def _facts(self) -> dict[str, Any]:
        """What each checkpoint says about itself beside Lightning's state."""
        return {
            "config": self.config,
            "seed": self.config["seed"],
            "data": self.data.info,
            "run": {"name": self.directory.path.name, "id": self.id},
            **({"parent": self.parent} if self.parent else {}),
        }

    def _trainer(self) -> pl.Trainer:
        """Lightning's trainer with our callbacks; their order is the order of their work in a step."""
        plugins = self.config.get("plugins") or ()
        extra = configs.build(self.config.get("callbacks") or {}, "callbacks", plugins=plugins)
        arguments = sections.trainer_arguments(self.config)
        bar = [console.StepBar(self.rows)] if arguments.pop("enable_progress_bar", True) and is_rank_zero() else []
        callbacks = [
            Seeds(self.config["seed"]),
            *([FrozenInEval()] if self.config.get("init") else []),
            self.settings["health"],
            *extra.values(),
            self.rows,  # before EMA: pictures at the end of a validation are made with the averaged weights
            self.settings["ema"],
            *bar,
            self.checkpoints.attach(self.directory.checkpoints, self._facts, self.flag),
        ]
        settings: dict[str, Any] = dict(
            **{**arguments, "plugins": [CheckpointIO(), *(arguments.get("plugins") or [])]},
            max_epochs=-1,
            logger=self.records,
            callbacks=callbacks,
            enable_progress_bar=bool(bar),
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            check_val_every_n_epoch=None,
            default_root_dir=str(self.directory.path),
        )
        try:
            return pl.Trainer(**settings)
        except (ValueError, TypeError, MisconfigurationException) as error:
            self.records.close(FAILURE)
            raise ConfigError(f"trainer: {str(error).partition(chr(10))[0]}") from error

    def run(self) -> int:
        """Train and report; whatever happens, close the records and say in `state` how it ended."""
        code, state = FAILURE, "failed"
        try:
            ready()  # what only rank 0 has looked for so far, the others may now rely on: the directory, the data
            self._check_shares()
            self._check_parts()
            if is_rank_zero():
                self._summarize()
            resume = str(self.start.checkpoint) if self.start.checkpoint else None
            self.trainer.fit(self.module, datamodule=self.data, ckpt_path=resume, weights_only=True)
            self._validate_last(resumed=resume is not None)
            code, state = 0, "finished"
            if self.trainer.is_global_zero:
                self._finish()
        except Stopped as stop:
            code, state = stop.exit_code, "interrupted" if stop.exit_code == INTERRUPTED else "preempted"
            console.say(f"{stop}; the same command goes on from {self.checkpoints.saved}")
        except Refused as refusal:
            code = refusal.exit_code
        except (KeyboardInterrupt, SystemExit):  # a second Ctrl-C; Lightning turns it into SystemExit
            code, state = INTERRUPTED, "interrupted"
            saved = self.checkpoints.saved or self.start.checkpoint or "none"
            console.say(f"interrupted at once: steps since the last checkpoint ({saved}) are lost")
        finally:
            if is_rank_zero():
                self.directory.write_state(state)
            self.records.close(code)
        if self.trainer.world_size > 1 and code:
            # Launchers send SIGTERM to the others as soon as one process has left; leave with our code first.
            os._exit(code)
        return code

    def _validate_last(self, resumed: bool) -> None:
        """Make up for a validation at the last step that a kill cut off: there is no step left to train before it."""
        interval = sections.trainer_arguments(self.config)["val_check_interval"]
        ended = self.start.step >= self.trainer.max_steps
        if resumed and ended and self.start.step * self.trainer.accumulate_grad_batches % interval == 0:
            self.trainer.validate(self.module, datamodule=self.data, verbose=False)

    def _check_parts(self) -> None:
        """Refuse parts that do not fit together: data and net, optimizer and schedule, checkpoint and model."""
        try:
            self.module.check_data(self.data)
            self.module.configure_optimizers()
        except (ValueError, TypeError) as error:
            raise ConfigError(str(error)) from error
        if self.start.checkpoint:
            stored = read(self.start.checkpoint)["state_dict"]
            own = {clean_name(n): w for n, w in self.module.state_dict().items()}
            wrong = [n for n in {**own, **stored} if n not in own or n not in stored or own[n].shape != stored[n].shape]
            if wrong:
                raise ConfigError(
                    f"{self.start.checkpoint} holds other weights than the config builds (first: {wrong[0]}): give the "
                    "config it was trained with, or take over what fits by init.from"
                )

    def _check_shares(self) -> None:
        """Refuse fewer processes than asked for, and a global batch that cannot be shared out."""
        data, trainer, asked = self.data, self.trainer, self.config["trainer"]
        devices, world = asked.get("devices", "auto"), trainer.world_size
        if isinstance(devices, int) and devices > 0 and devices * asked.get("num_nodes", 1) != world:
            raise ConfigError(
                f"asked for {devices * asked.get('num_nodes', 1)} processes, got {world}: inside a SLURM job use "
                f"srun --ntasks-per-node={devices}, or unset SLURM_NTASKS for an interactive run"
            )
        try:
            micro_batch(data.batch_size, world, trainer.accumulate_grad_batches)
            data.train_dataloader()
        except ValueError as error:
            raise ConfigError(f"data.batch_size={data.batch_size}: {error}") from error
        if 0 < (size := data.size("val")) < world and trainer.limit_val_batches:
            raise ConfigError(
                f"{size} validation samples for {world} processes: each needs one; lower trainer.devices, enlarge the "
                "set, or set trainer.limit_val_batches=0 to validate nowhere"
            )

    def _summarize(self) -> None:
        """Print what is about to happen."""
        config, module, data = self.config, self.module, self.data
        ema: EMA = self.settings["ema"]
        was, world = self.start.facts.get("world_size"), self.trainer.world_size
        moved = was not in (None, world)
        upload = f"upload later: wandb login && wandb sync {self.directory.path}/wandb"
        url = f", {self.records.tracker.url}" if self.records.tracker else ""
        start = f"resuming from {self.start.checkpoint} (step {self.start.step})" if self.start.step else "fresh run"
        console.show(
            f"ndeflow run {self.directory.path.name}: {start}",
            {
                "module": f"{config['module']['_target_']}, {console.count(module)}"
                + (f", EMA {ema.decay:g}" if ema.enabled else ", no EMA"),
                "data": data.summary(),
                **({"processes": f"{world}, were {was}: data order and keyed draws continue exactly"} if moved else {}),
                "device": console.device_name(self.trainer),
                "steps": f"{self.start.step} to {self.trainer.max_steps}, seed {config['seed']}",
                "checkpoints": f"every {self.checkpoints.every} steps in {self.directory.checkpoints}",
                "wandb": f"{self.mode} ({self.why})" + (f"; {upload}" if self.mode == "offline" else url),
                "code": f"{code_version()}, torch {torch.__version__}, lightning {pl.__version__}",
                "output": str(self.directory.path),
            },
        )

    def _finish(self) -> None:
        """Write the report with the final weights, averaged ones where there are any, and say where everything is."""
        ema: EMA = self.settings["ema"]
        facts = {
            "run": self.directory.path.name,
            "step": self.trainer.global_step,
            "weights": "ema" if ema.enabled else "raw",
            "seconds": round(time.monotonic() - self.began, 1),
            "commit": code_version(),
        }
        self.module.eval()
        settings: Report = self.settings["report"]
        with ema.applied(self.module):
            report = write_report(settings, self.directory.report, self.records.rows(), self.module, self.data, facts)
        if self.records.tracker:
            self.records.tracker.summarize(report, sorted(self.directory.report.glob("*.png")))
        path = self.directory.path
        if isinstance(self.module, RectifiedFlow):  # what these commands are for
            for words in (["sample", str(path), "n=64", "steps=20"], ["evaluate", str(path)]):
                console.say(f"next: {_command(words, self.config.get('plugins'))}")
        console.say(
            f"finished {path} in {report['seconds']} s: {_headline(report)}; report {self.directory.report}, "
            f"checkpoint {self.checkpoints.saved}"
        )


def _command(words: Sequence[str], plugins: Sequence[str] | None) -> str:
    """A command line to paste into a shell; it names the packages that the run builds from."""
    return shlex.join(["ndeflow", *words, *([f"plugins=[{','.join(plugins)}]"] if plugins else [])])


def _headline(report: Mapping[str, Any]) -> str:
    """The numbers of a report on one line."""
    return ", ".join(f"{k} {v:.4g}" for k, v in report.items() if isinstance(v, float) and k != "seconds") or "done"
