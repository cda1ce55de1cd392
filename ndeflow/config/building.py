"""Check a node of a config against signatures, and build what it describes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any, TypeVar

from ndeflow.config.errors import ConfigError, nearest, written
from ndeflow.config.hints import Pending, fit
from ndeflow.config.loading import KEYS
from ndeflow.config.targets import EMPTY, full_name, parameter_name, resolve, signature

T = TypeVar("T")


def validate(
    node: Any,
    key: str,
    plugins: Sequence[str] = (),
    target: Callable[..., Any] | None = None,
    given: Iterable[str] | Mapping[str, str] = (),
) -> None:
    """Check names, targets, types and missing arguments of a node and of all below it; build nothing.

    Args:
        node: plain containers, as `load` returns them.
        key: where the node stands, e.g. `module.net`.
        plugins: packages that a `_target_` may name beside the allowed ones.
        target: check the keys of a node without `_target_` against this class; null counts as no keys.
        given: arguments that the caller passes itself, so the node must not. A mapping says what sets
            them: `{"max_epochs": "trainer.max_steps"}`.

    Raises:
        ConfigError: the first thing that is wrong.

    >>> validate({"_target_": "torch.nn.Linear", "in_features": 2.5}, "net")
    Traceback (most recent call last):
    ndeflow.config.errors.ConfigError: net.in_features=2.5: expected int, got float
    """
    setters = dict(given) if isinstance(given, Mapping) else {name: _setter(name) for name in given}
    if target is not None:
        if not isinstance(node, dict | None):
            raise ConfigError(f"{key}={written(node)}: expected keys and values, got {type(node).__name__}", key)
        _check_arguments(node or {}, key, target, full_name(target), plugins, setters)
    elif is_node(node):
        _pending(node, key, plugins, setters)
    elif setters:
        raise ConfigError(f"{key} has no _target_: name its class, e.g. {key}._target_=torch.nn.Linear", key)
    else:
        _outline(node, key, plugins)


def build(node: Any, key: str, plugins: Sequence[str] = (), **given: Any) -> Any:
    """Build what a node describes, innermost first, after all of it has been checked.

    Args:
        node: a mapping with `_target_`, or containers of such mappings. `_partial_: true` makes a
            `functools.partial` of the target, for what needs arguments that only its owner has.
        key: where the node stands, e.g. `module.net`.
        plugins: packages that a `_target_` may name beside the allowed ones.
        given: arguments of the outermost target that the config may not set.

    Returns:
        The object, or the containers with objects in the places of nodes.

    Raises:
        ConfigError: `validate` refuses the node, or a class its arguments (ValueError, TypeError).

    >>> build([{"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}], "nets")
    [Linear(in_features=2, out_features=3, bias=True)]
    """
    validate(node, key, plugins, given=tuple(given))
    return _make(node, key, plugins, given)


def section(node: Any, cls: Callable[..., T], key: str, plugins: Sequence[str] = (), **given: Any) -> T:
    """Build a section that has no `_target_` because its class is known: `run`, `ema`, `trainer` and so on.

    Args:
        node: the keys of the section; null counts as none.
        cls: class (or function) whose signature is the schema.
        key: name of the section.
        plugins: packages that a `_target_` inside may name beside the allowed ones.
        given: arguments that the config may not set.

    Returns:
        What `cls` returns.

    Raises:
        ConfigError: as for `build`.
    """
    validate(node, key, plugins, cls, tuple(given))
    return _call(cls, node or {}, key, full_name(cls), plugins, given)


def _setter(name: str) -> str:
    """Who hands an argument to a target, if the config must not."""
    return f"the top-level key {name}" if name in KEYS else "ndeflow"


def is_node(value: object) -> bool:
    """Whether a value of a config describes an object."""
    return isinstance(value, dict) and "_target_" in value


def arguments_of(node: dict[str, Any]) -> dict[str, Any]:
    """Return what a node hands to its target."""
    return {name: value for name, value in node.items() if name not in ("_target_", "_partial_")}


def _outline(value: Any, key: str, plugins: Sequence[str]) -> Any:
    """Check a value; return it with each node replaced by what it will become."""
    if is_node(value):
        return _pending(value, key, plugins, {})
    if isinstance(value, dict):
        return {name: _outline(item, f"{key}.{name}", plugins) for name, item in value.items()}
    if isinstance(value, list):
        return [_outline(item, f"{key}[{i}]", plugins) for i, item in enumerate(value)]
    return value


def _pending(node: dict[str, Any], key: str, plugins: Sequence[str], given: Mapping[str, str]) -> Pending:
    """Check a node; return what it will become."""
    target = resolve(node["_target_"], key, plugins)
    partial = fit(node.get("_partial_", False), bool, f"{key}._partial_")
    _check_arguments(arguments_of(node), key, target, node["_target_"], plugins, given, partial)
    return Pending(node["_target_"], signature(target).returns, isinstance(target, type), partial)


def _check_arguments(
    values: dict[str, Any],
    key: str,
    target: Callable[..., Any],
    name: str,
    plugins: Sequence[str],
    given: Mapping[str, str],
    partial: bool = False,
) -> None:
    """Check what a config hands to a target, key by key, then what it lacks."""
    parameters, takes_more, _ = signature(target)
    for argument, value in values.items():
        here = f"{key}.{argument}"
        if argument in given:
            raise ConfigError(f"{here} is set by {given[argument]}; remove it", here)
        if argument not in parameters and not takes_more:
            settable = [known for known in parameters if known not in given]
            raise ConfigError(f"unknown key {here} for {name}; {nearest(str(argument), settable)}", here)
        outline = _outline(value, here, plugins)
        if argument in parameters:
            fit(outline, parameters[argument].hint, here)
    lacking = [k for k, p in parameters.items() if p.default is EMPTY and k not in values and k not in given]
    if lacking and not partial:
        raise ConfigError(f"{key} ({name}): missing {', '.join(lacking)}", f"{key}._target_")


def _make(value: Any, key: str, plugins: Sequence[str], given: Mapping[str, Any] | None = None) -> Any:
    """Build a checked value."""
    if isinstance(value, dict) and is_node(value):
        target, name = resolve(value["_target_"], key, plugins), value["_target_"]
        call = functools.partial(functools.partial, target) if value.get("_partial_", False) else target
        return _call(target, arguments_of(value), key, name, plugins, given or {}, call)
    if isinstance(value, dict):
        return {name: _make(item, f"{key}.{name}", plugins) for name, item in value.items()}
    if isinstance(value, list):
        return [_make(item, f"{key}[{i}]", plugins) for i, item in enumerate(value)]
    return value


def _call(
    target: Callable[..., Any],
    values: dict[str, Any],
    key: str,
    name: str,
    plugins: Sequence[str],
    given: Mapping[str, Any],
    call: Callable[..., Any] | None = None,
) -> Any:
    """Call `call` (by default the target) with the built arguments of a target."""
    parameters = signature(target).parameters
    arguments = dict(given)
    for argument, value in values.items():
        made = _make(value, f"{key}.{argument}", plugins)
        known = parameters.get(argument)
        # once more: what a function target returns, and YAML's lists where tuples are wanted
        arguments[argument] = fit(made, known.hint, f"{key}.{argument}") if known else made
    positional = [argument for argument, parameter in parameters.items() if parameter.positional]
    leading = [arguments.pop(argument) for argument in takewhile(arguments.__contains__, positional)]
    try:
        return (call or target)(*leading, **{parameter_name(k): v for k, v in arguments.items()})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key} ({name}): {error}") from error
