"""What a run leaves about its last evaluation: scores with intervals, curves, confusions."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from statezoo.lightning_modules import pictures
from statezoo.lightning_modules.callbacks import run_folder
from statezoo.lightning_modules.labelled import LabelTask
from statezoo.lightning_modules.scores import (
    ClassScores,
    Interval,
    LabelScores,
    NumberScores,
    Scoring,
    TagScores,
    intervals,
    roc,
)


class EvaluationReport(Callback):
    """Write how well a task with labels does, at the end of a fit, a validation or a test.

    After a fit it is about the validation that was best in this run, so about ``best.ckpt``. The
    files are, in the run's folder:

    * ``metrics.json``, ``{name: {value, low, high, n}}``: each score with its 95 % bootstrap
      interval over the ``n`` labelled sequences, which are drawn anew with replacement; null where
      a score is undefined;
    * ``confusion.csv`` and ``.png`` of classes (sequences) and tags (tokens): rows are true,
      columns predicted; of several labels a row each: hits, false alarms, misses, correct noes;
    * ``roc.csv`` and ``.png`` of classes and labels, each against the rest;
    * ``scatter.csv`` and ``.png`` of numbers, predicted against true.

    Args:
        resamples: How many samples of the rows the intervals are made of.
        seed: Of their draws.
    """

    def __init__(self, resamples: int = 1000, seed: int = 0) -> None:
        if resamples < 1:
            raise ValueError(f"EvaluationReport needs resamples of at least 1, got {resamples}.")
        self.resamples, self.seed = resamples, seed
        self._best, self._scoring = math.inf, None  # type: float, Scoring | None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what was before."""
        self._best, self._scoring = math.inf, None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the rows of the best validation of a fit; report another at once."""
        if not isinstance(pl_module, LabelTask) or trainer.sanity_checking:
            return
        if not pl_module.rows.update_called:
            return
        scoring = pl_module.scored_rows()  # of all processes
        if trainer.state.fn == "validate":
            self._report(trainer, pl_module, "val", scoring)
            return
        loss = scoring.values()[pl_module.measure]
        if loss < self._best or self._scoring is None:
            self._best, self._scoring = loss, scoring

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the best validation."""
        if isinstance(pl_module, LabelTask) and self._scoring is not None:
            self._report(trainer, pl_module, "val", self._scoring)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the test."""
        if isinstance(pl_module, LabelTask) and pl_module.rows.update_called:
            self._report(trainer, pl_module, "test", pl_module.scored_rows())

    def _report(self, trainer: Trainer, task: LabelTask, split: str, scoring: Scoring) -> None:
        folder = run_folder(trainer)
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False) or not scoring.n:
            return
        folder.mkdir(parents=True, exist_ok=True)
        found = intervals(scoring, self.resamples, self.seed)
        named = {f"{split}/{name}": interval for name, interval in found.items()}
        plain = {
            name: {k: v if not isinstance(v, float) or math.isfinite(v) else None
                   for k, v in interval._asdict().items()}
            for name, interval in named.items()
        }  # fmt: skip
        (folder / "metrics.json").write_text(json.dumps(plain, indent=2) + "\n")
        _show(named, f"{scoring.n} sequences of {split}")
        write_details(scoring, task.class_names, folder)


def _show(found: dict[str, Interval], of: str) -> None:
    table = Table("score", "value", "95 % interval", title=of)
    for name, (value, low, high, _) in found.items():
        table.add_row(name, f"{value:.4g}", f"{low:.4g} to {high:.4g}")
    Console().print(table)


def write_details(scoring: Scoring, names: Sequence[str], folder: Path) -> None:
    """Write the tables and pictures of what was scored.

    Args:
        scoring: The rows.
        names: Of classes, labels, numbers or tags.
        folder: Where to.
    """
    if isinstance(scoring, (ClassScores, TagScores)):
        predicted = [f"predicted {name}" for name in names]
        _confusion(scoring.table().tolist(), names, predicted, folder)
    if isinstance(scoring, LabelScores):
        columns = ["hits", "false alarms", "misses", "correct noes"]
        _confusion(scoring.table().tolist(), names, columns, folder)
    if isinstance(scoring, (ClassScores, LabelScores)):
        _curves(scoring, names, folder)
    if isinstance(scoring, NumberScores):
        points = {name: column[1:3] for name, column in zip(names, scoring.columns, strict=True)}
        rows = ([name, *pair] for name, xy in points.items() for pair in zip(*xy, strict=True))
        _write(folder / "scatter.csv", ["number", "label", "predicted"], rows)
        pictures.scatter(points, folder / "scatter.png")


def _confusion(
    counts: list[list[int]], names: Sequence[str], columns: Sequence[str], folder: Path
) -> None:
    rows = ([name, *row] for name, row in zip(names, counts, strict=True))
    _write(folder / "confusion.csv", ["label", *columns], rows)
    pictures.confusion(counts, names, columns, folder / "confusion.png")


def _curves(scoring: ClassScores | LabelScores, names: Sequence[str], folder: Path) -> None:
    curves: dict[str, tuple[float, NDArray[Any]]] = {}
    for number, holds, said, area in scoring.questions():
        if holds.any() and not holds.all():
            value = float(area(np.ones((1, len(said))))[0])
            curves[names[number]] = value, roc(holds, said)
    if not curves:
        return
    rows = (
        [name, *(f"{x:.8g}" for x in point)] for name, (_, xy) in curves.items() for point in xy
    )
    head = ["class", "threshold", "false_positive_rate", "true_positive_rate"]
    _write(folder / "roc.csv", head, rows)
    pictures.roc(curves, folder / "roc.png")


def _write(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(rows)
