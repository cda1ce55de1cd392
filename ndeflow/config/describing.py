"""What a config may set, as text: the help page of one config."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import NoneType
from typing import Any

from ndeflow.config.building import arguments_of, is_node
from ndeflow.config.errors import written
from ndeflow.config.hints import spell
from ndeflow.config.loading import KEYS
from ndeflow.config.overrides import quoted
from ndeflow.config.targets import EMPTY, Parameter, full_name, resolve, signature


def describe(
    config: Mapping[str, Any],
    sections: Mapping[str, Callable[..., Any]] | None = None,
    given: Mapping[str, Iterable[str]] | None = None,
) -> str:
    """Return every key that a config takes, as the override that sets it to what it is now.

    Args:
        config: what `load` returned.
        sections: classes of the sections without `_target_`, by name; shown even where the config has none.
        given: by section, arguments of its class that the config may not set; they are not shown.

    Returns:
        A block per section and per node with a `_target_`: key, class, first line of the docstring, and
        one line `KEY=VALUE  # type` per argument.

    Raises:
        ConfigError: a `_target_` is wrong.

    >>> print(describe({"seed": 0, "module": {"_target_": "torch.nn.Flatten", "start_dim": 2}}))
    seed=0
    module: torch.nn.Flatten. Flattens a contiguous range of dims into a tensor.
      module.start_dim=2   # int, default 1
      module.end_dim=-1    # int, the default
    """
    sections, given, plugins = sections or {}, given or {}, config.get("plugins", ())
    lines: list[str] = []
    for key in KEYS:
        hidden = frozenset(given.get(key, ()))
        if key in sections:
            lines += _block(config.get(key) or {}, key, sections[key], full_name(sections[key]), plugins, hidden)
        elif key in config:
            lines += _described(config[key], key, plugins, hidden, top=True)
    return "\n".join(lines)


def _described(
    value: Any, key: str, plugins: Sequence[str], hidden: frozenset[str] = frozenset(), top: bool = False
) -> Iterator[str]:
    """The blocks of all nodes in a value; at the top level also its plain entries."""
    if is_node(value):
        target = resolve(value["_target_"], key, plugins)
        if value.get("_partial_"):  # what it lacks, its owner passes
            hidden |= {name for name, p in signature(target).parameters.items() if p.default is EMPTY} - value.keys()
        yield from _block(arguments_of(value), key, target, value["_target_"], plugins, hidden)
    elif isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _described(
                item, f"{key}.{name}" if isinstance(value, dict) else f"{key}[{name}]", plugins, top=top
            )
    elif top:
        yield _assignment(key, value)


def _block(
    values: dict[str, Any],
    key: str,
    target: Callable[..., Any],
    name: str,
    plugins: Sequence[str],
    hidden: frozenset[str],
) -> Iterator[str]:
    """Heading and arguments of one target, then the blocks of the nodes among its arguments."""
    found = signature(target)
    rows = [
        _row(f"{key}.{argument}", values.get(argument, EMPTY), parameter)
        for argument, parameter in found.parameters.items()
        if argument not in hidden
    ]
    rows += [
        (_assignment(f"{key}.{more}", values[more]), "not checked") for more in values if more not in found.parameters
    ]
    width = min(max((len(left) for left, _ in rows), default=0), 60)
    summary = (inspect.getdoc(target) or "").partition("\n")[0]
    # a dataclass without a docstring gets its signature for one
    heading = name if not summary or summary.startswith(f"{target.__name__}(") else f"{name}. {summary}"
    yield f"{key}: {heading}"
    yield from (f"  {left:{width}}   # {right}" for left, right in rows)
    for argument, value in values.items():
        yield from _described(value, f"{key}.{argument}", plugins)


def _row(key: str, value: Any, parameter: Parameter) -> tuple[str, str]:
    """The override of one argument, and what it takes."""
    kind = "any" if parameter.hint is Any else written(spell(parameter.hint))
    if value is EMPTY and parameter.default is EMPTY:
        return f"{key}=", f"{kind}, required"
    if value is EMPTY and not isinstance(parameter.default, str | int | float | list | tuple | dict | NoneType):
        return f"{key}=", f"{kind}, default {written(parameter.default)}"
    if value is EMPTY:
        return _assignment(key, parameter.default), f"{kind}, the default"
    return _assignment(
        key, value
    ), kind if parameter.default is EMPTY else f"{kind}, default {written(parameter.default)}"


def _assignment(key: str, value: Any) -> str:
    """The override that sets a key to a value."""
    if is_node(value):
        return f"{key}._target_={value['_target_']}"
    return f"{key}={quoted(value) if isinstance(value, str) else written(value)}"
