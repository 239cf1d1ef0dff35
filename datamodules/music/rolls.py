"""Piano rolls: pieces as frames of 88 keys, from the public JSON files or from notes."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from statezoo.datamodules.music.notes import TPQ, Piece

__all__ = [
    "KEYS",
    "LOWEST",
    "Roll",
    "read_splits",
    "roll_of_piece",
    "roll_of_pitches",
    "transposed",
]

Roll = NDArray[np.uint8]
"""``[T 88]``: 1 where a key sounds."""

LOWEST, KEYS = 21, 88
"""MIDI number of the first key of a piano, and how many there are."""

SPLITS = {"train": "train", "val": "valid", "test": "test"}
"""Our names of the splits, and those in the public files."""


def roll_of_pitches(frames: Sequence[Sequence[float]]) -> Roll:
    """A piece from the pitches of each of its frames; pitches below 0 are rests.

    Raises:
        ValueError: If a pitch is not on the keyboard, 21 to 108.
    """
    roll = np.zeros((len(frames), KEYS), dtype=np.uint8)
    for t, frame in enumerate(frames):
        for pitch in frame:
            if pitch < 0:
                continue
            if not LOWEST <= pitch < LOWEST + KEYS:
                raise ValueError(
                    f"frames hold pitches {LOWEST} to {LOWEST + KEYS - 1}, got {pitch} in frame {t}"
                )
            roll[t, int(pitch) - LOWEST] = 1
    return roll


def roll_of_piece(piece: Piece, steps_per_quarter: int) -> Roll:
    """The keys that sound when each step begins, drums left out.

    Notes off the grid begin and end at the nearest step and sound for one at least; notes that are
    not on the keyboard are left out.

    Args:
        piece: Notes.
        steps_per_quarter: Frames per quarter note.
    """
    step = TPQ / steps_per_quarter
    begin = np.floor(piece.onset / step + 0.5).astype(np.int64)
    end = np.maximum(np.floor(piece.end / step + 0.5).astype(np.int64), begin + 1)
    keys = piece.pitch - LOWEST
    used = ~piece.drums & (keys >= 0) & (keys < KEYS)
    roll = np.zeros((int(end[used].max(initial=0)), KEYS), dtype=np.uint8)
    for first, last, key in zip(begin[used], end[used], keys[used], strict=True):
        roll[first:last, key] = 1
    return roll


def transposed(roll: Roll, semitones: int) -> Roll:
    """All keys higher by ``semitones``; where a note would leave the keyboard, the same roll."""
    used = np.flatnonzero(roll.any(0))
    if not len(used) or used[0] + semitones < 0 or used[-1] + semitones >= KEYS:
        return roll
    return np.roll(roll, semitones, axis=1)


def read_splits(path: str | Path) -> dict[str, list[Roll]]:
    """The splits ``train``, ``val``, ``test`` of a public file of frames.

    Such a file is JSON, gzipped or not: ``{"train": [piece, ...], "valid": ..., "test": ...}``,
    a piece being a list of frames and a frame the list of the pitches that sound.

    Raises:
        ValueError: If the file is something else.
        FileNotFoundError: If there is no such file.
    """
    content = _json(Path(path))
    names = sorted(SPLITS.values())
    if not isinstance(content, dict) or sorted(content) != names:
        has = ", ".join(map(str, content)) if isinstance(content, dict) else "no mapping"
        raise ValueError(f"{path} needs the splits {', '.join(names)}, got {has or 'none'}.")
    found = {}
    for ours, theirs in SPLITS.items():
        try:
            found[ours] = [roll_of_pitches(piece) for piece in content[theirs] if piece]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: a piece of {theirs!r} is no list of frames of pitches: {error}"
            ) from error
    return found


def _json(path: Path) -> Any:
    data = path.read_bytes()
    try:
        return json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"{path} is no JSON ({error}); pickled versions of these files run code when they are "
            "read: take the .json."
        ) from error
