"""The network inside a module: from settings, from weights, and out again in Hub format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging

import statezoo
from statezoo.lightning_modules import checkpoint as ckpt
from statezoo.zoo import StateZooConfig, StateZooForCausalLM
from statezoo.zoo.mixer import resolve_mixer


def build_network(
    settings: Mapping[str, Any],
    pretrained: str | Path | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> StateZooForCausalLM:
    """Return a new network, or that of ``pretrained`` where its shape is the one asked for.

    Args:
        settings: Arguments of ``StateZooConfig``.
        pretrained: Checkpoint, Hub folder or Hub name. Settings left at their defaults are then
            those of the file.
        defaults: What ``settings`` are where no one asked for anything.

    Raises:
        ValueError: If a setting is wrong, or was set to something that ``pretrained`` has not.
    """
    if pretrained is None:
        return StateZooForCausalLM(StateZooConfig(**settings))
    net: StateZooForCausalLM = load_network(pretrained)
    found = net.config
    wanted = StateZooConfig(**{**settings, "n_layers": max(settings["n_layers"], found.n_layers)})
    wanted.n_layers = settings["n_layers"]
    _check_same_mixers(wanted, found, str(pretrained))
    usual = StateZooConfig(**(defaults or {}))
    for key in settings:
        if key != "mixers":
            default = None if key == "vocab_size" else getattr(usual, key)
            _check_same(key, getattr(wanted, key), getattr(found, key), default, str(pretrained))
    net.train()
    return net


def _check_same_mixers(wanted: StateZooConfig, found: StateZooConfig, source: str) -> None:
    asked = [wanted.mixers[i % len(wanted.mixers)] for i in range(found.n_layers)]
    names = [mixer["name"] for mixer in asked], [mixer["name"] for mixer in found.layer_mixers]
    if names[0] != names[1]:
        raise ValueError(
            f"{source!r} is of another architecture: its mixers are {_listed(names[1])}, "
            f"asked for were {_listed(names[0])}."
        )
    for one, other in zip(asked, found.layer_mixers, strict=True):
        default = resolve_mixer(one["name"])
        for key in one.keys() - {"name", "backend"}:
            _check_same(key, one[key], other[key], default[key], source)


def _check_same(key: str, asked: Any, has: Any, default: Any, source: str) -> None:
    """Raise where what was asked for is neither the default nor what the file has."""
    if asked not in (has, default):
        raise ValueError(
            f"{source!r} has {key} {has!r}, asked for was {asked!r}: "
            "leave the setting out, or start without pretrained weights."
        )


def _listed(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def load_network(source: str | Path) -> StateZooForCausalLM:
    """Return the network of a checkpoint, a Hub folder or a Hub name.

    Raises:
        ValueError: If the checkpoint or folder cannot be read.
    """
    if Path(source).is_file() or str(source).endswith(".ckpt"):
        content = ckpt.read(source)
        ckpt.class_path(content, source)
        config = StateZooConfig(**_own_keys(content[ckpt.KEY]["config"]))
        net = StateZooForCausalLM(config)
        net.load_state_dict(ckpt.network_weights(content))
        return net
    if not Path(source).exists() and str(source).count("/") != 1:
        raise ckpt.CheckpointError(f"there is no checkpoint or model folder {str(source)!r}.")
    with _no_progress_bars():
        return statezoo.load(source)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers' bars, which are for large models, off the screen."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _own_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what transformers adds on writing and refuses or ignores on reading."""
    return {k: v for k, v in config.items() if k not in ("transformers_version", "model_type")}


def export(
    net: StateZooForCausalLM,
    folder: str | Path,
    tokenizer: Mapping[str, bytes] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a network as a Hub folder that ``AutoModelForCausalLM.from_pretrained`` reads.

    Args:
        net: The network.
        folder: Where to; made where it is missing.
        tokenizer: Files of the tokenizer, by name.
        extra: What to write as ``metrics.json``.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _no_progress_bars():
        net.save_pretrained(folder)
    ckpt.write_files(tokenizer or {}, folder)
    if extra is not None:
        (folder / "metrics.json").write_text(json.dumps(dict(extra), indent=2) + "\n")
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(0o644)  # transformers writes weights for the owner alone
    return folder


def export_checkpoint(path: str | Path, folder: str | Path) -> Path:
    """Write a checkpoint's network and tokenizer as a Hub folder.

    Raises:
        CheckpointError: If the file is missing or not ours.
    """
    net = load_network(path)
    return export(net, folder, ckpt.read(path)[ckpt.KEY].get("tokenizer"))
