"""``statezoo music bench``: models on the JSB chorales, beside baselines and published numbers."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from statezoo.music import jsb
from statezoo.music.jsb import FRAMES, PUBLISHED, TOKENS

__all__ = ["bench"]

CONFIGS = {FRAMES: "music/jsb_frames.yaml", TOKENS: "music/jsb_satb.yaml"}
COLUMNS = {
    FRAMES: ("valid", "test"),
    TOKENS: ("valid", "test", "valid on beat", "test on beat"),
}
TITLES = {
    FRAMES: "Frames: nats per frame of 88 notes, quarter grid, notes independent given the past",
    TOKENS: "Tokens: nats per token of soprano, alto, tenor and bass, sixteenth grid",
}

Row = dict[str, Any]


def bench(
    *,
    root: str,
    models: str = "",
    mixers: str = "",
    task: Literal["frames", "tokens", "both"] = "both",
    steps: int = 0,
    seed: int = 0,
    out: str = "music_bench.md",
) -> None:
    """Score models on the JSB chorales' standard split, beside baselines and published numbers.

    Args:
        root: Folder with jsb-chorales-quarter.json or jsb_quarter_roll.json (frames), and with
            Jsb16thSeparated.json or jsb_16th_satb.json (tokens), or these with .gz.
        models: Checkpoints, folders of runs or exported folders, separated by commas.
        mixers: Architectures to train first with the shipped configs music/jsb_frames and
            music/jsb_satb, separated by commas; + joins those of a hybrid.
        task: What ``mixers`` are trained for.
        steps: Optimiser steps of that training; 0 takes the config's.
        seed: Of that training.
        out: Table to write; scores and baselines are kept in a .json beside it and training runs in
            a folder beside it, and what is finished is not run again.
    """
    files = jsb.find_files(root)
    chosen = [part for part in (FRAMES, TOKENS) if task in (part, "both") and part in files]
    sources = _listed(models)
    if steps < 0:
        raise ValueError(f"bench needs steps of at least 0, got {steps}.")
    if mixers and not chosen:
        raise ValueError(f"{root} has no file for the task {task}; it has {', '.join(files)}.")
    table = Path(out)
    store = _Store(table.with_suffix(".json"))
    rows: dict[str, list[Row]] = {part: _baselines(part, files[part], store) for part in files}
    for source in sources:
        _score(source, files, store, rows)
    for part in chosen:
        for mixer in _listed(mixers):
            runs = table.with_suffix("") / "runs"
            found = train(part, mixer, files[part], steps=steps, seed=seed, runs=runs)
            _score(str(found), files, store, rows, name=f"{mixer} (seed {seed})")
            table.write_text(report(rows), encoding="utf-8")
    table.write_text(report(rows), encoding="utf-8")
    say(report(rows) + f"wrote {table} and {store.path}")


def say(text: str) -> None:
    """Write a line."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


class _Store:
    """Finished scores in a JSON file, written after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Any] = {}
        if path.is_file():
            try:
                self.rows = json.loads(path.read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path} is no file of finished scores ({error}): remove it, or choose another "
                    "name with --out."
                ) from error
        path.parent.mkdir(parents=True, exist_ok=True)

    def get(self, key: Sequence[Any], make: Any) -> Any:
        """Return what is kept under a key, else make and keep it."""
        name = json.dumps(key)
        if name not in self.rows:
            self.rows[name] = make()
            draft = self.path.with_suffix(".json.tmp")
            draft.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")
            draft.replace(self.path)
        return self.rows[name]


def _stamp(path: Path) -> list[Any]:
    """What changes where a file does."""
    about = path.stat()
    return [str(path.resolve()), about.st_size, about.st_mtime_ns]


def _baselines(part: str, file: Path, store: _Store) -> list[Row]:
    make = jsb.frame_baselines_of if part == FRAMES else jsb.token_baselines_of
    say(f"{part}: {file}, simple models")
    found = store.get([part, "baselines", file.name, file.stat().st_size], lambda: make(file))
    return [{"model": name, "scores": scores, "note": "baseline"} for name, scores in found.items()]


# ------------------------------------------------------------------------ models


def _score(
    source: str,
    files: Mapping[str, Path],
    store: _Store,
    rows: Mapping[str, list[Row]],
    name: str = "",
) -> None:
    """Score a checkpoint on the task that it was trained for, and add the row."""
    from statezoo.arguments import find_weights

    found = find_weights(source)
    place = Path(found)
    stamped = _stamp(place / "model.safetensors" if place.is_dir() else place)
    part, module, trained = _load(found)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    net = getattr(module, "net", module)
    mixers = dict.fromkeys(mixer["name"] for mixer in net.config.layer_mixers)
    label = name or f"{source} ({', '.join(mixers)})"
    row: Row = {"model": label, "parameters": parameters, "transpose": trained.transpose}
    try:
        jsb.refuse_bach(label, trained)
    except jsb.Contaminated as refusal:
        say(f"refused: {refusal}")
        rows.get(part, []).append({**row, "scores": {}, "note": f"refused: {refusal}"})
        return
    if part not in files:
        needed = ", ".join(jsb.FILES[part])
        raise ValueError(f"{label} says {part}; the folder lacks their file: {needed} (or .gz).")
    file = files[part]
    key = [part, *stamped, file.name, file.stat().st_size]
    if part == FRAMES:
        scores = store.get(key, lambda: jsb.frame_scores(module, file))
    else:
        scores = store.get(key, lambda: jsb.token_scores(module, found, file))
    say(f"{part} {label}: " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items()))
    rows[part].append({**row, "scores": scores, "note": trained.note})


def _load(source: str) -> tuple[str, Any, jsb.Trained]:
    """Return task, module or network, and training data of a checkpoint or exported folder.

    Raises:
        ValueError: If it is for another task than frames or tokens.
    """
    from statezoo.lightning_modules import checkpoint as ckpt
    from statezoo.lightning_modules.network import load_network
    from statezoo.lightning_modules.note_frames import NoteFrames
    from statezoo.zoo import StateZooForCausalLM

    trained = jsb.Trained()
    if Path(source).is_file():
        content = ckpt.read(source)
        trained = jsb.trained_on(Path(source), content)
        if ckpt.class_path(content, source).endswith(f".{NoteFrames.__name__}"):
            module = ckpt.load_checkpoint(source, map_location="cpu")
            return FRAMES, module, trained
    net = load_network(source)
    if not isinstance(net, StateZooForCausalLM):
        raise ValueError(
            f"{source} holds a {type(net).__name__}; bench scores NoteFrames and language models "
            "of the satb grid."
        )
    return TOKENS, net, trained


def train(part: str, mixer: str, file: Path, *, steps: int, seed: int, runs: Path) -> Path:
    """Train an architecture with a shipped config, or go on where its run was stopped.

    Args:
        part: ``frames`` or ``tokens``.
        mixer: Name of a mixer, or several joined by ``+``.
        file: The chorales.
        steps: Optimiser steps; 0 takes the config's.
        seed: Of weights and order.
        runs: Folder of runs.

    Returns:
        The folder of the run.
    """
    from statezoo import cli

    name = f"{part}-{mixer}-{steps or 'config'}-{seed}"
    folder = runs / name
    if (folder / "finished").is_file():
        return folder
    say(f"{part}: training {mixer} in {folder}")
    arguments = ["fit", "--config", CONFIGS[part], "--data.path", str(file), "--name", name]
    arguments += ["--model.mixers", json.dumps(mixer.split("+")), "--seed_everything", str(seed)]
    arguments += ["--trainer.default_root_dir", str(runs)]
    arguments += ["--trainer.enable_progress_bar", "false"]
    arguments += ["--trainer.max_steps", str(steps)] if steps else []
    arguments += ["--trainer.val_check_interval", str(max(1, steps // 10))] if steps else []
    if list(folder.rglob("last.ckpt")):
        arguments += ["--ckpt_path", str(folder)]
    cli.run(arguments)
    (folder / "finished").touch()
    return folder


# ------------------------------------------------------------------------- table


def report(rows: Mapping[str, Sequence[Row]]) -> str:
    """The tables, in Markdown."""
    lines = []
    for part, found in rows.items():
        columns = COLUMNS[part]
        sources = list(dict.fromkeys(number.source for number in PUBLISHED[part]))
        lines += [f"## {TITLES[part]}", "", _line("model", *columns, "parameters", "note")]
        lines.append("|" + "---|" * (len(columns) + 3))
        for row in found:
            cells = [_number(row["scores"].get(column)) for column in columns]
            note = [row["note"].partition(": ")[0] if not row["scores"] else row["note"]]
            if row.get("transpose"):
                moved = row["transpose"]
                note.append(
                    "not transposed" if moved == "no" else f"transposed {moved} in training"
                )
            size = f"{row['parameters']:,}" if "parameters" in row else ""
            name = f"**{row['model']}**" if size else row["model"]
            lines.append(_line(name, *cells, size, "; ".join(filter(None, note))))
        for number in PUBLISHED[part]:
            cells = [_number(number.valid), _number(number.test)] + [""] * (len(columns) - 2)
            mark = f"[{sources.index(number.source) + 1}]"
            lines.append(_line(number.model, *cells, "", f"published {mark}"))
        lines.append("")
        lines += [f"[{n}] {source}.  " for n, source in enumerate(sources, start=1)]
        refused = [row for row in found if row["note"].startswith("refused")]
        lines += [f"\n{row['note']}" for row in refused] + [""]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
