"""The one exception of the config, and the phrases its messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(Exception):
    """A config that cannot be run, said in one line to the person who wrote it.

    Args:
        message: what was given, what is allowed, what to do.
        key: dotted key the message is about; `located` turns it into the file or override that set it.
            None where the message already says so.
    """

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


def near(name: str, names: Iterable[str], n: int = 3) -> list[str]:
    """Return at most `n` of `names` that resemble `name`, nearest first, whatever their case."""
    by_case = {candidate.lower(): candidate for candidate in names}
    return [by_case[match] for match in difflib.get_close_matches(name.lower(), by_case, n)]


def nearest(name: str, names: Iterable[str]) -> str:
    """Return `did you mean X?`, or the list of what is allowed where nothing resembles `name`.

    >>> nearest("rtoll", ["rtol", "atol"]), nearest("foo", ["rtol", "atol"])
    ('did you mean rtol?', 'allowed: rtol, atol')
    """
    names = list(names)
    match = near(name, names, 1)
    return f"did you mean {match[0]}?" if match else f"allowed: {', '.join(names) or 'none'}"


def written(value: object) -> str:
    """Return `value` as a config writes it, cut to 60 characters.

    >>> written(True), written(None), written("cosine"), written({"betas": (0.9, None)})
    ('true', 'null', 'cosine', '{betas: [0.9, null]}')
    """
    text = _flow(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _flow(value: object) -> str:
    """A value in YAML's one-line style, texts bare."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_flow(item)}' for key, item in value.items())}}}"
    return value if isinstance(value, str) else repr(value)
