"""Four voices on a grid of sixteenths: one token for each voice and step, soprano first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from statezoo.datamodules.music.base import BOS, Ids, Mask, MusicTokenizer
from statezoo.datamodules.music.notes import TPQ, Piece, TrackInfo

__all__ = ["STEP", "VOICES", "SatbGrid", "SatbState", "piece_from_grid"]

STEP = TPQ // 4
"""Ticks per sixteenth."""

VOICES = ("Soprano", "Alto", "Tenor", "Bass")
CHOIR = 52  # General MIDI "Choir Aahs"
LOUDNESS = 80
REST = -1


def piece_from_grid(
    grid: NDArray[np.int64], struck: NDArray[np.bool_] | None = None, step: int = STEP
) -> Piece:
    """Notes of a grid of pitches; equal pitches in a row are one note.

    Args:
        grid: ``[T 4]`` pitch of each voice, -1 for none.
        struck: ``[T 4]`` where a note begins although the pitch stays.
        step: Ticks per row.
    """
    rows = []
    for voice in range(grid.shape[1]):
        line = grid[:, voice]
        new = np.diff(line, prepend=-2) != 0
        if struck is not None:
            new |= struck[:, voice]
        starts = np.flatnonzero(new)
        ends = np.append(starts, len(line))[1:]
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            if line[start] >= 0:
                size = (end - start) * step
                rows.append((start * step, size, int(line[start]), LOUDNESS, voice))
    notes = np.array(rows, dtype=np.int64).reshape(-1, 5)
    tracks = tuple(TrackInfo(name, CHOIR) for name in VOICES)
    return Piece(tracks, notes, length=len(grid) * step)


class SatbState(NamedTuple):
    """Where a grid stands.

    Attributes:
        written: Tokens so far; the next belongs to voice ``written % 4``.
        sounding: Whether each voice had a pitch in its last token.
    """

    written: int = 0
    sounding: tuple[bool, bool, bool, bool] = (False, False, False, False)

    @property
    def tick(self) -> int:
        """Begin of the step that the next token belongs to."""
        return self.written // len(VOICES) * STEP

    @property
    def voice(self) -> int:
        """Voice of the next token, 0 for soprano."""
        return self.written % len(VOICES)


class SatbGrid(MusicTokenizer):
    """Serialised grid of sixteenths: soprano, alto, tenor, bass, soprano, ...

    Ids are 0 for a rest, then the pitches from ``low`` to ``high``, then hold (if used), then BOS.
    Without hold, as in the literature, a repeated note and a held one are the same.

    Args:
        hold: Write a note as its pitch and then holds, so that repeated notes are kept.
        low: Lowest pitch.
        high: Highest pitch.

    Source: Huang et al., Music Transformer, arXiv:1809.04281, section 4.1.
    """

    kind = "satb"
    unit = "token"

    def __init__(self, hold: bool = False, low: int = 36, high: int = 81) -> None:
        if not 0 <= low <= high <= 127:
            raise ValueError(f"SatbGrid needs 0 <= low <= high <= 127, got {low} and {high}.")
        self.hold, self.low, self.high = hold, low, high
        pitches = range(low, high + 1)
        self.names = ["Rest_None", *(f"Pitch_{pitch}" for pitch in pitches)]
        self.names += ["Hold_None"] if hold else []
        self.hold_id = len(self.names) - 1 if hold else None
        self.bos_id = len(self.names)
        self.names.append(BOS)
        self.vocab_size = len(self.names)
        self.pitch_of = np.full(self.vocab_size, -1)
        self.pitch_of[1 : 1 + len(pitches)] = pitches
        self.counts = np.ones(self.vocab_size, dtype=np.int64)

    def settings(self) -> dict[str, Any]:
        """Arguments that rebuild it."""
        return {"hold": self.hold, "low": self.low, "high": self.high}

    def encode_piece(self, piece: Piece) -> Ids:
        """``[4 n]`` ids; onsets and ends go to the nearest sixteenth, drums are left out.

        Four tracks of one note at a time are the four voices, in the order of their usual names or
        from high to low. Otherwise voices are the notes that sound, from the highest down.

        Raises:
            ValueError: If more than four notes sound at once, or a pitch is out of range.
        """
        return self.encode_grid(*self.grid(piece))

    def encode_grid(self, grid: NDArray[np.int64], struck: NDArray[np.bool_]) -> Ids:
        """``[4 n]`` ids of ``[n 4]`` pitches, -1 for a rest, and of where notes begin."""
        ids = np.where(grid >= 0, grid - self.low + 1, 0)
        if self.hold_id is not None:
            ids = np.where((grid >= 0) & ~struck, self.hold_id, ids)
        return ids.reshape(-1)

    def grid(self, piece: Piece) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """``[n 4]`` pitch of each voice, -1 for none, and whether a note begins there."""
        notes = piece.notes[~piece.drums]
        outside = notes[(notes[:, 2] < self.low) | (notes[:, 2] > self.high), 2]
        if len(outside):
            raise ValueError(
                f"pitch {outside[0]} is outside the grid's range {self.low} to {self.high}"
            )
        steps = -(-piece.length // STEP)
        start = np.minimum((notes[:, 0] + STEP // 2) // STEP, max(steps - 1, 0))
        stop = np.maximum((notes[:, 0] + notes[:, 1] + STEP // 2) // STEP, start + 1)
        voice = _voices(piece, notes, start, stop)
        grid = np.full((steps, len(VOICES)), REST)
        struck = np.zeros((steps, len(VOICES)), dtype=bool)
        for row, first, last, column in zip(notes, start, stop, voice, strict=True):
            if isinstance(column, np.ndarray):  # one voice for each step
                at = np.arange(first, last)
                grid[at, column] = row[2]
                struck[at, column] = np.diff(column, prepend=-1) != 0
            else:
                grid[first:last, column] = row[2]
                struck[first:last, column] = False
                struck[first, column] = True
        return grid, struck

    def decode_piece(self, ids: Iterable[int]) -> Piece:
        """Four tracks; voices that the last step lacks rest there."""
        known = [i for i in map(int, ids) if 0 <= i < self.bos_id]
        known += [0] * (-len(known) % len(VOICES))
        tokens = np.array(known, dtype=np.int64).reshape(-1, len(VOICES))
        grid = np.where(tokens > 0, tokens - 1 + self.low, REST)
        if self.hold_id is None:
            return piece_from_grid(grid)
        for step in range(len(grid)):
            held = tokens[step] == self.hold_id
            grid[step] = np.where(held, grid[step - 1] if step else REST, grid[step])
        struck = (grid >= 0) & (tokens != self.hold_id)
        return piece_from_grid(grid, struck)

    def start(self) -> SatbState:
        """The state before the first soprano."""
        return SatbState()

    def advance(self, state: SatbState, token: int) -> SatbState:
        """The state after one voice."""
        if token == self.bos_id:
            return state
        sounding = list(state.sounding)
        sounding[state.voice] = token != 0 and (token != self.hold_id or sounding[state.voice])
        return SatbState(state.written + 1, tuple(sounding))  # type: ignore[arg-type]

    def allowed(self, state: SatbState) -> Mask:
        """All but BOS; hold only where the voice sounds."""
        mask = np.ones(self.vocab_size, dtype=bool)
        mask[self.bos_id] = False
        if self.hold_id is not None:
            mask[self.hold_id] = state.sounding[state.voice]
        return mask


def _voices(piece: Piece, notes: Ids, start: Ids, stop: Ids) -> list[Any]:
    """Voice of each note; an array with one for each step where voices follow from pitch."""
    used = np.unique(notes[:, 4]).tolist()
    lines = [np.flatnonzero(notes[:, 4] == track) for track in used]
    ends = notes[:, 0] + notes[:, 1]
    apart = all((notes[line[1:], 0] >= ends[line[:-1]]).all() for line in lines)
    if len(piece.tracks) == len(VOICES) and apart:
        names = tuple(track.name[:1].upper() for track in piece.tracks)
        if names == tuple(name[0] for name in VOICES):
            return list(notes[:, 4].tolist())
        if len(used) == len(VOICES):
            height = [-notes[line, 2].mean() for line in lines]
            place = {used[track]: voice for voice, track in enumerate(np.argsort(height).tolist())}
            return [place[track] for track in notes[:, 4].tolist()]
    if len(used) == 1 and apart:
        return [0] * len(notes)
    sounding: dict[int, list[int]] = {}
    for number, (first, last) in enumerate(zip(start.tolist(), stop.tolist(), strict=True)):
        for step in range(first, last):
            sounding.setdefault(step, []).append(number)
    found: list[list[int]] = [[] for _ in notes]
    for step in sorted(sounding):
        order = sorted(sounding[step], key=lambda number: (-notes[number, 2], number))
        if len(order) > len(VOICES):
            raise ValueError(
                f"{len(order)} notes sound at once in quarter {step // 4 + 1}; "
                "the grid has four voices"
            )
        for voice, number in enumerate(order):
            found[number].append(voice)
    return [np.array(voices) for voices in found]
