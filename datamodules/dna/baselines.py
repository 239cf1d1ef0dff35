"""What counting alone reaches on DNA: fixed orders, and a mixture of many.

All counts are of the training bases and of their reverse complement. Numbers are bits per base.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["ORDERS", "Counts", "baselines", "keys_of", "order_bits", "other_strand"]

ORDERS = (1, 3, 6, 8, 12)
LONGEST = 26
"""Bases of context that, with the base after them, fit 64 bits in base 5."""

N = 4

Codes = NDArray[np.uint8]
Keys = NDArray[np.int64]


def other_strand(codes: Codes) -> Codes:
    """Codes of the reverse complement."""
    return np.where(codes < N, 3 - codes, N)[::-1].astype(np.uint8)


def keys_of(part: Codes) -> Keys:
    """``[n]`` number in base 5 of each base with its context, the nearest base first.

    The digits are the ``LONGEST`` letters before the base, from the last to the first, and the base
    itself; N, and what is before the piece, is 4. Sorting the numbers sorts the contexts of every
    order at once. Letters N have no number.
    """
    padded = np.concatenate([np.full(LONGEST, N, np.uint8), part])
    keys = np.zeros(len(part), dtype=np.int64)
    for back in (*range(1, LONGEST + 1), 0):
        keys *= 5
        keys += padded[LONGEST - back : len(padded) - back]
    return keys[part < N]


class Counts:
    """How often each base follows each context, of every order, on either strand.

    Args:
        parts: ``[T]`` codes 0 to 3 of pieces of training sequence, 4 for N.
    """

    def __init__(self, parts: Sequence[Codes]) -> None:
        strands = (strand for part in parts for strand in (part, other_strand(part)))
        self.keys = np.concatenate([np.zeros(0, np.int64), *map(keys_of, strands)])
        self.keys.sort()
        bases = self.keys % 5
        self.before = np.zeros((4, len(bases) + 1), dtype=np.int32)
        for base in range(4):
            np.cumsum(bases == base, out=self.before[base, 1:])

    def of(self, keys: Keys, order: int) -> NDArray[np.int64]:
        """``[n 4]`` counts of the bases after the last ``order`` letters before each key's base.

        Zero where one of these letters is N or before the piece.
        """
        width = 5 ** (LONGEST + 1 - order)
        context = keys // width
        unknown = np.zeros(len(keys), dtype=np.bool_)
        digits = context.copy()
        for _ in range(order):
            unknown |= digits % 5 == N
            digits //= 5
        low = np.searchsorted(self.keys, context * width)
        # written without context + 1, which may pass 64 bits
        high = np.searchsorted(self.keys, context * width + (width - 1), side="right")
        high = np.where(unknown, low, high)
        return (self.before[:, high] - self.before[:, low]).T.astype(np.int64)


def order_bits(counts: Counts, keys: Keys, order: int) -> float:
    r"""Bits per base of one order, :math:`p = (n(cb) + 1) / (n(c) + 4)`.

    Args:
        counts: Counts of the training sequence.
        keys: ``keys_of`` the test sequence.
        order: Bases of context, 0 to 26.

    Raises:
        ValueError: If ``order`` is out of range.
    """
    if not 0 <= order <= LONGEST:
        raise ValueError(f"order_bits needs an order of 0 to {LONGEST}, got {order}.")
    n = counts.of(keys, order)
    hits = np.take_along_axis(n, (keys % 5)[:, None], axis=1)[:, 0]
    return float(-np.log2((hits + 1) / (n.sum(axis=1) + 4)).mean())


def baselines(train: Sequence[Codes], test: Sequence[Codes]) -> dict[str, float]:
    """Bits per base of ``test``: ``order_1`` to ``order_12``, and the ``mixture`` of many orders.

    Args:
        train: Pieces of codes 0 to 3, 4 for N.
        test: The same; each piece begins without context, N is not scored.

    Raises:
        ValueError: If ``train`` or ``test`` has no base.
    """
    from statezoo.datamodules.dna.mixture import mixture_bits

    keys = np.concatenate([np.zeros(0, np.int64), *map(keys_of, test)])
    keys.sort()  # the mean does not mind, and neighbours are found faster
    counts = Counts(train)
    if not (len(counts.keys) and len(keys)):
        raise ValueError("baselines needs bases to train and to test on, got none.")
    found = {f"order_{order}": order_bits(counts, keys, order) for order in ORDERS}
    return found | {"mixture": mixture_bits(train, counts, keys)}
