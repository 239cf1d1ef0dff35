"""A loader that can be put back to any position of any epoch.

The order is a pure function of seed, epoch and position, so a checkpoint needs to hold one number
and a resumed run reads the very batches that the interrupted one had not read yet, whatever the
number of workers before and after.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from statezoo.datamodules.batch import Batch

__all__ = ["SeekableLoader", "Windows"]

Index = tuple[int, list[int]]


class Windows(Protocol):
    """A split that is read in windows.

    ``windows[shift, numbers]`` is the batch of these windows when the bounds of all of them are
    moved by ``shift``, below ``size``; number -1 is a window without scored targets.
    """

    size: int

    def __len__(self) -> int:
        """Windows of an epoch."""

    def __getitem__(self, index: Index) -> Batch:
        """The batch of some windows."""


class SeekableLoader:
    """Batches of windows, resumable in the middle of an epoch.

    Lightning saves ``state_dict`` with each checkpoint and puts it back on resume. The state
    counts a batch as read when it is handed out; workers read ahead without changing it. A shuffled
    loader goes on where its last pass stopped, an unshuffled one begins each pass at the first
    batch, unless a state was put back just before.

    Args:
        windows: The split to read.
        batch_size: Windows per batch and process.
        shuffle: Draw a new order of windows, and new window bounds, each epoch.
        seed: Seeds the orders; an epoch's order depends on ``seed`` and its number only.
        num_workers: Processes that read ahead; 0 reads in this one.
        rank: Number of this process among those that share each batch.
        world_size: How many those are. Windows missing from the last batch of a shuffled epoch
            are taken from its beginning; otherwise they are windows without scored targets.
        epoch: Epoch to begin with.
    """

    def __init__(
        self,
        windows: Windows,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"SeekableLoader needs batch_size of at least 1, got {batch_size}.")
        if not 0 <= rank < world_size:
            raise ValueError(
                f"SeekableLoader needs 0 <= rank < world_size={world_size}, got rank={rank}."
            )
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.shuffle, self.seed = shuffle, seed
        self.num_workers = num_workers
        self.windows = self.arrange(windows)
        self.epoch_length = self.count_batches()
        self.length = self.epoch_length
        self.done = epoch * self.epoch_length
        """Batches handed out since the run began."""
        self.pass_end = self.done
        self._resumed = False
        self._order: tuple[int, int, NDArray[np.int64]] | None = None

    def arrange(self, windows: Windows) -> Windows:
        """Return what is read when these windows are given: themselves, unless a kind differs."""
        return windows

    def count_batches(self) -> int:
        """Count the batches of an epoch."""
        return -(-len(self.windows) // (self.batch_size * self.world_size))

    def layout(self) -> dict[str, Any] | None:
        """Describe what an order depends on beside seed, epoch and sizes; None for nothing."""
        return None

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        if not (self._resumed and self.done < self.pass_end):
            self.done = self.done if self.shuffle else 0
            self.pass_end = self.done + self.length
        self._resumed = False
        for batch in self.read(range(self.done, self.pass_end)):
            self.done += 1
            yield batch

    def read(self, numbers: range) -> Iterator[Batch]:
        """Batches of these numbers, counted from the first epoch."""
        # Not persistent workers: those would outlive a pass that is left before its end.
        reader: DataLoader[Batch] = DataLoader(
            self.windows,  # type: ignore[arg-type]  # indexed by pairs, not by numbers
            batch_size=None,
            sampler=map(self.index, numbers),
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),  # leaves the global one alone
        )
        yield from reader

    def like(self, windows: Windows, batch_size: int) -> SeekableLoader:
        """Return a loader of other windows, at its beginning, that is like this one otherwise."""
        return type(self)(
            windows,
            batch_size,
            shuffle=self.shuffle,
            seed=self.seed,
            num_workers=self.num_workers,
            rank=self.rank,
            world_size=self.world_size,
        )

    def limit(self, batches: float) -> None:
        """End each pass after so many batches (float: part of the epoch); the next goes on there.

        Takes what ``Trainer(limit_train_batches=...)`` takes, so that a pass that Lightning cuts
        short is a whole one here and resumes right.
        """
        asked = int(batches * self.epoch_length) if isinstance(batches, float) else batches
        self.length = min(asked, self.epoch_length)

    def index(self, n: int) -> Index:
        """Shift and windows of this process's part of batch ``n``, counted from the first epoch."""
        epoch, position = divmod(n, self.epoch_length)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, *self._epoch_order(epoch))
        _, shift, order = self._order
        size = self.batch_size * self.world_size
        part = order[position * size : (position + 1) * size][self.rank :: self.world_size]
        return shift, part.tolist()

    def _epoch_order(self, epoch: int) -> tuple[int, NDArray[np.int64]]:
        """Where the stream begins in this epoch, and its windows in reading order."""
        count = len(self.windows)
        missing = -count % self.world_size
        if not self.shuffle:
            return 0, np.concatenate([np.arange(count), np.full(missing, -1)])
        rng = np.random.default_rng([self.seed, epoch])
        shift = int(rng.integers(self.windows.size))
        order = rng.permutation(count)
        return shift, np.concatenate([order, np.resize(order, missing)])

    def state_dict(self) -> dict[str, Any]:
        """Position as plain numbers, the same on every rank, and what it is a position in."""
        state = {"done": self.done, "pass_end": self.pass_end, "epoch_length": self.epoch_length}
        state["together"] = self.batch_size * self.world_size
        layout = self.layout()
        return state if layout is None else state | {"layout": layout}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batches that ``state`` counts as read.

        Raises:
            ValueError: If the data, the batch size or the stages are not those of the saved run.
        """
        if (layout := state.get("layout")) != self.layout():
            had, has = (x or "windows in random order" for x in (layout, self.layout()))
            raise ValueError(
                f"The checkpoint was made with {had}, this run has {has}: resume with the same "
                "data.packing, data.carry and data.decomposition, or start a new run from the "
                "checkpoint's weights."
            )
        together = self.batch_size * self.world_size
        if (had := state.get("together", together)) != together:
            raise ValueError(
                f"The checkpoint was made with {had} windows per batch over all processes, now "
                f"there are {together}, {self.batch_size} on each of {self.world_size}: resume "
                f"with {_alike(had, self.world_size)}, or start a new run from the checkpoint's "
                "weights."
            )
        if state["epoch_length"] != self.epoch_length:
            raise ValueError(
                f"The checkpoint was made with {state['epoch_length']} batches per epoch, now "
                f"there are {self.epoch_length}: resume with the same data and seq_len, or start "
                "a new run from the checkpoint's weights."
            )
        had, has = state.get("stages"), self.state_dict().get("stages")
        if had != has:
            told = {True: "with stages of growing windows", False: "without"}
            raise ValueError(
                f"The checkpoint was made {told[bool(had)]} ([first batch, batches per epoch]: "
                f"{had}), this run has {has}: resume with the same LengthWarmup, or start a new "
                "run from the checkpoint's weights."
            )
        self.done, self.pass_end = state["done"], state["pass_end"]
        self._resumed = True


def _alike(together: int, world_size: int) -> str:
    """Say with which batch size, or on how many processes, batches are those of before."""
    if together % world_size == 0:
        return f"data.batch_size {together // world_size}"
    return f"a number of processes that divides {together}, and data.batch_size to match"
