"""Note-level measures of music, what a reference reaches against itself, and what chance reaches.

All of them see a piece on the grid of sixteenths, and its bars up to the one in which the last note
ends: there is never an empty bar after the music.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from statezoo.datamodules.music.notes import TPQ, Piece

__all__ = ["HISTOGRAMS", "SCALARS", "Sheet", "compare", "groove", "overlap", "repetition", "sheet"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Score = Callable[[Floats, Floats], float]

STEP = TPQ // 4
LONGEST = 32
"""Durations and intervals of this many sixteenths and more are counted together."""

MAJOR = (0, 2, 4, 5, 7, 9, 11)


@dataclass(frozen=True)
class Sheet:
    """A piece in sixteenths.

    Attributes:
        onset: ``[n]`` sixteenth at which each note begins.
        duration: ``[n]`` sixteenths, at least 1.
        pitch: ``[n]`` MIDI numbers.
        drum: ``[n]`` whether it is a drum, which has no pitch class.
        bars: ``[m+1]`` where bars begin, and where the last one ends.
    """

    onset: Ints
    duration: Ints
    pitch: Ints
    drum: NDArray[np.bool_]
    bars: Ints

    @property
    def tones(self) -> Ints:
        """Pitches of the notes that are no drums."""
        return self.pitch[~self.drum]

    def bar_notes(self) -> list[frozenset[tuple[int, int, int, bool]]]:
        """Notes that begin in each bar: place in the bar, duration, pitch, drum."""
        at = np.searchsorted(self.bars, self.onset, side="right") - 1
        found: list[set[tuple[int, int, int, bool]]] = [set() for _ in self.bars[1:]]
        columns = (self.onset - self.bars[at], self.duration, self.pitch, self.drum)
        for bar, *note in zip(at.tolist(), *(c.tolist() for c in columns), strict=True):
            found[bar].add(tuple(note))
        return [frozenset(notes) for notes in found]


def sheet(piece: Piece) -> Sheet:
    """Put a piece on the grid: onsets and ends go to the nearest sixteenth."""
    onset = (piece.onset + STEP // 2) // STEP
    stop = np.maximum((piece.end + STEP // 2) // STEP, onset + 1)
    last = int(stop.max(initial=1))
    bars = np.unique((piece.bars(last * STEP) + STEP // 2) // STEP)
    return Sheet(onset, stop - onset, piece.pitch.copy(), piece.drums, bars)


# ------------------------------------------------------------------- histograms


def pitch_classes(x: Sheet) -> Floats:
    """Notes of each pitch class, C first."""
    return np.bincount(x.tones % 12, minlength=12).astype(float)


def durations(x: Sheet) -> Floats:
    """Notes of each duration: 1 to 32 sixteenths, longer ones with 32."""
    return np.bincount(np.minimum(x.duration, LONGEST), minlength=LONGEST + 1)[1:].astype(float)


def intervals(x: Sheet) -> Floats:
    """Sixteenths from each onset to the next one, of whatever part: 1 to 32 and more."""
    steps = np.diff(np.unique(x.onset))
    return np.bincount(np.minimum(steps, LONGEST), minlength=LONGEST + 1)[1:].astype(float)


def overlap(one: Floats, other: Floats) -> float:
    """Common area of two histograms after each is scaled to sum 1; NaN if one is empty."""
    if not one.sum() or not other.sum():
        return float("nan")
    return float(np.minimum(one / one.sum(), other / other.sum()).sum())


# ---------------------------------------------------------------------- scalars


def entropy(x: Sheet) -> float:
    """Entropy of the pitch classes in bits, at most log2(12)."""
    p = pitch_classes(x)
    p = p[p > 0] / max(p.sum(), 1)
    return float(-(p * np.log2(p)).sum()) if len(p) else float("nan")


def polyphony(x: Sheet) -> float:
    """Different pitches that sound at a time, over the sixteenths in which any does."""
    sounding = {
        (step, pitch)
        for begin, size, pitch in zip(x.onset, x.duration, x.pitch, strict=True)
        for step in range(begin, begin + size)
    }
    return len(sounding) / max(len({step for step, _ in sounding}), 1) or float("nan")


def scale_consistency(x: Sheet) -> float:
    """Part of the notes that the best of the twelve diatonic scales holds."""
    counts = pitch_classes(x)
    if not counts.sum():
        return float("nan")
    best = max(float(np.roll(counts, -key)[list(MAJOR)].sum()) for key in range(12))
    return best / float(counts.sum())


def repetition(bars: int) -> Callable[[Sheet], float]:
    """Part of the bars with notes that repeat exactly what was played ``bars`` bars before."""

    def measure(x: Sheet) -> float:
        notes = x.bar_notes()
        later = [(now, before) for now, before in zip(notes[bars:], notes, strict=False) if now]
        if not later:
            return float("nan")
        return sum(now == before for now, before in later) / len(later)

    return measure


def empty_bars(x: Sheet) -> float:
    """Part of the bars in which nothing sounds."""
    stop = x.onset + x.duration
    silent = [
        not ((x.onset < end) & (stop > begin)).any()
        for begin, end in zip(x.bars[:-1], x.bars[1:], strict=True)
    ]
    return float(np.mean(silent)) if silent else float("nan")


def groove(x: Sheet) -> float:
    """Likeness of the onsets of neighbouring bars: the mean of 1 - Hamming distance / sixteenths.

    Bars from the first to the last with an onset are compared, neighbours of equal length only:
    equal bars give 1. NaN where there is nothing to compare.

    Source: Wu & Yang, The Jazz Transformer, arXiv:2008.01307, section 4.2.
    """
    patterns = []
    for begin, end in zip(x.bars[:-1], x.bars[1:], strict=True):
        inside = x.onset[(x.onset >= begin) & (x.onset < end)]
        pattern = np.zeros(end - begin, dtype=bool)
        pattern[inside - begin] = True
        patterns.append(pattern)
    filled = [i for i, pattern in enumerate(patterns) if pattern.any()]
    patterns = patterns[filled[0] : filled[-1] + 1] if filled else []
    alike = [
        float((one == other).mean()) for one, other in pairwise(patterns) if len(one) == len(other)
    ]
    return float(np.mean(alike)) if alike else float("nan")


HISTOGRAMS: dict[str, Callable[[Sheet], Floats]] = {
    "pitch classes": pitch_classes,
    "durations": durations,
    "onset intervals": intervals,
}
"""Compared by overlap, over all notes of a set."""

SCALARS: dict[str, Callable[[Sheet], float]] = {
    "pitch-class entropy (bits)": entropy,
    "polyphony": polyphony,
    "scale consistency": scale_consistency,
    "empty bars": empty_bars,
    "repetition after 1 bar": repetition(1),
    "repetition after 2 bars": repetition(2),
    "repetition after 4 bars": repetition(4),
    "groove": groove,
}
"""Means over pieces, compared by their difference."""

IN_ORDER = (*(name for name in SCALARS if name.startswith("repetition")), "groove")
"""Scalars of the order of bars: chance deals out the bars anew. Elsewhere it draws notes."""


# ------------------------------------------------------------------- comparison


def compare(
    generated: Sequence[Sheet], reference: Sequence[Sheet], *, seed: int = 0, repeats: int = 50
) -> dict[str, dict[str, float | None]]:
    """All measures of two sets of pieces.

    Args:
        generated: At least one piece.
        reference: At least one; two and more tell what the reference reaches against itself.
        seed: Draws halves and chance.
        repeats: Random halves of the reference.

    Returns:
        For each measure ``score`` (overlap of histograms, or absolute difference of means),
        ``ceiling`` (the same between two random halves of the reference, mean), ``ceiling_low``
        and ``ceiling_high`` (the middle nine tenths of the halves), ``chance`` (the same of
        the reference shuffled); for scalars also the means ``generated``, ``reference`` and
        ``shuffled``. None where a set has nothing to measure.

    Raises:
        ValueError: If a set is empty.
    """
    if not generated or not reference:
        raise ValueError(
            f"compare needs a piece at least on each side, got {len(generated)} generated and "
            f"{len(reference)} of the reference."
        )
    rng = np.random.default_rng(seed)
    halves = []
    for _ in range(repeats if len(reference) > 1 else 0):
        order = rng.permutation(len(reference))
        halves.append((order[: len(order) // 2], order[len(order) // 2 :]))
    notes, bars = random_notes(reference, rng), dealt_bars(reference, rng)
    found = {}
    for name, histogram in HISTOGRAMS.items():
        sets = [np.array([histogram(x) for x in part]) for part in (generated, reference, notes)]
        found[name] = _row(sets, halves, lambda a, b: overlap(a.sum(0), b.sum(0)))
    for name, scalar in SCALARS.items():
        chance = bars if name in IN_ORDER else notes
        sets = [np.array([scalar(x) for x in part]) for part in (generated, reference, chance)]
        means = zip(("generated", "reference", "shuffled"), map(_mean, sets), strict=True)
        row = _row(sets, halves, lambda a, b: abs(_mean(a) - _mean(b)))
        found[name] = {key: _known(value) for key, value in means} | row
    return found


def _row(
    sets: Sequence[Floats], halves: Sequence[tuple[Ints, Ints]], score: Score
) -> dict[str, float | None]:
    """Scores of generated music, halves of the reference, and chance, against the reference."""
    generated, reference, chance = sets
    own = np.array([score(reference[one], reference[other]) for one, other in halves])
    own = own[~np.isnan(own)]
    low, high = np.quantile(own, [0.05, 0.95]) if len(own) else (np.nan, np.nan)
    row = {
        "score": score(generated, reference),
        "ceiling": own.mean() if len(own) else np.nan,
        "ceiling_low": low,
        "ceiling_high": high,
        "chance": score(chance, reference),
    }
    return {key: _known(value) for key, value in row.items()}


def _mean(values: Floats) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


# ----------------------------------------------------------------------- chance


def random_notes(pieces: Sequence[Sheet], rng: np.random.Generator) -> list[Sheet]:
    """As many notes in as many bars, with pitch, onset and duration drawn evenly.

    Pitches lie between the lowest and highest of all pieces, durations are a bar of 4/4 at most.
    """
    pitches = np.concatenate([x.pitch for x in pieces])
    low, high = int(pitches.min(initial=127)), int(pitches.max(initial=0))
    return [
        Sheet(
            rng.integers(0, x.bars[-1], len(x.onset)),
            rng.integers(1, 17, len(x.onset)),
            rng.integers(low, high + 1, len(x.onset)),
            x.drum,
            x.bars,
        )
        for x in pieces
    ]


def dealt_bars(pieces: Sequence[Sheet], rng: np.random.Generator) -> list[Sheet]:
    """The bars of all pieces, dealt out to the pieces in a random order."""
    bars = [
        (size, notes)
        for x in pieces
        for size, notes in zip(np.diff(x.bars).tolist(), x.bar_notes(), strict=True)
    ]
    order = iter(rng.permutation(len(bars)).tolist())
    found = []
    for x in pieces:
        own = [bars[next(order)] for _ in x.bars[1:]]
        bounds = np.cumsum([0, *(size for size, _ in own)])
        rows = [
            (begin + place, *rest)
            for begin, (_, notes) in zip(bounds.tolist(), own, strict=False)
            for place, *rest in sorted(notes)
        ]
        table = np.array(rows, dtype=np.int64).reshape(-1, 4)
        found.append(Sheet(table[:, 0], table[:, 1], table[:, 2], table[:, 3] == 1, bounds))
    return found
