"""From the dotted name in `_target_` to the object it names, and to what that object takes."""

from __future__ import annotations

import importlib
import inspect
import keyword
import pkgutil
import sys
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from ndeflow.config.errors import ConfigError, near

ALLOWED = (
    "ndeflow.",
    "torch.nn.",
    "torch.optim.",
    "pytorch_lightning.callbacks.",
    "pytorch_lightning.strategies.",
    "torchmetrics.",
)


EMPTY = inspect.Parameter.empty
_TOPS = tuple({f"{prefix.partition('.')[0]}." for prefix in ALLOWED})


class Parameter(NamedTuple):
    """One argument of a target: its evaluated hint (Any if it has none) and its default (`EMPTY` if required)."""

    hint: Any
    default: Any
    positional: bool


class Signature(NamedTuple):
    """What a target takes, whether it takes unnamed further keys, and the class it returns, if known."""

    parameters: dict[str, Parameter]
    open: bool
    returns: type | None


def full_name(target: Callable[..., Any]) -> str:
    """Return the dotted name under which a target is defined."""
    return f"{target.__module__}.{getattr(target, '__qualname__', type(target).__qualname__)}"


def resolve(target: object, key: str, plugins: Sequence[str] = ()) -> Callable[..., Any]:
    """Import what a `_target_` names, if the config may use it.

    The name must begin with an allowed package, and so must the module in which the object it leads to is
    *defined*: the name alone can be walked out of any package (`torch.nn.functional.torch.os.system`).

    Args:
        target: the dotted name.
        key: key of the node, for messages.
        plugins: packages allowed beside ndeflow's, torch's and Lightning's.

    Returns:
        A class or function.

    Raises:
        ConfigError: not allowed, not there, fails to import, or not callable.
    """
    where = f"{key}._target_"
    allowed = (*ALLOWED, *(f"{plugin}." for plugin in plugins))
    if not isinstance(target, str) or "." not in target:
        raise ConfigError(f"{where}={target} is not a dotted name such as torch.nn.Linear", where)
    if not target.startswith(allowed):
        names = ", ".join(f"{prefix}*" for prefix in allowed)
        advice = (
            ""
            if target.startswith(_TOPS)
            else (f"; to use your own package add `plugins: [{target.partition('.')[0]}]`")
        )
        raise ConfigError(f"{where}={target} is not allowed (allowed: {names}){advice}", where)
    found = _walk(target.split("."), where)
    if not _is_target(found):
        kind = "a module" if inspect.ismodule(found) else f"of type {type(found).__name__}"
        raise ConfigError(f"{where}={target} is {kind}, not a class or function", where)
    home = full_name(found)
    if not home.startswith(allowed):
        raise ConfigError(f"{where}={target} leads to {home}, outside the allowed packages", where)
    return found


def _walk(parts: list[str], where: str) -> Any:
    """The object at the end of a dotted name; a submodule is imported under its own name only."""
    found: Any = _import(parts[0], where)
    if found is None:
        raise ConfigError(f"{where}: there is no package {parts[0]}; start where it can be imported", where)
    for depth, part in enumerate(parts[1:], 1):
        outer, owner = ".".join(parts[:depth]), found
        if part.startswith("_"):
            raise ConfigError(f"{where}: {outer}.{part} is private; name what its package exports", where)
        found = getattr(owner, part, None)
        if found is None and inspect.ismodule(owner):
            found = _import(f"{outer}.{part}", where)
        if found is None:
            close = near(part, _names(owner, last=depth == len(parts) - 1), 1)
            advice = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{where}: {outer} has no {part}{advice}", where)
    return found


def _names(owner: Any, last: bool) -> list[str]:
    """Public names in a module or class: at the end of a dotted name classes and functions, before it all."""
    names = {name for name in dir(owner) if not last or _is_target(getattr(owner, name, None))}
    if not last:
        names |= {info.name for info in pkgutil.iter_modules(getattr(owner, "__path__", []))}
    return sorted(name for name in names if not name.startswith("_"))


def _is_target(found: object) -> bool:
    """Whether something is a class or function, though a module that can be called is none."""
    return callable(found) and not inspect.ismodule(found)


def _import(name: str, where: str) -> ModuleType | None:
    """The module, or None if there is none of this name."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            return None
        what = error if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"importing {name} failed: {what}", where) from error


def signature(target: Callable[..., Any]) -> Signature:
    """Return the arguments of a class or function, each hint evaluated by itself.

    A hint that cannot be evaluated (a name imported for type checkers only) becomes Any and leaves the others
    alone. Builtins without a signature take anything.
    """
    try:
        found = inspect.signature(target)
    except ValueError:
        return Signature({}, True, None)
    scope = _scope(target)
    parameters = {
        _key(name): Parameter(_evaluate(p.annotation, scope), p.default, p.kind is p.POSITIONAL_ONLY)
        for name, p in found.parameters.items()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    returns = target if isinstance(target, type) else _evaluate(found.return_annotation, scope)
    return Signature(
        parameters,
        open=any(p.kind is p.VAR_KEYWORD for p in found.parameters.values()),
        returns=returns if isinstance(returns, type) and returns is not Any else None,
    )


def _key(name: str) -> str:
    """The key of a parameter in a config: `from` for `from_`, since Python keeps the word for itself."""
    return name[:-1] if name.endswith("_") and keyword.iskeyword(name[:-1]) else name


def parameter_name(key: str) -> str:
    """Return the Python name of a key, the inverse of what `signature` does: `from_` for `from`."""
    return f"{key}_" if keyword.iskeyword(key) else key


def _scope(target: Callable[..., Any]) -> Mapping[str, Any]:
    """The names that annotations of a target may use: a class inherits them with its arguments."""
    if not isinstance(target, type):
        return getattr(inspect.unwrap(target), "__globals__", {})
    return ChainMap(*(vars(sys.modules[base.__module__]) for base in target.__mro__ if base.__module__ in sys.modules))


def _evaluate(annotation: Any, scope: Mapping[str, Any]) -> Any:
    """An annotation as an object, Any where it is missing or cannot be evaluated."""
    if annotation is EMPTY:
        return Any
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, {}, scope)
    except Exception:  # whatever it raises, it is no hint
        return Any
