"""From files and overrides to one resolved config of plain dicts and lists, and back to a file."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ndeflow.config.errors import ConfigError, near, nearest, written
from ndeflow.config.hints import fit
from ndeflow.config.overrides import apply, in_order, merge, steps

_SECTION = dict | None
KEYS: dict[str, Any] = {
    "extends": str | list[str],
    "plugins": list[str],
    "vars": _SECTION,
    "seed": int,
    "run": _SECTION,
    "resume": str,
    "init": _SECTION,
    "module": dict,
    "data": dict,
    "optim": _SECTION,
    "ema": _SECTION,
    "checkpoints": _SECTION,
    "health": _SECTION,
    "wandb": _SECTION,
    "callbacks": _SECTION,
    "trainer": _SECTION,
    "report": _SECTION,
}


class _Layer(NamedTuple):
    """One file, as messages name it, and what it says."""

    where: str
    tree: dict[str, Any]


def available(root: str | Path = "configs") -> list[str]:
    """Return the names of the configs below `root`, sorted; those in a folder `base` are parts, not configs."""
    paths = (path.relative_to(root) for path in Path(root).rglob("*.yaml"))
    return sorted(path.with_suffix("").as_posix() for path in paths if "base" not in path.parts[:-1])


def find(name: str | Path, root: str | Path = "configs") -> Path:
    """Return the file of a config.

    Args:
        name: a path, or a name below `root`, with or without `.yaml`: `flow/digits`.
        root: folder of configs.

    Raises:
        ConfigError: there is none; names the near ones.
    """
    for path in (Path(name), Path(f"{name}.yaml"), Path(root, name), Path(root, f"{name}.yaml")):
        if path.is_file():
            return path
    names = available(root)
    wanted = Path(name).with_suffix("").as_posix().removeprefix(f"{Path(root).as_posix()}/")
    last = {known.rpartition("/")[2]: known for known in reversed(names)}
    close = [last[known] for known in near(wanted.rpartition("/")[2], last)] or near(wanted, names)
    advice = f"did you mean {' or '.join(close)}?" if close else f"available: {', '.join(names) or 'none'}"
    raise ConfigError(f"there is no config {name} in {_shown(Path(root))}; {advice}")


def load(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a config: its files, then the overrides, then interpolations.

    Args:
        path: a YAML file. `extends` in it names further ones, relative to it, on top of which it is laid:
            mappings merge key by key, lists and scalars replace, and so does a mapping with another `_target_`.
        overrides: `KEY=VALUE`, applied after all files.

    Returns:
        Plain dicts, lists, numbers, texts, bools and None, under the keys of `KEYS` without `extends`.

    Raises:
        ConfigError: anything is wrong that can be seen without the classes it names; says where.
    """
    files, parsed = _read(Path(path)), in_order(overrides)
    tree = merged = functools.reduce(merge, (layer.tree for layer in files), {})
    for override in parsed:
        if override.path[0] not in KEYS:
            raise ConfigError(
                f"unknown key {override.path[0]} in {override.where}; {nearest(str(override.path[0]), KEYS)}"
            )
        tree = apply(tree, override)
        _refuse_new_vars(merged.get("vars") or {}, tree.get("vars"), override.where)
    with located(path, overrides):
        _refuse_idle_vars(tree, files, [str(override.path[1]) for override in parsed if override.path[0] == "vars"])
        return _checked(_resolve(tree, path, overrides))


@contextmanager
def located(path: str | Path, overrides: Sequence[str] = ()) -> Iterator[None]:
    """Add to a `ConfigError` from inside the block where its key was set: `(in override 'optim.lr=x')`.

    Args:
        path: the file that `load` was given.
        overrides: the overrides that `load` was given.
    """
    try:
        yield
    except ConfigError as error:
        where = error.key and _origin(path, overrides, error.key)
        if not where:
            raise
        raise ConfigError(f"{error} (in {where})") from error


def save(config: Mapping[str, Any], path: str | Path) -> None:
    """Write a resolved config so that `load` reads it back equal.

    `vars` are left out: their values stand where they were interpolated, and nothing refers to them any more.
    """
    tree = {key: _escaped(value) for key, value in config.items() if key != "vars"}
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.create(tree)), encoding="utf-8")


def _escaped(value: Any) -> Any:
    """A value in which `${` is text, not the start of an interpolation."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _read(path: Path, chain: tuple[Path, ...] = ()) -> list[_Layer]:
    """A file and, before it, all that it extends."""
    path = Path(os.path.normpath(path))
    if path in chain:
        raise ConfigError(f"extends cycle: {' -> '.join(_shown(step) for step in (*chain, path))}")
    where = _shown(path)
    tree = _parse(path, where)
    for key in tree:
        if key not in KEYS:
            raise ConfigError(f"unknown key {key} in {where}; {nearest(str(key), KEYS)}")
    bases = fit(tree.pop("extends", []), KEYS["extends"], f"{where}: extends")
    layers = []
    for name in [bases] if isinstance(bases, str) else bases:
        base = path.parent / name
        if not base.is_file():
            names = [(Path(name).parent / other.name).as_posix() for other in base.parent.glob("*.yaml")]
            raise ConfigError(f"{where} extends {name}, which does not exist; {nearest(name, names)}")
        layers += _read(base, (*chain, path))
    return [*layers, _Layer(where, tree)]


def _shown(path: Path) -> str:
    """A path as messages name it: relative where that is shorter."""
    relative = os.path.relpath(path)
    return path.as_posix() if relative.startswith("..") else Path(relative).as_posix()


def _parse(path: Path, where: str) -> dict[str, Any]:
    """The mapping in a YAML file, interpolations unresolved."""
    if not path.is_file():
        raise ConfigError(f"{where} does not exist")
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except yaml.MarkedYAMLError as error:
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise ConfigError(f"{where}: {': '.join(filter(None, (error.context, error.problem)))}{line}") from error
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        raise ConfigError(f"{where}: {_first_line(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{where} holds a list; a config is a mapping of {', '.join(KEYS)}")
    return tree


def _first_line(error: Exception) -> str:
    """The first line of an error's text, with the key OmegaConf names in another one."""
    key = getattr(error, "full_key", None)
    return str(error).splitlines()[0] + (f" (at {key})" if key else "")


def _resolve(tree: dict[str, Any], path: str | Path, overrides: Sequence[str]) -> Any:
    """Plain containers without interpolations and `???`."""
    try:
        return OmegaConf.to_container(OmegaConf.create(tree), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        where = _origin(path, overrides, getattr(error, "full_key", None) or "") or _shown(Path(path))
        raise ConfigError(f"{where}: {_first_line(error)}") from error


def _checked(config: dict[str, Any]) -> dict[str, Any]:
    """The config, if its top level has the right types and all of it is plain."""
    for key, value in config.items():
        _refuse_objects(value, key)
        fit(value, KEYS[key], key)
    for key, room in {"module": "modules", "data": "data"}.items():
        if key in config and "_target_" not in config[key]:
            raise ConfigError(f"{key} has no _target_: name its class, e.g. {key}._target_=ndeflow.{room}.NAME", key)
    return config


def _refuse_objects(value: Any, key: str) -> None:
    """Raise for what YAML tags can make beside plain values."""
    if isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_objects(item, f"{key}.{name}" if isinstance(value, dict) else f"{key}[{name}]")
    elif not isinstance(value, str | bool | int | float | NoneType):
        raise ConfigError(f"{key} is a {type(value).__name__}; write it as text, number, list or mapping", key)


def _keys(tree: Any, prefix: str = "") -> list[str]:
    """The dotted keys of nested mappings."""
    items = tree.items() if isinstance(tree, dict) else ()
    return [key for name, item in items for key in (f"{prefix}{name}", *_keys(item, f"{prefix}{name}."))]


def _refuse_new_vars(files: dict[str, Any], after: Any, where: str) -> None:
    """Raise if an override made an entry of `vars`."""
    known = _keys(files)
    for name in _keys(after):
        if name not in known:
            raise ConfigError(f"unknown key vars.{name} in {where}; {nearest(name, known)}")


def _interpolated(tree: Any) -> Iterator[str]:
    """Names of the entries of `vars` that some text interpolates; the empty name for all of `vars`."""
    if isinstance(tree, dict | list):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _interpolated(item)
    elif isinstance(tree, str) and "${" in tree:
        yield from (a or b for a, b in re.findall(r"\bvars\b(?:\.(\w+)|\[(\w+)\])?", tree))


def _refuse_idle_vars(tree: dict[str, Any], files: Iterable[_Layer], overridden: Iterable[str]) -> None:
    """Raise for an entry of `vars` without effect.

    A new `_target_` on the command line may remove the only place of an entry of the files: that is no
    mistake, unless the same command line sets the entry.
    """
    used = set(_interpolated(tree))
    for name, value in (fit(tree.get("vars"), _SECTION, "vars") or {}).items():
        in_files = name not in overridden and any(name in _interpolated(layer.tree) for layer in files)
        if not used & {name, ""} and not in_files:
            key = f"vars.{name}"
            raise ConfigError(f"{key}={written(value)} has no effect: nothing interpolates ${{{key}}}; remove it", key)


def _origin(path: str | Path, overrides: Sequence[str], key: str) -> str | None:
    """The override or file that set a key last."""
    wanted = steps(key)
    if wanted is None:
        return None
    for override in reversed(in_order(overrides)):
        n = len(override.path)
        if override.path == wanted[:n] and _holds(override.value, wanted[n:]):
            return override.where
    return next((layer.where for layer in reversed(_read(Path(path))) if _holds(layer.tree, wanted)), None)


def _holds(tree: Any, path: Sequence[str | int]) -> bool:
    """Whether nested containers have something at a path."""
    try:
        functools.reduce(lambda inner, step: inner[step], path, tree)
    except (KeyError, IndexError, TypeError):
        return False
    return True
