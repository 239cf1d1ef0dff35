"""What network is meant: ``1.3B-gla``, a shipped config, a run, a model's folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statezoo.parser import nearest

if TYPE_CHECKING:
    from statezoo.zoo import StateZooConfig

UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
DEPTHS = (
    (125e6, 12), (350e6, 24), (760e6, 24), (1.3e9, 24), (2.7e9, 32), (6.7e9, 32), (13e9, 40),
    (30e9, 48), (66e9, 64), (175e9, 96),
)  # fmt: skip
"""Parameters and layers of Brown et al., GPT-3, arXiv:2005.14165v4, table 2.1 (30 and 66 B: Zhang
et al., OPT, arXiv:2205.01068v4, table 1)."""
STEP = 128
"""Widths are multiples of it."""


def number(text: str | float, what: str) -> float:
    """Read ``100B``, ``1.3B``, ``0.5M`` or a plain number.

    Raises:
        ValueError: If it is none above 0.
    """
    found = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([KMBT]?)\s*", str(text), re.IGNORECASE)
    try:
        value = float(found[1]) * UNITS[found[2].upper()] if found else 0.0
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ValueError(f"{what} must be a number above 0 such as 1.3B or 500M, got {text!r}.")
    return value


def find_shape(model: str, settings: Mapping[str, Any], vocab_size: int | None) -> StateZooConfig:
    """Return the configuration of the network that is to be trained.

    Args:
        model: ``1.3B-NAME`` of an architecture or its presets; a config, shipped or the user's; a
            folder or checkpoint of a run; a model's folder; or a short name.
        settings: Settings of the network instead of those found, ``d_model`` and others of the
            model's ``--help``.
        vocab_size: Symbols; default those of the model, 32000 where it does not say.

    Raises:
        ValueError: If there is no such model, or a setting is wrong.
    """
    if sized := re.fullmatch(r"([\d.]+[KMBT])-(\w+)", model, re.IGNORECASE):
        return _sized(number(sized[1], "--model"), sized[2], settings, vocab_size)
    cls, init = _described(model)
    return _config(cls, {**init, **settings}, vocab_size)


def _described(model: str) -> tuple[str, dict[str, Any]]:
    """Return class and settings that a name, a file or a folder stands for."""
    from statezoo import arguments, shipped
    from statezoo.lightning_modules import ARCHITECTURES
    from statezoo.zoo import MIXERS

    if model in ARCHITECTURES:
        return model, {}
    if model in MIXERS:
        return "Hybrid", {"mixers": [model]}
    place = Path(shipped.resolve(model))
    if (place / "config.json").is_file():
        said = json.loads((place / "config.json").read_text(encoding="utf-8"))
        keys = ("mixers", "vocab_size", "d_model", "n_layers", "channel", "tie_embeddings")
        return "Hybrid", {key: said[key] for key in keys if key in said}
    if place.is_dir() or place.suffix == ".ckpt":
        from statezoo.lightning_modules import checkpoint as ckpt

        path = str(arguments.find_checkpoint(place))
        content = ckpt.read(path)
        cls = ckpt.task_class(content, path).__name__
        return cls, dict(ckpt.settings(content, path))
    try:
        content = arguments.read_config(arguments.find_config(model))
    except ValueError as error:
        known = [*MIXERS, *ARCHITECTURES, *shipped.names()]
        raise ValueError(f"--model {model}: {error}{nearest(model, known)}.") from None
    part = content.get("model") or {}
    if not isinstance(part, dict) or "class_path" not in part:
        raise ValueError(f"--model {model} is a config without a model: name one that has it.")
    return str(part["class_path"]).rpartition(".")[2], dict(part.get("init_args") or {})


def _config(cls: str, init: Mapping[str, Any], vocab_size: int | None) -> StateZooConfig:
    """Return the configuration that a class makes of settings."""
    import torch

    from statezoo.lightning_modules import ARCHITECTURES, CausalLM

    kind = {**ARCHITECTURES, "CausalLM": CausalLM}.get(cls)
    if kind is None:
        raise ValueError(
            f"plan knows language models, CausalLM and architectures by their names, not {cls}."
        )
    if init.get("pretrained"):
        raise ValueError("plan needs a whole config: name the pretrained model itself as --model.")
    size = vocab_size or init.get("vocab_size") or 32000
    n_layers = init.get("n_layers")
    kept = {key: value for key, value in init.items() if key != "vocab_size"}
    if n_layers is not None:  # only as many are built as there are kinds
        kept["n_layers"] = min(n_layers, len(init.get("mixers", [1])))
    try:
        with torch.device("meta"):
            config: StateZooConfig = kind(**kept, vocab_size=size).net.config
    except TypeError as error:
        raise ValueError(f"--settings: {error}") from error
    config.n_layers = n_layers or config.n_layers
    return config


def _sized(
    wanted: float, name: str, settings: Mapping[str, Any], vocab_size: int | None
) -> StateZooConfig:
    """Return a network of an architecture with about so many parameters.

    Its kind of layers and their settings are those of the architecture's largest preset. The depth
    is that of GPT-3 at this size, times what the preset has over GPT-3 at its own; the width the
    multiple of 128 that comes nearest. Heads grow in number with the width of the network, up to a
    few less where it could not be cut so; up to four heads stay as many, and grow in width.
    """
    from statezoo.lightning_modules.estimate import sizes

    cls, init = _largest_preset(name)
    has = sizes(_config(cls, init, vocab_size)).all
    period = len(init.get("mixers", [1]))
    depth = init["n_layers"] / _depth(has) * _depth(wanted)
    n_layers = int(settings.get("n_layers", max(1, round(depth / period)) * period))

    def at(width: int) -> StateZooConfig:
        wrong: list[ValueError] = []
        for fewer in range(9):  # heads that the width can be cut into
            scaled = _scaled(init, width / init["d_model"], fewer)
            made = {**scaled, "d_model": width, "n_layers": n_layers, **settings}
            try:
                return _config(cls, made, vocab_size)
            except ValueError as error:
                wrong.append(error)
        raise wrong[0]

    if "d_model" in settings:
        return at(int(settings["d_model"]))
    low, high = 1, 1024
    while high - low > 1:
        middle = (low + high) // 2
        if sizes(at(middle * STEP)).all <= wanted:
            low = middle
        else:
            high = middle
    found = [at(step * STEP) for step in (low, high)]
    return min(found, key=lambda config: abs(sizes(config).all - wanted))


def _depth(size: float) -> int:
    """Return the layers of GPT-3 nearest to a size, by ratio."""
    return min(DEPTHS, key=lambda row: max(row[0] / size, size / row[0]))[1]


def _largest_preset(name: str) -> tuple[str, dict[str, Any]]:
    """Return class and settings of the largest preset of an architecture.

    Raises:
        ValueError: If it has none.
    """
    from statezoo import arguments
    from statezoo.listing import configs

    presets = configs()[0]
    known = {x.lower() for p in presets for x in (p.architecture, p.model) if x != "Hybrid"}
    fits = [p for p in presets if name.lower() in (p.architecture, p.model.lower())]
    if name.lower() == "attention":
        fits = [p for p in presets if p.model == "Transformer"]
    if not fits or name.lower() == "hybrid":
        raise ValueError(
            f"--model: no architecture {name!r}{nearest(name, known)}; those with presets are "
            f"{', '.join(sorted({p.architecture for p in presets}))}."
        )
    preset = max(fits, key=lambda p: float(p.cells[0].split()[0]))
    part = arguments.read_config(arguments.find_config(preset.name))["model"]
    return part["class_path"], part["init_args"]


def _scaled(init: Mapping[str, Any], times: float, fewer: int) -> dict[str, Any]:
    """Scale the numbers of heads, and widths that a preset names, with the width of the network."""
    made = dict(init)
    entries = [dict(m) if isinstance(m, Mapping) else {"name": m} for m in init.get("mixers", [])]
    if entries:
        made["mixers"] = [_heads(entry, times, fewer) for entry in entries]
    elif "n_heads" in init:
        made |= _heads(init, times, fewer)
    if isinstance(init.get("inner_settings"), Mapping):
        made["inner_settings"] = _heads(init["inner_settings"], times, fewer)
    channel = init.get("channel")
    if isinstance(channel, Mapping) and channel.get("inner"):
        made["channel"] = {**channel, "inner": max(64, round(channel["inner"] * times / 64) * 64)}
    return made


def _heads(settings: Mapping[str, Any], times: float, fewer: int) -> dict[str, Any]:
    heads = settings.get("n_heads")
    if heads is None or (heads <= 4 and "head_dim" not in settings):
        return dict(settings)
    return {**settings, "n_heads": max(1, round(heads * times) - fewer)}
