"""Weights & Biases as a view of the records: one run across restarts, nothing sent unasked."""

from __future__ import annotations

import os
import secrets
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

Mode = Literal["auto", "online", "offline", "disabled"]
ResolvedMode = Literal["online", "offline", "disabled"]
STEP = "trainer/global_step"


class Wandb:
    """The `wandb` section of a config.

    Args:
        mode: `"online"`, `"offline"`, `"disabled"`, or `"auto"`: the environment's WANDB_MODE if set, else
            online if logged in, else offline, where nothing leaves the machine.
        project: project of the run.
        entity: team or user, by default the one logged in.
        group: groups runs, such as the seeds of one study.
        tags: labels.
    """

    def __init__(
        self,
        mode: Mode = "auto",
        project: str = "ndeflow",
        entity: str | None = None,
        group: str | None = None,
        tags: tuple[str, ...] = (),
    ) -> None:
        self.mode: Mode = mode
        self.project, self.entity, self.group, self.tags = project, entity, group, tags

    def resolve(self) -> tuple[ResolvedMode, str]:
        """Return the mode to use and why; never prompts.

        Raises:
            ValueError: WANDB_MODE holds something else, or WANDB_API_KEY no key.
        """
        if self.mode != "auto":
            return self.mode, f"wandb.mode={self.mode}"
        from_environment = {"dryrun": "offline", "run": "online"}
        if found := os.environ.get("WANDB_MODE"):
            for mode in get_args(ResolvedMode):
                if from_environment.get(found, found) == mode:
                    return mode, f"WANDB_MODE={found}"
            raise ValueError(f"WANDB_MODE={found}: allowed are online, offline, disabled")
        import wandb
        from wandb.errors import AuthenticationError

        try:
            # Not verified: a server that is out of reach must not end a run, see `Tracker.start`.
            logged_in = wandb.login(prompt=False, verify=False)
        except AuthenticationError as error:
            raise ValueError(f"{error}; correct it, or set wandb.mode=offline") from error
        return ("online", "logged in") if logged_in else ("offline", "no login")


def run_id(folder: Path) -> str:
    """Return the id of the run in `folder`, made before anything is logged and the same ever after."""
    path = folder / "wandb_id"
    if not path.is_file():
        path.write_text(os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
    return path.read_text().strip()


class Tracker:
    """A W&B run fed from the records, without gaps or repeats across restarts.

    Online, the rows that the server has not seen are sent first, then the new ones. Offline, or where the server
    cannot be used, each start writes one segment that begins with all earlier rows. Older segments are moved aside,
    so that `wandb sync RUN/wandb` is always enough and a segment broken by a kill cannot block it.

    Args:
        settings: the `wandb` section.
        mode: `"online"` or `"offline"`.
        folder: the run directory.
        config: the resolved config.
    """

    def __init__(
        self, settings: Wandb, mode: Literal["online", "offline"], folder: Path, config: Mapping[str, Any]
    ) -> None:
        self.settings, self.folder, self.config = settings, folder, config
        self.mode: Literal["online", "offline"] = mode
        self.run: Any = None
        self._seen = -1

    def start(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Open the run, offline where the server cannot be used, and bring it up to the rows recorded so far."""
        import wandb
        from wandb.errors import CommError

        self._set_segments_aside()
        try:
            self.run = self._open()
        except CommError as error:
            warnings.warn(f"W&B is offline from here to the next start: {error}", stacklevel=2)
            wandb.teardown()  # its service holds on to the id of the run that could not be opened
            self.mode = "offline"
            self.run = self._open()
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP)
        if self.run.resumed:
            self._seen = int(self.run.summary.get(STEP, -1))
        for row in rows:
            self._repeat(row)

    def _open(self) -> Any:
        """A W&B run under the id of this directory."""
        import wandb

        return wandb.init(
            id=run_id(self.folder),
            resume="allow",
            dir=str(self.folder),
            name=self.folder.name,
            mode=self.mode,
            project=self.settings.project,
            entity=self.settings.entity,
            group=self.settings.group,
            tags=self.settings.tags or None,
            config=dict(self.config),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def _repeat(self, row: Mapping[str, Any]) -> None:
        """Send a recorded row again."""
        if "media" in row:
            self.log_pictures(row["step"], {name: self.folder / path for name, path in row["media"].items()})
        else:
            self.log(row["step"], {k: float(v) for k, v in row.items() if k not in ("step", "time")})

    def _set_segments_aside(self) -> None:
        """Move offline segments of earlier starts out of the folder that is synced."""
        aside = self.folder / "wandb-old"
        for segment in (self.folder / "wandb").glob("offline-run-*"):
            aside.mkdir(exist_ok=True)
            shutil.move(segment, aside / f"{segment.name}-{secrets.token_hex(2)}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send a row, unless the server has it already. W&B drops rows whose own step goes back: none is passed."""
        if step >= self._seen:
            self.run.log({STEP: step, **values})

    def log_pictures(self, step: int, paths: Mapping[str, Path]) -> None:
        """Send picture files."""
        import wandb

        if step >= self._seen:
            found = {name: wandb.Image(str(path)) for name, path in paths.items() if path.is_file()}
            self.run.log({STEP: step, **found})

    def summarize(self, report: Mapping[str, Any], figures: Sequence[Path]) -> None:
        """Send the final report: its numbers as the run's summary, its figures as pictures."""
        import wandb

        self.run.log({STEP: report["step"], **{f"report/{path.stem}": wandb.Image(str(path)) for path in figures}})
        self.run.summary.update({f"report/{name}": value for name, value in report.items()})

    @property
    def url(self) -> str | None:
        """Where the run can be seen, online."""
        return self.run.url if self.run is not None and self.mode == "online" else None

    def finish(self, exit_code: int) -> None:
        """Close the run; without this its last rows are lost."""
        if self.run is not None:
            self.run.finish(exit_code=exit_code)
            self.run = None
