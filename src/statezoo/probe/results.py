"""Results of cells, brought together: over learning rates and seeds, beside what is expected."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from statezoo.probe.models import Model
from statezoo.probe.published import Expected, expected

__all__ = ["Entry", "Result", "bring_together", "markdown", "value", "write_csv"]

Result = Mapping[str, Any]
"""What a cell has written."""


class Entry(NamedTuple):
    """A place of the table: a model on a task, over its seeds.

    Attributes:
        probe: The task.
        model: The model.
        d_model: Its width.
        results: The result of each seed, that of the best learning rate.
        mean: Of the seeds' values.
        best: The largest.
        expected: What is published, of the widest models; None if nothing is.
        agrees: Whether the best agrees with it; None if that cannot be said.
    """

    probe: str
    model: str
    d_model: int
    results: tuple[Result, ...]
    mean: float
    best: float
    expected: Expected | None
    agrees: bool | None


def value(result: Result, length: int | None = None, split: str = "test") -> float:
    """Return what counts of a result: an accuracy, as a share of what is above chance.

    Args:
        result: What a cell has written.
        length: At which length; default at the longest.
        split: ``test``, or ``val``, by which learning rates are chosen.
    """
    found = result[split][str(length or max(map(int, result[split])))]
    measure = result["cell"]["measure"]
    chance = found["chance"] if measure == "tokens" else 0.0
    return float((found[measure] - chance) / (1 - chance))


def bring_together(results: Iterable[Result], models: Mapping[str, Model]) -> list[Entry]:
    """Return the places of the table, in the order of the results.

    Args:
        results: What cells have written.
        models: What the names of models stand for.
    """
    groups: dict[tuple[str, str, int], dict[int, Result]] = {}
    for one in results:
        cell = one["cell"]
        seeds = groups.setdefault((cell["probe"], cell["model"], cell["d_model"]), {})
        held = seeds.get(cell["seed"])
        if held is None or value(one, split="val") > value(held, split="val"):
            seeds[cell["seed"]] = one
    best = {key: max(map(value, seeds.values())) for key, seeds in groups.items()}
    entries = []
    for (probe, model, width), seeds in groups.items():
        widest = width == max(w for p, _, w in groups if p == probe)
        others = {name: x for (p, name, w), x in best.items() if (p, w) == (probe, width)}
        hoped = expected(probe, models[model]) if widest else None
        top = best[probe, model, width]
        entries.append(
            Entry(
                probe, model, width, tuple(seeds.values()),
                statistics.fmean(map(value, seeds.values())), top,
                hoped, hoped.agrees(top, others) if hoped else None,
            )
        )  # fmt: skip
    return entries


def markdown(entries: Sequence[Entry], title: str, notes: Sequence[str]) -> str:
    """Return the table: a row for each model and width, a column for each task.

    Args:
        entries: The places.
        title: Heading.
        notes: Sentences below.
    """
    probes = list(dict.fromkeys(entry.probe for entry in entries))
    several = len({(entry.probe, entry.d_model) for entry in entries}) > len(probes)
    head = ["model", *(["width"] if several else []), *probes]
    lines = [f"# {title}", "", _row(head), _row(["---"] * len(head))]
    rows: dict[tuple[str, int], dict[str, Entry]] = {}
    for entry in entries:
        rows.setdefault((entry.model, entry.d_model * several), {})[entry.probe] = entry
    for (model, width), found in rows.items():
        cells = [_cell(found.get(probe)) for probe in probes]
        lines.append(_row([f"`{model}`", *([str(width)] if several else []), *cells]))
    judged = [entry for entry in entries if entry.agrees is not None]
    wrong = [(entry, entry.expected) for entry in judged if entry.expected and not entry.agrees]
    lines += ["", *(f"{note}\n" for note in notes)]
    lines.append(f"{len(judged) - len(wrong)} of {len(judged)} published cells agree.")
    for entry, hoped in wrong:
        lines.append(
            f"- differs: `{entry.model}` on {entry.probe}"
            f"{f' with width {entry.d_model}' if several else ''}: best {entry.best:.2f}, "
            f"published {hoped.text} ({hoped.source})"
        )
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(entry: Entry | None) -> str:
    """Write mean and best after the best at the shortest length, what is published, agreement."""
    if entry is None:
        return "not run"
    numbers = f"{entry.mean:.2f} / {entry.best:.2f}"
    lengths = [int(length) for length in entry.results[0]["test"]]
    if (short := min(lengths)) < max(lengths):
        numbers = f"{max(value(one, short) for one in entry.results):.2f} at {short}, {numbers}"
    if entry.expected is None:
        return numbers
    mark = {True: "agrees", False: "DIFFERS", None: "?"}[entry.agrees]
    return f"{numbers} ({entry.expected.text}: {mark})"


COLUMNS = (
    "probe", "model", "d_model", "seed", "lr", "steps", "seconds", "diverged", "parameters",
    "state_bytes", "length", "problems", "scored", "chance", "tokens", "sequences", "legal",
    "variation", "nll",
)  # fmt: skip


def write_csv(path: Path, results: Iterable[Result]) -> None:
    """Write a row for each result and length."""
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        rows.writeheader()
        for one in results:
            shared = {**one["cell"], **one}
            for length, found in one["test"].items():
                rows.writerow({**shared, "length": length, **found})
