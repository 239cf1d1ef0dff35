"""Windows read in order along parallel streams, for states that are carried from batch to batch.

The windows of a split are dealt to as many streams as all processes together have rows, each an
unbroken run of windows. Batch ``j`` of an epoch has window ``j`` of every stream, so each row goes
on where it ended in the batch before, unless ``starts`` says that it begins anew.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from statezoo.datamodules.batch import Batch
from statezoo.datamodules.loader import Index, SeekableLoader, Windows

__all__ = ["StreamLoader", "Streams"]


class Consecutive(Windows, Protocol):
    """Windows of which each, as a rule, goes on where the one of the number before ends."""

    def begins(self, shift: int, windows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """``[B]`` whether each of these windows does not."""


class Streams:
    """Batches of parallel streams; row ``step * count + stream`` is what a stream reads at a step.

    Args:
        windows: What the streams are cut of.
        count: How many.

    Raises:
        ValueError: If there are too few windows for two in each stream.
    """

    def __init__(self, windows: Consecutive, count: int) -> None:
        if len(windows) < 2 * count:
            raise ValueError(
                f"carry needs at least 2 windows in each of {count} streams (batch_size times "
                f"processes), the data has {len(windows)} windows: lower batch_size or seq_len, or "
                "add data."
            )
        self.windows, self.count, self.size = windows, count, windows.size
        self.bounds = np.arange(count + 1) * len(windows) // count
        self.steps = -(-len(windows) // count)

    def __len__(self) -> int:
        return self.steps * self.count

    def __getitem__(self, index: Index) -> Batch:
        """The rows ``index[1]``; the windows' bounds, and where streams begin, are moved."""
        shift, rows = index
        step, stream = np.divmod(np.asarray(rows, dtype=np.int64), self.count)
        own = self.bounds[stream] + step
        over = own >= self.bounds[stream + 1]
        window = np.where(over, -1, (own + shift) % len(self.windows))
        batch = self.windows[shift, window.tolist()]
        starts = over | (step == 0) | self.windows.begins(shift, window)
        batch["starts"] = torch.from_numpy(starts)
        return batch


class StreamLoader(SeekableLoader):
    """Batches that each go on where the one before ended; every window once per epoch.

    Where streams begin is drawn each epoch if ``shuffle``. Streams of one window less than others
    end an epoch with a row without scored targets.
    """

    def arrange(self, windows: Windows) -> Streams:
        """Cut the windows into a stream for each row of each process."""
        return Streams(windows, self.batch_size * self.world_size)  # type: ignore[arg-type]

    def layout(self) -> dict[str, Any]:
        """Say how many streams there are."""
        return {"streams": self.batch_size * self.world_size}

    def _epoch_order(self, epoch: int) -> tuple[int, NDArray[np.int64]]:
        shift, order = super()._epoch_order(epoch)
        return shift, np.arange(len(order))
