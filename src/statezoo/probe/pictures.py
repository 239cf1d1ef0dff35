"""Pictures of probes: accuracy by length, and accuracy against bytes of state."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from statezoo.probe.results import Entry, value

__all__ = ["draw_curves", "draw_frontier"]


def draw_curves(path: Path, entries: Sequence[Entry]) -> None:
    """Draw the best and the mean value by length, a panel for each task with several lengths."""
    from matplotlib.figure import Figure

    panels: dict[str, list[Entry]] = {}
    for entry in entries:
        panels.setdefault(entry.probe, []).append(entry)
    figure = Figure(figsize=(5.2 * len(panels) + 2.4, 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    names = list(dict.fromkeys((entry.model, entry.d_model) for entry in entries))
    several = len({width for _, width in names}) > 1
    for axis, (probe, found) in zip(axes, panels.items(), strict=True):
        for entry in found:
            number = names.index((entry.model, entry.d_model))
            lengths = sorted(map(int, entry.results[0]["test"]))
            values = [[value(one, n) for one in entry.results] for n in lengths]
            style: dict[str, Any] = dict(color=f"C{number % 10}", marker="os^Dv"[number // 10 % 5])
            label = f"{entry.model}{f', {entry.d_model}' if several else ''}"
            axis.plot(lengths, [max(x) for x in values], label=label, **style)
            means = [statistics.fmean(x) for x in values]
            axis.plot(lengths, means, linestyle=":", linewidth=0.8, **style)
        trained = found[0].results[0]["cell"]["task"].get("max_length")
        if trained in lengths:
            axis.axvline(trained, color="0.8", linewidth=0.8)
        axis.set(title=probe, xlabel="length", ylim=(-0.05, 1.05), xscale="log")
        axis.set_xticks(lengths, [str(n) for n in lengths])
        axis.minorticks_off()
    axes[0].set_ylabel(f"{found[0].results[0]['cell']['measure']}: best, mean dotted")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=120)


def draw_frontier(path: Path, entries: Sequence[Entry]) -> None:
    """Draw the best value against bytes of state after the longest problem of training."""
    from matplotlib.figure import Figure

    panels: dict[str, list[Entry]] = {}
    for entry in entries:
        panels.setdefault(entry.probe, []).append(entry)
    figure = Figure(figsize=(5.6 * len(panels) + 2, 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    models = list(dict.fromkeys(entry.model for entry in entries))
    for axis, (probe, found) in zip(axes, panels.items(), strict=True):
        for number, model in enumerate(models):
            points = sorted(
                (e.results[0]["state_bytes"], e.best) for e in found if e.model == model
            )
            if points:
                axis.plot(
                    *zip(*points, strict=True), label=model, color=f"C{number % 10}",
                    marker="os^Dv"[number // 10 % 5],
                )  # fmt: skip
        best, steps = -1.0, []
        for entry in sorted(found, key=lambda e: (e.results[0]["state_bytes"], -e.best)):
            if entry.best > best:
                best = entry.best
                steps.append((entry.results[0]["state_bytes"], best))
        axis.step(*zip(*steps, strict=True), where="post", color="0.7", linestyle="--", zorder=0)
        axis.set(title=probe, xlabel="bytes of state a sequence", ylim=(-0.05, 1.05), xscale="log")
    axes[0].set_ylabel("accuracy above chance, best of the seeds")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=120)
