"""When a fit writes its checkpoints, and how: whole or not at all, and never over the only one."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from statezoo.lightning_modules.callbacks import run_folder, trying
from statezoo.lightning_modules.checkpoint import RunStopped
from statezoo.lightning_modules.run_log import RunLog

__all__ = ["PART", "CheckpointFile", "Checkpoints"]

log = logging.getLogger(__name__)

PART = ".part"
"""Ending of what is being written; what a killed run leaves of it is removed at the next start."""


class CheckpointFile(TorchCheckpointIO):
    """Writes a checkpoint beside its place, on to the disk, and only then puts it there.

    Lightning's own way goes over the folder for temporary files, which may be on another disk, and
    trusts that the system writes in time. Reading never runs code from the file.

    Attributes:
        failed: What went wrong in :meth:`holding`.
    """

    def __init__(self) -> None:
        self.failed: OSError | None = None
        self._holds = False

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Keep an error of writing, which the first process alone has, until all know of it."""
        self.failed, self._holds = None, True
        try:
            yield
        finally:
            self._holds = False

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write; a path that ends in ``.part`` is put into its place by the caller.

        Raises:
            OSError: If the disk is full or cannot be written; what was there before is there still.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path)
        draft = place if place.suffix == PART else place.with_name(place.name + PART)
        try:
            draft.parent.mkdir(parents=True, exist_ok=True)
            _write(checkpoint, draft)
            if draft != place:
                put(draft, place)
        except OSError as error:
            draft.unlink(missing_ok=True)
            if not self._holds:
                raise
            self.failed = error

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: Any = None
    ) -> dict[str, Any]:
        """Read plain data and tensors alone, whatever was asked for."""
        return super().load_checkpoint(path, map_location, weights_only=True)


def _write(checkpoint: dict[str, Any], file: Path) -> None:
    """Write a file that is on the disk when this returns."""
    try:
        with file.open("wb") as opened:
            torch.save(checkpoint, opened)
            opened.flush()
            os.fsync(opened.fileno())
    except RuntimeError as error:  # torch's writer complains of what the error has left undone
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def put(draft: Path, place: Path, previous: Path | None = None) -> None:
    """Let a written file take its place; there is a whole one at any time.

    Args:
        draft: What was written.
        place: Where it belongs.
        previous: Where what was there goes; default nowhere.
    """
    if previous is not None and place.exists():
        place.replace(previous)
    draft.replace(place)
    _sync(place.parent)


def _sync(folder: Path) -> None:
    """Let the names in a folder be on the disk; not every system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        log.debug(f"{folder} cannot be synchronised ({error.strerror})")
    finally:
        os.close(handle)


class Checkpoints(Checkpoint):
    """Keep the newest state, ``last.ckpt``, and the one that validated best, ``best.ckpt``.

    ``last.ckpt`` resumes the run exactly where it was, and ``previous.ckpt``, the newest state but
    one, does where that was damaged; so does ``best.ckpt``, unless the validation fell between the
    micro-batches of a step. Each is written beside and takes its name when it is whole
    and on the disk. Where it cannot be written, because the disk is full, training goes on with a
    warning and tries again the next time; only at the end of the run that is an error. The signal
    TERM has ``last.ckpt`` written first.

    Args:
        every_n_steps: Optimiser steps between two writings of ``last.ckpt``; it is written at the
            end of each epoch and of the run too, and where a validation falls on such a step, after
            it.
        monitor: Logged value that is to be small; default is the loss in validation.
        folder: Where to write; default is the run's folder.
    """

    def __init__(
        self, every_n_steps: int = 100, monitor: str | None = None, folder: str | None = None
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"checkpoints.every_n_steps must be at least 1, got {every_n_steps}.")
        self.every_n_steps, self.monitor, self.folder = every_n_steps, monitor, folder
        self.best_score = math.inf
        self.best_model_path = self.last_model_path = ""
        self._saved_step = 0
        self._waits = False

    def path(self, trainer: Trainer, name: str) -> str:
        """Return where a checkpoint is written, the same on all processes."""
        folder = self.folder or str(run_folder(trainer))
        return str(Path(trainer.strategy.broadcast(folder)) / f"{name}.ckpt")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write and read files our way, where no one has chosen another."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointFile()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not write again what was just read; clean up after a run that was killed."""
        self._saved_step, self._waits = trainer.global_step, False
        self.last_model_path = str(trainer.ckpt_path or "")
        folder = Path(self.path(trainer, "last")).parent
        if trainer.is_global_zero and not trying(trainer):
            for left in folder.glob(f"*{PART}"):
                left.unlink(missing_ok=True)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the epoch that is under way, and the steps made, in what is logged too.

        Lightning leaves out an epoch that it resumes at its beginning; checkpoints of that part of
        the run, resumed at the end of an epoch, would then be an epoch behind. And the steps of the
        log are one behind where a run goes on with another interval between validations.
        """
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
        progress: Any = trainer.fit_loop.epoch_progress
        for part in (progress.current, progress.total):
            part.ready = part.started = part.processed + 1

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write ``last.ckpt`` where it is time; before a validation it waits for that."""
        step, loop = trainer.global_step, trainer.fit_loop
        now = trainer.world_size == 1 and trainer.received_sigterm
        due = now or step % self.every_n_steps == 0 or trainer.should_stop or trainer.is_last_batch
        if loop._should_accumulate() and not trainer.should_stop:
            return
        if not due or step <= self._saved_step or trying(trainer):
            return
        # a state from before a validation would go on after it, and what it found be lost
        self._waits = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]
        if now or not self._waits:
            self._log_row(trainer)
            self._save_last(trainer)

    def _log_row(self, trainer: Trainer) -> None:
        """Log the values of this step before its checkpoint; Lightning does it right after."""
        if trainer.loggers and all(isinstance(logger, RunLog) for logger in trainer.loggers):
            trainer._logger_connector.update_train_step_metrics()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``best.ckpt`` where the value is the smallest so far, and what has waited."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._save_best(trainer, self.monitor or f"val/{getattr(pl_module, 'measure', 'nll')}")
        if self._waits:
            self._save_last(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let a validation that came only because the run ended leave a state from before it.

        Lightning counts step and epoch when it goes on and finds that a validation is due that was
        made; here none is due.
        """
        loop = trainer.fit_loop
        if not (trainer.state.fn == "fit" and trainer.validating and trainer.should_stop):
            return
        trainer.should_stop = False
        due = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]
        trainer.should_stop = True
        if not due:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            for part in (progress["current"], progress["total"]):
                part["completed"] -= 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what has waited for a validation that did not come."""
        if self._waits:
            self._save_last(trainer)

    def _save_last(self, trainer: Trainer) -> None:
        self._waits = False
        path, step = self.path(trainer, "last"), trainer.global_step
        reason = self._save(trainer, path, "previous.ckpt")
        if not reason:
            self.last_model_path, self._saved_step = path, step
            return
        kept = (
            f"the one of step {self._saved_step} is kept" if self._saved_step else "there is none"
        )
        if trainer.should_stop or 0 < trainer.max_steps <= step:
            raise RunStopped(
                f"{path} could not be written at the last step, {step} ({reason}); {kept}: make "
                f"room and go on with --ckpt_path {Path(path).parent}."
            )
        if trainer.is_global_zero:
            log.warning(
                f"{path} could not be written at step {step} ({reason}); {kept}, training goes on, "
                f"and it is tried again in {self.every_n_steps} steps: make room"
            )

    def _save_best(self, trainer: Trainer, name: str) -> None:
        score = trainer.callback_metrics.get(name)
        if score is None:
            known = ", ".join(sorted(trainer.callback_metrics))
            log.warning(f"no best.ckpt: nothing logs {name!r}; there are {known}")
            return
        if float(score) >= self.best_score or trying(trainer):
            return
        before = self.best_score, self.best_model_path
        path = self.path(trainer, "best")
        self.best_score, self.best_model_path = float(score), path
        if reason := self._save(trainer, path):
            self.best_score, self.best_model_path = before
            if trainer.is_global_zero:
                log.warning(
                    f"{path} could not be written at step {trainer.global_step} ({reason}), the "
                    "one before is kept: make room"
                )

    def _save(self, trainer: Trainer, path: str, previous: str | None = None) -> str:
        """Write a checkpoint, and return to all processes why that failed, or nothing."""
        place, draft = Path(path), Path(path + PART)
        io = trainer.strategy.checkpoint_io
        error: OSError | None = None
        try:
            if isinstance(io, CheckpointFile):
                with io.holding():
                    trainer.save_checkpoint(draft, weights_only=False)
                error = io.failed
            else:
                trainer.save_checkpoint(draft, weights_only=False)
            if trainer.is_global_zero and error is None:
                put(draft, place, place.with_name(previous) if previous else None)
        except OSError as failed:
            error = failed
        if error is not None and trainer.is_global_zero:
            draft.unlink(missing_ok=True)
        told = "" if error is None else error.strerror or " ".join(str(error).split())
        reason: str = trainer.strategy.broadcast(told)
        return reason

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Say how to go on where the run was stopped from outside."""
        if isinstance(exception, (KeyboardInterrupt, SystemExit)) and trainer.is_global_zero:
            folder = Path(self.last_model_path).parent
            log.warning(
                f"stopped at step {trainer.global_step}, saved at {self._saved_step}: go on with  "
                f"statezoo fit --config {folder / 'config.yaml'} --ckpt_path {folder}"
                if self.last_model_path
                else f"stopped at step {trainer.global_step}, before the first checkpoint"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the best value so far."""
        return {"best_score": self.best_score, "best_model_path": self.best_model_path}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back the best value so far."""
        self.best_score = state_dict["best_score"]
        self.best_model_path = state_dict["best_model_path"]
