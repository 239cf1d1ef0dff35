"""Piano rolls: pieces as frames of 88 keys."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from statezoo.datamodules.music.notes import TPQ, Piece

__all__ = ["KEYS", "LOWEST", "Roll", "roll_of_piece", "transposed"]

Roll = NDArray[np.uint8]
"""``[T 88]``: 1 where a key sounds."""

LOWEST, KEYS = 21, 88
"""MIDI number of the first key of a piano, and how many there are."""


def roll_of_piece(piece: Piece, steps_per_quarter: int) -> Roll:
    """The keys that sound when each step begins, drums left out.

    Notes off the grid begin and end at the nearest step and sound for one at least; notes that are
    not on the keyboard are left out. Frames go on to the end of the piece, which may be silent.

    Args:
        piece: Notes.
        steps_per_quarter: Frames per quarter note.
    """
    step = TPQ / steps_per_quarter
    begin = np.floor(piece.onset / step + 0.5).astype(np.int64)
    end = np.maximum(np.floor(piece.end / step + 0.5).astype(np.int64), begin + 1)
    keys = piece.pitch - LOWEST
    used = ~piece.drums & (keys >= 0) & (keys < KEYS)
    steps = max(int(np.ceil(piece.length / step)), int(end[used].max(initial=0)))
    roll = np.zeros((steps, KEYS), dtype=np.uint8)
    for first, last, key in zip(begin[used], end[used], keys[used], strict=True):
        roll[first:last, key] = 1
    return roll


def transposed(roll: Roll, semitones: int) -> Roll:
    """All keys higher by ``semitones``; where a note would leave the keyboard, the same roll."""
    used = np.flatnonzero(roll.any(0))
    if not len(used) or used[0] + semitones < 0 or used[-1] + semitones >= KEYS:
        return roll
    return np.roll(roll, semitones, axis=1)
