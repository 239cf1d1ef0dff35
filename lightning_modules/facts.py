"""What a training cost, written down while it happens: steps, tokens, seconds, machine."""

from __future__ import annotations

import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["FACTS_FILE", "TrainingFacts", "cores", "machine", "threads"]

FACTS_FILE = "train.json"


def machine() -> str:
    """Name what this process can compute on: its graphics card, else its processor."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        lines = information.read_text(errors="replace").splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else name
    return f"{cores()} CPU core{'s' if cores() != 1 else ''}, {name}"


def cores() -> int:
    """Count the processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads(number: int) -> str:
    """Write out how many threads computed."""
    return f"{number} thread{'s' if number != 1 else ''}"


class TrainingFacts(Callback):
    """Write ``train.json`` at the end of a fit.

    It holds the optimiser ``steps``, the ``tokens`` that were read, padding included, over all
    processes, the ``seconds`` from beginning to end with validation, ``cpu_seconds`` of this
    process's processor time, ``threads``, ``device``, and the versions of ``torch`` and
    ``statezoo``. A run that was interrupted counts on.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.before, self.start = (0.0, 0.0), (0.0, 0.0)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks."""
        self.start = (time.perf_counter(), time.process_time())

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count."""
        if isinstance(batch, dict) and "tokens" in batch:
            self.tokens += batch["tokens"].numel() * trainer.world_size

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write, unless it was only a try."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if getattr(trainer, "fast_dev_run", False) or not trainer.is_global_zero:
            return
        if not folder.is_dir():
            return
        seconds, cpu_seconds = self._elapsed()
        facts = {
            "steps": trainer.global_step,
            "tokens": self.tokens,
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu_seconds, 1),
            "threads": torch.get_num_threads(),
            "device": machine(),
            "torch": torch.__version__,
            "statezoo": version("statezoo"),
        }
        (folder / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n")

    def _elapsed(self) -> tuple[float, float]:
        """Return the seconds so far, of the clock on the wall and of the processor."""
        wall, cpu = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
        return self.before[0] + wall, self.before[1] + cpu

    def state_dict(self) -> dict[str, Any]:
        """Return what was counted so far."""
        seconds, cpu_seconds = self._elapsed()
        return {"tokens": self.tokens, "seconds": seconds, "cpu_seconds": cpu_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on from an earlier part of the run."""
        self.tokens = state_dict["tokens"]
        self.before = (state_dict["seconds"], state_dict["cpu_seconds"])
