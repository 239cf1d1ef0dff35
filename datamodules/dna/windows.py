"""Windows over regions of a genome: every base is a target exactly once per epoch.

Nothing is kept in memory but the bounds of the regions: each window is read from the file when it
is asked for, turned to the other strand if it is its turn, and only then made into tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from statezoo.datamodules.batch import IGNORE, Batch
from statezoo.datamodules.decomposition import Buckets, Decomposition
from statezoo.datamodules.dna.fasta import Genome
from statezoo.datamodules.dna.intervals import Region
from statezoo.datamodules.dna.sequence import reverse_complement
from statezoo.datamodules.dna.tokenizers import DNATokenizer

__all__ = ["GenomePieces", "GenomeWindows", "Task"]

_MANY = 16  # windows of a region from which one more is spent on moving the bounds freely
_EMPTY = np.zeros(0, dtype=np.uint8)


class Task(NamedTuple):
    """What a window asks of a model.

    Attributes:
        objective: ``"causal"``: say each base from those before it; ``"masked"``: say the chosen
            ones from all others.
        mask_fraction: Part of the bases that are chosen.
        soft_mask_weight: Loss weight of bases in lower case.
        seed: Draws masks and strands.
    """

    objective: Literal["causal", "masked"] = "causal"
    mask_fraction: float = 0.15
    soft_mask_weight: float = 1.0
    seed: int = 0


class _Row(NamedTuple):
    """One window: ``[T]`` each; ``spans`` are the bases that each token stands for."""

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    spans: NDArray[np.int64]
    weights: NDArray[np.float32] | None


class GenomeWindows:
    """Batches of windows of ``seq_len`` tokens over some regions of a genome.

    A window stays within its region. A causal one reads the base before its first, or ``bos_id``
    at the beginning of a contig. A shift moves the inner bounds of windows; the first and the last
    of a region are shorter then. With k-mers a window holds ``seq_len * k`` bases, and a few
    more tokens where N or the end of the region leaves single letters. Rows of a batch are filled
    up on the right to the longest.

    Args:
        genome: The contigs.
        regions: What belongs to this split, apart from each other.
        tokenizer: Makes the ids.
        seq_len: Tokens per window.
        context: Leading tokens of each window but the first of a region that repeat the end of
            the window before and are not scored.
        movable: Leave room for shifts, for training.
        task: What the targets are.

    Attributes:
        size: Bases of all regions.
        rc: Read half of the windows from the other strand.
        masked: Say in ``attention_mask`` what fills rows up, so that no state sees it.
    """

    def __init__(
        self,
        genome: Genome,
        regions: Sequence[Region],
        tokenizer: DNATokenizer,
        seq_len: int,
        *,
        context: int = 0,
        movable: bool = False,
        task: Task | None = None,
    ) -> None:
        if not 0 <= context < seq_len:
            raise ValueError(
                f"GenomeWindows needs 0 <= context < seq_len={seq_len}, got context={context}."
            )
        self.genome, self.tokenizer, self.task = genome, tokenizer, task or Task()
        self.rc = False
        self.masked = self.task.objective == "masked"
        self.contigs = [region.contig for region in regions]
        self.starts = np.array([region.start for region in regions], dtype=np.int64)
        self.lengths = np.array([region.stop for region in regions], dtype=np.int64) - self.starts
        self.size = int(self.lengths.sum())
        if self.size < 1:
            raise ValueError("GenomeWindows needs at least one base, got none: add regions.")
        self.width = seq_len * tokenizer.bases_per_token
        self.context = context * tokenizer.bases_per_token
        self.stride = self.width - self.context
        counts = 1 + -(-np.maximum(self.lengths - self.width, 0) // self.stride)
        if movable:
            counts += counts >= _MANY
        room = self.width + (counts - 1) * self.stride - self.lengths
        self.room = np.where(counts > 1, np.minimum(room, self.width - 1), 0) if movable else None
        self.ends = np.cumsum(counts)  # number of the first window after each region

    def __len__(self) -> int:
        return int(self.ends[-1])

    def bounds(self, shift: int, window: int) -> tuple[int, int, int]:
        """Region of a window, and its first and past-the-last scored base within the region."""
        i = int(np.searchsorted(self.ends, window, side="right"))
        number = window - (int(self.ends[i - 1]) if i else 0)
        moved = 0 if self.room is None else shift % (int(self.room[i]) + 1)
        length, first = int(self.lengths[i]), self.width - moved
        start = 0 if number == 0 else min(first + (number - 1) * self.stride, length)
        return i, start, min(first + number * self.stride, length)

    def begins(self, shift: int, windows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """``[B]`` whether a window is the first of its region, at any shift."""
        return (windows <= 0) | np.isin(windows, self.ends)

    def __getitem__(self, index: tuple[int, list[int]]) -> Batch:
        """The windows ``index[1]``, their bounds moved by ``index[0]``; -1 is an empty one."""
        shift, windows = index
        rows = [self._row(shift, window) for window in windows]
        longest = max(1, *(len(row.tokens) for row in rows))
        shape = (len(rows), longest)
        tokens = np.full(shape, self.tokenizer.pad_id, dtype=np.int64)
        targets = np.full(shape, IGNORE, dtype=np.int64)
        weights = np.ones(shape, dtype=np.float32)
        mask = np.zeros(shape, dtype=np.int64)
        n_bases = 0
        for b, row in enumerate(rows):
            size = len(row.tokens)
            tokens[b, :size], targets[b, :size], mask[b, :size] = row.tokens, row.targets, 1
            n_bases += int(row.spans[row.targets != IGNORE].sum())
            if row.weights is not None:
                weights[b, :size] = row.weights
        batch = Batch(
            tokens=torch.from_numpy(tokens),
            targets=torch.from_numpy(targets),
            n_bytes=torch.tensor(n_bases),
        )
        if self.task.soft_mask_weight != 1:
            batch["weights"] = torch.from_numpy(weights)
        if self.masked and not mask.all():
            mask[:, 0] = 1  # a row of fillers alone still needs something to read
            batch["attention_mask"] = torch.from_numpy(mask)
        return batch

    def _row(self, shift: int, window: int) -> _Row:
        if window < 0:
            return self._tokens(_EMPTY, _EMPTY, _EMPTY, np.random.default_rng(0))
        rng = np.random.default_rng([self.task.seed, shift, window])
        i, start, stop = self.bounds(shift, window)
        contig, origin = self.contigs[i], int(self.starts[i])
        turned = self.rc and bool(rng.integers(2))
        context = min(self.context, start) if stop > start else 0
        low, high = origin + start - context, origin + stop
        reach = self.tokenizer.bases_per_token if self.task.objective == "causal" else 0
        before = 0 if turned else min(reach, low)
        after = min(reach, self.genome.length(contig) - high) if turned else 0
        letters = self.genome.fetch(contig, low - before, high + after)
        if turned:
            letters = reverse_complement(letters)
        body = letters[before + after :]
        return self._tokens(letters[: before + after], body[:context], body[context:], rng)

    def _tokens(
        self,
        before: NDArray[np.uint8],
        context: NDArray[np.uint8],
        body: NDArray[np.uint8],
        rng: np.random.Generator,
    ) -> _Row:
        """Tokens and targets of the letters of a window, those before it and those not scored."""
        ids, spans, skipped = self._encode(context, body)
        scored = ids != self.tokenizer.n_id
        scored[:skipped] = False
        weights = self._weights(np.concatenate([context, body]), spans)
        if self.task.objective == "causal":
            last = self._encode(before)[0][-1:] if len(before) else [self.tokenizer.bos_id]
            tokens = np.concatenate([last, ids[:-1]])[: len(ids)].astype(np.int64)
            return _Row(tokens, np.where(scored, ids, IGNORE), spans, weights)
        tokens, chosen = self._mask(ids, scored, rng)
        return _Row(tokens, np.where(chosen, ids, IGNORE), spans, weights)

    def _encode(
        self, *parts: NDArray[np.uint8]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """Ids and spans of parts that are cut into tokens one by one; tokens of the first part."""
        encoded = [self.tokenizer.encode_array(part) for part in parts]
        ids = np.concatenate([i for i, _ in encoded]).astype(np.int64)
        spans = [np.ones(len(i), np.int64) if n is None else n.astype(np.int64) for i, n in encoded]
        return ids, np.concatenate(spans), len(spans[0])

    def _weights(self, letters: NDArray[np.uint8], spans: NDArray[np.int64]) -> Any:
        """Mean weight of the bases of each token."""
        if self.task.soft_mask_weight == 1 or not len(letters):
            return None
        weights = np.where(letters >= ord("a"), self.task.soft_mask_weight, 1.0)
        starts = np.cumsum(spans) - spans
        return (np.add.reduceat(weights, starts) / spans).astype(np.float32)

    def _mask(
        self, ids: NDArray[np.int64], scored: NDArray[np.bool_], rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Hide a part of the scored tokens: 80 % as ``mask_id``, 10 % random, 10 % left.

        Source: Devlin et al., BERT, arXiv:1810.04805v2, appendix A.1.
        """
        places = np.flatnonzero(scored)
        count = max(round(self.task.mask_fraction * len(places)), min(1, len(places)))
        at = rng.choice(places, count, replace=False)
        kind = rng.random(count)
        drawn = rng.choice(np.array(self.tokenizer.replacements), count)
        tokens = ids.copy()
        tokens[at] = np.where(
            kind < 0.8, self.tokenizer.mask_id, np.where(kind < 0.9, drawn, ids[at])
        )
        chosen = np.zeros(len(ids), dtype=np.bool_)
        chosen[at] = True
        return tokens, chosen


class GenomePieces(GenomeWindows):
    """Batches of pieces of power-of-two length of some regions, as ``PieceLoader`` asks for.

    With k-mers a piece of ``n`` tokens holds ``n * k`` bases.

    Args:
        genome: The contigs.
        regions: What belongs to this split, apart from each other; each is a document.
        tokenizer: Makes the ids.
        seq_len: Tokens of the longest pieces.
        settings: The other lengths, and the order.
        task: What the targets are.

    Raises:
        ValueError: If no region is long enough for a piece.
    """

    def __init__(
        self,
        genome: Genome,
        regions: Sequence[Region],
        tokenizer: DNATokenizer,
        seq_len: int,
        settings: Decomposition,
        task: Task,
    ) -> None:
        super().__init__(genome, regions, tokenizer, seq_len, task=task)
        sizes = self.lengths // tokenizer.bases_per_token
        self.buckets = Buckets(sizes, seq_len, settings, task.seed)

    def __len__(self) -> int:
        return len(self.buckets)

    def bounds(self, shift: int, window: int) -> tuple[int, int, int]:
        """Region of a piece, and its first and past-the-last base within the region."""
        width, buckets = self.tokenizer.bases_per_token, self.buckets
        start = int(buckets.offset[window]) * width
        return int(buckets.document[window]), start, start + buckets.length(window) * width
