"""Pictures of an evaluation: confusions, ROC curves, predicted against true numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def confusion(
    counts: Sequence[Sequence[int]], names: Sequence[str], columns: Sequence[str], target: Path
) -> None:
    """Draw numbers by true (rows) and predicted class, shaded by their part of the row."""
    figure, axes = _axes(2.5 + 0.6 * len(columns), 2.5 + 0.6 * len(names))
    shares = [[n / max(sum(row), 1) for n in row] for row in counts]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(ylabel="label")
    if len(names) <= 20:
        for i, row in enumerate(counts):
            for j, n in enumerate(row):
                color = "white" if shares[i][j] > 0.5 else "black"
                axes.text(j, i, str(n), ha="center", va="center", color=color, fontsize=8)
    figure.savefig(target, dpi=120)


def roc(curves: Mapping[str, tuple[float, NDArray[Any]]], target: Path) -> None:
    """Draw ROC curves, by name: area, and corners ``[k 3]`` with false and true positive rates."""
    figure, axes = _axes(5, 4.6)
    axes.plot([0, 1], [0, 1], ":", color="grey", linewidth=1)
    for name, (area, points) in curves.items():
        axes.plot(points[:, 1], points[:, 2], label=f"{name}: area {area:.3f}", linewidth=1.2)
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    axes.set_aspect("equal")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(target, dpi=120)


def scatter(points: Mapping[str, Sequence[NDArray[Any]]], target: Path) -> None:
    """Draw predicted against true numbers, by name."""
    figure, axes = _axes(5, 4.6)
    for name, (true, said) in points.items():
        alpha = min(1.0, max(0.1, 200 / max(len(true), 1)))
        axes.plot(true, said, ".", label=name, alpha=alpha, markersize=4, rasterized=True)
        if len(true):
            ends = [min(true), max(true)]
            axes.plot(ends, ends, ":", color="grey", linewidth=1)
    axes.set(xlabel="label", ylabel="predicted")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(target, dpi=120)
