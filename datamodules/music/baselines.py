"""What a model of music must beat: frequencies, Markov chains, and holding every voice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["Markov", "repeat_bits", "unigram_bits"]

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]


def _contexts(pieces: Sequence[Ids], order: int, base: int, bos_id: int) -> Ids:
    """``[T]`` number of the ``order`` ids before each one; a piece begins after BOS."""
    found = []
    for ids in pieces:
        padded = np.concatenate([np.full(order, bos_id), ids])
        code = np.zeros(len(ids), dtype=np.int64)
        for back in range(order):
            code = code * base + padded[back : back + len(ids)]
        found.append(code)
    return np.concatenate(found)


def _find(table: Ids, codes: Ids) -> tuple[Ids, NDArray[np.bool_]]:
    at = np.minimum(np.searchsorted(table, codes), len(table) - 1)
    return at, table[at] == codes


class Markov:
    r"""Interpolated Markov chain of ids, Witten-Bell smoothed.

    .. math::
        p_k(w \mid c) = \frac{n(cw) + N(c\,\cdot)\, p_{k-1}(w \mid c')}{n(c) + N(c\,\cdot)}

    where :math:`N(c\,\cdot)` is the number of distinct ids after ``c``, ``c'`` lacks the first id
    of ``c`` and :math:`p_{-1} = 1/W`.

    Args:
        train: Ids of each training piece.
        order: Ids of context.
        vocab_size: ``W``.
        bos_id: What stands before a piece.

    Source: Witten and Bell 1991; Chen and Goodman 1999, section 2.5.
    """

    def __init__(self, train: Sequence[Ids], order: int, vocab_size: int, bos_id: int) -> None:
        if vocab_size ** (order + 1) >= 1 << 63:
            raise ValueError(f"Markov of order {order} over {vocab_size} ids does not fit 64 bits.")
        self.order, self.vocab_size, self.bos_id = order, vocab_size, bos_id
        words = np.concatenate(list(train))
        self.levels = []
        for length in range(order + 1):
            contexts = _contexts(train, length, vocab_size, bos_id)
            grams, counts = np.unique(contexts * vocab_size + words, return_counts=True)
            seen, where = np.unique(grams // vocab_size, return_inverse=True)
            totals = np.bincount(where, weights=counts)
            self.levels.append((grams, counts, seen, totals, np.bincount(where)))

    def probabilities(self, pieces: Sequence[Ids]) -> Floats:
        """``[T]`` probability of each id of ``pieces`` after those before."""
        words = np.concatenate(list(pieces))
        p = np.full(len(words), 1 / self.vocab_size)
        for length, (grams, counts, seen, totals, kinds) in enumerate(self.levels):
            contexts = _contexts(pieces, length, self.vocab_size, self.bos_id)
            at, known = _find(grams, contexts * self.vocab_size + words)
            count = np.where(known, counts[at], 0)
            at, known = _find(seen, contexts)
            mixed = (count + kinds[at] * p) / (totals[at] + kinds[at])
            p = np.where(known, mixed, p)
        return p

    def bits(self, pieces: Sequence[Ids]) -> float:
        """Bits that ``pieces`` need in all."""
        return float(-np.log2(self.probabilities(pieces)).sum())


def _frequencies(train: Sequence[Ids], vocab_size: int) -> Floats:
    counts = np.bincount(np.concatenate(list(train)), minlength=vocab_size) + 0.5
    found: Floats = counts / counts.sum()
    return found


def unigram_bits(train: Sequence[Ids], test: Sequence[Ids], vocab_size: int) -> float:
    """Bits of ``test`` under the frequencies of ids in ``train``, half a count added to each."""
    return float(-np.log2(_frequencies(train, vocab_size))[np.concatenate(list(test))].sum())


def repeat_bits(train: Sequence[Ids], test: Sequence[Ids], vocab_size: int, voices: int) -> float:
    """Bits of ``test`` if each voice repeats its last token, else follows the frequencies.

    How often it repeats is measured on ``train``.

    Args:
        train: Ids of each training piece, ``voices`` tokens a step.
        test: Ids to score.
        vocab_size: Number of ids.
        voices: Tokens per step.
    """
    same = [ids[voices:] == ids[:-voices] for ids in train]
    repeats = np.concatenate(same)
    often = float((repeats.sum() + 0.5) / (len(repeats) + 1))
    frequencies = _frequencies(train, vocab_size)
    total = 0.0
    for ids in test:
        p = frequencies[ids]
        stays = ids[voices:] == ids[:-voices]
        p[voices:] = often * stays + (1 - often) * p[voices:]
        total -= float(np.log2(p).sum())
    return total
