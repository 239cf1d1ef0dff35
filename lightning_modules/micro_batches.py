"""The batch that was asked for, in as many parts as memory needs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error

from statezoo.datamodules.base import SplitData
from statezoo.datamodules.batch import Batch
from statezoo.datamodules.loader import SeekableLoader
from statezoo.lightning_modules import checkpoint as ckpt
from statezoo.lightning_modules.length_warmup import LengthWarmup
from statezoo.lightning_modules.memory import (
    MARGIN,
    available_bytes,
    gigabytes,
    gradients_dropped,
    peak,
)
from statezoo.lightning_modules.task import Task

__all__ = ["MicroBatches"]

TRIED = 4
"""Batches looked at for the one with most tokens, where lengths differ."""


class MicroBatches(Callback):
    """Divide every batch into as many micro-batches as memory asks for.

    ``data.batch_size`` stays what an optimiser step reads, so what is learnt is the same on every
    machine, to rounding (the balance loss of mixtures of memories is one per micro-batch). Before
    the first step the memory of one and of two sequences is measured, the largest part that should
    fit is tried forward and back, and made smaller as long as memory runs out. A resumed run
    goes on with the parts that it had.

    Args:
        memory: GB that one process may use; default all that is free.
    """

    def __init__(self, memory: float | None = None) -> None:
        if memory is not None and not memory > 0:
            raise ValueError(f"MicroBatches needs memory above 0 GB, got {memory}.")
        self.memory = memory
        self.parts: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse data whose batches cannot be divided.

        Raises:
            ValueError: If the data has no batches of windows, or grows its windows.
        """
        if stage != "fit":
            return
        data: Any = getattr(trainer, "datamodule", None)
        loader = data.train_dataloader() if isinstance(data, SplitData) else None
        if type(loader) is not SeekableLoader or not isinstance(pl_module, Task):
            got = type(data).__name__ if loader is None else type(loader).__name__
            raise ValueError(
                "MicroBatches needs a task and data whose windows or pieces can be read in any "
                "number at once: Text, DNA or Music, not carried, decomposed or in buckets; got "
                f"{type(pl_module).__name__} and {got}: set data.batch_size and "
                "trainer.accumulate_grad_batches instead."
            )
        if any(isinstance(other, LengthWarmup) for other in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError("MicroBatches cannot divide LengthWarmup's batches: leave one out.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the number of parts, and divide.

        Raises:
            ValueError: If not even one sequence fits.
        """
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        module, whole = cast(Task, pl_module), data.batch_size
        if self.parts is None or whole % self.parts:
            with _undisturbed(module):
                self.parts = whole // self._largest(trainer, module, data)
        self._divide(trainer, data, self.parts)
        rank_zero_info(
            f"each batch of {whole} is read in {self.parts} parts of {data.batch_size}"
            if self.parts > 1
            else f"a batch of {whole} fits in memory"
        )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave trainer and data as they were."""
        if stage == "fit" and self.parts is not None:
            self._divide(trainer, trainer.datamodule, 1 / self.parts)  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """Return the number of parts."""
        return {"parts": self.parts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back the number of parts: the position in the data is counted in them."""
        self.parts = state_dict["parts"]

    def _divide(self, trainer: Trainer, data: Any, parts: float) -> None:
        """Read smaller batches, and count everything that is counted in batches in those."""
        data.batch_size = round(data.batch_size / parts)
        trainer.accumulate_grad_batches = round(trainer.accumulate_grad_batches * parts)
        for name in ("val_check_interval", "limit_train_batches"):
            if isinstance(value := getattr(trainer, name), int):
                setattr(trainer, name, round(value * parts))

    def _largest(self, trainer: Trainer, module: Task, data: Any) -> int:
        """Return the most sequences at once that fit, a divisor of the batch size."""
        whole = data.batch_size
        one, two = (_needs(trainer, module, data, rows) for rows in (1, 2))
        trained = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
        room = available_bytes(module.device) if self.memory is None else self.memory * 1e9
        room = -_most_of_all(trainer, module, -room)
        left = room - 3 * trained - MARGIN * one
        if left < 0:
            needed = "more" if math.isinf(left) else f"about {gigabytes(room - left)}"
            raise ValueError(
                f"one sequence needs {needed}, there are {gigabytes(room)}: shorten data.seq_len, "
                "add --trainer.callbacks+=ActivationCheckpointing, or take a smaller model."
            )
        more = left / (MARGIN * max(two - one, 1))
        fits = [rows for rows in range(1, whole + 1) if whole % rows == 0 and rows - 1 <= more]
        while len(fits) > 1 and math.isinf(_needs(trainer, module, data, fits[-1])):
            fits.pop()
        data.batch_size = whole
        return fits[-1]


@contextmanager
def _undisturbed(module: Task) -> Iterator[None]:
    """Put random numbers and mode back after trying."""
    rng, was = ckpt.rng_state(), module.training
    module.train()
    try:
        yield
    finally:
        module.train(was)
        ckpt.set_rng_state(rng)


def _needs(trainer: Trainer, module: Task, data: Any, rows: int) -> float:
    """Bytes of the tensors of a step with so many sequences, infinite if memory runs out."""
    data.batch_size = rows
    loader: Any = data.train_dataloader()
    found: list[Batch] = list(islice(loader.read(range(TRIED)), TRIED))
    fullest = max(found, key=lambda batch: batch["tokens"].numel())
    try:
        with gradients_dropped([p for p in module.parameters() if p.requires_grad]):
            needs = float(peak(module, trainer, fullest))
    except RuntimeError as error:
        if not (is_oom_error(error) or isinstance(error, torch.OutOfMemoryError)):
            raise
        needs = math.inf
    garbage_collection_cuda()
    return _most_of_all(trainer, module, needs)


def _most_of_all(trainer: Trainer, module: Task, value: float) -> float:
    """Agree with the other processes on the largest value."""
    if trainer.world_size == 1:
        return value
    mine = torch.tensor(value, device=module.device)
    return float(trainer.strategy.reduce(mine, reduce_op="max"))
