from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import pytorch_lightning as pl
import torch

from ndeflow.config import ConfigError
from ndeflow.config.targets import EMPTY, full_name, resolve, signature

if TYPE_CHECKING:
    from nowhere import Ghost

ALLOWED = (
    "ndeflow.*, torch.nn.*, torch.optim.*, "
    "pytorch_lightning.callbacks.*, pytorch_lightning.strategies.*, torchmetrics.*"
)


@pytest.mark.parametrize(
    ("name", "home"),
    [
        ("torch.nn.Linear", "torch.nn.modules.linear.Linear"),
        ("torch.nn.modules.linear.Linear", "torch.nn.modules.linear.Linear"),
        ("torch.nn.functional.silu", "torch.nn.functional.silu"),
        ("torch.optim.AdamW", "torch.optim.adamw.AdamW"),
        ("torch.optim.lr_scheduler.LinearLR", "torch.optim.lr_scheduler.LinearLR"),
        ("pytorch_lightning.callbacks.EarlyStopping", "pytorch_lightning.callbacks.early_stopping.EarlyStopping"),
        ("pytorch_lightning.strategies.DDPStrategy", "pytorch_lightning.strategies.ddp.DDPStrategy"),
        ("torchmetrics.MeanMetric", "torchmetrics.aggregation.MeanMetric"),
        ("ndeflow.config.load", "ndeflow.config.loading.load"),  # a re-export
        ("ndeflow.config.loading.load", "ndeflow.config.loading.load"),
        ("mypkg.nets.Wide", "mypkg.nets.Wide"),
        ("mypkg.Linear", "mypkg.schedules.Linear"),
    ],
)
def test_targets_resolve_to_the_object(package, name, home):
    assert full_name(resolve(name, "module", package)) == home


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("os.system", f"is not allowed (allowed: {ALLOWED}, mypkg.*); to use your own package add `plugins: [os]`"),
        (
            "mypkgs.Wide",
            f"is not allowed (allowed: {ALLOWED}, mypkg.*); to use your own package add `plugins: [mypkgs]`",
        ),
        ("torch.load", f"is not allowed (allowed: {ALLOWED}, mypkg.*)"),
        ("pytorch_lightning.Trainer", f"is not allowed (allowed: {ALLOWED}, mypkg.*)"),
        ("torch.nn.functional.torch.os.system", "leads to posix.system, outside the allowed packages"),
        ("torch.nn.functional.torch.load", "leads to torch.serialization.load, outside the allowed packages"),
        ("ndeflow.config.loading.yaml.load", "leads to yaml.load, outside the allowed packages"),
        ("mypkg.nets.walk.system", "leads to posix.system, outside the allowed packages"),
        ("torch.nn.functional", "is a module, not a class or function"),
        ("torch.nn.functional.torch", "is a module, not a class or function"),
        ("mypkg.nets.constant", "is of type int, not a class or function"),
        ("Wide", "is not a dotted name such as torch.nn.Linear"),
        (3, "is not a dotted name such as torch.nn.Linear"),
        (None, "is not a dotted name such as torch.nn.Linear"),
    ],
)
def test_targets_that_are_refused(package, name, message):
    with pytest.raises(ConfigError) as caught:
        resolve(name, "module.net", package)
    assert str(caught.value) == f"module.net._target_={name} {message}"
    assert caught.value.key == "module.net._target_"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mypkg.nets.Wid", "module.net._target_: mypkg.nets has no Wid; did you mean Wide?"),
        ("mypkg.net.Wide", "module.net._target_: mypkg has no net; did you mean nets?"),
        ("mypkg.nets.Wide.zzz", "module.net._target_: mypkg.nets.Wide has no zzz"),
        ("torch.nn.linear", "module.net._target_: torch.nn has no linear; did you mean Linear?"),
        ("mypkg.Schedule", "module.net._target_: mypkg has no Schedule"),  # mypkg.schedules is a module
        ("ndeflow.data.mnst", "module.net._target_: ndeflow.data has no mnst; did you mean MNIST?"),
        ("torch.nn.zzzz.Linear", "module.net._target_: torch.nn has no zzzz"),
        ("torch.nn..Linear", "module.net._target_: torch.nn has no "),
        ("ndeflow.confg.load", "module.net._target_: ndeflow has no confg; did you mean config?"),
        ("absent.Wide", "module.net._target_: there is no package absent; start where it can be imported"),
        ("mypkg.broken.Wide", "importing mypkg.broken failed: No module named 'mypk'"),
        ("mypkg._inner.Hidden", "module.net._target_: mypkg._inner is private; name what its package exports"),
        (
            "torch.nn.Module.__init__",
            "module.net._target_: torch.nn.Module.__init__ is private; name what its package exports",
        ),
    ],
)
def test_targets_that_are_not_there(package, name, message):
    with pytest.raises(ConfigError) as caught:
        resolve(name, "module.net", [*package, "absent"])
    assert str(caught.value) == message


def test_a_package_that_does_not_parse_says_so(package):
    with pytest.raises(ConfigError, match=r"^importing mypkg\.invalid failed: SyntaxError: ") as caught:
        resolve("mypkg.invalid.f", "module", package)
    assert isinstance(caught.value.__cause__, SyntaxError)


def test_arguments_have_evaluated_hints():
    found = signature(torch.optim.lr_scheduler.CosineAnnealingLR)  # annotated by strings
    assert found.parameters["T_max"].hint is int
    assert found.parameters["T_max"].default is EMPTY
    assert found.parameters["eta_min"].default == 0.0
    assert not found.open
    assert found.returns is torch.optim.lr_scheduler.CosineAnnealingLR


def test_one_hint_that_cannot_be_evaluated_leaves_the_others():
    def target(a: int, b: Ghost, c, d: list[Ghost], e: float | None = None) -> Ghost: ...

    found = signature(target)
    assert {name: parameter.hint for name, parameter in found.parameters.items()} == {
        "a": int,
        "b": Any,
        "c": Any,
        "d": Any,
        "e": float | None,
    }
    assert found.returns is None


def test_inherited_arguments_are_read_in_the_module_that_declares_them(package):
    nets = importlib.import_module("mypkg.nets")

    class Narrow(nets.Wide):
        pass

    assert signature(Narrow).parameters["schedule"].hint == nets.Schedule | None


def test_dataclasses():
    @dataclass
    class Point:
        x: float
        tags: list[str] = field(default_factory=list)

    found = signature(Point)
    assert list(found.parameters) == ["x", "tags"]
    assert found.parameters["tags"].hint == list[str]
    assert found.parameters["tags"].default is not EMPTY


def test_open_signatures():
    assert signature(torch.nn.Identity)[:2] == ({}, True)
    assert signature(torch.nn.Sequential)[:2] == ({}, False)
    assert signature(torch.nn.functional.softplus)[:2] == ({}, True)  # a builtin without a signature


def test_positional_only_arguments_are_marked(package):
    from mypkg.nets import Open

    found = signature(Open)
    assert {name: parameter.positional for name, parameter in found.parameters.items()} == {
        "first": True,
        "second": False,
        "third": False,
    }
    assert found.open


def test_wrapped_constructors_show_what_they_wrap():
    assert signature(pl.Trainer).parameters["max_steps"].hint is int
    assert "self" not in signature(pl.Trainer).parameters
    assert inspect.signature(pl.Trainer).parameters.keys() == signature(pl.Trainer).parameters.keys()


def test_functions_promise_what_they_are_annotated_with(package):
    from mypkg import schedules

    assert signature(schedules.promised).returns is schedules.Schedule
    assert signature(schedules.unknown).returns is None
