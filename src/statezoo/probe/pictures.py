"""Pictures of probes: accuracy by length or token, and against bytes of state."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from statezoo.probe.results import Entry, Result, value

__all__ = ["draw_curves", "draw_frontier"]


def draw_curves(path: Path, entries: Sequence[Entry]) -> bool:
    """Draw what the best seed and all in the mean can do, a panel for each task.

    That is the value by length of the test; where whole sequences count, the share of them that is
    right up to each token of the longest. Tasks of one length and one answer have no curve.

    Returns:
        Whether there was anything to draw.
    """
    drawn = [entry for entry in entries if len(_curve(entry.results[0])) > 1]
    if not drawn:
        return False
    panels, save = _panels(drawn, "best seed, mean dotted")
    names = list(dict.fromkeys((entry.model, entry.d_model) for entry in entries))
    several = len({width for _, width in names}) > 1
    for axis, probe, found in panels:
        for entry in found:
            number = names.index((entry.model, entry.d_model))
            curves = [_curve(one) for one in entry.results]
            best = curves[max(range(len(curves)), key=lambda i: value(entry.results[i]))]
            style: dict[str, Any] = dict(color=f"C{number % 10}", alpha=0.8)
            if len(best) < 9:
                style["marker"] = "os^Dv"[number // 10 % 5]
            label = f"{entry.model}{f', {entry.d_model}' if several else ''}"
            axis.plot([*best], [*best.values()], label=label, **style)
            mean = [statistics.fmean(curve[x] for curve in curves) for x in best]
            axis.plot([*best], mean, linestyle=":", linewidth=0.8, **style)
        cell = found[0].results[0]["cell"]
        trained = cell["task"].get("max_length")
        if trained is not None:
            axis.axvline(trained, color="0.8", linewidth=0.8, zorder=0)
        of = "token" if _cumulative(found[0].results[0]) else "length"
        axis.set(title=f"{probe}: {cell['measure']}", xlabel=of, ylim=(-0.05, 1.05), xscale="log")
    save(path)
    return True


def _panels(
    entries: Sequence[Entry], label: str
) -> tuple[list[tuple[Any, str, list[Entry]]], Callable[[Path], None]]:
    """Return an axis, its task and what is drawn there for each task, and what saves them."""
    from matplotlib.figure import Figure

    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.probe, []).append(entry)
    figure = Figure(figsize=(5.4 * len(found) + 2.2, 4.1), layout="constrained")
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    axes[0].set_ylabel(label)

    def save(path: Path) -> None:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=7)
        figure.savefig(path, dpi=120)

    return [(axis, *part) for axis, part in zip(axes, found.items(), strict=True)], save


def _cumulative(result: Result) -> list[float]:
    """Return the share of sequences right up to each token, where those are what counts."""
    found = result["test"][str(max(map(int, result["test"])))]
    wanted = result["cell"]["measure"] == "sequences"
    return list(found.get("cumulative", ())) if wanted else []


def _curve(result: Result) -> dict[int, float]:
    """Return what is drawn of a result: values by token or by length."""
    if shares := _cumulative(result):
        return dict(enumerate(shares, 1))
    return {n: value(result, n) for n in sorted(map(int, result["test"]))}


def draw_frontier(path: Path, entries: Sequence[Entry]) -> None:
    """Draw the best value against bytes of state after the longest problem of training."""
    panels, save = _panels(entries, "accuracy above chance, best of the seeds")
    models = list(dict.fromkeys(entry.model for entry in entries))
    for axis, probe, found in panels:
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
    save(path)
