"""Batches of labelled rows, padded on the right, rows of like length together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from statezoo.datamodules.batch import IGNORE, Batch
from statezoo.datamodules.labels import Labels
from statezoo.datamodules.loader import SeekableLoader

__all__ = ["LabelledRows", "LengthLoader"]


class LabelledRows:
    """Batches of some labelled rows, in the form that ``SeekableLoader`` asks for.

    A batch has ``tokens [B T]`` and ``labels``, ``attention_mask [B T]`` where lengths differ (the
    padding is on the right), and ``ids`` where names are wanted; with names, those of tags have
    ``tagged [B T]`` too, whether a tag is due.

    Args:
        parts: ``[T]`` array of each row: ids, or what ``encode`` makes ids of.
        labels: Their labels; tags have one for each of the ``T`` places.
        pad_id: Fills short rows.
        blank: Ids of a row that is not there.
        names: Name of each row, to be handed on.
    """

    size = 2**31 - 1
    """The loader draws a number below this each epoch, which ``encode`` may use."""

    def __init__(
        self,
        parts: Sequence[NDArray[Any]],
        labels: Labels,
        *,
        pad_id: int,
        blank: int,
        names: list[str] | None = None,
    ) -> None:
        # One array, not a list: worker processes would copy a list's pages by counting references.
        self.joined = np.concatenate(parts) if len(parts) else np.zeros(0, dtype=np.uint8)
        self.bounds = np.cumsum([0, *map(len, parts)])
        self.labels, self.names = labels, names
        self.pad_id, self.blank = pad_id, blank
        if labels.kind == "tags":
            self._tags = np.concatenate(labels.values or [np.zeros(0, dtype=np.int16)])

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """``[n]`` places of each row."""
        return np.diff(self.bounds)

    def __getitem__(self, index: tuple[int, list[int]]) -> Batch:
        """The rows ``index[1]`` in the epoch that is named ``index[0]``; row -1 has no label."""
        epoch, rows = index
        encoded = [self._row(row, epoch) for row in rows]
        sizes = np.array([len(ids) for ids, _ in encoded])
        inside = np.arange(sizes.max()) < sizes[:, None]  # [B T]
        tokens = np.full(inside.shape, self.pad_id, dtype=np.int64)
        tokens[inside] = np.concatenate([ids for ids, _ in encoded])
        batch = Batch(tokens=torch.from_numpy(tokens))
        if not inside.all():
            batch["attention_mask"] = torch.from_numpy(inside.astype(np.int64))
        if self.names is not None:
            batch["ids"] = [self.names[row] if row >= 0 else "" for row in rows]
        if self.labels.kind != "tags":
            batch["labels"] = self.labels.batch(rows)
            return batch
        tags = np.full(inside.shape, IGNORE, dtype=np.int64)
        tags[inside] = np.concatenate([tags for _, tags in encoded])
        if self.names is not None:
            batch["tagged"] = torch.from_numpy(tags != IGNORE)
        batch["labels"] = torch.from_numpy(np.where(tags >= 0, tags, IGNORE))
        return batch

    def _row(self, row: int, epoch: int) -> tuple[NDArray[Any], NDArray[np.int16]]:
        if row < 0:
            return np.array([self.blank]), np.array([IGNORE], dtype=np.int16)
        at = slice(self.bounds[row], self.bounds[row + 1])
        tags = self._tags[at] if self.labels.kind == "tags" else np.zeros(0, dtype=np.int16)
        return self.encode(row, epoch, self.joined[at], tags)

    def encode(
        self, row: int, epoch: int, part: NDArray[Any], tags: NDArray[np.int16]
    ) -> tuple[NDArray[Any], NDArray[np.int16]]:
        """Ids of a row and, if there are tags, that of each."""
        return part, tags


class LengthLoader(SeekableLoader):
    """Puts rows of like length into a batch: within every ``POOL`` batches they are sorted."""

    POOL = 50

    def _epoch_order(self, epoch: int) -> tuple[int, NDArray[np.int64]]:
        shift, order = super()._epoch_order(epoch)
        lengths = self.windows.lengths  # type: ignore[attr-defined]
        if self.shuffle and len(np.unique(lengths)) > 1:
            size = self.batch_size * self.world_size
            pool = np.arange(len(order)) // (size * self.POOL)
            order = order[np.lexsort((lengths[order], pool))]
            whole = len(order) // size  # the last batch, which may be smaller, stays the last
            batches = np.random.default_rng([self.seed, epoch, 1]).permutation(whole)
            front = order[: whole * size].reshape(whole, size)[batches].reshape(-1)
            order = np.concatenate([front, order[whole * size :]])
        return shift, order
