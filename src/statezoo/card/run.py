"""A finished run as a card sees it: its settings, its best weights, its data, what it cost."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from statezoo.arguments import find_checkpoint, read_config
from statezoo.listing import walk

__all__ = ["Run", "command_of", "open_run", "portable", "training"]

LONGEST_REPLAY = 5000
"""Batches of training that are read again to count tokens that a run did not count."""
PLAIN = ("bytes", "characters", "satb", "remi", "tsd", "midilike", "performance", "kmer")
"""How the names of tokenizers begin that need no files."""


@dataclass(frozen=True)
class Run:
    """A run that is over.

    Attributes:
        folder: Where it is.
        checkpoint: Its best weights.
        config: What ``config.yaml`` says.
        module: The Lightning module with these weights.
        data: The data module, from the settings of the run.
    """

    folder: Path
    checkpoint: Path
    config: dict[str, Any]
    module: Any
    data: Any

    @property
    def split(self) -> Literal["test", "val"]:
        """The split that is held out from everything, else the one that chose the weights."""
        windows = getattr(self.data, "windows", None)
        return "test" if windows is None or windows("test") is not None else "val"


def open_run(source: str) -> Run:
    """Return a run with its model and data.

    Raises:
        ValueError: If it has no checkpoint or settings, is no language model, or its data is gone.
    """
    from statezoo.lightning_modules import CausalLM
    from statezoo.lightning_modules import checkpoint as ckpt

    checkpoint = find_checkpoint(source)
    settings = checkpoint.with_name("config.yaml")
    if not settings.is_file():
        raise ValueError(
            f"there is no config.yaml beside {str(checkpoint)!r}: card needs the folder that "
            "statezoo fit wrote, which says what the data was."
        )
    config = read_config(str(settings))
    module = ckpt.load_checkpoint(checkpoint, map_location="cpu")
    if not isinstance(module, CausalLM):
        raise ValueError(
            f"card describes language models, and {str(checkpoint)!r} is a "
            f"{type(module).__name__}: statezoo export writes its folder, statezoo test its "
            "numbers."
        )
    return Run(checkpoint.parent, checkpoint, config, module, _data(config, settings, checkpoint))


def _data(config: Mapping[str, Any], settings: Path, checkpoint: Path) -> Any:
    """Make the data module of a run; a tokenizer that was a file is that of the checkpoint."""
    entry = config.get("data") or {}
    if not isinstance(entry, dict) or "class_path" not in entry:
        raise ValueError(f"{str(settings)!r} does not say what the data was (data.class_path).")
    module, _, name = entry["class_path"].rpartition(".")
    given = dict(entry.get("init_args") or {})
    given |= {key: str(checkpoint) for key in _filed(given)}
    try:
        return getattr(importlib.import_module(module), name)(**given)
    except FileNotFoundError as error:
        path = given.get("path")
        raise ValueError(
            f"the data of the run, {path!r}, is not there any more: card measures on it. Put it "
            f"back, or set data.path in {str(settings)!r} to where it is now."
        ) from error
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"cannot make the data of {str(settings)!r}: {error}") from error


# ---------------------------------------------------------------- what is shipped


def portable(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return settings without paths of this machine: files by their last part alone.

    A tokenizer that was a file or folder is that of the card, by its name.
    """
    found: dict[str, Any] = _without_folders(dict(config))
    given = found["data"].get("init_args") or {}
    if given.get("path"):
        given["path"] = Path(given["path"]).name
    given |= {key: name for key in _filed(given)}
    return found


def _filed(given: Mapping[str, Any]) -> list[str]:
    """Return those settings of data that name files of a tokenizer."""
    keys = ("tokenizer", "encoding")
    return [k for k in keys if isinstance(given.get(k), str) and not given[k].startswith(PLAIN)]


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_folders(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_folders(v) for v in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def command_of(config: Mapping[str, Any], name: str) -> str:
    """Return the command that trains the same: by a shipped recipe, else by the card's config."""
    path = (config["data"].get("init_args") or {}).get("path")
    data = f" --data.path {Path(path).name}" if path else ""
    for recipe, file in walk(files("statezoo") / "configs" / "pretrain"):
        if recipe.endswith(".yaml") and _says(config, read_config(str(file))):
            return f"statezoo fit --config pretrain/{recipe.removesuffix('.yaml')}{data}"
    return f"statezoo fit --config {name}/config.yaml{data}"


def _says(config: Any, recipe: Any) -> bool:
    """Say whether the settings of a recipe are those of a run; paths may differ."""
    if not isinstance(recipe, dict):
        return bool(config == recipe)
    if not isinstance(config, dict):
        return False
    for key, value in recipe.items():
        has = config.get(key)
        if key == "class_path":
            if str(has).rpartition(".")[2] != str(value).rpartition(".")[2]:
                return False
        elif key not in ("path", "tokenizer") and not _says(has, value):
            return False
    return True


# ---------------------------------------------------------------- what it cost


def training(run: Run, name: str, hardware: str | None) -> dict[str, Any]:
    """Return the facts of the training; what was not recorded is None.

    Args:
        run: The run.
        name: Name of the card.
        hardware: Where it was trained, for a run that did not write it down.
    """
    from statezoo.lightning_modules import checkpoint as ckpt
    from statezoo.lightning_modules.facts import FACTS_FILE, threads

    best = int(ckpt.read(run.checkpoint)["global_step"])
    file, trainer = run.folder / FACTS_FILE, run.config.get("trainer") or {}
    facts: dict[str, Any] = {
        "command": command_of(run.config, name),
        "steps": int(ckpt.read(find_checkpoint(run.folder, "last"))["global_step"]),
        "best_step": best,
        "hardware": hardware,
        "precision": str(trainer.get("precision") or "32-true"),
        "seed": run.config.get("seed_everything"),
        "pretrained": _base(run.config),
    }
    if file.is_file():
        told = json.loads(file.read_text())
        facts |= {key: told[key] for key in ("steps", "tokens", "seconds", "cpu_seconds")}
        facts["hardware"] = f"{told['device']}, {threads(told['threads'])}"
        return facts | {"seconds_by": "clock"}
    facts["tokens"] = _tokens(run, facts["steps"])
    return facts | {"seconds": _by_files(run.folder), "seconds_by": "times of files"}


def _base(config: Mapping[str, Any]) -> str | None:
    """Return the weights that a run began with, by name."""
    source = (config["model"].get("init_args") or {}).get("pretrained")
    return (Path(source).name if Path(source).is_absolute() else source) if source else None


def _tokens(run: Run, steps: int) -> int | None:
    """Count what a run read in training by reading it again; the order is a function of the seed.

    None where lengths may have changed on the way, or it would be long.
    """
    trainer = run.config.get("trainer") or {}
    loader = run.data.train_dataloader()
    batches = steps * int(trainer.get("accumulate_grad_batches") or 1)
    changed = "LengthWarmup" in json.dumps(trainer.get("callbacks"))
    if changed or not hasattr(loader, "read") or batches > LONGEST_REPLAY:
        return None
    return sum(int(batch["tokens"].numel()) for batch in loader.read(range(batches)))


def _by_files(folder: Path) -> float | None:
    """Return the seconds from the first file that a fit writes to its last checkpoint."""
    start = (folder / "config.yaml").stat().st_mtime
    end = max(file.stat().st_mtime for file in folder.glob("*.ckpt"))
    return round(end - start, 1) if end > start else None
