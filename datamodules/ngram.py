"""Classical baselines on bytes: what a model must beat before it has learned anything new.

All numbers are bits per byte of the test text, from the training text alone unless said otherwise.
"""

from __future__ import annotations

import gzip
import lzma

import numpy as np
from numpy.typing import NDArray

__all__ = ["KneserNey", "baselines", "gzip_bits", "unigram_entropy", "xz_bits"]

Codes = NDArray[np.uint64]
Floats = NDArray[np.float64]

LARGEST_ORDER = 7  # context and next byte fit 64 bits


def unigram_entropy(text: bytes) -> float:
    """Entropy in bits of the byte frequencies of ``text`` itself; 0 for an empty text."""
    counts = np.bincount(np.frombuffer(text, dtype=np.uint8), minlength=256)
    p = counts[counts > 0] / max(len(text), 1)
    return float(-(p * np.log2(p)).sum()) + 0.0


def xz_bits(test: bytes, train: bytes = b"") -> float:
    """Bits per byte that ``test`` adds to an xz archive (preset 9e) that begins with ``train``."""
    if not test:
        raise ValueError("xz_bits needs at least one byte to compress, got none.")

    def size(text: bytes) -> int:
        return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) if text else 0

    return 8 * (size(train + test) - size(train)) / len(test)


def gzip_bits(text: bytes) -> float:
    """Bits per byte of ``text`` in a gzip archive of its own (level 9).

    Raises:
        ValueError: If it is empty.
    """
    if not text:
        raise ValueError("gzip_bits needs at least one byte to compress, got none.")
    return 8 * len(gzip.compress(text, compresslevel=9, mtime=0)) / len(text)


def _grams(text: NDArray[np.uint8], n: int) -> Codes:
    """``[T]`` code of the ``n`` bytes that end at each position; the text begins after zeros."""
    padded = np.concatenate([np.zeros(n - 1, np.uint8), text]) if n > 1 else text
    codes = np.zeros(len(text), dtype=np.uint64)
    for k in range(n):
        codes = (codes << np.uint64(8)) | padded[k : k + len(text)]
    return codes


def _find(table: Codes, codes: Codes) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Place of each code in a sorted table, and whether it is there."""
    at = np.minimum(np.searchsorted(table, codes), len(table) - 1)
    return at, table[at] == codes


class _Level:
    """Counts of the grams of one length, and of what follows their contexts."""

    def __init__(self, grams: Codes, counts: NDArray[np.int64]) -> None:
        self.grams, self.counts = grams, counts.astype(np.float64)
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        self.discount = once / (once + 2 * twice) if once else 0.5
        self.contexts, where = np.unique(grams >> np.uint64(8), return_inverse=True)
        self.totals = np.bincount(where, weights=self.counts)
        self.kinds = np.bincount(where).astype(np.float64)

    def mix(self, grams: Codes, lower: Floats) -> Floats:
        """Probabilities of ``grams``, given those of their shorter forms."""
        at, seen = _find(self.grams, grams)
        count = np.where(seen, self.counts[at], 0.0)
        at, seen = _find(self.contexts, grams >> np.uint64(8))
        total, kinds = self.totals[at], self.kinds[at]
        p = (np.maximum(count - self.discount, 0.0) + self.discount * kinds * lower) / total
        return np.where(seen, p, lower)


class KneserNey:
    r"""Interpolated Kneser-Ney over bytes, with contexts of up to ``order`` bytes.

    .. math::
        p_k(w \mid c) = \frac{\max(n(cw) - d_k, 0) + d_k\, N(c\,\cdot)\, p_{k-1}(w \mid c')}{n(c)}

    where the longest contexts count occurrences, shorter ones count the distinct bytes before them,
    :math:`N(c\,\cdot)` is the number of distinct bytes after ``c``, ``c'`` lacks the first byte of
    ``c``, :math:`d_k = n_1 / (n_1 + 2 n_2)`, and :math:`p_{-1} = 1/256`.

    Args:
        train: Text to count.
        order: Bytes of context, 0 to 7.

    Source: Kneser and Ney 1995; Chen and Goodman 1999, section 2.7 (interpolated form).
    """

    def __init__(self, train: bytes, order: int) -> None:
        if not 0 <= order <= LARGEST_ORDER:
            raise ValueError(
                f"KneserNey needs an order of 0 to {LARGEST_ORDER} bytes of context, got {order}."
            )
        if not train:
            raise ValueError("KneserNey needs at least one byte to train on, got none.")
        self.order = order
        text = np.frombuffer(train, dtype=np.uint8)
        grams, counts = np.unique(_grams(text, order + 1), return_counts=True)
        self.levels = [_Level(grams, counts)]
        for length in range(order, 0, -1):  # grams of this many bytes
            mask = np.uint64((1 << (8 * length)) - 1)
            grams, counts = np.unique(grams & mask, return_counts=True)
            self.levels.insert(0, _Level(grams, counts))

    def probabilities(self, text: bytes, context: bytes = b"") -> Floats:
        """``[T]`` probability of each byte of ``text`` after ``context`` and the bytes before."""
        codes = _grams(np.frombuffer(context + text, dtype=np.uint8), self.order + 1)
        codes = codes[len(context) :]
        p = np.full(len(codes), 1 / 256)
        for length, level in enumerate(self.levels, start=1):
            p = level.mix(codes & np.uint64((1 << (8 * length)) - 1), p)
        return p

    def bits(self, test: bytes) -> float:
        """Mean bits per byte of ``test``, which begins after zero bytes."""
        if not test:
            raise ValueError("KneserNey.bits needs at least one byte to score, got none.")
        return float(-np.log2(self.probabilities(test)).mean())


def baselines(train: bytes, test: bytes) -> dict[str, float]:
    """Bits per byte of ``test``, by method, from the weakest to the strongest usual one.

    ``unigram_entropy`` is the entropy of the bytes of ``test`` itself; ``kneser_ney_3`` and
    ``kneser_ney_5`` have 3 and 5 bytes of context; ``gzip`` and ``xz`` compress ``test`` alone,
    and ``xz_primed`` counts what it adds to an archive of ``train``.

    Raises:
        ValueError: If ``train`` or ``test`` is empty.
    """
    return {
        "unigram_entropy": unigram_entropy(test),
        "kneser_ney_3": KneserNey(train, 3).bits(test),
        "kneser_ney_5": KneserNey(train, 5).bits(test),
        "gzip": gzip_bits(test),
        "xz": xz_bits(test),
        "xz_primed": xz_bits(test, train),
    }
