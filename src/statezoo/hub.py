"""Models by name, by folder and from the Hub; nothing heavy is imported before it is needed."""

import ast
import sys
from difflib import get_close_matches
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from statezoo.zoo.model import StateZooPreTrainedModel

ALIASES = {"transformer": "attention"}


def list_models(pattern: str = "*") -> list[str]:
    """List the names that :func:`create_model` takes.

    Args:
        pattern: Only names that match it, with ``*`` and ``?`` as on the command line.

    Example:
        >>> list_models("gl*")
        ['gla']
    """
    names = {*ALIASES, "hybrid"} | _mixer_names() - set(ALIASES.values())
    return sorted(name for name in names if fnmatchcase(name, pattern))


def create_model(
    name: str, task: Literal["causal", "masked", "classification"] = "causal", **settings: Any
) -> "StateZooPreTrainedModel":
    """Make a model with fresh weights.

    Args:
        name: A mixer for all layers (see :func:`list_models`), ``"transformer"`` (softmax
            attention), or ``"hybrid"``, which needs ``mixers=[...]``, cycled over the layers.
        task: What it predicts: the next token, masked tokens, or ``num_labels`` classes of a
            sequence.
        **settings: Keys of ``StateZooConfig`` and settings of the mixer, side by side.

    Raises:
        ValueError: If the name, the task or a setting is unknown.
        TypeError: If a value has the wrong type.

    Example:
        >>> create_model("gla", d_model=256, n_layers=4, vocab_size=256, n_heads=2)
        >>> create_model("hybrid", mixers=["gla", "gla", {"name": "attention", "window": 128}])
        >>> create_model("gla", task="masked", bidirectional=True)
    """
    from statezoo.zoo import MIXERS, StateZooConfig, mixer_settings
    from statezoo.zoo.config import LABELS
    from statezoo.zoo.tasks import TASKS

    if task not in TASKS:
        raise ValueError(
            f"no task named {task!r}{_near(task, [*TASKS])}; there are {', '.join(TASKS)}."
        )
    if name == "hybrid":
        if "mixers" not in settings:
            raise ValueError("hybrid needs its mixers, e.g. mixers=['gla', 'gla', 'attention'].")
        return TASKS[task](StateZooConfig(**settings))
    mixer = ALIASES.get(name, name)
    if mixer not in MIXERS:
        known = sorted({*MIXERS, *ALIASES, "hybrid"})
        raise ValueError(
            f"no model named {name!r}{_near(name, known)}; there are {', '.join(known)}."
        )
    own = mixer_settings(mixer)
    keys = {*StateZooConfig.own_keys(), *LABELS} - {"mixers"}
    for key in settings:
        if key not in own and key not in keys:
            raise ValueError(f"{name} has no setting {key!r}{_near(key, [*own, *keys])}.")
    entry = {"name": mixer} | {key: value for key, value in settings.items() if key in own}
    rest = {key: value for key, value in settings.items() if key not in own}
    return TASKS[task](StateZooConfig(mixers=[entry], **rest))


def load(path_or_id: str | Path, **kwargs: Any) -> "StateZooPreTrainedModel":
    """Load a model from a folder or from the Hub, and run no code from there.

    Its class is the one that ``architectures`` in ``config.json`` names.

    Models of other libraries are converted, see :mod:`statezoo.zoo.convert`: Mamba and Mamba-2 of
    state-spaces and transformers, and those of flash-linear-attention.

    Args:
        path_or_id: A folder with ``config.json`` and ``model.safetensors``, or a Hub id
            ``"owner/name"``.
        **kwargs: Further arguments of ``from_pretrained``, such as ``dtype`` or ``revision``.

    Raises:
        FileNotFoundError: If there is no such folder, or no model in it.
        ValueError: If it is not a model that can be loaded, or a tensor is missing, left over or of
            the wrong shape.

    Example:
        >>> net = load("state-spaces/mamba-130m-hf")
    """
    from statezoo.zoo import StateZooConfig, convert

    place, given = Path(path_or_id), str(path_or_id)
    if place.is_dir():
        _check_file(place, "config.json")
    elif place.exists() or given.count("/") != 1 or place.is_absolute() or given[:1] in (".", "~"):
        raise FileNotFoundError(f"{given} is not a folder, and no Hub id is written like this.")
    if kwargs.pop("trust_remote_code", False):
        raise ValueError("load executes no code from a checkpoint; leave trust_remote_code out.")
    where = ("revision", "cache_dir", "token", "local_files_only")
    hub = {key: kwargs[key] for key in where if key in kwargs}
    config = StateZooConfig.get_config_dict(str(place), **hub)[0]
    net: StateZooPreTrainedModel
    if config.get("model_type") != "statezoo":
        folder = place if place.is_dir() else convert.fetch(given, **hub)
        rest = {key: value for key, value in kwargs.items() if key not in hub}
        net, _ = convert.load(folder, **rest)
        return net
    if place.is_dir():
        _check_file(place, "model.safetensors")
    net = _class_of(config, given).from_pretrained(str(place), use_safetensors=True, **kwargs)
    return net


def _class_of(config: dict[str, Any], source: str) -> "type[StateZooPreTrainedModel]":
    """Return the class that a configuration names; the causal one where it names none."""
    from statezoo.zoo import StateZooModel
    from statezoo.zoo.tasks import TASKS

    classes = {cls.__name__: cls for cls in [*TASKS.values(), StateZooModel]}
    named = config.get("architectures") or [TASKS["causal"].__name__]
    if len(named) != 1 or named[0] not in classes:
        raise ValueError(
            f"{source}: config.json names the architectures {named}; there are "
            f"{', '.join(classes)}."
        )
    return classes[named[0]]


def _check_file(folder: Path, name: str) -> None:
    sharded = (folder / f"{name}.index.json").exists()
    if not (folder / name).exists() and not sharded:
        raise FileNotFoundError(
            f"{folder} has no {name}: a model folder is what save_pretrained(folder) writes."
        )


def _mixer_names() -> set[str]:
    """Find the files of zoo/ that define a mixer, without importing them."""
    if "statezoo.zoo" in sys.modules:
        return set(sys.modules["statezoo.zoo"].MIXERS)
    spec = find_spec("statezoo.zoo")
    folders = (spec.submodule_search_locations if spec else None) or []
    return {
        file.stem
        for folder in folders
        for file in Path(folder).glob("*.py")
        if any(
            isinstance(node, ast.ClassDef)
            and any(isinstance(base, ast.Name) and base.id == "Mixer" for base in node.bases)
            for node in ast.parse(file.read_text(encoding="utf-8")).body
        )
    }


def _near(word: str, known: list[str]) -> str:
    near = get_close_matches(word.lower(), known, 1)
    return f" (did you mean {near[0]!r}?)" if near else ""
