"""Pictures of tracks and of mutations, as PNG files."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["save_heatmap", "save_track"]

PANELS = 8
"""Contigs in one picture."""


def save_track(bedgraph: Path, unit: str) -> Path:
    """Draw a bedGraph, a panel for each of the first contigs, means where it is dense.

    Returns:
        The picture, ``TRACK.png``.
    """
    from statezoo.dna.tracks import points

    panels = list(islice(points(bedgraph), PANELS))
    figure, save = _canvas(10, 1 + 1.6 * max(len(panels), 1))
    for i, (contig, place, value) in enumerate(panels, 1):
        axis = figure.add_subplot(len(panels), 1, i)
        axis.plot(place, value, linewidth=0.8)
        axis.set_ylabel(f"{unit} per base")
        axis.set_title(contig, fontsize=9, loc="left")
        axis.margins(x=0)
    if panels:
        axis.set_xlabel("base, from 0")
    return save(Path(f"{bedgraph}.png"))


def save_heatmap(
    path: Path, values: NDArray[np.float64], ref: str, start: int, title: str, label: str
) -> Path:
    """Draw what every base in every place changes; blue lowers, red raises.

    Args:
        path: The picture.
        values: ``[L 4]`` changes to A, C, G, T; NaN stays blank.
        ref: The ``L`` bases that are there, marked by dots.
        start: Number of the first.
        title: What was mutated.
        label: What the values are.

    Returns:
        ``path``.
    """
    length = len(ref)
    figure, save = _canvas(min(max(6.0, length / 8), 40.0), 2.4)
    axis = figure.add_subplot()
    known = values[~np.isnan(values)]
    most = float(np.abs(known).max()) if known.size else 1.0
    image = axis.imshow(
        values.T, cmap="RdBu_r", vmin=-most or -1.0, vmax=most or 1.0, aspect="auto",
        interpolation="nearest", extent=(start - 0.5, start + length - 0.5, 3.5, -0.5),
    )  # fmt: skip
    there = [(start + i, "ACGT".index(base)) for i, base in enumerate(ref) if base in "ACGT"]
    if there and length <= 400:
        axis.scatter(*zip(*there, strict=True), s=4, color="black")
    axis.set_yticks(range(4), list("ACGT"))
    axis.set_xlabel("base, from 1")
    axis.set_title(title, fontsize=9, loc="left")
    figure.colorbar(image, ax=axis, label=label)
    return save(path)


def _canvas(width: float, height: float) -> tuple[Any, Callable[[Path], Path]]:
    """Return a figure that needs no display, and what saves it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)

    def save(path: Path) -> Path:
        figure.savefig(path, dpi=120, metadata={"Software": None})
        return path

    return figure, save
