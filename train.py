"""Train what a config describes.

    python train.py CONFIG [key=value ...]     train, or go on with the run of the same name
    python train.py CONFIG --help              the keys of the classes it builds
    python train.py                            list the configs

Exit codes: 0 finished, 1 failed, 2 wrong config, 85 preempted (SIGTERM, SIGUSR1), 130 Ctrl-C;
after the last two the same command goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

try:
    from ndeflow import config as configs
except KeyboardInterrupt:
    sys.exit(130)

ROOT = Path(__file__).parent / "configs"


def main(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    names = [a for a in arguments if a.startswith("-") is False and "=" not in a]
    overrides = [a for a in arguments if "=" in a]
    flags = [a for a in arguments if a.startswith("-") and "=" not in a]
    if not names:
        print(__doc__, file=sys.stderr)
        print("configs:\n  " + "\n  ".join(configs.available(ROOT)), file=sys.stderr)
        return 0 if flags in (["-h"], ["--help"]) else 2
    if len(names) > 1:
        raise configs.ConfigError(f"{names[1]!r} is not KEY=VALUE; write e.g. trainer.max_steps=1000")
    sys.path.insert(0, str(Path.cwd()))  # `plugins:` are importable from the working directory
    path = configs.find(names[0], ROOT)
    config = configs.load(path, overrides)
    if flags:
        return describe(config, flags)
    from ndeflow.training.fitting import fit  # imports torch: seconds that a typo need not wait for

    with configs.located(path, overrides):
        return fit(config, path.stem, sys.argv)


def describe(config: dict[str, Any], flags: list[str]) -> int:
    """Print the keys of the classes that a config builds."""
    if flags not in (["-h"], ["--help"]):
        raise configs.ConfigError(f"unknown flag {flags[0]}; there is --help, all else is key=value")
    from ndeflow.training.sections import OWNED, SCHEMAS

    print(configs.describe(config, SCHEMAS, {"trainer": OWNED, "data": ("seed",)}))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except configs.ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # during the imports
        print("interrupted before the run began", file=sys.stderr)
        sys.exit(130)
