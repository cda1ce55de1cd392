"""Type hints as the types of a config: does a value fit, and what is it then."""

from __future__ import annotations

import collections.abc as abc
import functools
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from ndeflow.config.errors import ConfigError, nearest, written

_UNIONS = (Union, UnionType)


@dataclass(frozen=True)
class Pending:
    """What a `_target_` node will become, while nothing is built yet.

    Args:
        target: the dotted name, as the config writes it.
        kind: class of the object; None where a function does not say what it returns.
        exact: whether it is the very class, or what a function promises, which may return a subclass.
        partial: whether the node stays a function that its owner calls.
    """

    target: str
    kind: type | None
    exact: bool
    partial: bool

    def may_be(self, kind: type) -> bool:
        """Whether the object can be an instance of `kind`."""
        if self.partial:
            return issubclass(functools.partial, kind)
        return self.kind is None or issubclass(self.kind, kind) or (not self.exact and issubclass(kind, self.kind))

    def __str__(self) -> str:
        return f"{self.target} with _partial_" if self.partial else self.target


def spell(hint: Any) -> str:
    """Return a hint as text, without module names.

    >>> spell(Literal["shared", "per_sample"] | None), spell(tuple[float, ...])
    ("'shared' | 'per_sample' | None", 'tuple[float, ...]')
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in _UNIONS:
        return " | ".join(map(spell, args))
    if origin is Literal:
        return " | ".join(map(repr, args))
    if origin is Annotated:
        return spell(args[0])
    if origin is abc.Callable:
        return "Callable"
    if hint in (None, NoneType, Ellipsis):
        return "..." if hint is Ellipsis else "None"
    name = getattr(origin or hint, "__name__", str(hint))
    return f"{name}[{', '.join(map(spell, args))}]" if args else name


def fit(value: Any, hint: Any, key: str) -> Any:
    """Check a value of a config against a hint.

    An int is a float, a bool is neither an int nor a float, a text is no sequence of letters. Hints that
    name no class (type variables, unresolved names) and classes that cannot be tested (protocols) fit all.

    Args:
        value: plain values, objects and `Pending` ones, also inside lists and dicts.
        hint: an annotation.
        key: dotted key of the value, for the message.

    Returns:
        The value, with tuples where the hint wants a tuple and YAML gave a list.

    Raises:
        ConfigError: it does not fit; the key in the message is the innermost one.

    >>> fit([0.9, 1], tuple[float, float], "optim.betas")
    (0.9, 1)
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return fit(value, args[0], key)
    if origin in _UNIONS:
        return _fit_one_of(value, args, hint, key)
    if origin is Literal:
        return value if any(type(value) is type(arg) and value == arg for arg in args) else _refuse(value, hint, key)
    kind = NoneType if hint is None else origin or hint
    if kind is Any or not isinstance(kind, type):
        return value
    if not _is(value, kind):
        _refuse(value, hint, key)
    if isinstance(value, dict) and len(args) == 2:
        return {fit(k, args[0], key): fit(item, args[1], f"{key}.{k}") for k, item in value.items()}
    if isinstance(value, list | tuple) and kind is tuple:
        return _fit_tuple(value, args, hint, key)
    if isinstance(value, list) and len(args) == 1:
        return [fit(item, args[0], f"{key}[{i}]") for i, item in enumerate(value)]
    return value


def _fit_one_of(value: Any, options: tuple[Any, ...], hint: Any, key: str) -> Any:
    """`fit` for the first option that takes the value; if none does, the error that got deepest."""
    deeper = []
    for option in options:
        try:
            return fit(value, option, key)
        except ConfigError as error:
            deeper += [error] if error.key != key else []
    if len(deeper) != 1:
        _refuse(value, hint, key)
    raise deeper[0]


def _fit_tuple(value: list[Any] | tuple[Any, ...], args: tuple[Any, ...], hint: Any, key: str) -> tuple[Any, ...]:
    """`fit` for tuples: of fixed length, of any length (`...`), or bare."""
    if not args:
        return tuple(value)
    if args[-1] is Ellipsis:
        args = args[:1] * len(value)
    if len(args) != len(value):
        _refuse(value, hint, key)
    return tuple(fit(item, arg, f"{key}[{i}]") for i, (item, arg) in enumerate(zip(value, args, strict=True)))


def _is(value: Any, kind: type) -> bool:
    """Whether `value` counts as an instance of `kind` in a config."""
    try:
        if isinstance(value, Pending):
            return value.may_be(kind)
        if kind in (int, float):
            return isinstance(value, (int, kind)) and not isinstance(value, bool)
        if kind is tuple:
            return isinstance(value, list | tuple)
        if isinstance(value, str) and kind in (abc.Sequence, abc.Iterable, abc.Collection):
            return False
        return isinstance(value, kind)
    except TypeError:  # protocols and typed dicts refuse the question
        return True


def _refuse(value: Any, hint: Any, key: str) -> NoReturn:
    """Raise the error of a value that does not fit."""
    options = get_args(hint) if get_origin(hint) in _UNIONS else (hint,)
    choices = [choice for option in options if get_origin(option) is Literal for choice in get_args(option)]
    if isinstance(value, Pending):
        raise ConfigError(f"{key}: expected {spell(hint)}, got {value}", key)
    advice = ""
    if isinstance(value, bool | int | float) and str in options:
        advice = "; quote it to keep text"
    elif isinstance(value, str) and choices:
        advice = f"; {nearest(value, map(str, choices))}"
    elif isinstance(value, dict) and any(getattr(option, "__module__", "builtins") != "builtins" for option in options):
        advice = "; add its _target_"
    got = "null" if value is None else type(value).__name__
    plain = value is None or isinstance(value, str | bool | int | float | list | tuple | dict)
    raise ConfigError(f"{key}{f'={written(value)}' if plain else ''}: expected {spell(hint)}, got {got}{advice}", key)
