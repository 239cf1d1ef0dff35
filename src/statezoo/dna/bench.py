"""``statezoo dna bench``: classifiers on folders of labelled DNA, beside what they must beat."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from statezoo.arguments import find_weights
from statezoo.dna.bench_table import Section, markdown
from statezoo.quiet import quiet

__all__ = ["Task", "bench", "find_tasks", "train_and_test"]

TABLES = (".csv", ".tsv", ".parquet", ".csv.gz", ".tsv.gz")
TOKENS_PER_STEP = 4096
SCORES = ("accuracy", "mcc", "auc")


class Task(NamedTuple):
    """One data set: its name in the table, and the file or folder that ``LabelledDNA`` reads."""

    name: str
    path: str


class Recipe(NamedTuple):
    """How a network is made and trained; ``steps`` 0 chooses by the size of the data."""

    d_model: int
    n_layers: int
    steps: int
    lr: float
    pooling: str
    reverse_complement: str
    device: str

    def __str__(self) -> str:
        return (
            f"d_model {self.d_model}, {self.n_layers} layers, both directions, "
            f"{self.steps or '10 epochs, at least 300 and at most 2000'} steps, lr {self.lr:g}, "
            f"pooling {self.pooling}, reverse complement {self.reverse_complement}; "
            "tested is the best of 10 validations (a pretrained network keeps its own size "
            "and directions)"
        )


def bench(
    *,
    root: str,
    tasks: str = "*",
    mixers: str = "gla",
    model: str | None = None,
    seeds: int = 3,
    steps: int = 0,
    d_model: int = 64,
    n_layers: int = 2,
    lr: float = 3e-3,
    pooling: Literal["profile", "mean", "last"] = "profile",
    reverse_complement: Literal["none", "augment", "average", "equivariant"] = "none",
    out: str = "bench.md",
    device: str = "cpu",
) -> None:
    """Train classifiers on each labelled data set in a folder; print scores beside baselines.

    Args:
        root: Folder of data sets: tables with a column split, or folders with train and test, as
            GenomicBenchmarks, GUE and the Nucleotide Transformer have them; the test is read once
            per network and seed.
        tasks: Names of data sets, with * and ?, separated by commas.
        mixers: Architectures to compare, separated by commas; + joins those of a hybrid.
        model: Checkpoint, folder of a run, Hub folder, Hub name or short name to fine-tune instead.
        seeds: Runs of each; a seed draws weights, order and, where none is given, the validation.
        steps: Optimiser steps; 0 chooses by the size of the data.
        d_model: Width of the stream of tokens.
        n_layers: Number of blocks.
        lr: Highest learning rate.
        pooling: How a sequence is summed up: its profile keeps what stands where.
        reverse_complement: What to do about the other strand.
        out: Table to write; finished runs are kept in a .json beside it and not run again.
        device: Where to run: cpu, cuda, mps.
    """
    found = find_tasks(root, tasks)
    recipe = Recipe(d_model, n_layers, steps, lr, pooling, reverse_complement, device)
    networks = [model] if model else [name.strip() for name in mixers.split(",") if name.strip()]
    if model:
        find_weights(model)  # a run without a checkpoint is told before the baselines are fitted
    if seeds < 1 or not networks:
        raise ValueError(f"bench needs at least one seed and one of mixers, got seeds={seeds}.")
    table, store, sections = Path(out), _Store(Path(out).with_suffix(".json")), list[Section]()
    for task in found:
        base = store.get(task)
        if base is None:
            say(f"{task.name}: baselines")
            base = store.put(_baselines(task), task)
        if "useless" in base:
            say(f"{task.name}: left out, {base['useless']}")
            continue
        sections.append(Section(task.name, base, {network: [] for network in networks}))
        for network, seed in product(networks, range(seeds)):
            run = store.get(task, network, seed, recipe)
            kept = run is not None
            if run is None:
                run = train_and_test(task, network, seed, recipe, pretrained=model is not None)
                store.put(run, task, network, seed, recipe)
            sections[-1].runs[network].append(run)
            say(
                f"{task.name} {network} seed {seed}: accuracy {run['accuracy']:.3f} "
                + (f"(kept in {store.path})" if kept else f"({run['seconds']:.0f} s)")
            )
            table.write_text(markdown(sections, str(recipe)), encoding="utf-8")
    if not sections:
        raise ValueError(f"{root}: no data set could be used, see above.")
    say(f"\n{table.read_text(encoding='utf-8')}\nwrote {table} and {store.path}")


def say(text: str) -> None:
    """Write a line."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def find_tasks(root: str, patterns: str = "*") -> list[Task]:
    """Data sets below a folder, in the order of their names.

    A folder with a training file or folder is one data set, a table elsewhere too.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If there is no data set in it, or none that ``patterns`` names.
    """
    place = Path(root).expanduser()
    if not place.is_dir():
        raise FileNotFoundError(f"No folder {root!r} of data sets.")
    found = _below(place, "")
    if not found:
        raise ValueError(
            f"{root} holds no data set: bench needs folders with train and test, or tables "
            f"({', '.join(TABLES)}) with a column split."
        )
    wanted = [pattern.strip() for pattern in patterns.split(",")]
    chosen = [task for task in found if any(fnmatch(task.name, p) for p in wanted)]
    if not chosen:
        raise ValueError(
            f"{root} has no data set {patterns!r}; it has {', '.join(t.name for t in found)}."
        )
    return chosen


def _below(folder: Path, name: str) -> list[Task]:
    children = sorted(folder.iterdir())
    if any(child.name.split(".")[0] in ("train", "training") for child in children):
        return [Task(name or folder.resolve().name, str(folder))]
    found = []
    for child in children:
        inner = f"{name}/{child.name}" if name else child.name
        if child.is_dir():
            found += _below(child, inner)
        elif child.name.lower().endswith(TABLES):
            found.append(Task(inner.split(".")[0], str(child)))
    return found


class _Store:
    """Finished runs in a JSON file, written after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if path.is_file():
            try:
                self.rows = json.loads(path.read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path} is no file of finished runs ({error}): remove it, or choose another "
                    "name with --out."
                ) from error
        path.parent.mkdir(parents=True, exist_ok=True)

    def get(self, task: Task, *what: Any) -> dict[str, Any] | None:
        """The row of a task and what was done with it; None if it is not there."""
        return self.rows.get(self._key(task, what))

    def put(self, row: dict[str, Any], task: Task, *what: Any) -> dict[str, Any]:
        """Keep a row, and write all of them."""
        self.rows[self._key(task, what)] = row
        draft = self.path.with_suffix(".json.tmp")
        draft.write_text(json.dumps(self.rows, indent=1), encoding="utf-8")
        draft.replace(self.path)
        return row

    @staticmethod
    def _key(task: Task, what: tuple[Any, ...]) -> str:
        return json.dumps([task.name, _size(Path(task.path)), *what])


def _size(path: Path) -> int:
    """Bytes of a data set: another size is another data set."""
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    return sum(file.stat().st_size for file in files)


def _baselines(task: Task) -> dict[str, Any]:
    """Sizes, and classical scores on the test split; ``useless``, a reason, where there are none.

    Raises:
        ValueError: If scikit-learn is not installed.
    """
    from statezoo.datamodules.dna.classical import require_sklearn
    from statezoo.datamodules.dna.labelled import LabelledDNA

    require_sklearn()
    data = LabelledDNA(task.path)
    try:
        if data.test_split != "test":
            return {"useless": "it has no test split: add a column split"}
        scores = data.classical_baselines("test")
    except (ValueError, OSError) as error:
        return {"useless": str(error)}
    sizes = {split: len(data.rows(split)[0]) for split in ("train", "val", "test")}
    return {**sizes, "scores": {name: list(found) for name, found in scores.items()}}


def train_and_test(
    task: Task, network: str, seed: int, recipe: Recipe, *, pretrained: bool = False
) -> dict[str, Any]:
    """Train on the training split, keep the best of the validation, read the test once.

    Args:
        task: Data set.
        network: Names of mixers joined by ``+``, or what to fine-tune.
        seed: Of weights, order and validation.
        recipe: Size and training.
        pretrained: Whether ``network`` is to be fine-tuned.

    Returns:
        ``accuracy``, ``mcc``, ``auc`` on the test, ``val_accuracy``, ``steps``, ``seconds``,
        ``n``, and ``right``, which rows were, as hexadecimal bits.
    """
    from lightning.pytorch import Trainer, seed_everything
    from lightning.pytorch.callbacks import ModelCheckpoint

    from statezoo.datamodules.dna.classical import score
    from statezoo.datamodules.dna.labelled import LabelledDNA

    start = time.perf_counter()
    seed_everything(seed, verbose=False)
    data = LabelledDNA(task.path, seed=seed)
    with quiet("statezoo.datamodules"):
        sequences, _ = data.rows("train")
        length = sum(map(len, sequences)) / len(sequences)
        data.batch_size = int(min(max(TOKENS_PER_STEP // length, 8), 64, len(sequences)))
        per_epoch = -(-len(sequences) // data.batch_size)
        steps = recipe.steps or min(max(10 * per_epoch, 300), 2000)
        module = _classifier(data, network, recipe, pretrained)
        with tempfile.TemporaryDirectory() as folder:
            best = ModelCheckpoint(folder, monitor="val/accuracy", mode="max")
            trainer = Trainer(
                accelerator="gpu" if recipe.device == "cuda" else recipe.device,
                devices=1,
                max_steps=steps,
                val_check_interval=max(1, -(-steps // 10)),
                check_val_every_n_epoch=None,
                num_sanity_val_steps=0,
                logger=False,
                callbacks=[best],
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
            )
            trainer.fit(module, datamodule=data)
            said: Any = trainer.predict(module, datamodule=data, ckpt_path=best.best_model_path)
    p = np.concatenate([part["probabilities"].double().cpu().numpy() for part in said])
    _, labels = data.rows("test")
    right = p.argmax(axis=1) == labels
    return {
        **dict(zip(SCORES, score(labels, p), strict=True)),
        "val_accuracy": float(best.best_model_score or float("nan")),
        "steps": steps,
        "parameters": sum(x.numel() for x in module.parameters()),
        "seconds": time.perf_counter() - start,
        "n": len(labels),
        "right": np.packbits(right).tobytes().hex(),
    }


def _classifier(data: Any, network: str, recipe: Recipe, pretrained: bool) -> Any:
    from statezoo.lightning_modules.classify import SequenceClassifier

    shared: dict[str, Any] = {
        "vocab_size": data.vocab_size,
        "class_names": data.class_names,
        "complement": data.complement if recipe.reverse_complement != "none" else None,
        "pooling": recipe.pooling,
        "reverse_complement": recipe.reverse_complement,
        "optim": {"lr": recipe.lr},
    }
    if pretrained:
        return SequenceClassifier(pretrained=find_weights(network), **shared)
    return SequenceClassifier(
        [*network.split("+")],
        d_model=recipe.d_model,
        n_layers=max(recipe.n_layers, network.count("+") + 1),
        bidirectional=True,
        **shared,
    )
