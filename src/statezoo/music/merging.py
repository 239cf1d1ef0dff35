"""Events that are given, merged in time order into a sequence that is drawn."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from statezoo.datamodules.music.base import Ids, MusicTokenizer
from statezoo.datamodules.music.notes import Notes, Piece, TrackInfo
from statezoo.music.continuation import TICK
from statezoo.music.decoding import DRUMS, ENDS, ONSETS, TIMES, Row, Rules

if TYPE_CHECKING:
    from statezoo.music.infilling import Task

__all__ = ["Events", "Merge", "encode", "label"]

Mask = NDArray[np.bool_]
Key = tuple[int, int, int]
"""Place among the events of one time: 0 for an end or 1 for a begin, program, pitch."""

LAST = 128


class _Given(NamedTuple):
    """A begin or an end of a note that is given.

    Attributes:
        tick: When.
        key: Its place among the events of that time.
        tail: Tokens after it: velocity, duration.
        loud: The velocity that was set before it; -1 if none.
    """

    tick: int
    key: Key
    tail: tuple[int, ...] = ()
    loud: int = -1


class Merge:
    """What may come next where some notes are given: nothing passes the next of them.

    The model may draw notes of its own up to the next given event, in the order of the tokens
    (time, ends before begins, program, pitch); the given event itself is among what it may draw,
    and when it is drawn, its velocity and duration are forced. An event that the tokens' grid
    cannot reach is passed over.

    Args:
        tokenizer: Whose tokens; without merges.
        ids: ``[T]`` the piece of all given notes.
        start: Tick from which notes are drawn, in the tokens' time.
        end: Tick at which that ends.
        players: Programs that are drawn, -1 for drums; None where tokens name none.
        pitches: Lowest and highest pitch that is drawn; None for all.
    """

    def __init__(
        self,
        tokenizer: MusicTokenizer,
        ids: Ids,
        *,
        start: int,
        end: int,
        players: Collection[int] | None = None,
        pitches: tuple[int, int] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.kinds = [name.partition("_")[0] for name in tokenizer.names]
        values = [name.partition("_")[2] for name in tokenizer.names]
        events = {*ONSETS, *ENDS, "Program"}
        self.value = [int(v) if k in events else 0 for k, v in zip(self.kinds, values, strict=True)]
        self.given = sorted(self._read(ids, start, end))
        self.players, self.pitches = players, pitches
        if players is not None:
            players = {*players, *(_program(given.key) for given in self.given)}
        self.rules = Rules(tokenizer, start=start, end=end, programs=players)
        self._done: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {}

    def _read(self, ids: Ids, start: int, end: int) -> list[_Given]:
        """Begins and ends inside the span."""
        found: list[_Given] = []
        state, loud = self.tokenizer.start(), -1
        timed = self.tokenizer.kind == "performance"
        for token in map(int, ids):
            state = self.tokenizer.advance(state, token)
            kind = self.kinds[token]
            if kind == "Velocity":
                loud = token
            if not start <= state.tick < end:
                continue
            if kind in ONSETS or kind in ENDS:
                found.append(_Given(state.tick, self._key(state, token), (), loud))
            elif found and not timed and kind in ("Velocity", "Duration"):
                found[-1] = found[-1]._replace(tail=(*found[-1].tail, token))
        return found

    def _key(self, state: Any, token: int) -> Key:
        kind = self.kinds[token]
        program = getattr(state, "program", 0)
        return int(kind in ONSETS), LAST if program == DRUMS else program, self.value[token]

    def is_given(self, tick: int, program: int, pitch: int) -> bool:
        """Whether a note that was drawn is one of those that are given."""
        key = (1, LAST if program == DRUMS else program, pitch)
        return any(given.tick == tick and given.key == key for given in self.given)

    def _progress(self, row: Row) -> tuple[int, tuple[int, ...]]:
        """Given events that are written, and the tokens that must follow at once."""
        place: int = 0
        tail: tuple[int, ...] = ()
        if row.ids:
            place, tail = self._done[row.number, len(row.ids) - 1]
            tail, token = tail[1:], row.ids[-1]
            if place < len(self.given) and (
                self.kinds[token] in ONSETS or self.kinds[token] in ENDS
            ):
                given = self.given[place]
                if (given.tick, given.key) == (row.state.tick, self._key(row.state, token)):
                    place, tail = place + 1, given.tail
        while place < len(self.given) and self._is_past(self.given[place], row.state):
            place += 1
        self._done[row.number, len(row.ids)] = place, tail
        return place, tail

    def _is_past(self, given: _Given, state: Any) -> bool:
        """Whether it cannot be written any more: too late, or what it ends does not sound."""
        if given.tick != state.tick or given.key[0]:
            return bool(given.tick < state.tick)
        return given.key[1:] not in {_sounding(note) for note in state.active}

    def forced(self, row: Row) -> int | None:
        """The velocity or duration of a given note that has just begun."""
        tail = self._progress(row)[1]
        return tail[0] if tail else None

    def __call__(self, row: Row) -> Mask:
        """``[W]`` which tokens may come next in a row."""
        place, tail = self._progress(row)
        base = self.rules(row)
        if tail:
            return base
        state = row.state
        head = self.given[place] if place < len(self.given) else None
        due = head is not None and head.tick == state.tick
        limit = self._limit(state, place) if due else None
        mask = base.copy()
        for token in np.flatnonzero(base).tolist():
            kind = self.kinds[token]
            if kind in TIMES and head is not None:
                mask[token] = self.tokenizer.advance(state, token).tick <= head.tick
            elif kind == "Velocity" and limit is not None:
                mask[token] = limit[0] == 1  # of a note-on that follows, in performance events
            elif kind == "Program":
                mask[token] = self._may_play(self.value[token], head if due else None, limit)
            elif kind in ONSETS or kind in ENDS:
                key = self._key(state, token)
                if due and head is not None and key == head.key:
                    wrong = self.tokenizer.kind == "performance" and kind in ONSETS
                    mask[token] = key == limit and not (wrong and state.last != head.loud)
                else:
                    mask[token] = (limit is None or key <= limit) and self._own(key, place)
        last = self.kinds[row.ids[-1]] if row.ids else ""
        halfway = last == "Program" or (last == "Velocity" and self.tokenizer.kind == "performance")
        return mask if mask.any() or halfway else base

    def _limit(self, state: Any, place: int) -> Key:
        """What comes first now: the next given event, or the end of a drawn note in its way."""
        now = [given.key for given in self.given[place:] if given.tick == state.tick]
        sounding = {_sounding(note) for note in getattr(state, "active", ())}
        ends = [(0, *key[1:]) for key in now if key[0] and key[1:] in sounding]
        return min([now[0], *ends])

    def _may_play(self, program: int, head: _Given | None, limit: Key | None) -> bool:
        order = LAST if program == DRUMS else program
        mine = self.players is None or program in self.players
        return (mine or (head is not None and head.key[1] == order)) and (
            limit is None or order <= limit[1]
        )

    def _own(self, key: Key, place: int) -> bool:
        """Whether a begin or end may be one of the model's own notes."""
        if key[0] == 0:  # the end of a given note comes at its own time
            for given in self.given[place:]:
                if given.key[1:] == key[1:]:
                    return given.key[0] == 1
            return not self._rings_on(key, place)
        if self.players is not None and _program(key) not in self.players:
            return False
        return self.pitches is None or self.pitches[0] <= key[2] <= self.pitches[1]

    def _rings_on(self, key: Key, place: int) -> bool:
        """Whether a given note that has begun lasts past the span."""
        before = [given.key[0] for given in self.given[:place] if given.key[1:] == key[1:]]
        return bool(before) and before[-1] == 1


def _program(key: Key) -> int:
    return DRUMS if key[1] == LAST else key[1]


def _sounding(note: tuple[int, ...]) -> tuple[int, int]:
    """Program and pitch of a state's sounding note."""
    program, pitch = (0, note[0]) if len(note) == 2 else note[:2]
    return LAST if program == DRUMS else program, pitch


def label(number: int, info: TrackInfo) -> str:
    """A track as messages name it."""
    player = "drums" if info.is_drum else f"program {info.program}"
    return f"{number + 1} ({info.name.strip() or player})"


def encode(tokenizer: MusicTokenizer, piece: Piece) -> Ids:
    """``[T]`` ids of a piece; ValueError where the tokens cannot write it."""
    try:
        return tokenizer.encode_piece(piece)
    except ValueError as error:
        raise ValueError(
            f"the file cannot be written in the model's {tokenizer.kind} tokens: it {error}."
        ) from error


class Events:
    """Events in time: the model goes on from the span's start as the masked instruments.

    Args:
        tokenizer: Whose tokens.
        task: What to write.
    """

    def __init__(self, tokenizer: MusicTokenizer, task: Task) -> None:
        self.tokenizer, self.task = tokenizer, task
        self.players = [_player(info) for info in task.whole.tracks]
        named = bool(getattr(tokenizer, "programs", False))
        melodic = task.whole.notes[np.isin(task.whole.track, task.masked)]
        if not named:
            self._check_drums()
        self.named = named
        self.mean = {i: melodic[melodic[:, 4] == i, 2].mean() for i in task.masked}
        pitches = (int(melodic[:, 2].min()), int(melodic[:, 2].max()))
        self.start, self.end = self.time(task.start), self.time(task.end)
        self.end = max(self.end, self.start + 1)
        self.prompt = self._prompt(self.encode(task.whole))
        players = {self.players[i] for i in task.masked} if named else None
        compass = None if named else pitches
        span = {"start": self.start, "end": self.end}
        self.merge: Merge | None = None
        self.allowed: Callable[[Row], Mask]
        if getattr(tokenizer, "bpe", None) is None:
            self.merge = Merge(tokenizer, self._given(), players=players, pitches=compass, **span)
            self.allowed = self.merge
        else:
            self.allowed = Rules(tokenizer, programs=players, pitches=compass, **span)

    def _given(self) -> Ids:
        """``[T]`` the notes that are kept; none where the tokens leave all of them out."""
        kept = self.task.kept
        written = ~kept.drums | self.named
        return self.encode(kept) if written.any() else np.zeros(0, dtype=np.int64)

    def forced(self, row: Row) -> int | None:
        """What belongs to a kept note that has just begun."""
        return None if self.merge is None else self.merge.forced(row)

    def _check_drums(self) -> None:
        tracks = self.task.whole.tracks
        drums = [label(i, tracks[i]) for i in self.task.masked if tracks[i].is_drum]
        if drums:
            raise ValueError(
                f"track {', '.join(drums)} has drums, which the model's {self.tokenizer.kind} "
                "tokens leave out: train with --data.programs true, or choose other tracks."
            )

    def time(self, tick: int) -> int:
        """A tick of a piece in the tokens' time: milliseconds for performance events."""
        if self.tokenizer.kind != "performance":
            return tick
        seconds = self.task.whole.seconds(np.array([tick]))[0]
        return int(np.rint(seconds * 1000 / TICK)) * TICK

    def encode(self, piece: Piece) -> Ids:
        """``[T]`` ids."""
        return encode(self.tokenizer, piece)

    def _prompt(self, ids: Ids) -> Ids:
        """What comes before the span, and the span's meter, if it stands first."""
        state = self.tokenizer.start()
        for place, token in enumerate(ids.tolist()):
            state = self.tokenizer.advance(state, token)
            kinds = {part.partition("_")[0] for part in self.tokenizer.names[token].split("+")}
            if state.tick > self.start or (
                state.tick == self.start and not kinds <= {"Bar", "TimeSig"}
            ):
                return ids[:place]
        return ids

    def notes(self, row: Row) -> Notes:
        """``[n 5]`` what was drawn, in the file's time and tracks."""
        piece = self.tokenizer.decode_piece([*self.prompt.tolist(), *row.ids])
        begun = (piece.onset >= self.start) & (piece.onset < self.end)
        players = [_player(info) if self.named else 0 for info in piece.tracks]
        if self.merge is not None:
            begun &= [
                not self.merge.is_given(n[0], players[n[4]], n[2]) for n in piece.notes.tolist()
            ]
        notes = piece.notes[begun].copy()
        if self.tokenizer.kind == "performance":
            ticks = np.arange(self.task.start, self.task.end + 1)
            at = self.task.whole.seconds(ticks) * 1000
            bounds = np.stack([notes[:, 0], notes[:, 0] + notes[:, 1]])
            bounds = np.rint(np.interp(bounds, at, ticks)).astype(np.int64)
            notes[:, 0], notes[:, 1] = bounds[0], np.maximum(bounds[1] - bounds[0], 1)
        for note in notes:
            mine = [
                i for i in self.task.masked if not self.named or self.players[i] == players[note[4]]
            ]
            note[4] = min(mine, key=lambda i: abs(self.mean[i] - note[2])) if mine else -1
        return notes


def _player(info: TrackInfo) -> int:
    return DRUMS if info.is_drum else info.program
