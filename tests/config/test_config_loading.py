import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ndeflow.config import ConfigError, available, find, load, located, save

PARTS = {
    "base/trainer.yaml": "trainer: {max_steps: 10, devices: auto}\nseed: 1\n",
    "base/net.yaml": "module: {_target_: pkg.A, net: {_target_: pkg.B, width: 8, sizes: [1, 2]}, lr: 1e-3}\n",
    "x.yaml": """
extends: [base/trainer.yaml, base/net.yaml]
vars: {width: 64, steps: 20}
module: {net: {width: "${vars.width}", sizes: [3]}}
trainer: {max_steps: "${vars.steps}"}
""",
}


def message(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value)


def test_files_lie_on_top_of_each_other(write):
    write(PARTS)
    assert load("x.yaml") == {
        "seed": 1,
        "vars": {"width": 64, "steps": 20},
        "trainer": {"max_steps": 20, "devices": "auto"},
        "module": {"_target_": "pkg.A", "lr": 1e-3, "net": {"_target_": "pkg.B", "width": 64, "sizes": [3]}},
    }


def test_later_bases_win_and_the_file_wins_over_all(write):
    write({"a.yaml": "seed: 1\nresume: none\nrun: {name: a}\n", "b.yaml": "seed: 2\nrun: {root: b}\n"})
    write({"c.yaml": "extends: [a.yaml, b.yaml]\nresume: auto\n", "d.yaml": "extends: c.yaml\n"})
    assert load("d.yaml") == {"seed": 2, "resume": "auto", "run": {"name": "a", "root": "b"}}


def test_extends_is_relative_to_the_file_that_says_it(write, tmp_path, monkeypatch):
    write({"configs/flow/x.yaml": "extends: ../base/y.yaml\n", "configs/base/y.yaml": "extends: z.yaml\n"})
    write({"configs/base/z.yaml": "seed: 3\n"})
    assert load("configs/flow/x.yaml") == {"seed": 3}
    monkeypatch.chdir(tmp_path / "configs")
    assert load("flow/x.yaml") == load(tmp_path / "configs/flow/x.yaml") == {"seed": 3}


def test_another_class_in_a_file_clears_the_arguments_of_the_one_below(write):
    write(PARTS | {"y.yaml": "extends: base/net.yaml\nmodule: {net: {_target_: pkg.C, depth: 2}}\n"})
    assert load("y.yaml")["module"]["net"] == {"_target_": "pkg.C", "depth": 2}


def test_interpolations_see_overrides(write):
    write(PARTS)
    config = load("x.yaml", ["vars.width=5", "trainer.devices=${vars.width}", "run.name=w${vars.width}"])
    assert config["module"]["net"]["width"] == config["trainer"]["devices"] == 5
    assert config["run"]["name"] == "w5"


def test_only_plain_containers_come_out(write):
    write(PARTS)

    def types(value):
        yield type(value)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from types(item)

    assert set(types(load("x.yaml", ["run.name=2024-01-01"]))) == {dict, list, str, int, float}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"x.yaml": "moduel: 1\n"}, "unknown key moduel in x.yaml; did you mean module?"),
        ({"x.yaml": "extends: y.yaml\n", "y.yaml": "seeds: 1\n"}, "unknown key seeds in y.yaml; did you mean seed?"),
        ({"x.yaml": "extends: y.yaml\n", "y.yaml": "extends: x.yaml\n"}, "extends cycle: x.yaml -> y.yaml -> x.yaml"),
        ({"x.yaml": "extends: x.yaml\n"}, "extends cycle: x.yaml -> x.yaml"),
        (
            {"x.yaml": "extends: base/trainr.yaml\n", "base/trainer.yaml": "", "base/net.yaml": ""},
            "x.yaml extends base/trainr.yaml, which does not exist; did you mean base/trainer.yaml?",
        ),
        ({"x.yaml": "extends: 3\n"}, "x.yaml: extends=3: expected str | list[str], got int; quote it to keep text"),
        ({"y.yaml": ""}, "x.yaml does not exist"),
        ({"x.yaml": "a: [1,\n"}, "x.yaml: while parsing a flow node: did not find expected node content (line 2)"),
        ({"x.yaml": "seed: 1\nseed: 2\n"}, "x.yaml: while constructing a mapping: found duplicate key seed (line 2)"),
        ({"x.yaml": "seed: !foo 3\n"}, "x.yaml: could not determine a constructor for the tag '!foo' (line 1)"),
        ({"x.yaml": "3\n"}, "x.yaml: Invalid loaded object type: int"),
        ({"x.yaml": "seed: 0b_\n"}, "x.yaml: invalid literal for int() with base 2: ''"),
        ({"x.yaml": "seed: ${vars.sed}\n"}, "x.yaml: Interpolation key 'vars.sed' not found (at seed)"),
        ({"x.yaml": "run: {name: '${run'}\n"}, "x.yaml: no viable alternative at input '${run' (at run.name)"),
        (
            {"x.yaml": "extends: y.yaml\n", "y.yaml": "module:\n  _target_: pkg.A\n  lr: ???\n"},
            "y.yaml: Missing mandatory value: lr (at module.lr)",
        ),
        ({"x.yaml": "seed: ${resume}\nresume: ${seed}\n"}, "x.yaml: Recursive interpolation detected (at seed)"),
        ({"x.yaml": "seed: 1.5\n"}, "seed=1.5: expected int, got float (in x.yaml)"),
        ({"x.yaml": "seed: on\n"}, "seed=true: expected int, got bool (in x.yaml)"),
        ({"x.yaml": "resume: off\n"}, "resume=false: expected str, got bool; quote it to keep text (in x.yaml)"),
        ({"x.yaml": "plugins: mypkg\n"}, "plugins=mypkg: expected list[str], got str (in x.yaml)"),
        ({"x.yaml": "run: moons\n"}, "run=moons: expected dict | None, got str (in x.yaml)"),
        ({"x.yaml": "vars: 3\n"}, "vars=3: expected dict | None, got int (in x.yaml)"),
        (
            {"x.yaml": "module: {lr: 1}\n"},
            "module has no _target_: name its class, e.g. module._target_=ndeflow.modules.NAME (in x.yaml)",
        ),
        (
            {"x.yaml": "run: {root: !!python/object/apply:pathlib.Path [x]}\n"},
            "run.root is a PosixPath; write it as text, number, list or mapping (in x.yaml)",
        ),
        (
            {"x.yaml": "run: {root: [!!binary aGk=]}\n"},
            "run.root[0] is a bytes; write it as text, number, list or mapping (in x.yaml)",
        ),
        (
            {"x.yaml": "vars: {width: 3}\n"},
            "vars.width=3 has no effect: nothing interpolates ${vars.width}; remove it (in x.yaml)",
        ),
    ],
)
def test_wrong_files(write, files, expected):
    write(files)
    assert message("x.yaml") == expected


def test_a_list_is_no_config(write):
    write({"x.yaml": "- 1\n"})
    assert message("x.yaml").startswith("x.yaml holds a list; a config is a mapping of extends, plugins, vars, seed,")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("vars.stepz=3", "unknown key vars.stepz in override 'vars.stepz=3'; did you mean steps?"),
        ("vars.foo=3", "unknown key vars.foo in override 'vars.foo=3'; allowed: width, steps"),
        ("vars={foo: 3}", "unknown key vars.foo in override 'vars={foo: 3}'; allowed: width, steps"),
        ("vars.steps.foo=3", "override 'vars.steps.foo=3': vars.steps=20 has no key foo"),
        ("seed=x", "seed=x: expected int, got str (in override 'seed=x')"),
        ("run=3", "run=3: expected dict | None, got int (in override 'run=3')"),
        ("seed=${foo}", "override 'seed=${foo}': Interpolation key 'foo' not found (at seed)"),
        ("seed=${nope:1}", "override 'seed=${nope:1}': Unsupported interpolation type nope (at seed)"),
        ("module.lr=???", "override 'module.lr=???': Missing mandatory value: lr (at module.lr)"),
        ("module=null", "module=null: expected dict, got null (in override 'module=null')"),
    ],
)
def test_wrong_overrides(write, override, expected):
    write(PARTS)
    assert message("x.yaml", override) == expected


def test_vars_that_a_new_class_leaves_idle_are_an_error_only_if_the_command_line_sets_them(write):
    write(PARTS)
    config = load("x.yaml", ["module.net._target_=pkg.C"])
    assert config["module"]["net"] == {"_target_": "pkg.C"}
    assert message("x.yaml", "module.net._target_=pkg.C", "vars.width=3") == (
        "vars.width=3 has no effect: nothing interpolates ${vars.width}; remove it (in override 'vars.width=3')"
    )


@pytest.mark.parametrize("text", ["${vars.a}", "${vars[a]}", "x-${vars.a}-y", "${vars}", "${vars.${resume}}"])
def test_ways_of_using_an_entry_of_vars(write, text):
    write({"x.yaml": f"vars: {{a: a}}\nresume: a\nmodule: {{_target_: pkg.A, x: [{{y: '{text}'}}]}}\n"})
    assert str(load("x.yaml")["module"]["x"][0]["y"]) in ("a", "x-a-y", "{'a': 'a'}")


def test_a_mention_in_plain_text_is_no_use(write):
    write({"x.yaml": "vars: {a: 1}\nrun: {name: vars.a}\n"})
    assert message("x.yaml").startswith("vars.a=1 has no effect")


def test_locations_name_what_set_a_key_last(write):
    write(PARTS)
    overrides = ["trainer.devices=2", "module.net={width: 3}", "run.name=x"]
    for key, where in {
        "trainer.devices": "override 'trainer.devices=2'",
        "module.net.width": "override 'module.net={width: 3}'",
        "module.net.sizes[0]": "x.yaml",
        "module.net._target_": "base/net.yaml",
        "module.lr": "base/net.yaml",
        "seed": "base/trainer.yaml",
        "run": "override 'run.name=x'",
    }.items():
        with pytest.raises(ConfigError) as caught, located("x.yaml", overrides):
            raise ConfigError("wrong", key)
        assert str(caught.value) == (f"wrong (in {where})" if key != "run" else "wrong")


def test_errors_without_a_place_stay_as_they_are(write):
    write(PARTS)
    for key in (None, "module.other", "init.lr.encoder.*"):
        with pytest.raises(ConfigError) as caught, located("x.yaml"):
            raise ConfigError("wrong", key)
        assert str(caught.value) == "wrong"


def test_locations_are_said_once(write):
    write({"x.yaml": "seed: x\n"})
    with pytest.raises(ConfigError) as caught, located("x.yaml"):
        load("x.yaml")
    assert str(caught.value) == "seed=x: expected int, got str (in x.yaml)"


FOLDER = {f"configs/{n}.yaml": "" for n in ("flow/digits", "flow/moons", "cnf/moons", "demo", "base/toy", "cnf/base/y")}


def test_available_leaves_out_parts(write):
    write(FOLDER)
    assert available("configs") == available() == ["cnf/moons", "demo", "flow/digits", "flow/moons"]
    assert available("nowhere") == []


@pytest.mark.parametrize("name", ["flow/digits", "flow/digits.yaml", "configs/flow/digits", "configs/flow/digits.yaml"])
def test_configs_are_found_by_name_and_by_path(write, name):
    write(FOLDER)
    assert find(name) == Path("configs/flow/digits.yaml")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("flow/digit", "did you mean flow/digits?"),
        ("configs/flow/digit.yaml", "did you mean flow/digits?"),
        ("digits", "did you mean flow/digits?"),
        ("flo/moon", "did you mean cnf/moons?"),
        ("zzz", "available: cnf/moons, demo, flow/digits, flow/moons"),
    ],
)
def test_configs_that_are_not_there(write, name, advice):
    write(FOLDER)
    with pytest.raises(ConfigError) as caught:
        find(name)
    assert str(caught.value) == f"there is no config {name} in configs; {advice}"


def test_saved_is_loaded(write):
    write(PARTS)
    config = load("x.yaml", ["run.name='0123'", "run.root=a${vars.width}", "trainer.devices=[0,1]", "optim.lr=1e-9"])
    save(config, "saved.yaml")
    assert load("saved.yaml") == {key: value for key, value in config.items() if key != "vars"}
    assert message("saved.yaml", "vars.width=3") == "unknown key vars.width in override 'vars.width=3'; allowed: none"


TRAPS = [
    "on",
    "0123",
    "1e-3",
    "nan",
    "null",
    "~",
    "",
    " ",
    "12:30:00",
    "2024-01-01",
    "${vars.a}",
    "\\${a}",
    "\\",
    "a: b",
]
texts = st.sampled_from(TRAPS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
scalars = texts | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
plain = st.recursive(
    scalars.filter(lambda value: value != "???"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts.filter(bool), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(section=st.dictionaries(texts.filter(bool), plain, max_size=3))
def test_any_section_survives_saving_and_loading(tmp_path, section):
    save({"seed": 0, "run": section}, tmp_path / "saved.yaml")
    assert load(tmp_path / "saved.yaml") == {"seed": 0, "run": section}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False))
def test_what_python_prints_of_a_number_is_the_override_that_sets_it(tmp_path, value):
    (tmp_path / "x.yaml").write_text("seed: 0\n")
    word = {None: "null", True: "true", False: "false"}[value] if isinstance(value, bool | None) else repr(value)
    assert load(tmp_path / "x.yaml", [f"run.x={word}"])["run"] == {"x": value}


def test_nan_survives(tmp_path):
    save({"run": {"x": math.nan}}, tmp_path / "x.yaml")
    assert math.isnan(load(tmp_path / "x.yaml")["run"]["x"])


def test_reading_a_config_imports_no_torch(write):
    write(PARTS)
    code = "import sys; from ndeflow.config import load; load('x.yaml', ['seed=2']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
