"""Start a new run from the weights of another: what is taken, renamed, left out, frozen, and said aloud."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import pytorch_lightning as pl
from torch import Tensor, nn

from ndeflow.modules.base import Module, clean_name
from ndeflow.training import files
from ndeflow.training.loading import pick, read


class WarmStartError(ValueError):
    """The weights cannot be taken over as asked."""


@dataclass(frozen=True)
class Report:
    """What became of each tensor: names loaded, of another shape, missing in the source, unexpected in it."""

    loaded: list[str]
    shape: dict[str, str]
    missing: list[str]
    unexpected: list[str]

    def __str__(self) -> str:
        counts = (
            f"{len(self.loaded)} loaded, {len(self.shape)} other shape, {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected"
        )
        lines = [f"  other shape   {name} {change}" for name, change in self.shape.items()]
        if self.missing:
            lines.append(f"  missing       {' '.join(self.missing)}  (stay at their initial values)")
        if self.unexpected:
            lines.append(f"  unexpected    {' '.join(self.unexpected)}  (in the checkpoint, not in the model)")
        return "\n".join([counts, *lines])


@dataclass(frozen=True)
class WarmStart:
    """Finetune: the `init` section of a config. The run is a new one: step 0, fresh optimizer, EMA and W&B id.

    Patterns are those of file names (`model.net.head.*`), on names as checkpoints store them. A pattern
    that matches nothing is an error.

    Args:
        from_: a checkpoint, a run directory or a file of `ndeflow export` (`from` in a config).
        weights: its averaged or its raw weights.
        skip: names of the checkpoint to leave out.
        rename: regular expressions and replacements, applied in order to names of the checkpoint.
        freeze: parameters of the new model that are not trained.
        lr: factors of the learning rate for parameters of the new model, first match wins.
        allow_shape: leave out tensors whose shape differs, instead of refusing.

    Raises:
        ValueError: a factor is not positive, or a regular expression is none.
    """

    from_: str
    weights: Literal["ema", "raw"] = "ema"
    skip: tuple[str, ...] = ()
    rename: dict[str, str] = field(default_factory=dict)
    freeze: tuple[str, ...] = ()
    lr: dict[str, float] = field(default_factory=dict)
    allow_shape: bool = False

    def __post_init__(self) -> None:
        for pattern, factor in self.lr.items():
            if not 0.0 < factor < math.inf:
                raise ValueError(f"lr of {pattern!r} is {factor}: give a positive factor; to train nothing use freeze")
        for pattern in self.rename:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"rename: {pattern!r} is no regular expression ({error})") from error

    def load(self, module: Module) -> tuple[Report, dict[str, Any]]:
        """Put the weights in.

        Returns:
            What became of each tensor, and facts about the parent for the new run's checkpoints.

        Raises:
            CheckpointError: the source is not there or cannot be read.
            WarmStartError: a pattern matches nothing, nothing could be loaded, or a shape differs.
        """
        path = files.locate(self.from_)
        checkpoint = read(path)
        report = self.take(module, pick(checkpoint, self.weights, str(path)))
        parent = checkpoint["ndeflow"]
        facts = {"path": str(path), "step": checkpoint["global_step"], "run": parent["run"], "config": parent["config"]}
        return report, facts

    def prepare(self, module: Module) -> None:
        """Freeze parameters and set learning-rate factors; at every start, resumed ones too.

        Raises:
            WarmStartError: a pattern matches nothing, or no parameter that is trained.
        """
        names = {clean_name(n): p for n, p in module.named_parameters()}
        _require(self.freeze, names, "init.freeze", "parameter of the model")
        _require(self.lr, names, "init.lr", "parameter of the model")
        for name, parameter in names.items():
            if any(fnmatchcase(name, pattern) for pattern in self.freeze):
                parameter.requires_grad_(False)
        module.learning_rates = dict(self.lr)
        try:
            module.parameter_groups()
        except ValueError as error:
            raise WarmStartError(f"init: {error}") from error

    def take(self, module: nn.Module, weights: Mapping[str, Tensor]) -> Report:
        """Load what fits of `weights` into `module`."""
        _require(self.skip, weights, "init.skip", "key of the checkpoint")
        kept = {n: w for n, w in weights.items() if not any(fnmatchcase(n, p) for p in self.skip)}
        for pattern, replacement in self.rename.items():
            kept = _renamed(kept, pattern, replacement)
        own = {clean_name(n): (n, w) for n, w in module.state_dict().items()}
        same = {n: w for n, w in kept.items() if n in own and own[n][1].shape == w.shape}
        shape = {
            n: f"{tuple(w.shape)} -> {tuple(own[n][1].shape)}" for n, w in kept.items() if n in own and n not in same
        }
        report = Report(list(same), shape, [n for n in own if n not in kept], [n for n in kept if n not in own])
        self._check(report)
        module.load_state_dict({own[n][0]: w for n, w in same.items()}, strict=False)
        return report

    def _check(self, report: Report) -> None:
        """Refuse to lose tensors silently."""
        if not report.loaded:
            raise WarmStartError(
                f"init.from={self.from_}: nothing fits the model ({report}); rename keys by init.rename"
            )
        if report.shape and not self.allow_shape:
            raise WarmStartError(
                f"init.from={self.from_}: {report}\nleave these out by init.skip, or all by init.allow_shape=true"
            )


def _require(patterns: Iterable[str], names: Iterable[str], key: str, what: str) -> None:
    """Refuse a pattern that matches nothing: it is a typo, and what it was for would silently not happen."""
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise WarmStartError(_nothing(key, pattern, what, names))


def _renamed(weights: Mapping[str, Tensor], pattern: str, replacement: str) -> dict[str, Tensor]:
    """The weights under new names; two under one name would lose one of them."""
    if not any(re.search(pattern, name) for name in weights):
        raise WarmStartError(_nothing("init.rename", pattern, "key of the checkpoint", weights))
    renamed: dict[str, str] = {}
    for name in weights:
        try:
            new = re.sub(pattern, replacement, name)
        except (re.error, IndexError) as error:
            raise WarmStartError(f"init.rename={pattern!r}: bad replacement {replacement!r} ({error})") from error
        if renamed.setdefault(new, name) != name:
            raise WarmStartError(f"init.rename={pattern!r} gives {renamed[new]} and {name} one name, {new}")
    return {new: weights[name] for new, name in renamed.items()}


def _nothing(key: str, pattern: str, what: str, names: Iterable[str]) -> str:
    """The message for a pattern without a match."""
    starts = sorted({".".join(name.split(".")[:3]) for name in names})
    return f"{key}={pattern!r} matches no {what}; they start with: {', '.join(starts[:12])}"


class FrozenInEval(pl.Callback):
    """Keep submodules without any trained parameter in eval mode: no dropout, no moving statistics."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the modes, which Lightning keeps from here on; no epoch starts in a run resumed within one."""
        for child in pl_module.modules():
            parameters = list(child.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                child.eval()
