"""Begin with short windows, double them, and know before the first step that all will fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from statezoo.datamodules.batch import Batch
from statezoo.datamodules.loader import Windows
from statezoo.datamodules.stages import Stage, Warmup
from statezoo.lightning_modules.memory import Footprint, available_bytes, gigabytes, measure
from statezoo.lightning_modules.task import Task

__all__ = ["LengthWarmup"]

SHORT = 512
"""Most tokens of the short windows on which memory is measured; the long ones have twice that."""


class LengthWarmup(Callback):
    """Train on short windows first and double their length until it is the data's ``seq_len``.

    The tokens of a batch stay the same (the last of an epoch may be smaller): ``batch_size`` is
    that of the longest windows, shorter ones are more. The data are read anew at each stage, in an
    order of its own that depends on the data's ``seed``; a run resumes in the middle of a stage as
    in any other place. The schedule of the learning rate goes on, validation is at full length
    throughout.

    Before the first step the memory of each stage is estimated and told, and the run refused where
    one does not fit. Needs data that is read in windows: Text, DNA.

    Args:
        start: Tokens per window of the first stage; ``seq_len`` halved some times.
        steps_per_stage: Optimiser steps until windows are twice as long.
        memory: GB that one process may use; default all that is free.

    Raises:
        ValueError: If a setting is out of range; at the beginning of a fit, if the data cannot be
            cut so, has no stretch of ``seq_len``, or a stage will not fit in memory.
    """

    def __init__(
        self, start: int = 128, steps_per_stage: int = 500, memory: float | None = None
    ) -> None:
        for name, value in (("start", start), ("steps_per_stage", steps_per_stage)):
            if value < 1:
                raise ValueError(f"LengthWarmup needs {name} of at least 1, got {value}.")
        if memory is not None and not memory > 0:
            raise ValueError(f"LengthWarmup needs memory above 0 GB, got {memory}.")
        self.start, self.steps_per_stage, self.memory = start, steps_per_stage, memory
        self.stages: list[Stage] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell the data how its windows grow.

        Raises:
            ValueError: If that cannot be.
        """
        if stage != "fit":
            return
        data: Any = getattr(trainer, "datamodule", None)
        if not (hasattr(data, "warmup") and hasattr(data, "at_length")):
            kind = "none" if data is None else type(data).__name__
            raise ValueError(
                f"LengthWarmup needs a data module that is read in windows, Text or DNA, got "
                f"{kind}: leave the callback out."
            )
        if trainer.overfit_batches:  # type: ignore[attr-defined]
            raise ValueError(
                "LengthWarmup needs the whole data: leave trainer.overfit_batches or the callback "
                "out."
            )
        warmup = Warmup(self.start, self.steps_per_stage, trainer.accumulate_grad_batches)
        self.stages = warmup.stages(data.seq_len, data.batch_size)
        data.at_length(data.seq_len)
        data.warmup = warmup
        last, steps = self.stages[-1], trainer.max_steps
        tried = trainer.fast_dev_run  # type: ignore[attr-defined]
        if 0 < steps <= last.first_step and not tried:
            rank_zero_warn(
                f"LengthWarmup: windows of seq_len={last.seq_len} begin at step {last.first_step}, "
                f"the run ends at step {steps}: raise trainer.max_steps, or lower steps_per_stage."
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the data be read at full length by others."""
        data: Any = getattr(trainer, "datamodule", None)
        if stage == "fit" and hasattr(data, "warmup"):
            data.warmup = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell what each stage needs.

        Raises:
            ValueError: If a stage needs more memory than there is.
        """
        if not isinstance(pl_module, Task):
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        length = min(SHORT, data.seq_len // 2)
        footprint = measure(pl_module, trainer, short_batches(data.at_length), length)
        room = self._room(trainer, pl_module, footprint)
        for stage in self.stages:
            needs = footprint.peak(stage.batch_size, stage.seq_len)
            rank_zero_info(
                f"from step {stage.first_step}: {stage.batch_size} windows of {stage.seq_len} "
                f"tokens, about {gigabytes(needs)} of {gigabytes(room)}"
            )
        for number, stage in enumerate(self.stages, 1):
            if footprint.peak(stage.batch_size, stage.seq_len) > room:
                raise ValueError(_refusal(number, self.stages, footprint, room))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Log the length of the windows."""
        begun = [stage for stage in self.stages if stage.first_step <= trainer.global_step]
        pl_module.log("train/seq_len", float(begun[-1].seq_len), rank_zero_only=True)

    def _room(self, trainer: Trainer, module: LightningModule, footprint: Footprint) -> float:
        """Bytes for all of a process, the least of all processes."""
        if self.memory is not None:
            return self.memory * 1e9
        free = available_bytes(module.device)
        if module.device.type != "cuda":
            free //= trainer.num_devices
        room = torch.tensor(-float(free + footprint.held), dtype=torch.float64)
        if trainer.world_size > 1:
            room = trainer.strategy.reduce(room.to(module.device), reduce_op="max")
        return -float(room)


def short_batches(at_length: Callable[[int], Windows]) -> Callable[[int, int], Batch]:
    """Return what makes batches of some times the same window, the fullest of several tried."""

    def make(rows: int, length: int) -> Batch:
        windows = at_length(length)
        tried = range(0, len(windows), max(1, len(windows) // 64))
        fullest = max(tried, key=lambda k: windows[0, [k]]["tokens"].numel())
        return windows[0, [fullest] * rows]

    return make


def _refusal(number: int, stages: Sequence[Stage], footprint: Footprint, room: float) -> str:
    """Say which stage does not fit, and what would."""
    stage, last = stages[number - 1], stages[-1]
    return (
        f"LengthWarmup: stage {number}, {stage.batch_size} windows of {stage.seq_len} tokens from "
        f"step {stage.first_step} on, needs about "
        f"{gigabytes(footprint.peak(stage.batch_size, stage.seq_len))} of memory, there are "
        f"{gigabytes(room)}: {_advice(stages, last.batch_size, footprint, room)}."
    )


def _advice(stages: Sequence[Stage], batch_size: int, footprint: Footprint, room: float) -> str:
    """Find the largest part of the batch with which all stages fit."""
    for times in range(2, batch_size + 1):
        part = batch_size // times
        if batch_size % times == 0 and all(
            footprint.peak(part * stage.batch_size // batch_size, stage.seq_len) <= room
            for stage in stages
        ):
            return (
                f"lower data.batch_size from {batch_size} to {part} and multiply "
                f"trainer.accumulate_grad_batches by {times}, which makes the same step"
            )
    least = footprint.held + footprint.more
    if least > room:
        return (
            f"parameters, gradients and AdamW's averages alone are {gigabytes(least)}: make the "
            "model smaller"
        )
    return f"lower data.seq_len from {stages[-1].seq_len}: a single window does not fit"
