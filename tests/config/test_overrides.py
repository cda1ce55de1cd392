import math

import pytest

from ndeflow.config import ConfigError, load
from ndeflow.config.overrides import apply, dotted, in_order, merge, parse, steps

VALUES = {
    # numbers, as YAML 1.1 and OmegaConf read them
    "3": 3,
    "-3": -3,
    "1_000": 1000,
    "0x10": 16,
    "1.5": 1.5,
    "1e-3": 1e-3,
    "1e3": 1000.0,
    "inf": math.inf,
    "-inf": -math.inf,
    "+Inf": math.inf,
    ".inf": math.inf,
    # traps of YAML 1.1: the type check of the key speaks about them
    "on": True,
    "off": False,
    "yes": True,
    "0123": 83,
    "12:30:00": 45000,
    # null and the empty text
    "null": None,
    "~": None,
    "": "",
    "none": "none",
    # text that YAML would refuse, cut, or make something else of
    "*.weight": "*.weight",
    "%s": "%s",
    "@x": "@x",
    "&anchor": "&anchor",
    "#3": "#3",
    "a # b": "a # b",
    "a: b": "a: b",
    "a: b: c": "a: b: c",
    "- a": "- a",
    "a=b": "a=b",
    "2024-01-01": "2024-01-01",
    "0b_": "0b_",
    "!!python/object/apply:pathlib.Path [x]": "!!python/object/apply:pathlib.Path [x]",
    "${vars.width}": "${vars.width}",
    "${vars": "${vars",
    # marked YAML
    "'0123'": "0123",
    '"on"': "on",
    "[1, 2.5, a]": [1, 2.5, "a"],
    "{a: 1, b: [x]}": {"a": 1, "b": ["x"]},
    "{encoder.*: 0.1}": {"encoder.*": 0.1},
}


@pytest.mark.parametrize(("text", "value"), VALUES.items())
def test_values(text, value):
    parsed = parse(f"a.b={text}")
    assert parsed.path == ("a", "b")
    assert parsed.value == value
    assert type(parsed.value) is type(value)


def test_nan_is_a_float():
    assert math.isnan(parse("a=nan").value)


def test_two_dashes_are_optional():
    assert parse("--optim.lr=0.1")[1:] == parse("optim.lr=0.1")[1:] == (("optim", "lr"), 0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "override 'a' is not KEY=VALUE; write e.g. trainer.max_steps=1000"),
        ("--help", "override 'help' is not KEY=VALUE; write e.g. trainer.max_steps=1000"),
        ("seed=[1,2", "override 'seed=[1,2': while parsing a flow sequence; check brackets and quotes"),
        ("seed={a", "override 'seed={a': while parsing a flow mapping; check brackets and quotes"),
        ('name="x', "override 'name=\"x': while scanning a quoted scalar; check brackets and quotes"),
        ("=3", "override '=3': '' is not a key; write e.g. module.net.width or callbacks[0].every"),
        ("a..b=3", "override 'a..b=3': 'a..b' is not a key; write e.g. module.net.width or callbacks[0].every"),
        ("a b=3", "override 'a b=3': 'a b' is not a key; write e.g. module.net.width or callbacks[0].every"),
        ("a[x]=3", "override 'a[x]=3': 'a[x]' is not a key; write e.g. module.net.width or callbacks[0].every"),
        (
            "extends=base/x.yaml",
            "override 'extends=base/x.yaml': extends belongs into a file, since overrides come after all files",
        ),
    ],
)
def test_texts_that_are_no_override(text, message):
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert str(caught.value) == message


@pytest.mark.parametrize("key", ["a", "a.b", "a[0]", "a[0][12].b.c[3]", "a1.b2[3]"])
def test_keys_split_and_join(key):
    assert dotted(steps(key)) == key


def test_an_index_is_an_int_and_a_name_of_digits_is_a_name():
    assert steps("a[1].2") == ("a", 1, "2")


def test_merge_goes_key_by_key_and_replaces_lists():
    below = {"a": {"x": 1, "y": [1, 2]}, "b": 1, "c": {"z": 1}}
    above = {"a": {"y": [3]}, "c": None, "d": 4}
    assert merge(below, above) == {"a": {"x": 1, "y": [3]}, "b": 1, "c": None, "d": 4}


@pytest.mark.parametrize(
    ("below", "above", "merged"),
    [
        ({"_target_": "A", "x": 1}, {"_target_": "B", "y": 2}, {"_target_": "B", "y": 2}),
        ({"_target_": "A", "x": 1}, {"_target_": "A", "y": 2}, {"_target_": "A", "x": 1, "y": 2}),
        ({"_target_": "A", "x": 1}, {"y": 2}, {"_target_": "A", "x": 1, "y": 2}),
        ({"x": 1}, {"_target_": "B"}, {"x": 1, "_target_": "B"}),
    ],
)
def test_another_target_replaces_the_mapping(below, above, merged):
    assert merge({"net": below}, {"net": above}) == {"net": merged}


TREE = {
    "seed": 0,
    "vars": {"width": 8},
    "module": {"_target_": "A", "net": {"_target_": "B", "x": 1, "size": [1, 2]}, "act": None},
    "callbacks": [{"_target_": "C", "every": 5}, 7],
}


def applied(*overrides):
    tree = TREE
    for override in in_order(overrides):
        tree = apply(tree, override)
    return tree


@pytest.mark.parametrize(
    ("overrides", "where", "value"),
    [
        (["seed=3"], lambda t: t["seed"], 3),
        (["module.net.x=2"], lambda t: t["module"]["net"], {"_target_": "B", "x": 2, "size": [1, 2]}),
        (["module.net.new=2"], lambda t: t["module"]["net"]["new"], 2),
        (["module.net={x: 5}"], lambda t: t["module"]["net"], {"_target_": "B", "x": 5, "size": [1, 2]}),
        (["module.net=null"], lambda t: t["module"]["net"], None),
        (["module.net.size[1]=9"], lambda t: t["module"]["net"]["size"], [1, 9]),
        (["callbacks[0].every=3"], lambda t: t["callbacks"], [{"_target_": "C", "every": 3}, 7]),
        (["callbacks[1]=x"], lambda t: t["callbacks"][1], "x"),
        (["run.name=x"], lambda t: t["run"], {"name": "x"}),
        (["seed=1", "seed=2"], lambda t: t["seed"], 2),
        # a new class clears the arguments of the old one, whatever the order on the command line
        (["module.net.y=2", "module.net._target_=D"], lambda t: t["module"]["net"], {"_target_": "D", "y": 2}),
        (["module.net._target_=D", "module.net.y=2"], lambda t: t["module"]["net"], {"_target_": "D", "y": 2}),
        (["module.net._target_=B"], lambda t: t["module"]["net"], TREE["module"]["net"]),
        (["module.net={_target_: D}", "module.net.y=2"], lambda t: t["module"]["net"], {"_target_": "D", "y": 2}),
        (
            ["module.net._target_=D", "module.net.y=1", "module._target_=E"],
            lambda t: t["module"],
            {"_target_": "E", "net": {"_target_": "D", "y": 1}},
        ),
        # a node may begin on the command line
        (["module.act._target_=F", "module.act.y=1"], lambda t: t["module"]["act"], {"_target_": "F", "y": 1}),
        (["module.new._target_=F"], lambda t: t["module"]["new"], {"_target_": "F"}),
    ],
)
def test_overrides_reach_their_place(overrides, where, value):
    before = repr(TREE)
    assert where(applied(*overrides)) == value
    assert repr(TREE) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("module.nett.x=1", "unknown key module.nett in override 'module.nett.x=1'; did you mean net?"),
        ("module.foo.x=1", "unknown key module.foo in override 'module.foo.x=1'; allowed: net, act"),
        ("run.a.b=1", "unknown key run.a in override 'run.a.b=1'; allowed: none"),
        ("seed.x=1", "override 'seed.x=1': seed=0 has no key x"),
        ("module.act.x=1", "override 'module.act.x=1': module.act=null has no key x"),
        ("module.net.x.y=1", "override 'module.net.x.y=1': module.net.x=1 has no key y"),
        ("callbacks[1].every=1", "override 'callbacks[1].every=1': callbacks[1]=7 has no key every"),
        ("callbacks[2].every=1", "override 'callbacks[2].every=1': callbacks has 2 items, and the first is [0]"),
        ("callbacks[2]=1", "override 'callbacks[2]=1': callbacks has 2 items, and the first is [0]"),
        ("seed[0]=1", "override 'seed[0]=1': seed=0 is not a list"),
        ("module.net.x[1]=1", "override 'module.net.x[1]=1': module.net.x=1 is not a list"),
        (
            "module.net.size.1=3",
            "override 'module.net.size.1=3': module.net.size=[1, 2] has no key 1; write module.net.size[1]",
        ),
    ],
)
def test_paths_that_lead_nowhere(override, message):
    with pytest.raises(ConfigError) as caught:
        applied(override)
    assert str(caught.value) == message


def test_a_wrong_section_is_found_in_the_override(write):
    write({"x.yaml": "seed: 0\n"})
    with pytest.raises(ConfigError) as caught:
        load("x.yaml", ["moduel.lr=1"])
    assert str(caught.value) == "unknown key moduel in override 'moduel.lr=1'; did you mean module?"
