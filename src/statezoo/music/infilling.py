"""Bars of some tracks written anew, between the bars before and after and beside the others."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from statezoo.datamodules.music.base import Ids
from statezoo.datamodules.music.notes import TPQ, Notes, Piece, TrackInfo
from statezoo.datamodules.music.satb import STEP, VOICES, SatbGrid
from statezoo.music.continuation import apart, open_score
from statezoo.music.decoding import Row, Rules, Sampling, open_model, sample, score
from statezoo.music.harmony import RANGES
from statezoo.music.merging import Events, encode, label
from statezoo.music.spans import bar_span

__all__ = ["Task", "find_task", "infill"]

AFTER_BARS = 4
"""Bars after the span whose likelihood counts, too, when candidates are compared."""


class Task(NamedTuple):
    """What to write anew.

    Attributes:
        score: The file without the notes that are replaced, in its own ticks.
        places: Which track of the score each track of the pieces is.
        whole: The file as it was.
        kept: The score as a piece.
        masked: Tracks of the pieces to write.
        start: Where the span begins, in ticks of a piece.
        end: Where it ends.
        until: Up to where candidates are compared.
    """

    score: Any
    places: list[int]
    whole: Piece
    kept: Piece
    masked: list[int]
    start: int
    end: int
    until: int

    def own(self, tick: int) -> int:
        """A tick of a piece as one of the file."""
        return round(tick * int(self.score.ticks_per_quarter) / TPQ)

    def view(self, filled: Any) -> Piece:
        """A score as a piece with the tracks of ``whole``, whether they have notes or not."""
        piece, places = Piece.from_score(filled), _sounding(filled)
        notes = piece.notes.copy()
        numbers = np.array([self.places.index(place) for place in places], dtype=np.int64)
        notes[:, 4] = numbers[notes[:, 4]]
        return self.whole.with_notes(notes)


def infill(
    model: Any,
    song: Any,
    *,
    tracks: str,
    bars: str,
    n: int = 8,
    sampling: Sampling = Sampling(),  # noqa: B008  # immutable
    device: str = "cpu",
) -> Any:
    """Write some bars of some tracks anew: the likeliest of several drawn candidates.

    All notes that begin outside the bars, or in other tracks, stay as they are in the file. New
    notes begin and end within the bars. A candidate is as likely as the model finds the filled
    piece from the first of the bars to four bars after the last, together with the other tracks.

    What the model knows while it writes is all that comes before, and of the kept notes inside the
    span those whose turn in time has come; what comes later takes part only in the choice between
    candidates. With satb tokens new notes stay in their voice's range. All others draw up to the
    next kept note and read it in its place; merged tokens (BPE) cannot, and write the masked
    instruments alone. Tokens without programs do not tell instruments apart: new notes then stay
    between the lowest and the highest pitch that the masked tracks have in the file, and each goes
    to the masked track whose mean pitch is nearest.

    Args:
        model: Checkpoint, run's folder, exported folder or Hub name; or network and tokenizer.
        song: File of music, ``symusic.Score`` or ``Piece``; satb tokens need four voices.
        tracks: Numbers, from 1, or names of tracks with notes, such as ``1,Bass``.
        bars: First and last bar, from 1, such as ``9:12``.
        n: Candidates to choose from.
        sampling: Temperature, top-p, top-k and seed.
        device: Where to run.

    Returns:
        A ``symusic.Score``, in the ticks of the file.

    Raises:
        ValueError: If there are no such tracks or bars, or the model's tokens cannot write them.
    """
    sampling.check()
    if n < 1:
        raise ValueError(f"infill needs n of at least 1, got {n}.")
    task = find_task(open_score(song), tracks, bars)
    net, tokenizer = open_model(model, "music infill", device)
    work: _Voices | Events
    work = _Voices(tokenizer, task) if isinstance(tokenizer, SatbGrid) else Events(tokenizer, task)
    rows = sample(
        net,
        tokenizer,
        work.prompt,
        rows=n,
        end=work.end,
        allowed=work.allowed,
        sampling=sampling,
        forced=work.forced,
    )
    filled = [_paste(task, work.notes(row)) for row in rows]
    if n == 1:
        return filled[0]
    return filled[int(np.argmax([_likelihood(net, work, task, one) for one in filled]))]


# ------------------------------------------------------------------------ the task


def _sounding(given: Any) -> list[int]:
    """Tracks with notes that last: those of ``Piece.from_score``."""
    return [
        place
        for place, track in enumerate(given.tracks)
        if any(note.duration > 0 and note.velocity > 0 for note in track.notes)
    ]


def find_task(given: Any, tracks: str, bars: str) -> Task:
    """What a score and the user's tracks and bars ask for.

    Raises:
        ValueError: If there are no such tracks or bars, or no notes.
    """
    whole = Piece.from_score(given)
    if not len(whole):
        raise ValueError("the file has no notes.")
    masked = _find_tracks(whole, tracks)
    starts = whole.bars()
    first, last = bar_span(bars, len(starts) - 1)
    start, end = int(starts[first - 1]), int(starts[last])
    after = last + AFTER_BARS
    until = int(starts[after]) if after < len(starts) else int(starts[-1]) + 1
    kept: Any = given.copy()
    task = Task(kept, _sounding(given), whole, whole, masked, start, end, until)
    begin, stop = task.own(start), task.own(end)
    for number in masked:
        track = kept.tracks[task.places[number]]
        track.notes = [note for note in track.notes if not begin <= note.time < stop]
    return task._replace(kept=task.view(kept))


def _find_tracks(piece: Piece, text: str) -> list[int]:
    """Tracks by number or name."""
    found: set[int] = set()
    for part in (part.strip() for part in text.split(",")):
        named = {i for i, info in enumerate(piece.tracks) if part and info.name.strip() == part}
        if not named and part.isdecimal() and 1 <= int(part) <= len(piece.tracks):
            named = {int(part) - 1}
        if not named:
            there = [label(i, info) for i, info in enumerate(piece.tracks)]
            raise ValueError(f"there is no track {part!r}; the file has {', '.join(there)}.")
        found |= named
    return sorted(found)


def _paste(task: Task, notes: Notes) -> Any:
    """The file with new notes, ``[n 5]`` as those of a piece."""
    import symusic

    filled: Any = task.score.copy()
    begin, stop = task.own(task.start), task.own(task.end)
    rows = notes.copy()
    bounds = np.stack([notes[:, 0], notes[:, 0] + notes[:, 1]])
    bounds = np.rint(bounds * int(filled.ticks_per_quarter) / TPQ).astype(np.int64)
    rows[:, 0] = np.maximum(bounds[0], begin)
    rows[:, 1] = np.maximum(np.minimum(bounds[1], stop) - rows[:, 0], 1)
    for number in task.masked:
        track = filled.tracks[task.places[number]]
        new = rows[(rows[:, 4] == number) & (rows[:, 0] < stop)]
        before = [note for note in track.notes if note.time < begin]
        for row in apart(new, before).tolist() if len(new) else ():
            track.notes.append(symusic.Note(*row[:4]))
        track.notes = sorted(track.notes, key=lambda note: note.time)
    return filled


def _likelihood(net: Any, work: _Voices | Events, task: Task, filled: Any) -> float:
    """Nats of the filled piece from the span on; ``-inf`` if nothing new is in it."""
    piece = task.view(filled)
    if len(piece) == len(task.kept):
        return -np.inf
    ids = work.encode(piece)
    state, ticks = work.tokenizer.start(), []
    for token in ids.tolist():
        state = work.tokenizer.advance(state, token)
        ticks.append(state.tick)
    until = work.time(task.until)
    ids = ids[: np.searchsorted(ticks, until)]
    first = int(np.searchsorted(ticks, work.time(task.start)))
    return float(score(net, work.tokenizer, ids)[first:].sum())


# ------------------------------------------------------------------------ four voices


class _Voices:
    """Four voices on a grid: kept ones are forced, masked ones are drawn.

    Args:
        tokenizer: Whose tokens.
        task: What to write.
    """

    def __init__(self, tokenizer: SatbGrid, task: Task) -> None:
        self.tokenizer, self.task = tokenizer, task
        self.order = _voice_order(task.whole)
        self.encode(task.whole)  # raises before anything is drawn
        start, self.end = self.time(task.start), self.time(task.end)
        length = max(task.whole.length, self.end)
        tokens = self.encode(task.kept.with_notes(task.kept.notes, length))
        self.grid = tokens.reshape(-1, len(VOICES))
        self.first = start // STEP
        self.prompt = self.grid[: self.first].reshape(-1)
        self.free = np.zeros(self.grid.shape, dtype=bool)
        voices = [self.order[track] for track in task.masked]
        self.free[self.first : self.end // STEP, voices] = True
        self.free &= self.grid == 0
        self.rules = Rules(tokenizer, start=start, end=self.end)

    def time(self, tick: int) -> int:
        """The first sixteenth at or after a tick."""
        return -(-tick // STEP) * STEP

    def encode(self, piece: Piece) -> Ids:
        """``[4 n]`` ids, each track in its voice."""
        notes = piece.notes.copy()
        notes[:, 4] = np.array(self.order)[notes[:, 4]]
        tracks = tuple(TrackInfo(name) for name in VOICES)
        return encode(self.tokenizer, Piece(tracks, notes, length=piece.length))

    def forced(self, row: Row) -> int | None:
        """The token of a voice that is kept; None where one is to be drawn."""
        step, voice = divmod(row.state.written, len(VOICES))
        return None if self.free[step, voice] else int(self.grid[step, voice])

    def allowed(self, row: Row) -> NDArray[np.bool_]:
        """``[W]`` tokens in the voice's range; no hold after a note that is kept."""
        mask = self.rules(row)
        step, voice = divmod(row.state.written, len(VOICES))
        low, high = RANGES[voice]
        pitch = self.tokenizer.pitch_of
        mask &= (pitch < 0) | ((pitch >= low) & (pitch <= high))
        if self.tokenizer.hold_id is not None and not (step and self.free[step - 1, voice]):
            mask[self.tokenizer.hold_id] = False
        return mask

    def notes(self, row: Row) -> Notes:
        """``[n 5]`` what was drawn, in the file's time and tracks."""
        tokens = np.array(row.ids, dtype=np.int64).reshape(-1, len(VOICES))
        tokens = np.where(self.free[self.first : self.first + len(tokens)], tokens, 0)
        notes = self.tokenizer.decode_piece(tokens.reshape(-1).tolist()).notes.copy()
        notes[:, 4] = np.argsort(self.order)[notes[:, 4]]
        notes[:, 0] += self.first * STEP
        kept = self.task.kept
        for note in notes:  # a kept note may end within a sixteenth
            mine = (kept.track == note[4]) & (kept.onset < note[0])
            late = max(int(kept.end[mine].max(initial=0)) - int(note[0]), 0)
            note[:2] += (late, -late)
        return notes[notes[:, 1] > 0]


def _voice_order(piece: Piece) -> list[int]:
    """Voice of each track, by name or from high to low."""
    names = [info.name[:1].upper() for info in piece.tracks]
    if len(names) != len(VOICES) or piece.drums.any():
        there = [label(i, info) for i, info in enumerate(piece.tracks)]
        raise ValueError(
            "the model writes four voices, so the file needs four tracks with notes and no drums; "
            f"it has {', '.join(there)}."
        )
    for number, info in enumerate(piece.tracks):
        mine = piece.notes[piece.track == number]
        late = np.flatnonzero(mine[1:, 0] < mine[:-1, 0] + mine[:-1, 1])
        if len(late):
            at = int(mine[late[0] + 1, 0])
            bar = np.searchsorted(piece.bars(at + 1), at, side="right")
            raise ValueError(
                "the model writes four voices of one note at a time, and track "
                f"{label(number, info)} has two notes at once in bar {bar}."
            )
    if names == [name[0] for name in VOICES]:
        return [*range(len(VOICES))]
    mean = [-piece.pitch[piece.track == number].mean() for number in range(len(VOICES))]
    return [int(voice) for voice in np.argsort(np.argsort(mean))]
