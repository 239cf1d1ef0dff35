"""A piece of music as plain numbers: what every reader gives and every tokenizer takes."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from symusic.core import ScoreTick as Score

__all__ = ["TPQ", "Piece", "TrackInfo", "quiet", "require"]

TPQ = 480
"""Ticks per quarter note."""

Notes = NDArray[np.int64]
ONSET, DURATION, PITCH, VELOCITY, TRACK = range(5)


def require(module: str, purpose: str) -> None:
    """Raise ValueError, with the command that helps, where an optional package is absent."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f'{purpose} needs the package {module}: pip install "statezoo[music]".')


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what C code writes to the descriptors of output and error from the terminal."""
    saved = [os.dup(number) for number in (1, 2)]
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nothing, number)
        yield
    finally:
        for number, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        os.close(nothing)


class TrackInfo(NamedTuple):
    """Who plays.

    Attributes:
        name: Name of the track.
        program: General MIDI program, 0 to 127; no meaning for drums.
        is_drum: Whether pitches are drums.
    """

    name: str = ""
    program: int = 0
    is_drum: bool = False


@dataclass(frozen=True, eq=False)
class Piece:
    """Notes with their tracks, tempos and time signatures; times are ticks, 480 per quarter.

    Attributes:
        tracks: Who plays; ``notes`` refer to them by number.
        notes: ``[n 5]`` int64: onset, duration (at least 1), pitch, velocity (1 to 127), track;
            in the order of onset, then track, then pitch.
        tempos: Pairs of tick and quarter notes per minute; without one it is 120.
        time_signatures: Tick, numerator, denominator; without one it is 4/4.
        length: Where the piece ends, at or after the end of its last note.
    """

    tracks: tuple[TrackInfo, ...]
    notes: Notes
    tempos: tuple[tuple[int, float], ...] = ()
    time_signatures: tuple[tuple[int, int, int], ...] = ()
    length: int = 0

    def __post_init__(self) -> None:
        notes = np.asarray(self.notes, dtype=np.int64).reshape(-1, 5)
        order = np.lexsort((notes[:, PITCH], notes[:, TRACK], notes[:, ONSET]))
        object.__setattr__(self, "notes", notes[order])
        object.__setattr__(self, "tracks", tuple(TrackInfo(*track) for track in self.tracks))
        end = int((notes[:, ONSET] + notes[:, DURATION]).max(initial=0))
        object.__setattr__(self, "length", max(self.length, end))
        if len(notes) and not 0 <= notes[:, TRACK].min() <= notes[:, TRACK].max() < len(
            self.tracks
        ):
            raise ValueError(
                f"Piece needs tracks numbered 0 to {len(self.tracks) - 1}, got notes of tracks "
                f"{notes[:, TRACK].min()} to {notes[:, TRACK].max()}."
            )

    def __len__(self) -> int:
        return len(self.notes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Piece):
            return NotImplemented
        mine = (self.tracks, self.tempos, self.time_signatures, self.length)
        its = (other.tracks, other.tempos, other.time_signatures, other.length)
        return mine == its and np.array_equal(self.notes, other.notes)

    @property
    def onset(self) -> Notes:
        """``[n]`` ticks."""
        return self.notes[:, ONSET]

    @property
    def duration(self) -> Notes:
        """``[n]`` ticks."""
        return self.notes[:, DURATION]

    @property
    def end(self) -> Notes:
        """``[n]`` tick at which each note stops."""
        return self.notes[:, ONSET] + self.notes[:, DURATION]

    @property
    def pitch(self) -> Notes:
        """``[n]`` MIDI numbers, 60 is middle C."""
        return self.notes[:, PITCH]

    @property
    def velocity(self) -> Notes:
        """``[n]`` 1 to 127."""
        return self.notes[:, VELOCITY]

    @property
    def track(self) -> Notes:
        """``[n]`` indices into ``tracks``."""
        return self.notes[:, TRACK]

    @property
    def drums(self) -> NDArray[np.bool_]:
        """``[n]`` whether a note is a drum."""
        flags = np.array([track.is_drum for track in self.tracks], dtype=bool)
        return flags[self.track] if len(flags) else np.zeros(len(self), dtype=bool)

    def with_notes(self, notes: Notes, length: int | None = None) -> Piece:
        """The same tracks, tempos and meters with other notes."""
        return replace(self, notes=notes, length=self.length if length is None else length)

    def transposed(self, semitones: int) -> Piece:
        """All notes but drums, higher by ``semitones``; those that leave 0 to 127 are dropped."""
        notes = self.notes.copy()
        notes[~self.drums, PITCH] += semitones
        return self.with_notes(notes[(notes[:, PITCH] >= 0) & (notes[:, PITCH] < 128)])

    def between(self, start: int, stop: int) -> Piece:
        """The notes that begin in ``[start, stop)``, cut at ``stop``, with ``start`` as tick 0."""
        notes = self.notes[(self.onset >= start) & (self.onset < stop)].copy()
        notes[:, DURATION] = np.minimum(notes[:, DURATION], stop - notes[:, ONSET])
        notes[:, ONSET] -= start

        def shifted(changes: Iterable[tuple]) -> tuple:  # type: ignore[type-arg]
            known = [change for change in changes if change[0] < stop]
            before = [change for change in known if change[0] <= start][-1:]
            after = [change for change in known if change[0] > start]
            return tuple((max(change[0] - start, 0), *change[1:]) for change in before + after)

        return Piece(
            self.tracks, notes, shifted(self.tempos), shifted(self.time_signatures), stop - start
        )

    def bars(self, until: int | None = None) -> NDArray[np.int64]:
        """Ticks at which bars begin, the first of them 0, up to the first at or after ``until``.

        A new time signature begins a new bar.

        Args:
            until: Default the length of the piece.
        """
        until = self.length if until is None else until
        marks = sorted(mark for mark in self.time_signatures if mark[0] < max(until, 1))
        changes = [(0, 4, 4), *marks]
        starts = [tick for tick, _, _ in changes[1:]] + [until]
        found: list[int] = []
        for (tick, numerator, denominator), stop in zip(changes, starts, strict=True):
            step = max(4 * TPQ * numerator // denominator, 1)
            found += range(tick, min(stop, until), step)
        last = changes[-1]
        step = max(4 * TPQ * last[1] // last[2], 1)
        beyond = last[0] + -(-max(until - last[0], 0) // step) * step
        return np.array([*found, beyond], dtype=np.int64)

    def seconds(self, ticks: NDArray[np.int64]) -> NDArray[np.float64]:
        """The time of ``ticks`` under the tempos of the piece."""
        changes = [(0, 120.0), *sorted(self.tempos)]
        at = np.array([tick for tick, _ in changes], dtype=np.float64)
        rate = np.array([60 / (qpm * TPQ) for _, qpm in changes])  # seconds per tick
        begin = np.concatenate([[0.0], np.cumsum(np.diff(at) * rate[:-1])])
        part = np.searchsorted(at, ticks, side="right") - 1
        found: NDArray[np.float64] = begin[part] + (ticks - at[part]) * rate[part]
        return found

    def to_score(self) -> Score:
        """The piece as a ``symusic.Score`` of 480 ticks per quarter."""
        require("symusic", "Making MIDI")
        import symusic

        score: Any = symusic.Score(TPQ)
        for number, info in enumerate(self.tracks):
            track: Any = symusic.Track(name=info.name, program=info.program, is_drum=info.is_drum)
            rows = self.notes[self.track == number]
            track.notes = symusic.Note.from_numpy(
                time=rows[:, ONSET].astype(np.int32),
                duration=rows[:, DURATION].astype(np.int32),
                pitch=rows[:, PITCH].astype(np.int8),
                velocity=rows[:, VELOCITY].astype(np.int8),
            )
            score.tracks.append(track)
        for tick, qpm in self.tempos:
            score.tempos.append(symusic.Tempo(tick, qpm))
        for tick, numerator, denominator in self.time_signatures:
            score.time_signatures.append(symusic.TimeSignature(tick, numerator, denominator))
        return score  # type: ignore[no-any-return]

    @classmethod
    def from_score(cls, score: Score) -> Piece:
        """The notes of a ``symusic.Score`` in ticks, whatever its resolution.

        Notes without length are dropped, tracks without notes, and meters of no beats.
        """
        tpq = score.ticks_per_quarter

        def scaled(ticks: NDArray[np.int64]) -> NDArray[np.int64]:
            nearest: NDArray[np.int64] = (ticks * (2 * TPQ) + tpq) // (2 * tpq)
            return nearest

        tracks: list[TrackInfo] = []
        parts = [np.zeros((0, 5), dtype=np.int64)]
        for track in score.tracks:
            columns = {
                name: column.astype(np.int64) for name, column in track.notes.numpy().items()
            }
            sounds = (columns["duration"] > 0) & (columns["velocity"] > 0)
            if not sounds.any():
                continue
            onset = columns["time"]
            begin, end = scaled(onset), scaled(onset + columns["duration"])
            size, number = np.maximum(end - begin, 1), np.full(len(onset), len(tracks))
            rows = (begin, size, columns["pitch"], columns["velocity"], number)
            parts.append(np.stack(rows, axis=1)[sounds])
            tracks.append(TrackInfo(track.name, int(track.program), bool(track.is_drum)))

        def tick(event: Any) -> int:
            return int(scaled(np.array(event.time, dtype=np.int64)))

        return cls(
            tuple(tracks),
            np.concatenate(parts),
            tuple((tick(t), float(t.qpm)) for t in score.tempos),
            tuple(
                (tick(t), int(t.numerator), int(t.denominator))
                for t in score.time_signatures
                if t.numerator > 0 and t.denominator > 0
            ),
        )

    def save_midi(self, path: str | Path) -> None:
        """Write a MIDI file; equal pieces give equal bytes."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.to_score().dump_midi(str(path))
