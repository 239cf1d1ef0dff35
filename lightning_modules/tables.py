"""Tables that a run writes: predictions, and which classes are taken for which."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from statezoo.datamodules.batch import IGNORE
from statezoo.lightning_modules.callbacks import run_folder
from statezoo.lightning_modules.classify import SequenceClassifier


class WritePredictions(Callback):
    """Write what a model predicts as a CSV file, batch by batch, in the order of the data.

    Of a language model: scored tokens of each sequence and their nats. Of a classifier: id (the
    number of the sequence where it has none), label if known, predicted class and the probability
    of each class. Several processes write a file each.

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
        if "probabilities" in outputs:
            names: Any = pl_module.class_names
            header = ["id", *(["label"] if "labels" in batch else []), "predicted"]
            rows = _class_rows(outputs["probabilities"], batch, names, self._count)
            self._write([*header, *(f"p_{name}" for name in names)], rows)
        elif "nll" in outputs:
            header = ["batch", "sequence", "tokens", "nll_nats", "nll_per_token"]
            rows = _token_rows(outputs, batch.get("cu_seqlens"), batch_idx)
            self._write(header, rows)

    def _write(self, header: list[str], rows: Iterator[list[Any]]) -> None:
        if self._writer is None:
            self.path = self._target
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._open.enter_context(self.path.open("w", newline="", encoding="utf-8"))
            self._writer = csv.writer(self._file)
            self._writer.writerow(header)
        for row in rows:
            self._writer.writerow(row)
            self._count += 1
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


def _class_rows(
    probabilities: Tensor, batch: Any, names: list[str], count: int
) -> Iterator[list[Any]]:
    """Compose the rows of classified sequences, of which ``count`` came before."""
    labels = batch["labels"].tolist() if "labels" in batch else None
    for i, (best, row) in enumerate(
        zip(probabilities.argmax(-1).tolist(), probabilities.tolist(), strict=True)
    ):
        name = batch["ids"][i] if "ids" in batch else count + i
        label = [] if labels is None else ["" if labels[i] == IGNORE else names[labels[i]]]
        yield [name, *label, names[best], *(f"{p:.6g}" for p in row)]


def _token_rows(
    outputs: dict[str, Tensor], bounds: Tensor | None, batch_idx: int
) -> Iterator[list[Any]]:
    """Compose the rows of sequences: those of a batch, or the parts of a packed one."""
    parts: Any = (outputs["nll"], outputs["scored"])
    if bounds is not None:
        parts = (x[0].split(torch.diff(bounds).tolist()) for x in parts)
    for number, (nll, scored) in enumerate(zip(*parts, strict=True)):
        tokens, nats = int(scored.sum()), float(nll.sum())
        yield [batch_idx, number, tokens, nats, nats / max(tokens, 1)]


class ConfusionTable(Callback):
    """Write ``confusion.csv`` and ``confusion.png`` of a classifier's last validation.

    Rows are the true classes, columns the predicted ones, cells numbers of sequences.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write, where the model is a classifier that has been validated."""
        if not isinstance(pl_module, SequenceClassifier) or not pl_module.confusion.update_called:
            return
        counts, folder = pl_module.confusion.compute().tolist(), run_folder(trainer)  # of all
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "confusion.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["label", *(f"predicted {name}" for name in pl_module.class_names)])
            writer.writerows(
                [name, *row] for name, row in zip(pl_module.class_names, counts, strict=True)
            )
        draw_confusion(counts, pl_module.class_names, folder / "confusion.png")


def draw_confusion(counts: list[list[int]], names: list[str], target: Path) -> None:
    """Draw numbers of sequences by true (rows) and predicted class, shaded by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = 2.5 + 0.6 * len(names)
    figure = Figure(figsize=(size, size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = [[n / max(sum(row), 1) for n in row] for row in counts]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(names))
    axes.set_xticks(ticks, names, rotation=45, ha="right")
    axes.set_yticks(ticks, names)
    axes.set(xlabel="predicted", ylabel="label")
    if len(names) <= 20:
        for i, row in enumerate(counts):
            for j, n in enumerate(row):
                color = "white" if shares[i][j] > 0.5 else "black"
                axes.text(j, i, str(n), ha="center", va="center", color=color, fontsize=8)
    figure.savefig(target, dpi=120)
