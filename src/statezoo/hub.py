"""Models by name, by folder and from the Hub; nothing heavy is imported before it is needed."""

import ast
import sys
from difflib import get_close_matches
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from statezoo import safety, shipped

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
    name: str,
    task: Literal["causal", "masked", "classification", "tagging"] = "causal",
    **settings: Any,
) -> "StateZooPreTrainedModel":
    """Make a model with fresh weights.

    Args:
        name: A mixer for all layers (see :func:`list_models`), ``"transformer"`` (softmax
            attention), or ``"hybrid"``, which needs ``mixers=[...]``, cycled over the layers.
        task: What it predicts: the next token, masked tokens, or ``num_labels`` classes of a
            sequence, or of each token.
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
    """Load a model that we ship, of a folder or from the Hub, and run no code from there.

    Its class is the one that ``architectures`` in ``config.json`` names. The folder is looked
    through before anything is built, see :mod:`statezoo.safety`.

    Models of other libraries are converted, see :mod:`statezoo.zoo.convert`: Mamba and Mamba-2 of
    state-spaces and transformers, and those of flash-linear-attention.

    Args:
        path_or_id: A short name (``statezoo list --pretrained``), a folder with ``config.json`` and
            ``model.safetensors``, a Hub id ``"owner/name"``, or an adapter in either place, whose
            base is loaded with it.
        **kwargs: For the Hub ``revision`` (branch, tag or commit), ``token``, ``cache_dir``,
            ``local_files_only`` and ``force_download``; further arguments of ``from_pretrained``,
            such as ``dtype``.

    Raises:
        FileNotFoundError: If there is no such folder, or no model in it.
        HubError: If the Hub has no such model, or it cannot be had; an ``OSError``.
        ValueError: If it is not a model that can be loaded, a tensor is missing, left over or of
            the wrong shape, or the folder holds what no model's folder holds.

    Example:
        >>> net = load("gla-novels")
        >>> net = load("state-spaces/mamba-130m-hf")
    """
    from statezoo.download import fetch, is_adapter
    from statezoo.zoo import convert
    from statezoo.zoo.loading import load_folder

    given = shipped.resolve(path_or_id)
    place = Path(given)
    is_id = given.count("/") == 1 and not place.is_absolute() and given[:1] not in (".", "~")
    if not place.is_dir() and (place.exists() or not is_id):
        raise FileNotFoundError(
            f"{given} is not a folder, and no Hub id is written like this{shipped.near(given)}."
        )
    where = ("revision", "cache_dir", "token", "local_files_only", "force_download")
    hub = {key: kwargs.pop(key) for key in where if key in kwargs}
    folder = place if place.is_dir() else fetch(given, **hub)
    if is_adapter(folder):
        return _with_base(folder, given, kwargs)
    net: StateZooPreTrainedModel
    if safety.read_json(folder / safety.CONFIG).get("model_type") == "statezoo":
        net = load_folder(folder, **kwargs)
        net.name_or_path = given
    else:
        net, _ = convert.load(folder, **kwargs)
    return net


def _with_base(folder: Path, name: str, kwargs: dict[str, Any]) -> "StateZooPreTrainedModel":
    """Return the base of an adapter with the adapter in it."""
    from statezoo.download import is_adapter, local
    from statezoo.lightning_modules.adapter import apply_adapter, base_of
    from statezoo.lightning_modules.network import load_network

    if kwargs:
        raise ValueError(f"{name} is an adapter, which takes no {', '.join(kwargs)}.")
    base = local(base_of(folder))
    if is_adapter(base):
        raise ValueError(f"{name} is an adapter of an adapter, {base_of(folder)}: it has no base.")
    net: StateZooPreTrainedModel = apply_adapter(load_network(base), folder)
    return net


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
