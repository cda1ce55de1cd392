import functools

import pytest
import pytorch_lightning as pl
import torch

from ndeflow.config import ConfigError, build, load, located, section, validate

WIDE = {"_target_": "mypkg.nets.Wide", "width": 3}
LINE = {"_target_": "mypkg.Linear", "slope": 2}


class Run:
    """Where a run is written."""

    def __init__(
        self, name: str | None = None, root: str = "runs", overwrite: bool = False, keep: tuple[int, int] = (1, 2)
    ):
        self.got = (name, root, overwrite, keep)


class Optim:
    def __init__(self, optimizer: torch.nn.Module | functools.partial, schedule: str | None = None):
        self.optimizer, self.schedule = optimizer, schedule


def error(check, *args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        check(*args, **kwargs)
    return str(caught.value)


def test_objects_are_built_innermost_first(package):
    from mypkg import nets, schedules

    wide = build(WIDE | {"schedule": LINE, "parts": {"a": LINE, "b": LINE}, "rtol": 1}, "net", package)
    assert type(wide) is nets.Wide
    assert type(wide.schedule) is schedules.Linear
    assert wide.schedule.slope == 2
    assert [part.slope for part in wide.parts.values()] == [2, 2]
    assert wide.parts["a"] is not wide.parts["b"]
    assert (wide.width, wide.rtol, wide.act) == (3, 1, "tanh")


def test_containers_of_nodes_are_built_in_place(package):
    built = build({"a": [LINE, 3], "b": {"c": LINE}, "d": "x"}, "callbacks", package)
    assert built["a"][0].slope == built["b"]["c"].slope == 2
    assert (built["a"][1], built["d"]) == (3, "x")


def test_lists_become_tuples_where_tuples_are_wanted(package):
    assert build(WIDE | {"betas": [0.5, 1]}, "net", package).betas == (0.5, 1)
    assert build(WIDE | {"names": ["a"]}, "net", package).names == ["a"]
    assert section({"keep": [3, 4]}, Run, "run").got == (None, "runs", False, (3, 4))


def test_dataclasses_are_built_and_checked(package):
    pair = build({"_target_": "mypkg.nets.Pair", "left": WIDE}, "pair", package)
    assert (pair.left.width, pair.right) == (3, None)
    wrong = {"_target_": "mypkg.nets.Pair", "left": WIDE, "right": LINE}
    assert error(build, wrong, "pair", package) == "pair.right: expected Wide | None, got mypkg.Linear"


def test_partials_wait_for_their_owner():
    node = {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.1, "betas": [0.8, 0.9]}
    optim = section({"optimizer": node}, Optim, "optim")
    optimizer = optim.optimizer([torch.nn.Parameter(torch.zeros(2))])
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["lr"] == 0.1
    assert optimizer.defaults["betas"] == (0.8, 0.9)


def test_functions_are_targets_too():
    act = build({"_target_": "torch.nn.functional.silu", "_partial_": True, "inplace": False}, "act")
    assert torch.equal(act(torch.ones(3)), torch.nn.functional.silu(torch.ones(3)))


def test_arguments_of_the_caller_are_passed_on():
    linear = build({"_target_": "torch.nn.Linear", "out_features": 2}, "net", in_features=5)
    assert linear.weight.shape == (2, 5)
    assert section({"name": "x"}, Run, "run", overwrite=True).got == ("x", "runs", True, (1, 2))


def test_positional_only_and_further_arguments(package):
    node = {"_target_": "mypkg.nets.Open", "first": 1, "third": 4, "other": 5}
    assert build(node, "net", package).got == (1, 2, (), 4, {"other": 5})
    assert error(build, node | {"first": "a"}, "net", package) == "net.first=a: expected int, got str"
    del node["first"]
    assert error(build, node, "net", package) == "net (mypkg.nets.Open): missing first"


def test_an_empty_section_is_its_defaults():
    assert section(None, Run, "run").got == section({}, Run, "run").got == (None, "runs", False, (1, 2))


def test_sections_take_the_signature_of_lightning():
    arguments = {"max_steps": 3, "accelerator": "cpu", "precision": "64-true", "limit_val_batches": 0.5}
    validate(arguments, "trainer", target=pl.Trainer)
    message = error(validate, arguments | {"max_step": 1}, "trainer", target=pl.Trainer)
    assert (
        message == "unknown key trainer.max_step for pytorch_lightning.trainer.trainer.Trainer; did you mean max_steps?"
    )
    message = error(validate, {"deterministic": "wran"}, "trainer", target=pl.Trainer)
    assert message.endswith("expected bool | 'warn' | None, got str; did you mean warn?")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widht": 1}, "unknown key net.widht for mypkg.nets.Wide; did you mean width?"),
        ({"foo": 1}, "unknown key net.foo for mypkg.nets.Wide; allowed: width, rtol, act, name, betas, schedule, make, "
         "parts, names, ghost, debug"),
        ({True: 1}, "unknown key net.True for mypkg.nets.Wide; allowed: width, rtol, act, name, betas, schedule, make, "
         "parts, names, ghost, debug"),
        ({"width": 1.5}, "net.width=1.5: expected int, got float"),
        ({"width": True}, "net.width=true: expected int, got bool"),
        ({"rtol": "small"}, "net.rtol=small: expected float, got str"),
        ({"rtol": False}, "net.rtol=false: expected float, got bool"),
        ({"rtol": -1}, "net (mypkg.nets.Wide): rtol=-1 must be > 0"),
        ({"name": 83}, "net.name=83: expected str | None, got int; quote it to keep text"),
        ({"act": "relo"}, "net.act=relo: expected 'tanh' | 'relu', got str; did you mean relu?"),
        ({"debug": 1}, "net.debug=1: expected bool, got int"),
        ({"betas": [0.9]}, "net.betas=[0.9]: expected tuple[float, float], got list"),
        ({"betas": [0.9, "x"]}, "net.betas[1]=x: expected float, got str"),
        ({"names": "abc"}, "net.names=abc: expected Sequence[str], got str"),
        ({"schedule": 3}, "net.schedule=3: expected Schedule | None, got int"),
        ({"schedule": {"slope": 1}}, "net.schedule={slope: 1}: expected Schedule | None, got dict; add its _target_"),
        ({"schedule": {"_target_": "torch.nn.Identity"}},
         "net.schedule: expected Schedule | None, got torch.nn.Identity"),
        ({"schedule": LINE | {"_partial_": True}},
         "net.schedule: expected Schedule | None, got mypkg.Linear with _partial_"),
        ({"schedule": LINE | {"_partial_": "yes"}}, "net.schedule._partial_=yes: expected bool, got str"),
        ({"schedule": LINE | {"slop": 1}}, "unknown key net.schedule.slop for mypkg.Linear; did you mean slope?"),
        ({"schedule": {"_target_": "mypkg.schedules.promised"}},
         "net.schedule (mypkg.schedules.promised): missing slope"),
        ({"schedule": {"_target_": "mypkg.schedules.unknown"}}, "net.schedule=3: expected Schedule | None, got int"),
        ({"make": LINE}, "net.make: expected Callable | None, got mypkg.Linear"),
        ({"parts": {"a": LINE, "b": {"_target_": "torch.nn.Identity"}}},
         "net.parts.b: expected Schedule, got torch.nn.Identity"),
        ({"parts": {"a": LINE | {"slope": "x"}}}, "net.parts.a.slope=x: expected float, got str"),
        ({"ghost": [{"_target_": "os.system"}]}, "net.ghost[0]._target_=os.system is not allowed (allowed: ndeflow.*, "
         "torch.nn.*, torch.optim.*, pytorch_lightning.callbacks.*, pytorch_lightning.strategies.*, torchmetrics.*, "
         "mypkg.*); to use your own package add `plugins: [os]`"),
    ],
)  # fmt: skip
def test_messages(package, change, message):
    assert error(build, WIDE | change, "net", package) == message


@pytest.mark.parametrize(
    "change",
    [
        {"schedule": None},
        {"schedule": {"_target_": "mypkg.schedules.promised", "slope": 1}},
        {"make": {"_target_": "mypkg.schedules.Callable"}},
        {"make": LINE | {"_partial_": True}},
        {"make": {"_target_": "mypkg.nets.Wide", "_partial_": True}},  # what is missing, the owner gives
        {"ghost": {"anything": [1]}},
        {"rtol": 1},
    ],
)
def test_what_fits_is_built(package, change):
    validate(WIDE | change, "net", package)
    build(WIDE | change, "net", package)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"nmae": "y"}, "unknown key run.nmae for test_building.Run; did you mean name?"),
        ({"foo": 1}, "unknown key run.foo for test_building.Run; allowed: name, root, overwrite, keep"),
        ({"_target_": "torch.nn.Linear"},
         "unknown key run._target_ for test_building.Run; allowed: name, root, overwrite, keep"),
        ({"overwrite": "yes"}, "run.overwrite=yes: expected bool, got str"),
        (3, "run=3: expected keys and values, got int"),
        ([1], "run=[1]: expected keys and values, got list"),
    ],
)  # fmt: skip
def test_messages_of_sections(node, message):
    assert error(section, node, Run, "run") == error(validate, node, "run", target=Run) == message


def test_missing_arguments_of_sections():
    assert error(section, {}, Optim, "optim") == "optim (test_building.Optim): missing optimizer"
    assert (
        error(build, {"_target_": "torch.nn.Linear"}, "net")
        == "net (torch.nn.Linear): missing in_features, out_features"
    )


def test_what_the_caller_passes_the_config_may_not():
    node = {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 2}
    assert error(build, node, "net", in_features=5) == "net.in_features is set by ndeflow; remove it"
    assert error(validate, {"seed": 1}, "data", target=dict, given=["seed"]) == (
        "data.seed is set by the top-level key seed; remove it"
    )
    owned = {"max_epochs": "trainer.max_steps"}
    assert error(validate, {"max_epochs": 1}, "trainer", target=pl.Trainer, given=owned) == (
        "trainer.max_epochs is set by trainer.max_steps; remove it"
    )
    message = error(validate, {"max_epoch": 1}, "trainer", target=pl.Trainer, given=owned)
    assert "did you mean min_epochs?" in message  # not the one that may not be set


def test_a_node_that_gets_arguments_needs_a_class():
    assert error(build, {"lr": 1}, "module", optim=None) == (
        "module has no _target_: name its class, e.g. module._target_=torch.nn.Linear"
    )


def test_nothing_is_built_before_all_is_checked(package):
    from mypkg import nets

    nets.built.clear()
    wrong = {"_target_": "mypkg.nets.Pair", "left": WIDE, "right": WIDE | {"rtoll": 1}}
    assert error(build, wrong, "pair", package).startswith("unknown key pair.right.rtoll")
    validate({"_target_": "mypkg.nets.Pair", "left": WIDE}, "pair", package)
    assert not nets.built


def test_a_class_error_keeps_its_cause(package):
    with pytest.raises(ConfigError) as caught:
        build(WIDE | {"rtol": -1}, "module.net", package)
    assert str(caught.value) == "module.net (mypkg.nets.Wide): rtol=-1 must be > 0"
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_type_error_of_a_class_that_takes_anything_is_reported():
    message = error(build, {"_target_": "torch.nn.Tanh", "alpha": 1}, "act")
    assert message.startswith("act (torch.nn.Tanh): ")
    assert "alpha" in message


def test_other_errors_of_a_class_pass(package):
    with pytest.raises(RuntimeError):
        build({"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 2, "device": "nowhere"}, "net")


CONFIG = """
plugins: [mypkg]
vars: {steps: 5}
module: {_target_: mypkg.nets.Wide, width: 3, schedule: {_target_: mypkg.Linear}}
trainer: {max_steps: "${vars.steps}"}
"""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("module.widht=1", "unknown key module.widht for mypkg.nets.Wide; "
         "did you mean width? (in override 'module.widht=1')"),
        ("module.width=a", "module.width=a: expected int, got str (in override 'module.width=a')"),
        ("module.width=nan", "module.width=nan: expected int, got float (in override 'module.width=nan')"),
        ("module.width=2024-01-01",
         "module.width=2024-01-01: expected int, got str (in override 'module.width=2024-01-01')"),
        ("module.name=0123", "module.name=83: expected str | None, got int; quote it to keep text "
         "(in override 'module.name=0123')"),
        ("module.name=12:30:00", "module.name=45000: expected str | None, got int; quote it to keep text "
         "(in override 'module.name=12:30:00')"),
        ("module.name=off", "module.name=false: expected str | None, got bool; quote it to keep text "
         "(in override 'module.name=off')"),
        ("module.schedule.slope=x",
         "module.schedule.slope=x: expected float, got str (in override 'module.schedule.slope=x')"),
        ("module.schedule._target_=mypkg.Liner", "module.schedule._target_: mypkg has no Liner; did you mean Linear? "
         "(in override 'module.schedule._target_=mypkg.Liner')"),
        ("module._target_=mypkg.nets.Pair", "module (mypkg.nets.Pair): missing left (in override "
         "'module._target_=mypkg.nets.Pair')"),
        ("trainer.max_steps=1e3",
         "trainer.max_steps=1000.0: expected int, got float (in override 'trainer.max_steps=1e3')"),
        ("vars.steps=a", "trainer.max_steps=a: expected int, got str (in x.yaml)"),
        ("run.nmae=y", "unknown key run.nmae for test_building.Run; did you mean name? (in override 'run.nmae=y')"),
        ("module.rtol=-1", "module (mypkg.nets.Wide): rtol=-1 must be > 0"),
    ],
)  # fmt: skip
def test_from_the_command_line_to_the_message(package, write, override, message):
    write({"x.yaml": CONFIG})

    def start():
        with located("x.yaml", [override]):
            config = load("x.yaml", [override])
            validate(config["trainer"], "trainer", package, pl.Trainer)
            section(config.get("run"), Run, "run", package)
            build(config["module"], "module", config["plugins"])

    assert error(start) == message


@pytest.mark.parametrize(
    "override",
    [
        "module.rtol=1e-3",
        "module.name='0123'",
        "module.name=2024-01-01",
        "run.name=a=b",
        "module.ghost=nan",
        "module.schedule=null",
        "--module.betas=[0.5,0.6]",
    ],
)
def test_overrides_that_are_right(package, write, override):
    write({"x.yaml": CONFIG})
    config = load("x.yaml", [override])
    section(config.get("run"), Run, "run", package)
    assert build(config["module"], "module", config["plugins"]).width == 3
