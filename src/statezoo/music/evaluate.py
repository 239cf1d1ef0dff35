"""``statezoo music evaluate``: how near generated music is to reference music, note by note."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statezoo.listing import aligned

if TYPE_CHECKING:
    from statezoo.music.measures import Sheet

__all__ = ["evaluate"]

COLOURS = {
    "generated": "#0072b2",
    "ceiling": "#999999",
    "reference": "#999999",
    "chance": "#d55e00",
}
COLOURS["shuffled"] = COLOURS["chance"]

COLUMNS = ("generated", "ceiling (5-95 %)", "chance")
MEANS = ("generated", "reference", "shuffled")

Measures = Mapping[str, Mapping[str, float | None]]


def evaluate(*, generated: str, reference: str, out: str = "metrics.json", seed: int = 0) -> None:
    """Measure generated music against reference music, beside what chance and the reference reach.

    Args:
        generated: File or folder of MIDI, MusicXML or ABC.
        reference: The same of music that no model was trained on; two files and more also tell what
            the reference reaches against itself.
        out: JSON to write; a table of the same name in .png is drawn beside it.
        seed: Draws the halves of the reference and the shuffled music.

    Raises:
        ValueError: If one of them holds no usable music; says why.
        FileNotFoundError: If one of them does not exist.
    """
    from statezoo.music.measures import compare, pitch_classes

    target = Path(out)
    if target.suffix != ".json":
        raise ValueError(f"out must end in .json, got {out!r}.")
    sets, skipped = {}, {}
    for name, path in (("generated", generated), ("reference", reference)):
        sets[name], skipped[name] = read(path, name)
    found = compare(sets["generated"], sets["reference"], seed=seed)
    report = {
        "generated": {
            "path": generated,
            **counts(sets["generated"]),
            "skipped": skipped["generated"],
        },
        "reference": {
            "path": reference,
            **counts(sets["reference"]),
            "skipped": skipped["reference"],
        },
        "seed": seed,
        "measures": found,
        "pitch_classes": {
            name: [float(sum(column)) for column in zip(*map(pitch_classes, pieces), strict=True)]
            for name, pieces in sets.items()
        },
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=2) + "\n")
    draw(report, target.with_suffix(".png"))
    sys.stdout.write(table(report) + f"\nwrote {target} and {target.with_suffix('.png')}\n")


def read(path: str, role: str) -> tuple[list[Sheet], dict[str, str]]:
    """Return the usable pieces of a file or folder, and why others were left out.

    Raises:
        ValueError: If there is none.
        FileNotFoundError: If there is no such place.
    """
    from statezoo.datamodules.music.readers import Skipped, music_source
    from statezoo.music.measures import sheet

    skipped: list[Skipped] = []
    pieces = [sheet(entry.piece) for entry in music_source(path).entries(skipped)]
    reasons = {item.name: item.reason for item in skipped}
    if not pieces:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:5])
        raise ValueError(
            f"--{role} {path} has no usable music ({listed or 'no file'}): give at least one piece."
        )
    return pieces, reasons


def counts(pieces: Sequence[Sheet]) -> dict[str, int]:
    """Return how much music there is."""
    return {
        "pieces": len(pieces),
        "notes": sum(len(x.onset) for x in pieces),
        "bars": sum(len(x.bars) - 1 for x in pieces),
    }


# ------------------------------------------------------------------------ table


def table(report: Mapping[str, Any]) -> str:
    """Lay out the measures, a row each."""
    from statezoo.music.measures import HISTOGRAMS, SCALARS

    found: Measures = report["measures"]
    lines = []
    for name in ("generated", "reference"):
        part = report[name]
        lines.append(
            f"{name}: {part['pieces']} pieces, {part['bars']} bars, {part['notes']} notes"
            + (f"; {len(part['skipped'])} skipped" if part["skipped"] else "")
        )
    rows: list[Sequence[str]] = [("overlap of histograms", *COLUMNS)]
    for name in HISTOGRAMS:
        row = found[name]
        rows.append((name, number(row["score"]), spread(row), number(row["chance"])))
    lines += ["", *aligned(rows), ""]
    rows = [("mean over pieces", *MEANS, "off by", "halves off by")]
    for name in SCALARS:
        row = found[name]
        means = (number(row[key]) for key in (*MEANS, "score"))
        rows.append((name, *means, spread(row)))
    lines += aligned(rows)
    lines += [
        "",
        "ceiling, halves: random halves of the reference against each other. chance, shuffled: the "
        "reference with",
        "notes drawn anew; for repetition and groove with all its bars dealt out anew.",
    ]
    if report["reference"]["pieces"] < 2:
        lines.append("One piece of reference has no halves: no ceiling; give more.")
    return "\n".join(lines)


def number(value: float | None) -> str:
    """Write a number in three digits, or a dash."""
    return "-" if value is None else f"{value:.3f}"


def spread(row: Mapping[str, float | None]) -> str:
    """Write a ceiling with its range."""
    low, high = number(row["ceiling_low"]), number(row["ceiling_high"])
    return "-" if row["ceiling"] is None else f"{number(row['ceiling'])} ({low}-{high})"


# --------------------------------------------------------------------- pictures


def draw(report: Mapping[str, Any], target: Path) -> None:
    """Draw each measure as bars, and the pitch classes of both sets.

    Raises:
        ValueError: If matplotlib is missing.
    """
    from statezoo.datamodules.music.notes import require

    require("matplotlib", "Drawing the measures")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from statezoo.music.measures import HISTOGRAMS

    found: Measures = report["measures"]
    columns = 4
    rows = math.ceil((len(found) + 1) / columns)
    figure = Figure(figsize=(3.1 * columns, 2.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns).flatten()
    for axis, (name, row) in zip(axes, found.items(), strict=False):
        if name in HISTOGRAMS:
            _bars(
                axis,
                {"generated": row["score"], "ceiling": row["ceiling"], "chance": row["chance"]},
            )
            if row["ceiling"] is not None:
                low, high = row["ceiling_low"], row["ceiling_high"]
                axis.plot([1, 1], [low, high], color="black", linewidth=1)
            axis.set_title(f"{name}, overlap", fontsize=9)
            axis.set_ylim(0, 1.05)
        else:
            _bars(axis, {key: row[key] for key in MEANS})
            axis.set_title(name, fontsize=9)
    _pitch_classes(axes[len(found)], report["pitch_classes"])
    for axis in axes[len(found) + 1 :]:
        axis.set_axis_off()
    figure.savefig(target, dpi=110)


def _bars(axis: Any, values: Mapping[str, float | None]) -> None:
    heights = [0.0 if value is None else value for value in values.values()]
    bars = axis.bar(list(values), heights, color=[COLOURS[name] for name in values], width=0.65)
    axis.bar_label(bars, [number(value) for value in values.values()], fontsize=8, padding=1)
    axis.margins(y=0.15)
    axis.tick_params(labelsize=8)


def _pitch_classes(axis: Any, classes: Mapping[str, Sequence[float]]) -> None:
    names = ("C", "", "D", "", "E", "F", "", "G", "", "A", "", "B")
    for shift, (name, heights) in zip((-0.2, 0.2), classes.items(), strict=True):
        total = sum(heights) or 1.0
        places = [i + shift for i in range(12)]
        shares = [height / total for height in heights]
        axis.bar(places, shares, width=0.4, color=COLOURS[name], label=name)
    axis.set_xticks(range(12), names, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.set_title("pitch classes, share of notes", fontsize=9)
    axis.legend(fontsize=7)
