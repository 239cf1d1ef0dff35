"""End a training whose task is solved."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from statezoo.probe.measuring import solved

__all__ = ["StopWhenSolved"]


class StopWhenSolved(Callback):
    """Stop when all validation problems of the longest test length are solved.

    Args:
        measure: The accuracy that must be 1.
        every_n_steps: Optimiser steps between two looks.
    """

    def __init__(self, measure: str, every_n_steps: int) -> None:
        self.measure, self.every_n_steps = measure, every_n_steps

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Look, and stop."""
        data: Any = getattr(trainer, "datamodule", None)
        if trainer.global_step % self.every_n_steps == 0:
            trainer.should_stop = solved(pl_module.net, data, self.measure) or trainer.should_stop
