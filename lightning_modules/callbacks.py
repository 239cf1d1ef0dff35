"""What a fit of ours writes and shows: loss curve, Hub folder, baselines."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.table import Table

from statezoo.lightning_modules import checkpoint as ckpt
from statezoo.lightning_modules.adapter import save_adapter
from statezoo.lightning_modules.facts import TrainingFacts
from statezoo.lightning_modules.network import NETWORKS, export, load_network
from statezoo.lightning_modules.processes import LostProcess
from statezoo.lightning_modules.shards import is_spread
from statezoo.lightning_modules.task import Task
from statezoo.lightning_modules.tuning import plain_network

log = logging.getLogger(__name__)


def run_folder(trainer: Trainer) -> Path:
    """Return where the run writes: the logger's folder, else the trainer's root.

    All processes must ask, as the first tells the others.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)


def trying(trainer: Trainer) -> bool:
    """Say whether this is a ``fast_dev_run``, which leaves nothing behind."""
    return bool(getattr(trainer, "fast_dev_run", False))


class ProgressBar(RichProgressBar):
    """Lightning's rich progress bar, counted in optimiser steps where their number is known."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=4)

    @property
    def total_train_batches(self) -> int | float:
        """Batches until the last step, or those of an epoch."""
        per_step, steps = self.trainer.accumulate_grad_batches, self.trainer.max_steps
        return steps * per_step if steps > 0 else super().total_train_batches

    def _get_train_description(self, current_epoch: int) -> str:
        if self.trainer.max_steps > 0:
            return f"Epoch {current_epoch}"
        return super()._get_train_description(current_epoch)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count from the beginning of the run, not of the epoch."""
        if trainer.max_steps > 0:
            batch_idx = trainer.fit_loop.epoch_loop.total_batch_idx
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Leave out the number of the run."""
        return {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}


class ValidateLast(Callback):
    """Let the last step of a run be followed by a validation, wherever the interval falls."""

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Ask to stop, which Lightning answers by validating first."""
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True


class LossCurve(Callback):
    """Draw ``loss.png`` from the logger's ``metrics.csv`` at the end of a fit."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, where there are numbers."""
        source = run_folder(trainer) / "metrics.csv"
        if not trainer.is_global_zero or trying(trainer):
            return
        for logger in trainer.loggers:
            logger.save()
        if source.is_file():
            scored = getattr(pl_module, "scored", "token")
            measure = getattr(pl_module, "measure", "nll")
            draw_losses(source, source.with_name("loss.png"), scored, measure)


def draw_losses(source: Path, target: Path, scored: str = "token", measure: str = "nll") -> None:
    """Draw the loss in training and validation, columns of a CSV file, over ``step``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with source.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, style in ((f"train/{measure}", "-"), (f"val/{measure}", "o-")):
        points = [(int(row["step"]) + 1, float(row[name])) for row in rows if row.get(name)]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name, markersize=4, linewidth=1)
    axes.set(xlabel="optimiser step", ylabel=f"{measure.replace('nll', 'nats')} per {scored}")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(target, dpi=120)


def recorders() -> list[Callback]:
    """Return the callbacks of every run: last validation, curve, facts, end of lost processes."""
    return [ValidateLast(), LossCurve(), TrainingFacts(), LostProcess()]


class ExportHub(Callback):
    """Write the best network and the tokenizer as a Hub folder at the end of a fit.

    Where a part of pretrained weights was trained, what was trained is written to ``adapter`` too.

    Args:
        folder: Name of the folder inside the run's folder.
    """

    def __init__(self, folder: str = "export") -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write, from the best checkpoint where there is one."""
        if not isinstance(pl_module, Task) or type(pl_module.net).__name__ not in NETWORKS:
            return
        target = run_folder(trainer) / self.folder
        if trying(trainer) or not trainer.is_global_zero:
            return
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if not best and is_spread(pl_module):  # whole weights are in the checkpoint alone
            best = getattr(trainer.checkpoint_callback, "last_model_path", "")
            if not best:
                log.warning("no export: weights are spread over processes, without a checkpoint")
                return
        metrics = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        }
        if best and Path(best).is_file():
            net = load_network(best)
            score = getattr(trainer.checkpoint_callback, "best_score", None)
            loss = metrics.get(f"val/{pl_module.measure}")
            metrics = {k: v for k, v in metrics.items() if score == loss}
        else:
            net = plain_network(pl_module.net, pl_module.tune, pl_module.adapter)
        export(net, target, pl_module.tokenizer_files, extra=metrics or None)
        if pl_module.tune != "full":
            found = ckpt.module_weights(ckpt.read(best)) if Path(best).is_file() else None
            save_adapter(pl_module, target.with_name("adapter"), found)


class CompareWithBaselines(Callback):
    """Print bits per byte of the model beside those of simple models of the same split.

    The data module says what they reach in ``baselines() -> {name: bits}``.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table, and write it as ``baselines.json``."""
        data: Any = getattr(trainer, "datamodule", None)
        name, folder = f"val/bits_per_{getattr(pl_module, 'unit', 'byte')}", run_folder(trainer)
        if not trainer.is_global_zero or name not in trainer.callback_metrics:
            return
        if not hasattr(data, "baselines"):
            return
        ours = float(trainer.callback_metrics[name])
        rows = {type(pl_module).__name__: ours} | dict(data.baselines())
        table = Table("model", name, title="on the same validation text")
        for label, bits in sorted(rows.items(), key=lambda row: -row[1]):
            style = "bold" if label == type(pl_module).__name__ else ""
            table.add_row(label, f"{bits:.3f}", style=style)
        Console().print(table)
        if folder.is_dir():
            (folder / "baselines.json").write_text(json.dumps(rows, indent=2) + "\n")
