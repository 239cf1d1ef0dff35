"""The table of predictions that a run writes."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from statezoo.datamodules.batch import IGNORE
from statezoo.lightning_modules.callbacks import run_folder
from statezoo.lightning_modules.labelled import LabelTask

Row = tuple[int, list[Any]]
"""The number of a sequence in its batch, and what there is to say of it."""


class WritePredictions(Callback):
    """Write what a model predicts as a CSV file, batch by batch, in the order of the data.

    Of a language model: scored tokens of each sequence and their nats. Of the tasks with labels a
    row per sequence: id (its number where it has none), label if known, and what is predicted:

    * of classes: the likeliest one, and the probability of each;
    * of several labels: those of a probability above 1/2, joined by ``;``, and that of each;
    * of numbers: each in its own units, ``label_NAME`` and ``predicted_NAME``;
    * of tags, a row per token: its ``position`` in the sequence, from 0, the likeliest tag and the
      probability of each.

    Several processes write a file each.

    Args:
        out: The file; default ``predictions.csv`` in the run's folder.
    """

    def __init__(self, out: str | None = None) -> None:
        self.out = out
        self.path: Path | None = None
        """Where the rows are, once there are any."""
        self._open, self._count = ExitStack(), 0
        self._writer: Any = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the file."""
        path = Path(self.out) if self.out else run_folder(trainer) / "predictions.csv"
        several = trainer.world_size > 1
        self._target = path.with_stem(f"{path.stem}_{trainer.global_rank}") if several else path

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the rows of a batch."""
        if not isinstance(outputs, dict):
            return
        if isinstance(pl_module, LabelTask):
            head, rows = label_rows(pl_module, outputs, batch)
            known = ["labels" in batch or not name.startswith("label") for name in head]
            names, seen = batch.get("ids"), self._count
            self._write(
                ["id", *compress(head, known)],
                ([names[i] if names else seen + i, *compress(row, known)] for i, row in rows),
            )
            self._count += _number_of_sequences(batch)
        elif "nll" in outputs:
            head = ["batch", "sequence", "tokens", "nll_nats", "nll_per_token"]
            self._write(head, _nats_rows(outputs, batch.get("cu_seqlens"), batch_idx))

    def _write(self, header: list[str], rows: Iterator[list[Any]]) -> None:
        if self._writer is None:
            self.path = self._target
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._open.enter_context(self.path.open("w", newline="", encoding="utf-8"))
            self._writer = csv.writer(self._file)
            self._writer.writerow(header)
        self._writer.writerows(rows)
        self._file.flush()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the file."""
        self._open.close()
        self._writer, self._count = None, 0

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Close the file with the rows that are there."""
        self._open.close()


def label_rows(
    task: LabelTask, outputs: dict[str, Tensor], batch: Any
) -> tuple[list[str], Iterator[Row]]:
    """Return the head and the rows of what a task with labels predicts of a batch."""
    names, labels = task.class_names, batch.get("labels")
    if task.kind == "number":
        head = [f"{what}_{name}" for what in ("label", "predicted") for name in names]
        return head, _number_rows(outputs["predictions"], labels)
    head, p = ["label", "predicted", *(f"p_{name}" for name in names)], outputs["probabilities"]
    if task.kind == "class":
        return head, _class_rows(p, labels, names)
    if task.kind == "classes":
        return head, _labels_rows(p, labels, names)
    return ["position", *head], _tag_rows(p, labels, batch, names)


def _number_of_sequences(batch: Any) -> int:
    packed = batch.get("cu_seqlens")
    return len(batch["tokens"]) if packed is None else len(packed) - 1


def _class_rows(p: Tensor, labels: Tensor | None, names: list[str]) -> Iterator[Row]:
    known = [IGNORE] * len(p) if labels is None else labels.tolist()
    for i, (row, label) in enumerate(zip(p.tolist(), known, strict=True)):
        true = "" if label == IGNORE else names[label]
        yield i, [true, names[row.index(max(row))], *(f"{x:.6g}" for x in row)]


def _labels_rows(p: Tensor, labels: Tensor | None, names: list[str]) -> Iterator[Row]:
    known = (torch.full_like(p, torch.nan) if labels is None else labels).tolist()
    for i, (row, label) in enumerate(zip(p.tolist(), known, strict=True)):
        true, said = (";".join(compress(names, (x > 0.5 for x in xs))) for xs in (label, row))
        yield i, [true, said, *(f"{x:.6g}" for x in row)]


def _number_rows(said: Tensor, labels: Tensor | None) -> Iterator[Row]:
    known = (torch.full_like(said, torch.nan) if labels is None else labels).tolist()
    for i, (row, label) in enumerate(zip(said.tolist(), known, strict=True)):
        true = ("" if x != x else f"{x:.8g}" for x in label)
        yield i, [*true, *(f"{x:.8g}" for x in row)]


def _tag_rows(p: Tensor, labels: Tensor | None, batch: Any, names: list[str]) -> Iterator[Row]:
    """Go through the tokens of each sequence of a batch, or of a pack."""
    known = torch.full(p.shape[:2], IGNORE) if labels is None else labels
    mask, bounds = batch.get("attention_mask"), batch.get("cu_seqlens")
    if bounds is not None:
        lengths = torch.diff(bounds).tolist()
        parts: Any = zip(p[0].split(lengths), known[0].split(lengths), strict=True)
    elif mask is not None:
        parts = ((x[m], y[m]) for x, y, m in zip(p, known, mask.bool(), strict=True))
    else:
        parts = zip(p, known, strict=True)
    for i, (some, tags) in enumerate(parts):
        for place, row in _class_rows(some, tags, names):
            yield i, [place, *row]


def _nats_rows(
    outputs: dict[str, Tensor], bounds: Tensor | None, batch_idx: int
) -> Iterator[list[Any]]:
    """Compose the rows of sequences: those of a batch, or the parts of a packed one."""
    parts: Any = (outputs["nll"], outputs["scored"])
    if bounds is not None:
        parts = (x[0].split(torch.diff(bounds).tolist()) for x in parts)
    for number, (nll, scored) in enumerate(zip(*parts, strict=True)):
        tokens, nats = int(scored.sum()), float(nll.sum())
        yield [batch_idx, number, tokens, nats, nats / max(tokens, 1)]
