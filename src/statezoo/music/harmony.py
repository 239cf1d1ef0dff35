"""Alto, tenor and bass to a melody, and how well models write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from statezoo.datamodules.music.base import Ids
from statezoo.datamodules.music.baselines import Markov, unigram_bits
from statezoo.datamodules.music.notes import TPQ, Piece, TrackInfo
from statezoo.datamodules.music.satb import STEP, VOICES, SatbGrid
from statezoo.music.continuation import open_score
from statezoo.music.decoding import Row, Rules, Sampling, open_model, sample, score

__all__ = [
    "RANGES",
    "evaluate_harmony",
    "harmonise",
    "harmony_floors",
    "harmony_nll",
]

RANGES = ((60, 81), (53, 74), (48, 69), (36, 64))
"""Lowest and highest pitch of soprano, alto, tenor and bass."""
LOWER = range(1, len(VOICES))
REST, HELD = -1, -2
BITS = np.log(2)


def harmonise(
    model: Any,
    melody: Any,
    *,
    n: int = 8,
    sampling: Sampling = Sampling(),  # noqa: B008  # immutable
    device: str = "cpu",
) -> Any:
    """Write alto, tenor and bass to a melody: the likeliest of several drawn settings.

    At each sixteenth the model sees all voices so far and the soprano's next note; no voice leaves
    its range or goes above the soprano. The soprano is the melody as it is in the file.

    Args:
        model: Checkpoint, run's folder, exported folder or Hub name of a model with satb tokens;
            or network and tokenizer.
        melody: File of music, ``symusic.Score`` or ``Piece``: one note at a time, between
            C4 (60) and A5 (81).
        n: Settings to choose from.
        sampling: Temperature, top-p, top-k and seed.
        device: Where to run.

    Returns:
        A ``symusic.Score`` of four tracks, in the ticks of the file.

    Raises:
        ValueError: If the model has other tokens, or the melody is none.
    """
    sampling.check()
    if n < 1:
        raise ValueError(f"harmonise needs n of at least 1, got {n}.")
    given = open_score(melody)
    line = _melody(given)
    net, tokenizer = _open_satb(model, device)
    soprano = _soprano(tokenizer, line)
    end = len(soprano) * STEP
    rules = _Voices(tokenizer, soprano, end)
    rows = sample(
        net, tokenizer, [], rows=n, end=end, allowed=rules, sampling=sampling, forced=rules.soprano
    )
    best = max(rows, key=lambda row: row.log_prob)
    return _four_tracks(given, line, tokenizer.decode_piece(best.ids))


def _open_satb(model: Any, device: str) -> tuple[Any, SatbGrid]:
    net, tokenizer = open_model(model, "music harmonise", device)
    if not isinstance(tokenizer, SatbGrid):
        raise ValueError(
            f"music harmonise needs a model of four voices, and this one has {tokenizer.kind} "
            "tokens: statezoo fit --data Music trains one with satb tokens."
        )
    return net, tokenizer


def _melody(given: Any) -> Piece:
    """The one line of notes in a score."""
    piece = Piece.from_score(given)
    piece = piece.with_notes(piece.notes[~piece.drums])
    if not len(piece):
        raise ValueError("the melody has no notes.")
    late = np.flatnonzero(piece.onset[1:] < piece.end[:-1])
    if len(late):
        at = int(piece.onset[late[0] + 1])
        raise ValueError(
            f"the melody has two notes at once in {_place(piece, at)}: give the soprano alone."
        )
    low, high = RANGES[0]
    wrong = (piece.pitch < low) | (piece.pitch > high)
    if wrong.any():
        first = int(wrong.argmax())
        raise ValueError(
            f"the melody has pitch {piece.pitch[first]} in {_place(piece, piece.onset[first])}, "
            f"outside a soprano's {low} to {high}: transpose it."
        )
    return piece


def _place(piece: Piece, tick: int) -> str:
    return f"bar {np.searchsorted(piece.bars(tick + 1), tick, side='right')}"


def _soprano(tokenizer: SatbGrid, line: Piece) -> Ids:
    """``[n]`` the soprano's token of each sixteenth."""
    alone = Piece((TrackInfo(VOICES[0]),), np.hstack([line.notes[:, :4], 0 * line.notes[:, 4:]]))
    return tokenizer.encode_piece(alone).reshape(-1, len(VOICES))[:, 0]


class _Voices:
    """Which tokens alto, tenor and bass may have below a soprano.

    Args:
        tokenizer: Whose tokens.
        soprano: ``[n]`` the soprano's token of each sixteenth.
        end: Tick at which it ends.
    """

    def __init__(self, tokenizer: SatbGrid, soprano: Ids, end: int) -> None:
        self.tokenizer, self.tokens = tokenizer, soprano
        self.rules = Rules(tokenizer, end=end)
        line = np.full((len(soprano), len(VOICES)), 0)
        line[:, 0] = soprano
        self.ceiling = _pitches(tokenizer, line)[:, 0]

    def soprano(self, row: Row) -> int | None:
        """The token to force: the melody's, in its turn."""
        return int(self.tokens[row.state.written // len(VOICES)]) if row.state.voice == 0 else None

    def __call__(self, row: Row) -> NDArray[np.bool_]:
        """``[W]`` which tokens may come next in a row."""
        mask = self.rules(row)
        voice = row.state.voice
        if voice == 0:
            return mask
        low, high = RANGES[voice]
        ceiling = int(self.ceiling[row.state.written // len(VOICES)])
        high = high if ceiling == REST else min(high, ceiling)
        pitch = self.tokenizer.pitch_of
        mask &= (pitch < 0) | ((pitch >= low) & (pitch <= high))
        hold = self.tokenizer.hold_id
        if hold is not None and mask[hold]:
            mask[hold] = self._held(row) <= high
        return mask

    def _held(self, row: Row) -> int:
        """Pitch that the voice in turn had last."""
        line = reversed(row.ids[row.state.voice :: len(VOICES)])
        return int(self.tokenizer.pitch_of[next(i for i in line if i != self.tokenizer.hold_id)])


def _pitches(tokenizer: SatbGrid, tokens: Ids) -> Ids:
    """``[n 4]`` the pitch that sounds in each voice, -1 for none."""
    grid = np.where(tokens == 0, REST, tokenizer.pitch_of[tokens])
    for step in range(1, len(grid)):
        held = tokens[step] == tokenizer.hold_id
        grid[step] = np.where(held, grid[step - 1], grid[step])
    return grid


def _four_tracks(given: Any, line: Piece, harmony: Piece) -> Any:
    """Soprano as given, the other voices as drawn, in the ticks of the file."""
    import symusic

    found: Any = symusic.Score(given.ticks_per_quarter)
    for name in ("tempos", "time_signatures", "key_signatures"):
        setattr(found, name, getattr(given, name))
    scale = given.ticks_per_quarter / TPQ
    end = max(note.time + note.duration for track in given.tracks for note in track.notes)
    for voice, info in enumerate(harmony.tracks):
        track: Any = symusic.Track(name=info.name, program=info.program)
        if voice == 0:
            own = [n for t in given.tracks if not t.is_drum for n in t.notes if n.duration > 0]
            track.notes = sorted(own, key=lambda note: note.time)
        for row in harmony.notes[harmony.track == voice].tolist() if voice else ():
            begin, stop = round(row[0] * scale), min(round((row[0] + row[1]) * scale), end)
            if stop > begin:
                track.notes.append(symusic.Note(begin, stop - begin, row[2], row[3]))
        found.tracks.append(track)
    return found


# ------------------------------------------------------------------------ how well


def harmony_nll(model: Any, piece: Piece, *, device: str = "cpu") -> float:
    """Nats per token of alto, tenor and bass, given all voices before and the soprano of the step.

    No token is masked. The mean is over ``3 n`` tokens of ``n`` sixteenths.

    Args:
        model: Checkpoint, run's folder, exported folder or Hub name of a model with satb tokens;
            or network and tokenizer.
        piece: Four voices.
        device: Where to run.

    Raises:
        ValueError: If the model has other tokens, or the piece is not of four voices.
    """
    net, tokenizer = _open_satb(model, device)
    return _mean(-score(net, tokenizer, ids := tokenizer.encode_piece(piece)), len(ids))


def _mean(nats: NDArray[np.float64], count: int) -> float:
    return float(nats[np.arange(count) % len(VOICES) != 0].mean())


def harmony_floors(
    train: Sequence[Ids], test: Sequence[Ids], tokenizer: SatbGrid
) -> dict[str, float]:
    """Nats per token of alto, tenor and bass that simple methods need.

    ``unigram`` knows how often each voice has each token, ``markov`` the voice's token before; a
    voice has its own model. Both are learnt from ``train``.

    Args:
        train: ``[T]`` ids of each training piece, soprano first.
        test: Ids to score.
        tokenizer: Whose ids.
    """
    size, bits, count = tokenizer.vocab_size, {"unigram": 0.0, "markov": 0.0}, 0
    for voice in LOWER:
        known, unknown = ([ids[voice :: len(VOICES)] for ids in part] for part in (train, test))
        bits["unigram"] += unigram_bits(known, unknown, size)
        bits["markov"] += Markov(known, 1, size, tokenizer.bos_id).bits(unknown)
        count += sum(map(len, unknown))
    return {name: float(value * BITS / count) for name, value in bits.items()}


def evaluate_harmony(model: str, path: str, *, device: str = "cpu") -> dict[str, Any]:
    """Compare a model with the floors on held-out chorales.

    Args:
        model: Checkpoint, run's folder, exported folder or Hub name of a model with satb tokens.
        path: Chorales, as ``Music`` takes them; its default split, unless they have their own.
        device: Where to run.

    Returns:
        ``split`` (test, or val where there is no test), ``pieces``, and nats per token of alto,
        tenor and bass: ``model``, ``unigram``, ``markov``; the floors learn from the training
        split.

    Raises:
        ValueError: If the model has other tokens, or was trained on the same music.
    """
    from statezoo.datamodules import Music

    _refuse_bach(model, path)
    net, tokenizer = _open_satb(model, device)
    data = Music(path, encoding_settings=tokenizer.settings())
    train, test, split = data.ids("train"), data.ids("test"), "test"
    if not test:
        test, split = data.ids("val"), "val"
    nats = np.concatenate([-score(net, tokenizer, ids) for ids in test])
    found = {"split": split, "pieces": len(test), "model": _mean(nats, len(nats))}
    return found | harmony_floors(train, test, tokenizer)


def _refuse_bach(model: str, path: str) -> None:
    """Raise where the chorales of a JSON were trained on under another name."""
    from pathlib import Path

    from statezoo.arguments import find_weights
    from statezoo.lightning_modules import checkpoint as ckpt
    from statezoo.music import jsb

    file = Path(find_weights(model))
    if file.is_file() and path.endswith((".json", ".json.gz")):
        jsb.refuse_bach(model, jsb.trained_on(file, ckpt.read(file)))
