"""More bars after the first ones of a piece."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from statezoo.datamodules.music.base import Ids, MusicTokenizer
from statezoo.datamodules.music.notes import TPQ, Notes, Piece, TrackInfo, require
from statezoo.music.decoding import DRUMS, Rules, Sampling, open_model, sample

__all__ = ["continue_piece", "open_score"]

LONGEST_BARS = 4
"""A new note lasts at most so many bars."""
PEDAL, RELEASED = 64, 0
TICK = 10
"""Milliseconds, which are the ticks of performance events, per step."""


class _Prompt(NamedTuple):
    """The bars to go on from.

    Attributes:
        score: They alone, in the ticks of the file, notes at full length.
        piece: The same in ticks of a ``Piece``.
        cut: Where they end, in ticks of the piece.
        bar: Ticks of a new bar.
        end: Where the new bars end.
    """

    score: Any
    piece: Piece
    cut: int
    bar: int
    end: int

    def own(self, tick: int) -> int:
        """A tick of the piece as one of the file."""
        return round(tick * int(self.score.ticks_per_quarter) / TPQ)


def continue_piece(
    model: Any,
    prompt: Any,
    *,
    prompt_bars: int = 4,
    bars: int = 16,
    n: int = 1,
    sampling: Sampling = Sampling(),  # noqa: B008  # immutable
    programs: Collection[int] | None = None,
    pitch_range: tuple[int, int] | None = None,
    device: str = "cpu",
) -> list[Any]:
    """Continue the first bars of a piece in several ways.

    The notes of these bars stay as they are in the file; what else is in it is left out. New notes
    are pasted after them, in the bars' last meter and tempo; none sounds past the last bar. A
    marker ``end`` is where that ends, so that a file with silence at the end is as long.

    Args:
        model: Checkpoint, run's folder, exported folder or Hub name; or network and tokenizer.
        prompt: File of music, ``symusic.Score`` or ``Piece``.
        prompt_bars: Bars of it to keep.
        bars: Bars to add.
        n: Number of continuations.
        sampling: Temperature, top-p, top-k and seed.
        programs: Instruments that may play on, 0 to 127, -1 for drums; None for those of the bars
            that are kept.
        pitch_range: Lowest and highest new pitch, drums apart; None for all.
        device: Where to run.

    Returns:
        ``n`` of ``symusic.Score``, in the ticks of the file.

    Raises:
        ValueError: If the model does not write music, the prompt is too short or has no notes, or
            a setting is out of range.
    """
    if min(prompt_bars, bars, n) < 1:
        raise ValueError(
            f"continue needs prompt_bars, bars and n of at least 1; got {prompt_bars}, {bars}, {n}."
        )
    sampling.check()
    kept = _cut(open_score(prompt), prompt_bars, bars)
    net, tokenizer = open_model(model, "music continue", device)
    start, end = _times(tokenizer, kept)
    if programs is None and getattr(tokenizer, "programs", False):
        programs = {DRUMS if t.is_drum else t.program for t in kept.piece.tracks}
    rules = Rules(tokenizer, start=start, end=end, programs=programs, pitches=pitch_range)
    ids = _prompt_ids(tokenizer, kept, start)
    rows = sample(net, tokenizer, ids, rows=n, end=end, allowed=rules, sampling=sampling)
    return [_paste(kept, tokenizer, ids, np.array(row.ids), start) for row in rows]


def open_score(source: Any) -> Any:
    """A ``symusic.Score`` of a file, a score or a piece; a MIDI file keeps its ticks.

    Raises:
        ValueError: If it is no music.
        FileNotFoundError: If there is no such file.
    """
    require("symusic", "Reading music")
    import symusic

    if isinstance(source, Piece):
        return source.to_score()
    if not isinstance(source, str | Path):
        return source.copy()
    from statezoo.datamodules.music.readers import read_piece

    piece = read_piece(source)
    midi = Path(source).suffix.lower() in (".mid", ".midi")
    return symusic.Score.from_file(str(source)) if midi else piece.to_score()


def _cut(score: Any, prompt_bars: int, bars: int) -> _Prompt:
    """Keep the first bars; nothing but notes that was held or set before the cut goes on."""
    import symusic

    whole = Piece.from_score(score)
    if not len(whole):
        raise ValueError("the prompt has no notes.")
    signs = tuple(sign for sign in whole.time_signatures if sign[0] < whole.length)
    starts = replace(whole, time_signatures=signs).bars()
    if len(starts) - 1 < prompt_bars:
        raise ValueError(
            f"the prompt has {len(starts) - 1} bars, and prompt_bars is {prompt_bars}: choose "
            "fewer, or give a longer file."
        )
    cut = int(starts[prompt_bars])
    own = round(cut * score.ticks_per_quarter / TPQ)
    for name in ("tempos", "time_signatures", "key_signatures", "markers"):
        setattr(score, name, [event for event in getattr(score, name) if event.time < own])
    for track in score.tracks:
        for name in ("notes", "controls", "pitch_bends", "pedals", "lyrics"):
            setattr(track, name, [event for event in getattr(track, name) if event.time < own])
        pedal = [control for control in track.controls if control.number == PEDAL]
        if pedal and max(pedal, key=lambda control: control.time).value > RELEASED:
            track.controls.append(symusic.ControlChange(own, PEDAL, RELEASED))
    piece = Piece.from_score(score)
    if not len(piece):
        raise ValueError(f"no note begins in the first {prompt_bars} bars of the prompt.")
    bar = int(piece.bars(cut + 1)[-1]) - cut
    return _Prompt(score, piece, cut, bar, cut + bars * bar)


def _times(tokenizer: MusicTokenizer, kept: _Prompt) -> tuple[int, int]:
    """Where the new bars begin and end, in the tokens' time."""
    cut, end = kept.cut, kept.end
    if tokenizer.kind == "performance":
        seconds = kept.piece.seconds(np.array([cut, end]))
        cut, end = (int(step) * TICK for step in np.rint(seconds * 1000 / TICK))
    if tokenizer.kind == "satb":
        from statezoo.datamodules.music.satb import STEP

        cut, end = (-(-at // STEP) * STEP for at in (cut, end))
    return cut, max(end, cut + 1)


def _prompt_ids(tokenizer: MusicTokenizer, kept: _Prompt, start: int) -> Ids:
    """Tokens of the prompt before the time at which the new bars begin."""
    piece = kept.piece
    try:
        if tokenizer.kind == "satb":
            return tokenizer.encode_piece(piece.between(0, start))
        ids = tokenizer.encode_piece(piece)
    except ValueError as error:
        raise ValueError(
            f"the prompt cannot be written in the model's {tokenizer.kind} tokens: it {error}."
        ) from error
    state = tokenizer.start()
    for place, token in enumerate(ids.tolist()):
        state = tokenizer.advance(state, token)
        if state.tick >= start:
            return ids[:place]
    return ids


def _paste(kept: _Prompt, tokenizer: MusicTokenizer, ids: Ids, new: Ids, start: int) -> Any:
    """The prompt with the notes that new tokens write after it."""
    import symusic

    score: Any = kept.score.copy()
    piece, notes = _decode(kept, tokenizer, ids, new, start)
    last, scale = kept.own(kept.end), score.ticks_per_quarter / TPQ
    sizes = np.minimum(notes[:, 1], LONGEST_BARS * kept.bar)
    begin = np.maximum(np.rint(notes[:, 0] * scale).astype(np.int64), kept.own(kept.cut))
    stop = np.minimum(np.rint((notes[:, 0] + sizes) * scale).astype(np.int64), last)
    rows = np.stack([begin, np.maximum(stop - begin, 1), *notes.T[2:]], axis=1)[begin < last]
    for track, info in enumerate(piece.tracks):
        mine = rows[rows[:, 4] == track]
        if not len(mine):
            continue
        place = _destination(score, tokenizer, kept, info, track)
        while place >= len(score.tracks):
            score.tracks.append(
                symusic.Track(name=info.name, program=info.program, is_drum=info.is_drum)
            )
        for row in apart(mine, score.tracks[place].notes).tolist():
            score.tracks[place].notes.append(symusic.Note(*row[:4]))
    tempos = [(round(tick * scale), qpm) for tick, qpm in piece.tempos if tick >= start]
    for tick, qpm in tempos if tokenizer.kind != "performance" else ():
        score.tempos.append(symusic.Tempo(tick, qpm))
    score.markers.append(symusic.TextMeta(last, "end"))
    return score


def _decode(
    kept: _Prompt, tokenizer: MusicTokenizer, ids: Ids, new: Ids, start: int
) -> tuple[Piece, Notes]:
    """What the tokens write, and the notes of it that begin after the prompt, in its time."""
    if tokenizer.kind == "satb":  # alone, so that a pitch held from the prompt is a new note
        piece = tokenizer.decode_piece(new)
        notes = piece.notes.copy()
        notes[:, 0] += start
        return piece, notes
    piece = tokenizer.decode_piece(np.concatenate([ids, new]))
    notes = piece.notes[piece.onset >= start].copy()
    if tokenizer.kind == "performance":
        tempo = max(kept.piece.tempos, default=(0, 120.0))[1]
        bounds = np.stack([notes[:, 0], notes[:, 0] + notes[:, 1]])
        bounds = kept.cut + np.rint((bounds - start) * tempo * TPQ / 60_000).astype(np.int64)
        notes[:, 0], notes[:, 1] = bounds[0], bounds[1] - bounds[0]
    return piece, notes


def _destination(
    score: Any, tokenizer: MusicTokenizer, kept: _Prompt, info: TrackInfo, track: int
) -> int:
    """Which track of the score plays on; one more than there are for a new one."""
    tracks = list(score.tracks)
    if getattr(tokenizer, "programs", False):
        players = [(t.is_drum, 0 if t.is_drum else t.program) for t in tracks]
        player = (info.is_drum, 0 if info.is_drum else info.program)
        return players.index(player) if player in players else len(tracks)
    old = [list(t.notes) if not t.is_drum else [] for t in kept.score.tracks]
    sounding = [i for i, notes in enumerate(old) if notes]
    if tokenizer.kind != "satb":
        return sounding[0]
    named = [t.name for t in tracks]
    if info.name in named:
        return named.index(info.name)
    if len(sounding) not in (1, 4):
        return len(tracks)
    order = sorted(sounding, key=lambda i: -np.mean([note.pitch for note in old[i]]))
    return order[track] if track < len(order) else len(tracks)


def apart(rows: Notes, before: Sequence[Any]) -> Notes:
    """Notes of which none begins while its pitch sounds: MIDI could not tell them apart."""
    held: dict[int, int] = {}
    for note in before:
        held[note.pitch] = max(held.get(note.pitch, 0), note.time + note.duration)
    rows = rows[[row[0] >= held.get(row[2], 0) for row in rows.tolist()]]
    rows = rows[np.lexsort((-rows[:, 1], rows[:, 0], rows[:, 2]))]
    twice = (np.diff(rows[:, [0, 2]], axis=0, prepend=-1) == 0).all(axis=1)
    rows = rows[~twice]
    same = np.diff(rows[:, 2]) == 0
    gap = np.diff(rows[:, 0])
    rows[:-1, 1] = np.where(same, np.minimum(rows[:-1, 1], gap), rows[:-1, 1])
    return rows[np.lexsort((rows[:, 2], rows[:, 0]))]
