"""Piano rolls: time to the right, pitch upwards, a colour per program, with the numbers beside."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from statezoo.music.spans import bar_span

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from statezoo.datamodules.music.notes import Piece, TrackInfo

__all__ = ["plot", "plot_file"]

COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7a5195", "#8c564b",
)  # fmt: skip
"""Of instruments in the order of their programs; told apart with any kind of colour vision."""
DRUM_COLOUR, PROMPT_COLOUR = "#555555", "#f6ecc9"
DRUMS = "drums"
KINDS = (".png", ".pdf", ".svg")
MOST_INCHES, INCHES_PER_BAR, DOTS = 60.0, 0.55, 110


def plot_file(file: str, *, out: str, bars: str = "") -> None:
    """Draw a file of music as a piano roll, with its numbers as JSON beside it.

    Args:
        file: MIDI, MusicXML or ABC.
        out: Picture to write: .png, .pdf or .svg.
        bars: Those to draw, such as 9:12, counted from 1; default all.

    Raises:
        ValueError: If the file cannot be used, has no such bars, or ``out`` is no picture.
    """
    from statezoo.datamodules.music.readers import read_piece

    _check_ending(out)
    piece = read_piece(file)
    span = bar_span(bars, len(piece.bars()) - 1) if bars else None
    title = Path(file).name + (f", bars {span[0]} to {span[1]}" if span else "")
    numbers = plot(piece, out, bars=span, title=title)
    beside = Path(out).with_suffix(".json")
    sys.stdout.write(f"{numbers['notes']} notes in {numbers['bars']} bars\nwrote {out}, {beside}\n")


def plot(
    piece: Piece,
    out: str | Path,
    *,
    prompt_bars: int = 0,
    bars: tuple[int, int] | None = None,
    title: str = "",
) -> dict[str, Any]:
    """Draw a piece as a piano roll, and write what it shows beside it as JSON.

    The same piece gives the same bytes.

    Args:
        piece: What to draw; it ends at its ``length``, silent bars included.
        out: Picture to write, ``.png``, ``.pdf`` or ``.svg``; its folder is made.
        prompt_bars: Bars at the start to shade, as given and not made by a model.
        bars: First and last bar to draw, counted from 1; default all.
        title: Text above.

    Returns:
        The numbers of the JSON: ``notes``, ``bars``, ``first_bar``, ``prompt_bars``, ``per_bar``
        (onsets in each bar), ``sounding_before`` (notes that ring into the first bar),
        ``pitch_range``, ``bar_ticks`` (bounds of the bars, 480 per quarter), and ``programs`` with
        ``name``, ``colour``, ``notes`` and ``per_bar`` of each.

    Raises:
        ValueError: If no note sounds there, there are no such bars, the ending is another one, or
            matplotlib is missing.
    """
    from statezoo.datamodules.music.notes import require

    out = Path(out)
    _check_ending(out)
    require("matplotlib", "Drawing")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    bounds = piece.bars()
    count = len(bounds) - 1
    if not len(piece):
        raise ValueError("there is nothing to draw: the piece has no notes.")
    first, last = bars or (1, count)
    if not 1 <= first <= last <= count:
        raise ValueError(f"bars must be a first and a last of 1 to {count}, got {bars}.")
    bounds = bounds[first - 1 : last + 1]
    numbers = {"first_bar": first, "prompt_bars": prompt_bars, **_count(piece, bounds)}
    if not numbers["pitch_range"]:
        raise ValueError(f"there is nothing to draw: no note sounds in bars {first} to {last}.")
    low, high = numbers["pitch_range"]
    width = min(max(7.0, 1.2 + INCHES_PER_BAR * numbers["bars"]), MOST_INCHES)
    height = min(max(3.0, 1.5 + 0.075 * (high - low)), 7.0)
    figure = Figure(figsize=(width, height), dpi=DOTS, layout="constrained")
    axes = figure.subplots()
    _grid(axes, numbers)
    _notes(axes, piece, numbers)
    axes.set_title(title, loc="left", fontsize=10, parse_math=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    dates = {".png": {"Software": None}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
    with rc_context({"svg.hashsalt": "statezoo"}):  # names of parts of an SVG, else drawn by lot
        figure.savefig(out, metadata=dates[out.suffix.lower()])
    out.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return numbers


def _check_ending(out: str | Path) -> None:
    """ValueError where ``out`` names no kind of picture."""
    if Path(out).suffix.lower() not in KINDS:
        raise ValueError(f"out must end in {', '.join(KINDS)}, got {str(out)!r}.")


def _player(track: TrackInfo) -> str:
    """Key of a track's instrument."""
    return DRUMS if track.is_drum else str(track.program)


def program_name(player: str) -> str:
    """Name of a program in General MIDI, given as text, or of the drum kit."""
    if player == DRUMS:
        return "Drums"
    from statezoo.datamodules.music.notes import require

    require("pretty_midi", "Naming instruments")
    from pretty_midi import (  # type: ignore[import-untyped]
        program_to_instrument_name,
    )

    return str(program_to_instrument_name(int(player)))


def _count(piece: Piece, bounds: Any) -> dict[str, Any]:
    """Notes in all, in each bar, and of each program, between the first and last of ``bounds``."""
    size = max(len(bounds) - 1, 0)
    begins = (piece.onset >= bounds[0]) & (piece.onset < bounds[-1])
    sounds = (piece.end > bounds[0]) & (piece.onset < bounds[-1])
    bar = np.searchsorted(bounds, piece.onset, side="right") - 1
    players = np.array([_player(track) for track in piece.tracks], dtype=object)[piece.track]
    pitches = piece.pitch[sounds]
    present = sorted(set(players[sounds]), key=lambda key: 128 if key == DRUMS else int(key))
    programs = {}
    for place, key in enumerate(present):
        mine = begins & (players == key)
        programs[key] = {
            "name": program_name(key),
            "colour": DRUM_COLOUR if key == DRUMS else COLOURS[place % len(COLOURS)],
            "notes": int(mine.sum()),
            "per_bar": np.bincount(bar[mine], minlength=size).tolist(),
        }
    return {
        "notes": int(begins.sum()),
        "bars": size,
        "per_bar": np.bincount(bar[begins], minlength=size).tolist(),
        "sounding_before": int((sounds & ~begins).sum()),
        "pitch_range": [int(pitches.min()), int(pitches.max())] if len(pitches) else [],
        "bar_ticks": bounds.tolist(),
        "programs": programs,
    }


def _grid(axes: Axes, numbers: dict[str, Any]) -> None:
    """Bar lines with numbers, the lines and names of each C, and the shaded prompt."""
    bounds, bars, first = numbers["bar_ticks"], numbers["bars"], numbers["first_bar"]
    low, high = numbers["pitch_range"]
    prompt = min(max(numbers["prompt_bars"] - first + 1, 0), bars)
    if prompt:
        axes.axvspan(bounds[0], bounds[prompt], color=PROMPT_COLOUR, zorder=0)
        axes.axvline(bounds[prompt], color="#b59a3a", linewidth=1.2, zorder=2)
    axes.vlines(bounds, -1, 129, color="#bbbbbb", linewidth=0.7, zorder=1)
    axes.hlines(np.arange(0, 129, 12) - 0.5, bounds[0], bounds[-1], color="#dddddd", linewidth=0.7)
    step = max(1, -(-bars // (1.8 * axes.figure.get_figwidth())))  # type: ignore[union-attr]
    step = next((size for size in (1, 2, 4, 8, 16, 32) if size >= step), 64)
    # numbers stand at the beginning of a bar: bar 1, then after every fourth, eighth, ...
    labelled = range(0, bars, step)
    axes.set_xticks([bounds[i] for i in labelled], [str(first + i) for i in labelled], fontsize=8)
    axes.set_yticks(range(0, 128, 12), [f"C{octave - 1}" for octave in range(11)], fontsize=8)
    axes.set_xlim(bounds[0], max(bounds[-1], bounds[0] + 1))
    axes.set_ylim(low - 2.5, high + 2.5)
    axes.set_xlabel("bar", fontsize=9)
    axes.set_ylabel("pitch", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _notes(axes: Axes, piece: Piece, numbers: dict[str, Any]) -> None:
    """Boxes, the louder the stronger, with a legend of instruments."""
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch

    start, stop = numbers["bar_ticks"][0], numbers["bar_ticks"][-1]
    thinnest = (stop - start) / (DOTS * axes.figure.get_figwidth())  # type: ignore[union-attr]
    players = np.array([_player(track) for track in piece.tracks], dtype=object)[piece.track]
    handles = [Patch(color=PROMPT_COLOUR, label="given")] if numbers["prompt_bars"] else []
    for key, entry in numbers["programs"].items():
        rows = (players == key) & (piece.end > start) & (piece.onset < stop)
        left, pitch = piece.onset[rows], piece.pitch[rows]
        right = np.maximum(piece.end[rows], left + 1.5 * thinnest)
        corners = [(left, -0.42), (right, -0.42), (right, 0.42), (left, 0.42)]
        boxes = np.stack([np.stack([x, pitch + y], axis=-1) for x, y in corners], axis=1)
        axes.add_collection(
            PolyCollection(
                boxes,  # type: ignore[arg-type]
                facecolors=entry["colour"],
                edgecolors="white",
                linewidths=0.3,
                alpha=0.35 + 0.65 * piece.velocity[rows] / 127,
                zorder=3,
            )
        )
        handles.append(Patch(color=entry["colour"], label=f"{entry['name']} ({entry['notes']})"))
    axes.figure.legend(
        handles=handles, loc="outside lower left", ncols=min(len(handles), 4), fontsize=8,
        frameon=False,
    )  # fmt: skip
