"""Overrides of the command line: `KEY=VALUE`, applied to plain containers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ndeflow.config.errors import ConfigError, nearest, written

KeyPath = tuple[str | int, ...]
_KEY = re.compile(r"\w+(\.\w+|\[\d+\])*")
_NOT_FINITE = re.compile(r"[+-]?(nan|inf)", re.IGNORECASE)


class Override(NamedTuple):
    """One `KEY=VALUE`: its text, the steps of its key (an int indexes a list), and its value."""

    text: str
    path: KeyPath
    value: Any

    @property
    def where(self) -> str:
        """How messages name it."""
        return f"override '{self.text}'"

    @property
    def sets_target(self) -> bool:
        """Whether it names the class of a node."""
        return self.path[-1] == "_target_" or (isinstance(self.value, dict) and "_target_" in self.value)


def steps(key: str) -> KeyPath | None:
    """Split a dotted key, None if it is none.

    >>> steps("callbacks[0].every"), steps("a..b")
    (('callbacks', 0, 'every'), None)
    """
    if not _KEY.fullmatch(key):
        return None
    return tuple(int(index) if index else name for index, name in re.findall(r"\[(\d+)\]|(\w+)", key))


def dotted(path: KeyPath) -> str:
    """Write a path as a dotted key, the inverse of `steps`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def parse(text: str) -> Override:
    """Read `KEY=VALUE` or `--KEY=VALUE`.

    A value that begins with a bracket, brace or quote is YAML. Any other is a number, true, false or null
    as YAML 1.1 reads it (so `on` is true and `0123` is 83), and otherwise text, character for character.

    >>> parse("--trainer.max_steps=1000").path, parse("a=1e-3").value, parse("a=*.weight").value
    (('trainer', 'max_steps'), 0.001, '*.weight')
    """
    text = text.removeprefix("--")
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"override '{text}' is not KEY=VALUE; write e.g. trainer.max_steps=1000")
    path = steps(key)
    if path is None:
        raise ConfigError(f"override '{text}': '{key}' is not a key; write e.g. module.net.width or callbacks[0].every")
    if path[0] == "extends":
        raise ConfigError(f"override '{text}': extends belongs into a file, since overrides come after all files")
    return Override(text, path, _value(value, text))


def _value(text: str, override: str) -> Any:
    """The value that a text stands for."""
    text = text.strip()
    if _NOT_FINITE.fullmatch(text):
        return float(text)
    marked = text.startswith(("[", "{", '"', "'"))
    try:
        found: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"v={text}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        if not marked:
            return text
        problem = getattr(error, "context", None) or str(error).splitlines()[0]
        raise ConfigError(f"override '{override}': {problem}; check brackets and quotes") from error
    if marked or isinstance(found["v"], bool | int | float):
        return found["v"]
    return None if text in ("null", "Null", "NULL", "~") else text


def quoted(text: str) -> str:
    """Write a text so that an override with it means this text.

    >>> quoted("cosine"), quoted("0123"), quoted("[x")
    ('cosine', '"0123"', '"[x"')
    """
    try:
        plain = _value(text, text) == text
    except ConfigError:
        plain = False
    return text if plain else json.dumps(text)


def in_order(overrides: Iterable[str]) -> list[Override]:
    """Parse overrides; those that set a `_target_` come first, outer ones before inner ones."""
    parsed = [parse(text) for text in overrides]
    return sorted(parsed, key=lambda o: (0, len(o.path)) if o.sets_target else (1, 0))


def merge(below: Any, above: Any) -> Any:
    """Merge mappings key by key; all else, and a mapping with another `_target_`, replaces what is below.

    >>> merge({"_target_": "a.A", "x": 1}, {"_target_": "b.B", "y": 2})
    {'_target_': 'b.B', 'y': 2}
    """
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    if "_target_" in above and above["_target_"] != below.get("_target_", above["_target_"]):
        return above
    return below | {key: merge(below.get(key), value) for key, value in above.items()}


def apply(tree: dict[str, Any], override: Override) -> dict[str, Any]:
    """Return a config with one override in it.

    Raises:
        ConfigError: the path leads through a key that is not there; only its last step may be new.
    """
    return _put(tree, override.path, override, ())


def _put(node: Any, rest: KeyPath, override: Override, done: KeyPath) -> Any:
    """`node`, which stands at `done`, with the value of the override at `rest` below it."""
    step, *after = rest
    if isinstance(step, int):
        return _put_item(node, step, tuple(after), override, done)
    if not isinstance(node, dict):
        advice = f"; write {dotted((*done, int(step)))}" if isinstance(node, list) and step.isdigit() else ""
        raise ConfigError(f"{override.where}: {dotted(done)}={written(node)} has no key {step}{advice}")
    if not after:
        return merge(node, {step: override.value})
    child = node.get(step)
    if (child is None and not done) or (not isinstance(child, dict) and after == ["_target_"]):
        child = {}  # a new node begins with its class; a section that no file mentions is empty
    elif step not in node:
        advice = nearest(step, (key for key in node if key not in ("_target_", "_partial_")))
        raise ConfigError(f"unknown key {dotted((*done, step))} in {override.where}; {advice}")
    return node | {step: _put(child, tuple(after), override, (*done, step))}


def _put_item(node: Any, index: int, after: KeyPath, override: Override, done: KeyPath) -> list[Any]:
    """`_put` where the next step is an index."""
    if not isinstance(node, list):
        raise ConfigError(f"{override.where}: {dotted(done)}={written(node)} is not a list")
    if index >= len(node):
        raise ConfigError(f"{override.where}: {dotted(done)} has {len(node)} items, and the first is [0]")
    item = _put(node[index], after, override, (*done, index)) if after else merge(node[index], override.value)
    return [*node[:index], item, *node[index + 1 :]]
