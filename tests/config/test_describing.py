import pytest
import pytorch_lightning as pl

from ndeflow.config import ConfigError, build, describe, load

CONFIG = {
    "plugins": ["mypkg"],
    "vars": {"width": 4},
    "seed": 0,
    "module": {
        "_target_": "mypkg.nets.Pair",
        "left": {
            "_target_": "mypkg.nets.Wide",
            "width": 4,
            "betas": [0.5, 0.6],
            "parts": {"a": {"_target_": "mypkg.Linear", "slope": 3}},
        },
    },
    "run": {"name": "x"},
    "optim": {
        "optimizer": {"_target_": "mypkg.nets.Pair", "_partial_": True},
        "schedule": {"_target_": "mypkg.nets.Drawn"},
    },
    "callbacks": {"stop": {"_target_": "mypkg.nets.Open", "first": 1, "other": 2}},
}


class Run:
    """Where a run is written.

    Not shown.
    """

    def __init__(self, name: str | None = None, root: str = "runs", hidden: int = 1):
        pass


class Checkpoints:
    def __init__(self, every: int, keep=2):
        pass


TEXT = """\
plugins[0]=mypkg
vars.width=4
seed=0
run: test_describing.Run. Where a run is written.
  run.name=x      # str | None, default null
  run.root=runs   # str, the default
module: mypkg.nets.Pair
  module.left._target_=mypkg.nets.Wide   # Wide
  module.right=null                      # Wide | None, the default
module.left: mypkg.nets.Wide. A wide net.
  module.left.width=4                                         # int
  module.left.rtol=0.001                                      # float, the default
  module.left.act=tanh                                        # 'tanh' | 'relu', the default
  module.left.name=null                                       # str | None, the default
  module.left.betas=[0.5, 0.6]                                # tuple[float, float], default [0.9, 0.99]
  module.left.schedule=null                                   # Schedule | None, the default
  module.left.make=null                                       # Callable | None, the default
  module.left.parts={a: {_target_: mypkg.Linear, slope: 3}}   # Mapping[str, Schedule] | None, default null
  module.left.names=[]                                        # Sequence[str], the default
  module.left.ghost=null                                      # any, the default
  module.left.debug=false                                     # bool, the default
module.left.parts.a: mypkg.Linear. A straight line.
  module.left.parts.a.slope=3   # float, default 1.0
optim.optimizer: mypkg.nets.Pair
  optim.optimizer.right=null   # Wide | None, the default
optim.schedule: mypkg.nets.Drawn
  optim.schedule.line=   # Schedule, default <line>
checkpoints: test_describing.Checkpoints
  checkpoints.every=   # int, required
  checkpoints.keep=2   # any, the default
callbacks.stop: mypkg.nets.Open
  callbacks.stop.first=1    # int
  callbacks.stop.second=2   # int, the default
  callbacks.stop.third=3    # int, the default
  callbacks.stop.other=2    # not checked"""


def test_every_key_is_shown_with_type_and_value(package):
    text = describe(CONFIG, {"run": Run, "checkpoints": Checkpoints}, {"run": ["hidden"]})
    assert text == TEXT


def test_what_is_shown_can_be_set(package, write):
    write({"x.yaml": "seed: 0\nplugins: [mypkg]\nmodule: {_target_: mypkg.nets.Wide, width: 3, name: '0123'}\n"})
    before = load("x.yaml")
    for line in describe(before).splitlines():
        key, equals, value = line.partition("   #")[0].strip().partition("=")
        if equals:
            after = build(load("x.yaml", [f"{key}={value}"])["module"], "module", package)
            after.names = tuple(after.names)
            assert vars(after) == vars(build(before["module"], "module", package)), line


def test_lightning_is_described_without_what_ndeflow_sets():
    text = describe({"trainer": {"max_steps": 3}}, {"trainer": pl.Trainer}, {"trainer": ["max_epochs", "logger"]})
    assert "  trainer.max_steps=3 " in text
    assert "trainer.min_epochs=null" in text
    assert "trainer.max_epochs" not in text
    assert "trainer.logger" not in text
    assert max(map(len, text.splitlines())) < 220


def test_a_wrong_class_is_an_error():
    with pytest.raises(ConfigError, match=r"^module\._target_=os\.system is not allowed"):
        describe({"module": {"_target_": "os.system"}})
