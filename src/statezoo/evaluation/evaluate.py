"""``statezoo evaluate``: a model on tasks of lm-evaluation-harness, in this process."""

from __future__ import annotations

import json
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import version
from importlib.resources import as_file, files
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from statezoo.listing import aligned
from statezoo.parser import nearest

if TYPE_CHECKING:
    from statezoo.evaluation.knn import KNN

__all__ = ["Found", "evaluate", "evaluate_model"]

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
RESAMPLES = 1000
"""Draws for standard errors that have no formula."""


class Found(NamedTuple):
    """One number that a task gave.

    Attributes:
        task: Name of the task or group.
        n: Documents; None for a group.
        metric: What was measured, after its filter where there is one: ``first/exact_match``.
        value: The number.
        stderr: Its standard error; None where the harness has none.
    """

    task: str
    n: int | None
    metric: str
    value: float
    stderr: float | None


def evaluate(
    *,
    model: str,
    tasks: str,
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    offline: bool = False,
    device: str = "cpu",
    out: str | None = None,
    verbose: bool = False,
    knn: str | None = None,
    knn_weight: float | None = None,
    knn_temperature: float | None = None,
    knn_neighbours: int | None = None,
    knn_tokens: int | None = None,
) -> None:
    """Measure a causal model on tasks of lm-evaluation-harness, ours and yours.

    Args:
        model: Checkpoint, folder of a run, exported folder, or name of a model.
        tasks: Names with commas between; * stands for anything. ``statezoo`` means the three tasks
            that are shipped and need no network.
        include_path: Folder with the YAML files of further tasks.
        limit: Use this many documents of each task; for trials.
        num_fewshot: Examples before each question; default what the task says.
        batch_size: Requests at once; it changes results by rounding alone.
        seed: Draws the examples, and what tasks sample.
        offline: Whether to stay off the Hub: data must be on this machine.
        device: Where to run: cpu, cuda, mps.
        out: JSON to write with all results and settings.
        verbose: Show what the harness says meanwhile.
        knn: Corpus, read as statezoo score reads it, to mix in what followed the nearest contexts
            there, also where texts are written; a text that stands in it finds itself. Weight and
            temperature, where they are not given, are found on its last tenth, and told.
        knn_weight: Share of the neighbours, from 0 to 1.
        knn_temperature: What squared distances are divided by; the lower, the more the nearest
            count.
        knn_neighbours: Contexts that a prediction asks; default 1024.
        knn_tokens: Tokens of the corpus that are kept, its first ones; default 250000.

    Raises:
        ValueError: If a setting is out of range, the extra is not installed, there is no such task,
            or a task cannot be run.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    _check(names, include_path, limit, num_fewshot, out)
    if offline:
        _go_offline()
    from statezoo.evaluation.knn import asked

    results = evaluate_model(
        model,
        names,
        include_path=include_path,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        seed=seed,
        device=device,
        verbose=verbose,
        knn=asked(knn, knn_weight, knn_temperature, knn_neighbours, knn_tokens),
    )
    rows = [("task", "n", "metric", "value", "stderr")]
    for one in _table(results):
        error = "" if one.stderr is None else f"{one.stderr:.4f}"
        rows.append((one.task, str(one.n or ""), one.metric, f"{one.value:.4f}", error))
    sys.stdout.write("\n".join([*aligned(rows), *results["notes"]]) + "\n")
    if out:
        text = json.dumps(results, indent=2, default=str, ensure_ascii=False)
        Path(out).write_text(text + "\n", encoding="utf-8")
        sys.stdout.write(f"wrote {out}\n")


def _check(
    names: Sequence[str],
    include_path: str | None,
    limit: int | None,
    num_fewshot: int | None,
    out: str | None,
) -> None:
    """Raise where the arguments cannot be meant."""
    if not names:
        raise ValueError("evaluate needs the names of tasks, with commas between: --tasks statezoo")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 document, got {limit}.")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"num_fewshot must be at least 0, got {num_fewshot}.")
    if include_path and not Path(include_path).is_dir():
        raise ValueError(f"there is no folder {include_path!r} with tasks (--include_path).")
    if out and not Path(out).resolve().parent.is_dir():
        raise ValueError(f"cannot write {out}: there is no folder {str(Path(out).parent)!r}.")
    if find_spec("lm_eval") is None:
        raise ValueError('evaluate needs lm-evaluation-harness: pip install "statezoo[eval]"')


def _go_offline() -> None:
    """Keep the libraries of the Hub from asking it; they look once, when they are imported.

    Raises:
        ValueError: If they are imported already, and are online.
    """
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None and not constants.HF_HUB_OFFLINE:
        raise ValueError(
            "offline must be known before huggingface_hub is imported: set HF_HUB_OFFLINE=1 in the "
            "environment of this process."
        )
    os.environ.update(dict.fromkeys(OFFLINE, "1"))


def evaluate_model(
    model: str,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    device: str = "cpu",
    verbose: bool = False,
    knn: KNN | None = None,
) -> dict[str, Any]:
    """Run tasks; arguments as in :func:`evaluate`, ``knn`` with all its settings.

    Returns:
        What ``--out`` writes: ``results`` as the harness gives them, the settings and versions that
        they depend on, and ``notes`` for the reader.

    Raises:
        ValueError: As :func:`evaluate`.
    """
    with ExitStack() as stack:
        tell = stack.enter_context(_quiet(verbose))
        ours = stack.enter_context(as_file(files("statezoo.evaluation") / "tasks"))
        manager, names = _find(tasks, str(ours), include_path)

        from statezoo.evaluation.harness import language_model
        from statezoo.evaluation.scoring import open_scorer, trained_length

        scorer = open_scorer(model, device, batch_size, knn)
        found = _run(
            manager.load([part for name in names for part in _open(manager, name)]),
            language_model(scorer, tell),
            verbose,
            limit=limit,
            num_fewshot=num_fewshot,
            seed=seed,
        )
        length = trained_length(model)
    notes = scorer.notes
    if length is not None and scorer.longest > length:
        notes.append(
            f"the longest text has {scorer.longest} tokens; the model was trained on {length}."
        )
    kept = ("results", "groups", "group_subtasks", "n-samples", "n-shot", "versions", "configs")
    return {
        "model": model,
        "parameters": sum(x.numel() for x in scorer.net.parameters()),
        "tokenizer": scorer.tokenizer.kind,
        "bos_id": scorer.tokenizer.bos_id,
        "tasks": names,
        "settings": {
            "limit": limit, "num_fewshot": num_fewshot, "batch_size": batch_size, "seed": seed,
            "device": device,
        },
        "knn": scorer.knn,
        "trained_length": length,
        "longest": scorer.longest,
        "notes": notes,
        **{key: found[key] for key in kept if key in found},
        "libraries": {name: version(name) for name in ("statezoo", "lm_eval", "torch")},
    }  # fmt: skip


@contextmanager
def _quiet(verbose: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Keep logs, warnings and bars of the harness off the screen; yield a bar of our own."""
    if verbose:
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(file=sys.stderr)
    before = logging.root.manager.disable
    bar = Progress(
        console=console, transient=True, redirect_stdout=False, redirect_stderr=False,
        disable=not console.is_terminal,
    )  # fmt: skip
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            with bar:
                row = bar.add_task("requests", total=None)
                yield lambda done, of: bar.update(row, completed=done, total=of)
    finally:
        logging.disable(before)


def _find(tasks: Sequence[str], ours: str, include_path: str | None) -> tuple[Any, list[str]]:
    """Return a task manager that knows these tasks, and their names.

    The harness's own index takes seconds, so it is read only where it is needed.

    Raises:
        ValueError: If there is no such task; names the nearest, and files that cannot be read.
    """
    from lm_eval.tasks import TaskManager  # type: ignore[import-untyped,unused-ignore]

    folders = [ours, *([include_path] if include_path else [])]
    for defaults in (False, True):
        manager = TaskManager(include_path=folders, include_defaults=defaults)
        matches = {task: manager.match_tasks([task]) for task in tasks}
        if all(matches.values()):
            return manager, list(dict.fromkeys(name for x in matches.values() for name in x))
    missing = next(task for task, found in matches.items() if not found)
    broken = "".join(f"\n  {line}" for line in _broken(include_path))
    raise ValueError(
        f"no task {missing!r}{nearest(missing, manager.all_tasks)}; --include_path FOLDER adds "
        f"yours.{broken}"
    )


def _broken(include_path: str | None) -> Iterator[str]:
    """Say which task files cannot be read; the harness passes them over."""
    from lm_eval.tasks._yaml_loader import (  # type: ignore[import-untyped,unused-ignore]
        load_yaml,
    )

    for file in sorted(Path(include_path).rglob("*.yaml")) if include_path else []:
        try:
            content = load_yaml(file, resolve_func=False)
        except Exception as error:  # whatever YAML, includes and functions may raise
            yield f"{file} cannot be read: {_line(error)}"
            continue
        if not {"task", "group"} & content.keys():
            yield f"{file} names no task: write task: NAME"


def _open(manager: Any, name: str) -> list[Any]:
    """Load a task or group with its data.

    Raises:
        ValueError: If its data or its code cannot be had.
    """
    try:
        loaded = manager.load([name])
    except Exception as error:  # from the Hub, from data sets, or from the task's own code
        config = manager.task_index[name].cfg or {}
        hint = ""
        if os.environ.get("HF_HUB_OFFLINE") and "dataset_path" in config:
            hint = (
                f"; offline, its data {config['dataset_path']!r} must be in the cache of Hugging "
                "Face: run it once with a network"
            )
        raise ValueError(f"task {name!r} cannot be loaded: {_line(error)}{hint}.") from error
    groups = loaded.get("groups") or {}
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def _run(
    tasks: Mapping[str, Any],
    lm: Any,
    verbose: bool,
    *,
    limit: int | None,
    num_fewshot: int | None,
    seed: int,
) -> dict[str, Any]:
    """Return what the harness finds.

    Raises:
        ValueError: If a task asks for what its documents or the model do not have.
    """
    import numpy as np
    import torch
    from lm_eval import evaluate as run  # type: ignore[import-untyped,unused-ignore]

    for task in tasks["tasks"].values():
        own = task.get_config("num_fewshot")
        if num_fewshot is not None and own != 0:  # 0 is what a task cannot do without
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its processes take longer than they save
    try:
        found: dict[str, Any] = run(
            lm=lm, task_dict=tasks, limit=limit, bootstrap_iters=RESAMPLES, log_samples=False
        )
    except ValueError:
        raise
    except Exception as error:  # of any kind: templates and functions of the task
        if verbose:
            raise
        raise ValueError(f"the task failed: {_line(error)} (--verbose shows where).") from error
    return found


def _line(error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0][:300].rstrip(".")
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


def _table(results: Mapping[str, Any]) -> Iterator[Found]:
    """Yield the numbers of all tasks and groups, each with its standard error."""
    sizes = results.get("n-samples", {})
    for task, metrics in {**results["results"], **results.get("groups", {})}.items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if metric.endswith("_stderr") or not kind or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            yield Found(
                task,
                sizes.get(task, {}).get("effective"),
                metric if kind == "none" else f"{kind}/{metric}",
                float(value),
                float(error) if isinstance(error, int | float) else None,
            )
