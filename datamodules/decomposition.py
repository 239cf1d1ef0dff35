r"""Documents in pieces of power-of-two length: every batch has pieces of one length.

A document is peeled into pieces of :math:`2^i` positions, the largest that fits first; what is left
under the shortest is its tail, which is not trained on. One that is longer than the longest piece
gives pieces of random lengths first, with odds :math:`2^i`, until at most that is left, so that
books and contigs are read at all lengths too. All pieces of a length are a bucket. Every batch is
drawn from one bucket and has the same number of tokens, so attention costs what
documents are long, not what windows could hold, and no piece sees another document.

Source: Pouransari et al., Dataset Decomposition, arXiv:2405.13226v2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from statezoo.datamodules.batch import Batch
from statezoo.datamodules.loader import Index, SeekableLoader, Windows
from statezoo.datamodules.packing import TokenFile

__all__ = [
    "DECOMPOSITION",
    "ONE_LENGTH",
    "Buckets",
    "Decomposition",
    "DocumentPieces",
    "PieceLoader",
    "check_decomposed",
]

ONE_LENGTH = (
    "packing 'decomposed' has pieces of all lengths already, windows of one length were asked for: "
    "leave LengthWarmup out, or choose another packing."
)


@dataclass
class Decomposition:
    """How documents are cut into pieces, and in which order these are read.

    Args:
        shortest: Tokens of the shortest pieces, a power of two; the longest have ``seq_len``.
        odds: How many times likelier the next batch has pieces of a length than of twice that
            length, as long as there are both: above 1 short ones tend to come first, 1 mixes them.
        cycles: How many times an epoch goes from short to long.

    Raises:
        ValueError: If a setting is out of range.
    """

    shortest: int = 32
    odds: float = 2.0
    cycles: int = 8

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.shortest < 1 or self.shortest & (self.shortest - 1):
            raise ValueError(
                f"decomposition.shortest must be a power of two, such as 32, got {self.shortest}."
            )
        if not 0 < self.odds < float("inf"):
            raise ValueError(f"decomposition.odds must be a number above 0, got {self.odds}.")
        if self.cycles < 1:
            raise ValueError(f"decomposition.cycles must be at least 1, got {self.cycles}.")

    @classmethod
    def of(cls, settings: Decomposition | Mapping[str, Any]) -> Decomposition:
        """Return settings that may be a mapping, as configuration files hold them."""
        return settings if isinstance(settings, Decomposition) else cls(**settings)


DECOMPOSITION = Decomposition()


def check_decomposed(settings: Decomposition, seq_len: int, carry: bool) -> None:
    """Refuse settings that do not go together.

    Raises:
        ValueError: If the longest piece is no power of two, or shorter than the shortest, or states
            are to be carried.
    """
    if carry:
        raise ValueError(
            "packing 'decomposed' has pieces that do not go on from batch to batch: set carry to "
            "false, or choose another packing."
        )
    if seq_len & (seq_len - 1) or seq_len < settings.shortest:
        raise ValueError(
            f"packing 'decomposed' needs a seq_len that is a power of two and at least "
            f"decomposition.shortest={settings.shortest}, got seq_len={seq_len}: set it to "
            f"{max(settings.shortest, 1 << (seq_len.bit_length() - 1))}."
        )


class Buckets:
    """Which piece is where: pieces are numbered by length, the shortest first.

    Args:
        sizes: ``[n]`` tokens of each document.
        longest: Tokens of the longest pieces.
        settings: Of the shortest, and of the order.
        seed: Draws how over-long documents are cut.

    Attributes:
        document: ``[P]`` number of the document that each piece is of.
        offset: ``[P]`` where in the document it begins.
        lengths: ``[K]`` tokens of the pieces of each bucket.
        ends: ``[K]`` number of the first piece after each bucket.
        tails: Documents with tokens left over.
        tail_tokens: How many these are, of all documents.

    Raises:
        ValueError: If no document has as many tokens as the shortest piece.
    """

    def __init__(
        self, sizes: NDArray[np.int64], longest: int, settings: Decomposition, seed: int
    ) -> None:
        self.settings, self.longest = settings, longest
        lengths = [longest]
        while lengths[0] > settings.shortest:
            lengths.insert(0, lengths[0] // 2)
        rng = np.random.default_rng([seed, 0])
        found = [_peel(i, int(n), lengths, rng) for i, n in enumerate(sizes) if n > longest]
        at = np.zeros(len(sizes), dtype=np.int64)
        for document, _, size in found:
            at[document[0]] = size.sum()
        rest = sizes - at  # at most the longest
        for length in reversed(lengths):
            fits = np.flatnonzero(rest >= length)
            found.append((fits, at[fits], np.full(len(fits), length, dtype=np.int64)))
            at[fits] += length
            rest[fits] -= length
        documents, offsets, each = (np.concatenate(x) for x in zip(*found, strict=True))
        if not len(each):
            raise ValueError(
                f"packing 'decomposed' found no document to train on of at least "
                f"decomposition.shortest={settings.shortest} tokens, the longest has "
                f"{int(sizes.max(initial=0))}: lower decomposition.shortest."
            )
        order = np.lexsort((offsets, documents, each))
        self.document, self.offset = documents[order], offsets[order]
        self.lengths, counts = np.unique(each, return_counts=True)
        self.ends = np.cumsum(counts)
        self.tails, self.tail_tokens = int((rest > 0).sum()), int(rest.sum())

    def __len__(self) -> int:
        return len(self.document)

    def length(self, piece: int) -> int:
        """Tokens of a piece."""
        return int(self.lengths[np.searchsorted(self.ends, piece, side="right")])

    def batches(self, rows: int) -> NDArray[np.int64]:
        """``[K]`` batches of each bucket where one has ``rows`` pieces of the longest length."""
        each = rows * self.longest // self.lengths
        found: NDArray[np.int64] = np.diff(self.ends, prepend=0) // each
        return found

    def describe(self, rows: int) -> str:
        """Say how many pieces there are of each length, and what is not trained on."""
        counts = np.diff(self.ends, prepend=0)
        batches = self.batches(rows)
        unread = int((counts * self.lengths - batches * rows * self.longest).sum())
        listed = ", ".join(f"{n:,} of {k}" for n, k in zip(counts, self.lengths, strict=True))
        return (
            f"pieces: {listed} tokens; {self.tail_tokens:,} tokens in {self.tails:,} tails under "
            f"{self.settings.shortest} left out; each epoch leaves {unread:,} others, drawn anew, "
            "that fill no batch"
        )


def _peel(
    document: int, size: int, lengths: Sequence[int], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Cut pieces off a document until at most the longest length is left.

    Returns:
        The number of the document, where each piece begins, and its length.
    """
    odds, surplus = np.array(lengths, dtype=np.float64), size - lengths[-1]
    odds /= odds.sum()
    sizes = np.zeros(0, dtype=np.int64)
    while sizes.sum() < surplus:
        more = rng.choice(lengths, size=8 + surplus // lengths[-1], p=odds)
        sizes = np.concatenate([sizes, more])
    stops = np.cumsum(sizes)
    count = int(np.searchsorted(stops, surplus)) + 1
    return np.full(count, document), (stops - sizes)[:count], sizes[:count]


class Pieces(Windows, Protocol):
    """A split that is read in pieces; those of one batch have the same length."""

    buckets: Buckets


class DocumentPieces:
    """Batches of pieces of documents of a token file, in the form that ``PieceLoader`` asks for.

    A piece reads the token before its first, or ``bos_id`` at the beginning of its document.

    Args:
        tokens: All tokens of the corpus.
        segments: ``[n 2]`` first and past-the-last index of each document of this split.
        seq_len: Tokens of the longest pieces.
        bos_id: Token read at the first position of a document.
        settings: The other lengths, and the order.
        seed: Draws how over-long documents are cut.
        lengths: Bytes that each token stands for; default 1 each.

    Raises:
        ValueError: If no document is long enough for a piece.
    """

    def __init__(
        self,
        tokens: TokenFile,
        segments: NDArray[np.int64],
        *,
        seq_len: int,
        bos_id: int,
        settings: Decomposition,
        seed: int,
        lengths: TokenFile | None = None,
    ) -> None:
        self.tokens, self.lengths, self.bos_id = tokens, lengths, bos_id
        self.starts = segments[:, 0]
        self.buckets = Buckets(segments[:, 1] - segments[:, 0], seq_len, settings, seed)
        self.size = int((segments[:, 1] - segments[:, 0]).sum())

    def __len__(self) -> int:
        return len(self.buckets)

    def __getitem__(self, index: Index) -> Batch:
        """The pieces ``index[1]``, all of one length; the epoch ``index[0]`` does not matter."""
        pieces, buckets = np.asarray(index[1], dtype=np.int64), self.buckets
        step = np.arange(buckets.length(int(pieces[0])))
        offset = buckets.offset[pieces][:, None] + step  # [B T]
        at = self.starts[buckets.document[pieces]][:, None] + offset
        values = self.tokens.array
        before = values[np.maximum(at - 1, 0)].astype(np.int64)
        n_bytes = at.size if self.lengths is None else self.lengths.array[at].sum()
        return Batch(
            tokens=torch.from_numpy(np.where(offset == 0, self.bos_id, before)),
            targets=torch.from_numpy(values[at].astype(np.int64)),
            n_bytes=torch.tensor(int(n_bytes)),
        )


class PieceLoader(SeekableLoader):
    r"""Batches of pieces of one length each, ``batch_size`` of the longest or more of shorter ones.

    An epoch reads the batches of all buckets in ``cycles`` cycles, each with its share of every
    bucket. The next batch is of bucket ``i`` with probability
    :math:`o_i / \sum_j o_j`, the sum over buckets of which the cycle has batches left, and
    :math:`o_i \propto \mathrm{odds}^{-i}`. Which pieces fill the batches is drawn each epoch; those
    too few for one are not read in it. All processes read pieces of the same length at a time.

    Source: Pouransari et al., arXiv:2405.13226v2, its curricula that grow in cycles.
    """

    _plan: tuple[int, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]] | None = None

    @property
    def buckets(self) -> Buckets:
        """Where the pieces are."""
        return cast(Pieces, self.windows).buckets

    def count_batches(self) -> int:
        """Count the batches of an epoch.

        Raises:
            ValueError: If there are too few pieces of any length for one.
        """
        rows = self.batch_size * self.world_size
        count = int(self.buckets.batches(rows).sum())
        if not count:
            raise ValueError(
                f"packing 'decomposed' has no batch of {rows * self.buckets.longest} tokens from "
                f"pieces of one length ({self.describe()}): lower batch_size, or add "
                "data."
            )
        return count

    def describe(self) -> str:
        """Say how many pieces there are of each length, and what is not trained on."""
        return self.buckets.describe(self.batch_size * self.world_size)

    def layout(self) -> dict[str, Any]:
        """Describe the buckets and their curriculum."""
        rows = self.batch_size * self.world_size
        batches = self.buckets.batches(rows).tolist()
        own = asdict(self.buckets.settings)
        return {**own, "batches": dict(zip(self.buckets.lengths.tolist(), batches, strict=True))}

    def index(self, n: int) -> Index:
        """Epoch and pieces of this process's part of batch ``n``, counted from the first epoch."""
        epoch, position = divmod(n, self.epoch_length)
        if self._plan is None or self._plan[0] != epoch:
            self._plan = (epoch, *self._draw(epoch))
        _, pieces, first, count = self._plan
        part = pieces[first[position] : first[position] + count[position]]
        return epoch, part[self.rank :: self.world_size].tolist()

    def _draw(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Pieces in random order, where in it each batch begins, and how many pieces it has.

        Draws with constant odds while both last: what comes first of processes of constant rates.
        """
        buckets, settings = self.buckets, self.buckets.settings
        rng = np.random.default_rng([self.seed, epoch, 1])
        rows = self.batch_size * self.world_size
        counts = buckets.batches(rows)
        each = rows * buckets.longest // buckets.lengths
        begins = buckets.ends - np.diff(buckets.ends, prepend=0)
        cycles, times, firsts = [], [], []
        pieces = np.concatenate(
            [a + rng.permutation(b - a) for a, b in zip(begins, buckets.ends, strict=True)]
        )
        for i, count in enumerate(counts.tolist()):
            order = np.arange(count)
            cycle = (settings.cycles * (order + rng.random()) // max(count, 1)).astype(np.int64)
            rarity = settings.odds ** np.log2(buckets.lengths[i] / buckets.lengths[0])
            waits = rng.exponential(rarity, count)
            passed = np.cumsum(waits)
            begun = np.searchsorted(cycle, cycle)  # first batch of the same cycle
            times.append(passed - (passed - waits)[begun])
            cycles.append(cycle)
            firsts.append(begins[i] + order * each[i])
        order = np.lexsort((np.concatenate(times), np.concatenate(cycles)))
        return pieces, np.concatenate(firsts)[order], np.repeat(each, counts)[order]
