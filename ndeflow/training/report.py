"""The final report of a run: curves, pictures and numbers under `report/`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from ndeflow.modules.base import Module


@dataclass(frozen=True)
class Report:
    """What the report at the end of training holds: the `report` section of a config.

    Args:
        evaluate: also compute the family's numbers on held-out data (`ndeflow evaluate` does it later).
    """

    evaluate: bool = True


def write_report(
    settings: Report,
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    module: Module,
    data: pl.LightningDataModule,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Write `loss.png`, the family's figures and `report.json`, and return what is in the last.

    A figure that fails is a warning: the run has its weights, and they are what it was for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = dict(facts)
    try:
        draw_curves(rows, folder / "loss.png")
        module.draw_report(folder)
        if settings.evaluate:
            report |= module.evaluate(data)
    except Exception as error:  # whatever a family's figures can raise
        warnings.warn(f"the report is incomplete: {type(error).__name__}: {error}", stacklevel=2)
        report["incomplete"] = f"{type(error).__name__}: {error}"
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def draw_curves(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw training and validation loss and the gradient norm against optimizer steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, names in ((left, ("train/loss", "val/loss")), (right, ("train/grad_norm",))):
        for name in names:
            points = [(row["step"], float(row[name])) for row in rows if name in row]
            if points:
                marker = "." if name.startswith("val") else ""
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1, marker=marker)
        axes.set_xlabel("optimizer step")
        axes.set_yscale("log")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
