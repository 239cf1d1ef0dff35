"""What a source of music yields, and the public JSON files of the JSB chorales."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from statezoo.datamodules.music.notes import TPQ, Piece, TrackInfo
from statezoo.datamodules.music.satb import CHOIR, LOUDNESS, piece_from_grid

__all__ = [
    "SPLIT_NAMES",
    "Chorales",
    "Entry",
    "MusicSource",
    "Skipped",
    "check_piece",
    "music_group",
]

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test",
}  # fmt: skip
TEMPOS = (5.0, 1000.0)
LONGEST = 100_000  # quarters


class Entry(NamedTuple):
    """One piece of a source.

    Attributes:
        name: File it is from, and its number there if it is one of several.
        piece: The music.
        split: ``train``, ``val``, ``test``, or empty where the place says nothing.
        group: Pieces of one group are the same music, in any key.
    """

    name: str
    piece: Piece
    split: str
    group: str


class Skipped(NamedTuple):
    """What was left out, and why."""

    name: str
    reason: str


class MusicSource(Protocol):
    """Something that yields pieces."""

    name: str

    def fingerprint(self) -> str:
        """Hash of the content."""

    def entries(self, skipped: list[Skipped]) -> Iterator[Entry]:
        """Read all pieces, in a fixed order; add to ``skipped`` what is left out."""


def check_piece(piece: Piece) -> None:
    """Raise ValueError where a piece cannot be music."""
    if not len(piece):
        raise ValueError("no notes of more than zero length")
    low, high = TEMPOS
    strange = [qpm for _, qpm in piece.tempos if not low <= qpm <= high]
    if strange:
        raise ValueError(
            f"absurd tempo of {strange[0]:g} quarters per minute, outside {low:g} to {high:g}"
        )
    if piece.length > LONGEST * TPQ:
        raise ValueError(f"lasts {piece.length // TPQ} quarters, more than {LONGEST}")
    if piece.onset.min() < 0:
        raise ValueError("a note begins before the piece does")


def music_group(piece: Piece) -> str:
    """Hash that is the same for the same notes in another key."""
    notes = piece.notes[:, :3].copy()
    notes[:, 0] -= notes[0, 0]
    melodic = ~piece.drums
    notes[melodic, 2] -= notes[melodic, 2].max(initial=0)
    return hashlib.blake2b(notes.tobytes(), digest_size=8).hexdigest()


class Chorales:
    """The public JSON of the JSB chorales: splits, each a list of pieces, each a list of frames.

    A frame is either the pitches of soprano, alto, tenor and bass, -1 for silence, or the set of
    pitches that sound. A step is a sixteenth, or what the file's name says: quarter or 8th.

    Args:
        path: A .json or .json.gz.

    Raises:
        ValueError: If it is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        data = path.read_bytes()
        self.digest = hashlib.sha256(data + path.name.encode()).hexdigest()
        try:
            text = gzip.decompress(data) if path.name.endswith(".gz") else data
            content = json.loads(text)
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(f"{path} is not JSON ({error}).") from error
        known = isinstance(content, dict) and content.keys() & SPLIT_NAMES.keys()
        if not known:
            raise ValueError(
                f"{path} is not a list of chorales: it needs train, valid and test, each a list "
                "of pieces, each a list of frames."
            )
        self.pieces = {name: list(content[name]) for name in content if name in SPLIT_NAMES}
        name = path.name.lower()
        self.step = TPQ if "quarter" in name else TPQ // 2 if "8th" in name else TPQ // 4

    def fingerprint(self) -> str:
        """Hash of content and name."""
        return self.digest

    def entries(self, skipped: list[Skipped]) -> Iterator[Entry]:
        """All pieces, in the order of the file."""
        frames = [frame for pieces in self.pieces.values() for piece in pieces for frame in piece]
        voices = all(isinstance(frame, list) and len(frame) == 4 for frame in frames)
        for name, pieces in self.pieces.items():
            for number, rows in enumerate(pieces):
                where = f"{self.path}#{name}{number}"
                try:
                    piece = self._voices(rows) if voices else self._roll(rows)
                    check_piece(piece)
                except (TypeError, ValueError) as error:
                    skipped.append(Skipped(where, str(error)))
                    continue
                yield Entry(where, piece, SPLIT_NAMES[name], music_group(piece))

    def _voices(self, frames: list[list[int]]) -> Piece:
        return piece_from_grid(np.array(frames, dtype=np.int64).reshape(-1, 4), step=self.step)

    def _roll(self, frames: list[list[int]]) -> Piece:
        roll = np.zeros((len(frames) + 1, 128), dtype=np.int8)
        for time, pitches in enumerate(frames):
            keys = np.array(pitches, dtype=np.int64)
            if ((keys < 0) | (keys > 127)).any():
                raise ValueError(f"a pitch outside 0 to 127 in frame {time}")
            roll[time, keys] = 1
        change = np.diff(roll, axis=0, prepend=0)
        pitch, start = np.nonzero(change.T == 1)
        _, stop = np.nonzero(change.T == -1)
        size, fixed = (stop - start) * self.step, np.full(len(start), LOUDNESS)
        notes = np.stack([start * self.step, size, pitch, fixed, np.zeros_like(start)], axis=1)
        return Piece((TrackInfo("Choir", CHOIR),), notes, length=len(frames) * self.step)
