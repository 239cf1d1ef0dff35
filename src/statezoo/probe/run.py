"""``statezoo probe run``: models on the tasks of a suite, as a table; goes on where it stopped."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from statezoo.parser import nearest
from statezoo.probe.base import Probe, Size, Suite
from statezoo.probe.cell import Cell, begin_worker, build, run_cell
from statezoo.probe.models import Model, parse_models, placed
from statezoo.probe.suites import SUITES

__all__ = ["plan_cells", "run"]


def run(
    *,
    suite: str,
    models: str | None = None,
    tasks: str | None = None,
    seeds: int = 1,
    size: Size = "quick",
    out: str = "probe.md",
    steps: int | None = None,
    jobs: int | None = None,
    device: str = "cpu",
) -> None:
    """Train models on synthetic tasks from several seeds, and compare them with publications.

    Every model is trained on each task and tested on longer problems; a cell of the table has the
    mean and the best over the seeds of the accuracy above chance at the longest length, and what is
    published of it. Finished cells are kept beside the table, so that the same command goes on
    where it was stopped, and more seeds, models or tasks add to it. Ctrl-C writes what there is.

    Args:
        suite: state_tracking, recall, in_context, long_context or algorithmic.
        models: Models with commas between, default those of the suite. A model is a mixer, or
            several, gla+attention, cycled over the layers; settings follow a mixer,
            deltaproduct:n_householder=3:negative_eigenvalues=false.
        tasks: Tasks of the suite with commas between; default its usual ones.
        seeds: Seeds, from 0 on.
        size: quick, for minutes on two CPU cores; or paper, the published setting, for a GPU.
        out: Markdown to write. Beside it go its .csv with every length and seed, .png with
            accuracy by length or token, .frontier.png with accuracy against bytes of state where
            the suite is of recall, and the folder .cells.
        steps: Optimiser steps instead of the suite's; for trials.
        jobs: Cells that are trained at once; default one for each CPU core, and one on other
            devices.
        device: Where to run: cpu, cuda, mps.

    Raises:
        ValueError: If a name is not known, a number out of range, or a model does not fit a task.
    """
    chosen = _find(suite, SUITES, "suite")
    _check(out, seeds, steps, jobs)
    probes = _probes(chosen, size, tasks)
    named = parse_models(models or chosen.models)
    cells = plan_cells(probes, named, seeds, steps)
    _check_fit(cells)
    folder = Path(out).with_suffix(".cells")
    folder.mkdir(exist_ok=True)
    missing = [cell for cell in cells if not (folder / f"{cell.name}.json").is_file()]
    if len(missing) < len(cells):
        sys.stderr.write(f"{len(cells) - len(missing)} of {len(cells)} cells are in {folder}\n")
    from statezoo.lightning_modules.facts import cores

    stopped = False
    try:
        _run_all(missing, folder, device, jobs or (cores() if device == "cpu" else 1))
    except (KeyboardInterrupt, SystemExit):  # Lightning turns the one into the other
        stopped = True
    files = [folder / f"{cell.name}.json" for cell in cells]
    results = [json.loads(file.read_text("utf-8")) for file in files if file.is_file()]
    if results:
        _write(Path(out), results, named, f"{suite}, {size} size: {chosen.about}", chosen.frontier)
    if stopped:
        sys.stderr.write(
            f"stopped with {len(results)} of {len(cells)} cells: the same command goes on\n"
        )
        raise SystemExit(130)


def plan_cells(
    probes: Mapping[str, Probe], models: Mapping[str, Model], seeds: int, steps: int | None = None
) -> list[Cell]:
    """Return the cells of a table: of every task, model, width, learning rate and seed."""
    return [
        Cell(
            probe=name,
            model=model,
            task=dict(probe.task),
            mixers=placed(mixers, probe.mixers),
            d_model=width,
            n_layers=max(probe.n_layers, len(mixers)),
            channel=probe.channel,
            steps=steps or probe.steps,
            batch_size=probe.batch_size,
            train_examples=probe.train_examples or (steps or probe.steps) * probe.batch_size,
            lr=lr,
            weight_decay=probe.weight_decay,
            warmup_steps=probe.warmup_steps,
            lengths=[*probe.lengths],
            examples=probe.examples,
            measure=probe.measure,
            seed=seed,
            precision=probe.precision,
        )
        for name, probe in probes.items()
        for model, mixers in models.items()
        for width in probe.d_model
        for seed in range(seeds)
        for lr in probe.lr
    ]


def _find(name: str, known: Mapping[str, Any], what: str) -> Any:
    if name not in known:
        raise ValueError(f"there is no {what} {name!r}{nearest(name, known)}: {', '.join(known)}.")
    return known[name]


def _probes(suite: Suite, size: str, tasks: str | None) -> dict[str, Probe]:
    """Return the probes that are meant."""
    known = _find(size, {"quick": suite.quick, "paper": suite.paper}, "size")
    if tasks is None:
        return {name: probe for name, probe in known.items() if probe.usual}
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    return {name: _find(name, known, "task") for name in names}


def _check(out: str, seeds: int, steps: int | None, jobs: int | None) -> None:
    """Raise where the arguments cannot be meant."""
    if min(seeds, steps or 1, jobs or 1) < 1 or 0 in (steps, jobs):
        raise ValueError(
            f"seeds, steps and jobs must be at least 1, got {seeds}, {steps} and {jobs}."
        )
    if not out.endswith(".md"):
        raise ValueError(f"out must end in .md (other files are named after it), got {out!r}.")
    if not Path(out).resolve().parent.is_dir():
        raise ValueError(f"cannot write {out}: there is no folder {str(Path(out).parent)!r}.")


def _check_fit(cells: Iterable[Cell]) -> None:
    """Build each kind of model once, so that what does not fit is told before anything is trained.

    Raises:
        ValueError: If settings of a model do not fit each other or its width.
    """
    seen = set()
    for cell in cells:
        kind = cell.probe, cell.model, cell.d_model
        if kind in seen:
            continue
        seen.add(kind)
        try:
            build(cell)
        except ValueError as error:
            raise ValueError(
                f"{cell.model} cannot be made for {cell.probe} (width {cell.d_model}): {error}"
            ) from None


def _run_all(cells: Sequence[Cell], folder: Path, device: str, jobs: int) -> None:
    """Run cells, several at once in processes of one thread each, and say what each has found."""
    began = time.perf_counter()
    for done, (cell, found) in enumerate(_found(cells, folder, device, jobs), 1):
        sys.stderr.write(
            f"{done}/{len(cells)} {cell.probe}, {cell.model}, width {cell.d_model}, seed "
            f"{cell.seed}: {found}; {time.perf_counter() - began:.0f} s so far\n"
        )
        sys.stderr.flush()


def _found(
    cells: Sequence[Cell], folder: Path, device: str, jobs: int
) -> Iterator[tuple[Cell, str]]:
    """Yield cells as they end, each with what it has found."""
    if min(jobs, len(cells)) <= 1:
        yield from ((cell, run_cell(cell, folder, device)) for cell in cells)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), begin_worker) as pool:
        waits = {pool.submit(run_cell, cell, folder, device): cell for cell in cells}
        try:
            for future in as_completed(waits):
                yield waits[future], future.result()
        except BaseException:
            for worker in active_children():
                worker.terminate()
            raise


def _write(
    out: Path, results: list[Any], models: Mapping[str, Model], title: str, frontier: bool
) -> None:
    """Write table, CSV and pictures, and show the table."""
    from statezoo.probe.measuring import MEASURES
    from statezoo.probe.pictures import draw_curves, draw_frontier
    from statezoo.probe.results import bring_together, markdown, write_csv

    entries = bring_together(results, models)
    said: dict[str, Any] = {}
    for entry in entries:
        said.setdefault(entry.probe, entry.results[0]["cell"])
    notes = [
        "Mean / best over the seeds, above chance, at the longest length, after the best at the "
        "shortest; then what is published."
    ]
    for name, cell in said.items():
        notes.append(
            f"{name}: {MEASURES[cell['measure']]}, at {max(cell['lengths'])}; trained at "
            f"{cell['task'].get('max_length', 'the lengths of the task')}, at most {cell['steps']} "
            f"steps of {cell['batch_size']}; {cell['n_layers']} layers, of a hybrid at "
            "least one of each kind."
        )
    text = markdown(entries, title, notes)
    out.write_text(text, encoding="utf-8")
    write_csv(out.with_suffix(".csv"), results)
    written = [out, out.with_suffix(".csv")]
    if draw_curves(out.with_suffix(".png"), entries):
        written.append(out.with_suffix(".png"))
    if frontier:
        written.append(out.with_suffix(".frontier.png"))
        draw_frontier(written[-1], entries)
    sys.stdout.write(text + "".join(f"wrote {path}\n" for path in written))
