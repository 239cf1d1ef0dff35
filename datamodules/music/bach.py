"""Bach's four-part chorales out of music21's own corpus, without importing music21.

The corpus names several works twice and transposed; what is the same music by its notes counts as
one work here, and works that share music stay on one side of every split.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from statezoo.datamodules.music.musicxml import read_musicxml, unpack
from statezoo.datamodules.music.notes import TPQ, Piece, require

__all__ = ["bach_folder", "fingerprint", "four_parts", "related"]

WINDOW = 16  # quarters


def bach_folder() -> Path:
    """Where music21 keeps its Bach.

    Raises:
        ValueError: If music21 is missing.
    """
    require("music21", "The Bach chorales of Music without a path")
    spec = importlib.util.find_spec("music21")
    places = spec.submodule_search_locations if spec else None
    folder = Path((places or [""])[0]) / "corpus" / "bach"
    if not folder.is_dir():
        raise ValueError(f"music21 is installed without its corpus ({folder}): give a path.")
    return folder


def four_parts(folder: Path) -> Iterator[tuple[str, Piece]]:
    """Name and piece of the scores in four parts of one note at a time, by name."""
    for path in sorted(folder.glob("*.mxl")):
        try:
            piece = read_musicxml(unpack(path.read_bytes()))
        except ValueError:
            continue
        if len(piece.tracks) == 4 and all(_is_line(piece, track) for track in range(4)):
            yield path.stem, piece


def _is_line(piece: Piece, track: int) -> bool:
    """Whether a track has notes, and one at a time."""
    mine = piece.track == track
    return bool(mine.any()) and bool((piece.end[mine][:-1] <= piece.onset[mine][1:]).all())


def fingerprint(piece: Piece) -> frozenset[bytes]:
    """Hashes of all windows of 16 quarters of the outer voices, relative to the first soprano.

    The same music in another key has the same windows.
    """
    quarters = -(-piece.length // TPQ)
    lines = np.full((2, quarters), -1)
    height = [piece.pitch[piece.track == track].mean() for track in range(len(piece.tracks))]
    outer = (int(np.argmax(height)), int(np.argmin(height)))
    for row, track in enumerate(outer):
        mine = piece.track == track
        for onset, end, pitch in zip(
            piece.onset[mine].tolist(), piece.end[mine].tolist(), piece.pitch[mine].tolist(),
            strict=True,
        ):  # fmt: skip
            lines[row, -(-onset // TPQ) : -(-end // TPQ)] = pitch
    size = min(WINDOW, quarters)
    found = set()
    for start in range(quarters - size + 1):
        part = lines[:, start : start + size]
        moved = np.where(part >= 0, part - part[part >= 0].max(initial=0), -999)
        found.add(hashlib.blake2b(moved.tobytes(), digest_size=8).digest())
    return frozenset(found)


def related(prints: list[frozenset[bytes]], share: float) -> list[int]:
    """Group of each piece: those that share more than ``share`` of the windows of the shorter.

    A group is named by its first piece.
    """
    leader = list(range(len(prints)))

    def find(n: int) -> int:
        while leader[n] != n:
            n = leader[n]
        return n

    holders: dict[bytes, list[int]] = {}
    for number, windows in enumerate(prints):
        shared: dict[int, int] = {}
        for window in windows:
            for other in holders.setdefault(window, []):
                shared[other] = shared.get(other, 0) + 1
            holders[window].append(number)
        for other, count in shared.items():
            if count > share * min(len(windows), len(prints[other])):
                first, second = sorted((find(number), find(other)))
                leader[second] = first
    return [find(number) for number in range(len(prints))]
