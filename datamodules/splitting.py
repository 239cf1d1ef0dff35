"""Which text is for training, which for validation, which for test."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from statezoo.datamodules.corpus import SPLITS, RawText

__all__ = ["split_text"]

TRAIN, VAL, TEST = (SPLITS.index(name) for name in ("train", "val", "test"))


def split_text(
    raw: RawText, *, val_fraction: float, test_fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Bounds of pieces of text, and the split of each (an index into ``SPLITS``).

    Documents whose place names a split stay there. Otherwise whole documents drawn by ``seed``
    make up the held-out splits, equal documents on the same side. Where no set of documents comes
    near the wanted size (one document, or few), the end of the longest is held out instead.

    Args:
        raw: The documents.
        val_fraction: Part of the bytes to validate on.
        test_fraction: Part of the bytes to test on; 0 for none.
        seed: Draws the documents.
    """
    bounds, labels = raw.bounds, raw.splits.copy()
    named = set(labels.tolist())
    labels[labels == 0] = TRAIN
    hashes = raw.hashes
    total = int(np.diff(bounds)[labels == TRAIN].sum())
    for split, fraction in ((TEST, test_fraction), (VAL, val_fraction)):
        if split in named or fraction == 0:
            continue
        drawn = _draw(np.diff(bounds), labels, hashes, fraction * total, seed)
        if drawn is not None:
            labels[drawn] = split
            continue
        sizes = np.where(labels == TRAIN, np.diff(bounds), 0)
        longest = int(sizes.argmax())
        start = int(bounds[longest])
        whole = int(sizes[longest])
        keep = whole - total + int(total * (1 - fraction))  # rounds as if cut from the whole
        cut = start + min(max(keep, 1), max(whole - 1, 1))
        while cut > start + 1 and raw.text.array[cut] & 0xC0 == 0x80:  # inside a character
            cut -= 1
        bounds = np.insert(bounds, longest + 1, cut)
        labels = np.insert(labels, longest + 1, split)
        hashes = np.insert(hashes, longest + 1, hashes[longest])
    return bounds, labels


def _draw(
    sizes: NDArray[np.int64],
    labels: NDArray[np.uint8],
    hashes: NDArray[np.uint64],
    target: float,
    seed: int,
) -> NDArray[np.int64] | None:
    """Training documents of about ``target`` bytes together, or None where there are none."""
    free = np.flatnonzero(labels == TRAIN)
    groups, group = np.unique(hashes[free], return_inverse=True)
    weight = np.bincount(group, weights=sizes[free])
    taken, chosen = 0.0, []
    # groups are in the order of their hashes, so adding a file moves few others
    for g in np.random.default_rng(seed).permutation(len(groups)).tolist():
        if taken + weight[g] <= 1.25 * target:
            chosen.append(g)
            taken += weight[g]
        if taken >= 0.9 * target:
            break
    if taken < 0.5 * target:
        return None
    return free[np.isin(group, chosen)]
