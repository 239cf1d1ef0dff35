"""Batches of music: windows of a stream of pieces, or whole pieces; transposed while training."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from statezoo.datamodules.batch import IGNORE, Batch
from statezoo.datamodules.music.base import Ids, MusicTokenizer
from statezoo.datamodules.packing import TokenFile, Windows

__all__ = ["Augmentation", "Part", "PieceWindows", "WholePieces"]

LEVELS = 5  # of velocity and of tempo, evenly spread over their ranges


class Part(NamedTuple):
    """The pieces of one split.

    Attributes:
        ids: Token ids of the whole corpus.
        segments: ``[n 2]`` first and past-the-last index of each piece.
        pieces: ``[n]`` number of each piece in the corpus.
        pitches: ``[n 2]`` lowest and highest pitch that transposition moves; 0 and -1 if none.
    """

    ids: TokenFile
    segments: NDArray[np.int64]
    pieces: NDArray[np.int64]
    pitches: NDArray[np.int64]


class Augmentation:
    """Other key, loudness and tempo for each piece and epoch; token by token, so lengths stay.

    A piece is transposed only as far as its tokens reach. What is drawn depends on the seed, the
    epoch and the piece alone.

    Args:
        tokenizer: Gives the tables of ids.
        transpose: Lowest and highest transposition in semitones.
        velocity: Velocities change by up to so much.
        tempo: Tempo changes by up to this part of itself.
        seed: Seeds the draws.
    """

    def __init__(
        self,
        tokenizer: MusicTokenizer,
        *,
        transpose: tuple[int, int],
        velocity: int,
        tempo: float,
        seed: int,
    ) -> None:
        self.transpose, self.seed = transpose, seed
        self.velocities = np.linspace(-velocity, velocity, LEVELS).round().astype(int)
        self.tempos = np.linspace(1 - tempo, 1 + tempo, LEVELS)
        moved = tokenizer.pitch_of[tokenizer.pitch_of >= 0]
        self.lowest, self.highest = moved.min(initial=127), moved.max(initial=0)
        self.tokenizer = tokenizer
        self._table: Callable[..., Ids] = cache(tokenizer.table)

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k != "_table"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._table = cache(self.tokenizer.table)

    def draw(self, epoch: int, piece: int, pitches: NDArray[np.int64]) -> tuple[int, int, float]:
        """Semitones, velocity and tempo of a piece in an epoch."""
        rng = np.random.default_rng([self.seed, epoch, piece])
        shift, velocity, tempo = rng.random(3)
        low, high = self.transpose
        if pitches[1] >= pitches[0]:
            low = max(low, int(self.lowest - pitches[0]))
            high = min(high, int(self.highest - pitches[1]))
        semitones = low + int(shift * (high - low + 1)) if high >= low else 0
        at = int(velocity * LEVELS), int(tempo * LEVELS)
        return semitones, int(self.velocities[at[0]]), float(self.tempos[at[1]])

    def table(self, epoch: int, piece: int, pitches: NDArray[np.int64]) -> Ids:
        """``[W]`` what each id becomes in this piece and epoch."""
        semitones, velocity, tempo = self.draw(epoch, piece, pitches)
        keys = self._table(semitones)
        return self._table(0, 0, tempo)[self._table(0, velocity)[keys]]

    def apply(self, batch: Batch, epoch: int, part: Part, rows: NDArray[np.int64]) -> None:
        """Change tokens and targets in place; ``rows`` says the piece of each position."""
        used, local = np.unique(rows, return_inverse=True)
        tables = np.stack(
            [self.table(epoch, int(part.pieces[row]), part.pitches[row]) for row in used]
        )
        local = local.reshape(rows.shape)
        tokens, targets = batch["tokens"].numpy(), batch["targets"].numpy()
        tokens[:] = tables[local, tokens]
        moved = tables[local, np.maximum(targets, 0)]
        targets[:] = np.where(targets == IGNORE, IGNORE, moved)


class PieceWindows(Windows):
    """Windows of ``seq_len`` positions over the pieces of a split, one after the other.

    Args:
        part: The split.
        seq_len: Positions per window.
        tokenizer: Gives the begin of pieces and what tokens count for.
        augmentation: Change each piece so; default none.
    """

    def __init__(
        self,
        part: Part,
        seq_len: int,
        tokenizer: MusicTokenizer,
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__(part.ids, part.segments, seq_len=seq_len, bos_id=tokenizer.bos_id)
        self.part, self.counts, self.augmentation = part, tokenizer.counts, augmentation

    def __getitem__(self, index: tuple[int, list[int]]) -> Batch:
        """Windows ``index[1]``; the place ``index[0]`` where the stream begins names the epoch."""
        batch = super().__getitem__(index)
        if self.augmentation is not None:
            shift, windows = index
            k = np.asarray(windows, dtype=np.int64)[:, None]
            place = k * self.seq_len + np.arange(self.seq_len)
            place = (np.maximum(place, 0) + shift) % self.size
            rows = np.searchsorted(self.bounds, place, side="right") - 1
            self.augmentation.apply(batch, shift, self.part, rows)
        batch["n_bytes"] = _count(batch, self.counts)
        return batch


class WholePieces:
    """One piece per sequence, packed: ``[1 T]`` with ``cu_seqlens``; all tokens see their piece.

    Args:
        part: The split.
        seq_len: Longer pieces are cut into parts of this length, each with a fresh state.
        tokenizer: Gives the begin of pieces and what tokens count for.
        augmentation: Change each piece so; default none.
    """

    def __init__(
        self,
        part: Part,
        seq_len: int,
        tokenizer: MusicTokenizer,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.part, self.bos_id = part, tokenizer.bos_id
        self.counts, self.augmentation = tokenizer.counts, augmentation
        self.size = int(np.diff(part.segments).sum())
        """Tokens of the split."""
        cuts = [np.arange(start, stop, seq_len) for start, stop in part.segments.tolist()]
        self.rows = np.repeat(np.arange(len(cuts)), [len(cut) for cut in cuts])
        self.starts = np.concatenate(cuts)
        self.stops = np.minimum(self.starts + seq_len, part.segments[self.rows, 1])

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: tuple[int, list[int]]) -> Batch:
        """Pieces ``index[1]`` in a row; ``index[0]`` names the epoch.

        Piece -1 is a single position without a scored target.
        """
        epoch, wanted = index
        values = self.part.ids.array
        tokens, targets, rows, sizes = [], [], [], [0]
        for n in wanted:
            row = int(self.rows[max(n, 0)])
            start, stop = int(self.starts[n]), int(self.stops[n])
            first = start == self.part.segments[row, 0]
            ids = values[start : stop if n >= 0 else start + 1].astype(np.int64)
            before = self.bos_id if first or n < 0 else int(values[start - 1])
            tokens.append(np.concatenate([[before], ids[:-1]]))
            targets.append(ids if n >= 0 else np.full(1, IGNORE))
            rows.append(np.full(len(ids), row))
            sizes.append(len(ids))
        batch = Batch(
            tokens=torch.from_numpy(np.concatenate(tokens)[None]),
            targets=torch.from_numpy(np.concatenate(targets)[None]),
            cu_seqlens=torch.from_numpy(np.cumsum(sizes).astype(np.int32)),
        )
        if self.augmentation is not None:
            self.augmentation.apply(batch, epoch, self.part, np.concatenate(rows)[None])
        batch["n_bytes"] = _count(batch, self.counts)
        return batch


def _count(batch: Batch, counts: Ids) -> torch.Tensor:
    """Units that the scored targets stand for."""
    targets = batch["targets"].numpy()
    return torch.tensor(int(counts[targets[targets != IGNORE]].sum()))
