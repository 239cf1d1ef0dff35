"""What the command line means before it is parsed: configs by name, models from checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]

from statezoo import shipped
from statezoo.listing import walk
from statezoo.parser import nearest, underscored

KEYWORDS = ("best", "last", "hpc", "registry")
"""What Lightning takes for ``ckpt_path`` besides paths."""

EXPORTED = ("config.json", "adapter.json")
"""Files of folders that are no runs."""

OF_DATA = ("vocab_size", "complement", "class_names")
"""Arguments of models that the command line takes from the data."""


def prepare(arguments: Sequence[str]) -> list[str]:
    """Resolve names of configs and checkpoints, and take the model from a checkpoint.

    Configs come first, then the classes of model and data, then their settings, whatever the
    order in which they were given: what is on the command line wins, and no setting is lost.

    Args:
        arguments: The subcommand and what follows it.

    Returns:
        Arguments that the parser understands.

    Raises:
        ValueError: If a config or checkpoint does not exist.
    """
    command, *rest = underscored(arguments)
    options = _Options(rest)
    for name in ("--config", "-c"):
        options.replace(name, find_config)
    for name in ("--model", "--data"):
        options.replace(name, lambda value: find_config(value) if _is_yaml(value) else value)
    options.replace(
        "--model.pretrained", lambda v: v if shipped.resolve(v) != v else find_weights(v)
    )
    options.replace("--model.teacher", find_weights)
    options.replace("--trainer.strategy", find_strategy)
    if command != "fit":
        options.replace("--ckpt_path", lambda v: v if v in KEYWORDS else str(find_checkpoint(v)))
    asked = next(iter(options.values("--ckpt_path")), None)
    if asked and asked not in KEYWORDS and not _names_model(options):
        options.arguments += ["--model", json.dumps(model_of(asked))]
    _check_pretrained(options)
    options.bring_forward(("--config", "-c"), ("--model", "--data"))
    return [command, *options.arguments]


class _Options:
    """Arguments in which the values of named options can be read and replaced."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = list(arguments)

    def _places(self, name: str) -> list[tuple[int, str]]:
        """Index and prefix of each value of an option: ``--x value`` or ``--x=value``."""
        found = []
        for i, argument in enumerate(self.arguments):
            if argument == name and i + 1 < len(self.arguments):
                found.append((i + 1, ""))
            elif argument.startswith(f"{name}="):
                found.append((i, f"{name}="))
        return found

    def values(self, name: str) -> list[str]:
        return [self.arguments[i].removeprefix(prefix) for i, prefix in self._places(name)]

    def replace(self, name: str, change: Any) -> None:
        for i, prefix in self._places(name):
            self.arguments[i] = prefix + change(self.arguments[i].removeprefix(prefix))

    def bring_forward(self, *ranks: tuple[str, ...]) -> None:
        """Put the named options first, rank by rank; within a rank and after, the order stays."""
        first: list[str] = []
        for names in ranks:
            places = sorted(place for name in names for place in self._places(name))
            kept = {i - 1 if not prefix else i for i, prefix in places} | {i for i, _ in places}
            first += [a for i, a in enumerate(self.arguments) if i in kept]
            self.arguments = [a for i, a in enumerate(self.arguments) if i not in kept]
        self.arguments = first + self.arguments


def _is_yaml(value: str) -> bool:
    return value.endswith((".yaml", ".yml"))


def find_config(name: str) -> str:
    """Return the path of a config: the user's file, else one that we ship.

    Raises:
        ValueError: If there is neither; names the nearest of ours. Also if the user's file is not
            a mapping in YAML.
    """
    if Path(name).is_file():
        read_config(name)
        return name
    if not _is_yaml(name):
        name = f"{name}.yaml" if "." not in Path(name).name else name
    from importlib.resources import files

    shipped = {path: file for path, file in walk(files("statezoo") / "configs") if _is_yaml(path)}
    if name in shipped:
        return str(shipped[name])
    raise ValueError(f"no config {name!r}{nearest(name, shipped)}; statezoo list shows ours")


def read_config(file: str) -> dict[str, Any]:
    """Return what a config says, interpolations as they stand.

    Raises:
        ValueError: If it is not a mapping in YAML; names the file, and the line.
    """
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or error
        raise ValueError(f"config {file!r} is not YAML{line}: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config {file!r} holds no settings: write model:, data: or trainer:.")
    return content


def find_strategy(name: str) -> str:
    """Return what names a class as the class, which takes settings; aliases as they are."""
    is_class = re.fullmatch(r"[A-Z]\w*|\w+(\.\w+)+", name)
    return json.dumps({"class_path": name}) if is_class else name


def check_strategy(name: Any) -> None:
    """Raise where there is no strategy of this alias.

    Raises:
        ValueError: If so; names the nearest.
    """
    from lightning.pytorch.strategies import StrategyRegistry

    known = ["auto", *StrategyRegistry.available_strategies()]
    if isinstance(name, str) and name.startswith("{"):  # a class that is not known
        name = json.loads(name)["class_path"]
    if isinstance(name, str) and name.lower() not in known:
        raise ValueError(
            f"no strategy {name!r}{nearest(name, known)}: --trainer.strategy takes auto, ddp, "
            "sequence_parallel and others of Lightning"
        )


def find_weights(source: str) -> str:
    """Return the best checkpoint of a run's folder, the place of a short name, else the source."""
    source = shipped.resolve(source)
    folder = Path(source)
    is_run = folder.is_dir() and not any((folder / name).is_file() for name in EXPORTED)
    return str(find_checkpoint(folder)) if is_run else source


def find_checkpoint(path: str | Path, first: str = "best") -> Path:
    """Return a checkpoint: the file itself, or one of a run's folder, of several runs the newest's.

    Args:
        path: File or folder.
        first: Which of ``best`` and ``last`` is preferred in a folder.

    Raises:
        ValueError: If there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        for name in (f"{first}.ckpt", "best.ckpt", "last.ckpt", "previous.ckpt"):
            if (path / name).is_file():
                return path / name
        newest = sorted(path.rglob("*.ckpt"), key=lambda file: file.stat().st_mtime)
        if newest:
            return find_checkpoint(newest[-1].parent, first)
        raise ValueError(f"there is no .ckpt file in {str(path)!r}")
    if shipped.find(path):
        raise ValueError(
            f"{str(path)!r} is a shipped model, and a checkpoint of a run is needed here: "
            f"--model.pretrained {path} starts from it, and it is a Hugging Face folder already."
        )
    near = nearest(path.name, (f.name for f in path.parent.glob("*.ckpt"))) or shipped.near(path)
    raise ValueError(f"there is no checkpoint {str(path)!r}{near}")


def _names_model(options: _Options) -> bool:
    """Say whether the command line or one of its configs names a model."""
    configs = [*options.values("--config"), *options.values("-c")]
    return bool(options.values("--model")) or any("model" in read_config(f) for f in configs)


def _check_pretrained(options: _Options) -> None:
    """Raise where a config reads with the tokenizer of weights that no one names.

    Raises:
        ValueError: If that is so.
    """
    for file in [*options.values("--config"), *options.values("-c")]:
        content = read_config(file)
        data, model = ((content.get(part) or {}) for part in ("data", "model"))
        wants = str(data).count("${model.init_args.pretrained}")
        named = isinstance(model, dict) and (model.get("init_args") or {}).get("pretrained")
        if wants and not (named or options.values("--model.pretrained")):
            raise ValueError(
                f"config {Path(file).stem!r} starts from pretrained weights and none are named: "
                "give --model.pretrained NAME_OR_PATH (statezoo list --pretrained shows ours)"
            )


def model_of(checkpoint: str) -> dict[str, Any]:
    """Return class and arguments of the module that wrote a checkpoint, or those of a run.

    What symbols and classes there are is left to the data.
    """
    from statezoo.lightning_modules import checkpoint as ckpt

    if Path(checkpoint).is_dir():
        checkpoint = str(ckpt.newest_whole(find_checkpoint(checkpoint, "last").parent)[0])
    content = ckpt.read(checkpoint)
    cls = ckpt.task_class(content, checkpoint)
    given = {k: v for k, v in ckpt.settings(content, checkpoint).items() if k not in OF_DATA}
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": given}
