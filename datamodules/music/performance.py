"""Performances as MIDI events in time, without bars or beats."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from statezoo.datamodules.music.base import BOS, Ids, Mask, MusicTokenizer
from statezoo.datamodules.music.notes import Piece, TrackInfo

__all__ = ["Performance", "PerformanceState"]

ON, OFF, SHIFT, VELOCITY, EVENTS = 0, 128, 256, 356, 388
STEPS_PER_SECOND = 100
LONGEST_SHIFT = 100
VELOCITIES = 32
TEMPO = 125.0  # quarter notes per minute: a tick of a decoded piece is a millisecond
STEP = 10  # ticks


class PerformanceState(NamedTuple):
    """Where a performance stands.

    Attributes:
        step: Time in steps of 10 ms.
        active: Pitch and begin, in steps, of the notes that sound.
        last: The token before; -1 at the beginning.
        loud: Whether a velocity was set.
    """

    step: int = 0
    active: tuple[tuple[int, int], ...] = ()
    last: int = -1
    loud: bool = False

    @property
    def tick(self) -> int:
        """Time in milliseconds, which are the ticks of a decoded piece."""
        return self.step * STEP


class Performance(MusicTokenizer):
    """388 events: 128 note-ons, 128 note-offs, 100 time shifts of 10 ms to 1 s, 32 velocities.

    One instrument: drums are left out, other tracks become one. A note that begins again while it
    sounds is ended before; equal notes at the same time are one. The sustain pedal is not read.
    Times are those of the piece's tempos, to the nearest 10 ms; a decoded piece has 125 quarters
    per minute, so its beats mean nothing.

    Source: Huang et al., Music Transformer, arXiv:1809.04281, section 4.2; Oore et al.,
    arXiv:1808.03715, section 3.
    """

    kind = "performance"
    unit = "note"
    bos_id = EVENTS
    vocab_size = EVENTS + 1

    def __init__(self) -> None:
        self.names = [
            *(f"NoteOn_{pitch}" for pitch in range(128)),
            *(f"NoteOff_{pitch}" for pitch in range(128)),
            *(f"TimeShift_{10 * n}ms" for n in range(1, LONGEST_SHIFT + 1)),
            *(f"Velocity_{4 * n + 2}" for n in range(VELOCITIES)),
            BOS,
        ]
        self.pitch_of = np.full(self.vocab_size, -1)
        self.pitch_of[:SHIFT] = np.tile(np.arange(128), 2)
        self.counts = np.zeros(self.vocab_size, dtype=np.int64)
        self.counts[:OFF] = 1

    def settings(self) -> dict[str, Any]:
        """There is nothing to set."""
        return {}

    def encode_piece(self, piece: Piece) -> Ids:
        """``[T]`` ids: at each time the note-offs, then the note-ons from low to high.

        Raises:
            ValueError: If the piece has nothing but drums.
        """
        notes = piece.notes[~piece.drums]
        if not len(notes):
            raise ValueError("has nothing but drums, which performance events leave out")
        times = piece.seconds(np.stack([notes[:, 0], notes[:, 0] + notes[:, 1]]))
        begin, end = np.rint(times * STEPS_PER_SECOND).astype(np.int64)
        end = np.maximum(end, begin + 1)
        order = np.lexsort((-end, begin, notes[:, 2]))
        begin, end, notes = begin[order], end[order], notes[order]
        same = np.diff(notes[:, 2]) == 0
        keep = np.concatenate([[True], ~(same & (np.diff(begin) == 0))])
        begin, end, notes = begin[keep], end[keep], notes[keep]
        same = np.diff(notes[:, 2]) == 0
        end[:-1] = np.where(same, np.minimum(end[:-1], begin[1:]), end[:-1])

        pitch, loud = notes[:, 2], notes[:, 3] // 4
        time = np.concatenate([end, begin])
        starts = np.repeat([0, 1], len(notes))
        order = np.lexsort((np.tile(pitch, 2), starts, time))
        ids: list[int] = []
        now, level = 0, -1
        columns = (time, starts, np.tile(pitch, 2), np.tile(loud, 2))
        for at, on, key, force in zip(*(c[order].tolist() for c in columns), strict=True):
            while now < at:
                shift = min(at - now, LONGEST_SHIFT)
                ids.append(SHIFT + shift - 1)
                now += shift
            if on and force != level:
                level = force
                ids.append(VELOCITY + level)
            ids.append((ON if on else OFF) + key)
        return np.array(ids, dtype=np.int64)

    def decode_piece(self, ids: Iterable[int]) -> Piece:
        """A piano track; notes that are not ended last to the end."""
        now, level = 0, 16
        active: dict[int, tuple[int, int]] = {}
        rows: list[tuple[int, int, int, int, int]] = []

        def close(pitch: int) -> None:
            begin, force = active.pop(pitch)
            if now > begin:
                rows.append((begin * STEP, (now - begin) * STEP, pitch, force, 0))

        for token in map(int, ids):
            if ON <= token < OFF:
                if token in active:
                    close(token)
                active[token] = (now, 4 * level + 2)
            elif OFF <= token < SHIFT and token - OFF in active:
                close(token - OFF)
            elif SHIFT <= token < VELOCITY:
                now += token - SHIFT + 1
            elif VELOCITY <= token < EVENTS:
                level = token - VELOCITY
        for pitch in list(active):
            close(pitch)
        notes = np.array(rows, dtype=np.int64).reshape(-1, 5)
        return Piece((TrackInfo("Piano"),), notes, tempos=((0, TEMPO),), length=now * STEP)

    def start(self) -> PerformanceState:
        """Silence."""
        return PerformanceState()

    def advance(self, state: PerformanceState, token: int) -> PerformanceState:
        """The state after one event."""
        step, active, loud = state.step, state.active, state.loud
        if token < OFF:
            active = (*(note for note in active if note[0] != token), (token, step))
        elif token < SHIFT:
            active = tuple(note for note in active if note[0] != token - OFF)
        elif token < VELOCITY:
            step += token - SHIFT + 1
        elif token < EVENTS:
            loud = True
        else:
            return state
        return PerformanceState(step, active, token, loud)

    def allowed(self, state: PerformanceState) -> Mask:
        """Events in the order in which ``encode_piece`` writes them.

        A velocity is followed by a note-on; only what sounds, and began before, ends; notes begin
        from low to high; a shift follows another one only if that was the longest.
        """
        mask = np.zeros(self.vocab_size, dtype=bool)
        sounding = [pitch for pitch, _ in state.active]
        began = [pitch for pitch, begin in state.active if begin == state.step]
        if state.loud:
            mask[max(began, default=-1) + 1 : OFF] = True
            mask[sounding] = False
        after_velocity = VELOCITY <= state.last < EVENTS
        if after_velocity and mask.any():
            return mask
        if not began:
            lowest = state.last + 1 if OFF <= state.last < SHIFT else OFF
            ends = np.array([OFF + p for p in sounding], dtype=np.int64)
            mask[ends[ends >= lowest]] = True
        mask[VELOCITY:EVENTS] = not after_velocity and max(began, default=-1) < 127
        if not SHIFT <= state.last < VELOCITY - 1:
            mask[SHIFT:VELOCITY] = True
        return mask

    def _change_velocity(self, table: Ids, velocity: int) -> None:
        moved = np.arange(VELOCITIES) + round(velocity / 4)
        table[VELOCITY:EVENTS] = VELOCITY + np.clip(moved, 0, VELOCITIES - 1)

    def _change_tempo(self, table: Ids, tempo: float) -> None:
        """The longest shift stays: it is the part of a longer time whose rest follows."""
        moved = np.rint(np.arange(1, LONGEST_SHIFT) / tempo).astype(np.int64)
        table[SHIFT : VELOCITY - 1] = SHIFT - 1 + np.clip(moved, 1, LONGEST_SHIFT)
