"""The end of a run on several processes when one of them is gone."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from statezoo.lightning_modules.checkpoint import RunStopped

__all__ = ["LostProcess"]

GRACE = 15.0
"""Seconds that the other processes of this machine have to say why they end."""


class LostProcess(Callback):
    """End all processes of a run when one ends, and say which, why and how to go on.

    The others notice at the next exchange, at once where its connections close with it (``gloo``);
    one that hangs instead is given up after the strategy's ``timeout``. Lightning ends the whole
    run within five seconds where a process that it has started ends before any exchange.
    """

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Turn a broken connection into its reason.

        Raises:
            RunStopped: If another process is gone.
        """
        if trainer.world_size == 1 or not isinstance(exception, Exception):
            return
        started: list[subprocess.Popen[Any]] = getattr(trainer.strategy.launcher, "procs", [])
        mine = list(started)
        started.clear()  # Lightning would kill this process too, before it can speak
        lost = is_lost(exception)
        codes = end(mine, GRACE if lost else 0.0)
        if lost:
            raise RunStopped(_told(trainer, codes, exception)) from exception


def is_lost(error: Exception) -> bool:
    """Say whether this is what an exchange raises when another process is gone."""
    closed = re.search(r"gloo|nccl|connection (closed|reset)", str(error), re.IGNORECASE)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(closed))


def end(processes: list[subprocess.Popen[Any]], grace: float) -> dict[int, int]:
    """Wait for processes, then kill those that are left.

    Args:
        processes: Those that this one has started, numbers 1 and up of the run.
        grace: Seconds to wait.

    Returns:
        Exit codes of those that had ended with an error, by number.
    """
    limit = time.monotonic() + grace
    while any(p.poll() is None for p in processes) and time.monotonic() < limit:
        time.sleep(0.05)
    codes = {i: p.poll() for i, p in enumerate(processes, start=1)}
    for process in processes:
        if process.poll() is None:
            process.kill()
    return {i: code for i, code in codes.items() if code}


def _told(trainer: Trainer, codes: dict[int, int], error: Exception) -> str:
    """Say which process ended and how to go on."""
    reasons = []
    for i, code in sorted(codes.items(), key=lambda pair: pair[1]):  # first those that were killed
        if code < 0:
            name = signal.Signals(-code).name
            reasons.append(f"process {i} was killed by signal {-code} ({name})")
        elif not reasons:
            reasons.append(f"process {i} ended with exit code {code}, its reason is above")
    first = re.sub(r"^\[\S*\] ", "", str(error).strip()).partition(". ")[0].partition("\n")[0]
    reason = "; ".join(reasons) or f"another process is gone ({first[:100]})"
    saved = getattr(trainer.checkpoint_callback, "last_model_path", "")
    on = f"go on with --ckpt_path {Path(saved).parent}" if saved else "there is no checkpoint yet"
    return (
        f"process {trainer.global_rank} of {trainer.world_size} stops at step "
        f"{trainer.global_step}: {reason}; {on}."
    )
