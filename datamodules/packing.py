"""Windows over a stream of documents: every token is a target exactly once.

The documents of a split are laid end to end. Position ``p`` of this stream must say token ``p``
and reads token ``p - 1``, or ``bos_id`` where ``p`` begins a document: no token is added,
dropped or scored twice, and no document is predicted from the end of another one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from statezoo.datamodules.batch import IGNORE, Batch

__all__ = ["TokenFile", "Windows"]


class TokenFile:
    """A one-dimensional ``.npy`` array, mapped when first read; pickles as its path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._array: NDArray[Any] | None = None

    @property
    def array(self) -> NDArray[Any]:
        """The mapped numbers; an empty file cannot be mapped and is read."""
        if self._array is None:
            self._array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return self._array

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_array": None}


class Windows:
    """Batches of windows of ``seq_len`` positions over some documents of a token file.

    Args:
        tokens: All tokens of the corpus.
        segments: ``[n 2]`` first and past-the-last index of each document of this split.
        seq_len: Positions per window.
        bos_id: Token read at the first position of a document.
        packed: Flatten a batch to ``[1, B*T]`` with ``cu_seqlens`` that reset the state at window
            and document starts; otherwise ``[B T]`` and the state runs on between documents.
        context: Leading positions of each window but the first that repeat the end of the window
            before and are not scored.
        lengths: Bytes that each token stands for; default 1 each.
    """

    def __init__(
        self,
        tokens: TokenFile,
        segments: NDArray[np.int64],
        *,
        seq_len: int,
        bos_id: int,
        packed: bool = False,
        context: int = 0,
        lengths: TokenFile | None = None,
    ) -> None:
        if not 0 <= context < seq_len:
            raise ValueError(
                f"Windows needs 0 <= context < seq_len={seq_len}, got context={context}."
            )
        segments = segments[segments[:, 1] > segments[:, 0]]
        if not len(segments):
            raise ValueError("Windows needs at least one token, got none: add text.")
        self.tokens, self.lengths = tokens, lengths
        self.seq_len, self.bos_id = seq_len, bos_id
        self.packed, self.context = packed, context
        self.starts = segments[:, 0]
        ends = np.cumsum(segments[:, 1] - segments[:, 0])
        self.size = int(ends[-1])
        """Tokens in the stream."""
        self.bounds = np.concatenate([[0], ends[:-1]]).astype(np.int64)  # stream positions

    def __len__(self) -> int:
        stride = self.seq_len - self.context
        return 1 + max(0, -(-(self.size - self.seq_len) // stride))

    def begins(self, shift: int, windows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """``[B]`` whether a window's state does not come from the window of the number before."""
        first = np.isin((windows * (self.seq_len - self.context) + shift) % self.size, self.bounds)
        return (windows <= 0) | first & self.packed

    def __getitem__(self, index: tuple[int, list[int]]) -> Batch:
        """The windows ``index[1]`` of the stream that begins, cyclically, at ``index[0]``.

        Window -1 is one without scored targets.
        """
        shift, windows = index
        k = np.asarray(windows, dtype=np.int64)[:, None]
        step = np.arange(self.seq_len)
        stride = self.seq_len - self.context
        place = k * stride + step  # [B T], before the shift
        inside = (place < self.size) & (k >= 0)
        scored = inside & ((step >= self.context) | (k == 0))
        place = np.where(inside, (place + shift) % self.size, 0)
        segment = np.searchsorted(self.bounds, place, side="right") - 1
        first = place == self.bounds[segment]
        at = self.starts[segment] + place - self.bounds[segment]

        values = self.tokens.array
        targets = np.where(scored, values[at].astype(np.int64), IGNORE)
        before = values[np.maximum(at - 1, 0)].astype(np.int64)
        tokens = np.where(first | ~inside, self.bos_id, before)
        n_bytes = scored.sum() if self.lengths is None else self.lengths.array[at[scored]].sum()
        batch = Batch(
            tokens=torch.from_numpy(tokens),
            targets=torch.from_numpy(targets),
            n_bytes=torch.tensor(int(n_bytes)),
        )
        if self.packed:
            starts = np.flatnonzero((first & inside) | (step == 0))
            bounds = np.append(starts, tokens.size).astype(np.int32)
            batch["cu_seqlens"] = torch.from_numpy(bounds)
            batch["tokens"] = batch["tokens"].view(1, -1)
            batch["targets"] = batch["targets"].view(1, -1)
        return batch
