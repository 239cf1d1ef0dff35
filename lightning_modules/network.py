"""The network inside a module: from settings, from weights, and out again in Hub format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch.utilities import rank_zero_info
from transformers.utils import logging

import statezoo
from statezoo import shipped
from statezoo.lightning_modules import checkpoint as ckpt
from statezoo.lightning_modules.vocabulary import Vocabulary, check_vocabulary, with_vocabulary
from statezoo.zoo import StateZooConfig, StateZooForCausalLM, with_head
from statezoo.zoo.loading import checked_config
from statezoo.zoo.mixer import resolve_mixer
from statezoo.zoo.model import StateZooPreTrainedModel
from statezoo.zoo.tasks import TASKS

Net = TypeVar("Net", bound=StateZooPreTrainedModel)

NETWORKS = {kind.__name__: kind for kind in TASKS.values()}

HEAD = ("id2label", "problem_type", "pooling")
"""Settings of heads alone."""

WEIGHTLESS = ("rope_base", "window")
"""Settings of mixers that attend which trained weights can do without or with."""


def build_network(
    kind: type[Net],
    settings: Mapping[str, Any],
    pretrained: str | Path | None = None,
    defaults: Mapping[str, Any] | None = None,
    tune: str = "full",
    vocabulary: Vocabulary = "same",
    attention: Mapping[str, Any] | None = None,
) -> Net:
    """Return a new network, or one whose body is that of ``pretrained``, and tell what was kept.

    A network that reads one way can go on as one that reads both ways, or both strands, from the
    same weights. Where ``pretrained`` was for another task or for other classes, the head is new.

    Args:
        kind: Class of the network.
        settings: Arguments of ``StateZooConfig``; None is what ``pretrained`` has.
        pretrained: Checkpoint, Hub folder or Hub name. Settings left at their defaults are then
            those of the file.
        defaults: What ``settings`` are where no one asked for anything.
        tune: What is to be trained.
        vocabulary: What to do where the data has other symbols than ``pretrained``.
        attention: ``rope_base`` and ``window`` that the attention of ``pretrained`` is to have.

    Raises:
        ValueError: If a setting is wrong, or was set to something that ``pretrained`` has not; or
            if the head, or new symbols, would be new and not be trained.
    """
    check_vocabulary(vocabulary, pretrained, tune, new_rows=False)
    if pretrained is None:
        if attention:
            raise ValueError(
                "attention is about pretrained layers, and these weights are fresh: give "
                "--model.pretrained NAME_OR_PATH, or say it in --model.mixers."
            )
        return kind(StateZooConfig(**_given(settings)))
    source = load_network(pretrained)
    if attention:
        source = with_attention(source, attention)
    had, has = int(source.config.vocab_size), int(settings["vocab_size"])
    new_rows = vocabulary == "new" or (vocabulary == "extend" and has != had)
    check_vocabulary(vocabulary, pretrained, tune, new_rows)
    if new_rows:
        source = with_vocabulary(source, has, vocabulary, settings.get("complement"))
    body = _changes(settings, source.config)
    _check_shape({**settings, **body}, source.config, defaults or {}, str(pretrained), body)
    net, told = _adopt(kind, source, settings, body, vocabulary == "new")
    if new_rows and vocabulary == "extend":
        told += f"; {has - had} new symbols, begun at the mean of the {had} others"
    if tune in ("lora", "state") and hasattr(net, "lm_head") and not hasattr(source, "lm_head"):
        raise ValueError(
            f"{str(pretrained)!r} is a {type(source).__name__}, so the head is new, and tune: "
            f"{tune} would leave it as it is: use tune: full or head."
        )
    rank_zero_info(f"from {pretrained}: {told}")
    net.train()
    return net


def with_attention(net: Net, settings: Mapping[str, Any]) -> Net:
    """Return a copy of a trained net whose attention layers have another base or window.

    Neither has weights. A larger ``rope_base`` makes the rotary positions' waves longer, so that
    places further apart than any seen in training still look like some that were; with heads of
    width K, ``rope_base * s ** (K / (K - 2))`` stretches the longest wave ``s`` times.

    Args:
        net: The trained net.
        settings: ``rope_base``, ``window`` or both.

    Raises:
        ValueError: If there is another key, or no layer that has such a setting.

    Source: of the stretch, bloc97, NTK-aware scaled RoPE, 2023; Peng et al., YaRN,
    arXiv:2309.00071v2, eq. 16.
    """
    if other := sorted(settings.keys() - {*WEIGHTLESS}):
        raise ValueError(f"attention has {' and '.join(WEIGHTLESS)}, got {', '.join(other)}.")
    mixers = net.config.mixers
    for key in settings:
        if not any(key in mixer for mixer in mixers):
            raise ValueError(
                f"attention.{key} needs layers that attend, these are "
                f"{_listed([mixer['name'] for mixer in mixers])}: leave it out; a recurrent layer "
                "reads any length as it is."
            )
    changed = [mixer | {k: v for k, v in settings.items() if k in mixer} for mixer in mixers]
    return with_head(net, type(net), mixers=changed)[0]


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what was left open; no channel mixer is an answer."""
    return {k: v for k, v in settings.items() if v is not None or k == "channel"}


def _changes(settings: Mapping[str, Any], found: StateZooConfig) -> dict[str, Any]:
    """Return what is asked of the body that ``found`` can be made to do with its weights."""
    changes = {
        key: settings[key]
        for key in ("bidirectional", "complement")
        if settings.get(key) and not getattr(found, key)
    }
    if "bidirectional" in changes and settings.get("tie_directions") is False:
        changes["tie_directions"] = False
    return changes


def _adopt(
    kind: type[Net],
    source: Any,
    settings: Mapping[str, Any],
    body: Mapping[str, Any],
    new_symbols: bool = False,
) -> tuple[Net, str]:
    """Return a network of this kind with the weights of ``source``, and what became of them."""
    head = {key: settings[key] for key in HEAD if settings.get(key) is not None}
    if type(source) is kind and head.get("pooling") == "mean":
        del head["pooling"]  # left at its default
    classes = head.get("id2label", source.config.id2label)
    same_head = type(source) is not kind or classes == source.config.id2label
    net, exchanged = with_head(
        source if same_head else getattr(source, "model", source), kind, **head, **body
    )
    names = _listed([mixer["name"] for mixer in net.config.layer_mixers])
    n = net.config.n_layers
    table = "" if new_symbols else "the embedding and "
    told = f"kept {table}{n} layer{'s' if n > 1 else ''} ({names})"
    if not (exchanged.new or new_symbols):
        told += " and the head"
    for key, what in (("bidirectional", "ways"), ("complement", "strands")):
        if key in body:
            both = "from copies of" if body.get("tie_directions") is False else "with"
            told += f", now reading both {what} {both} the same weights"
    if new_symbols:
        told += f"; new: the embedding and the head, for {net.config.vocab_size} symbols"
    elif exchanged.new:
        told += "; new: the head"
        told += f" for {len(classes)} classes ({', '.join(classes.values())})" if head else ""
    return net, told


def _check_shape(
    settings: Mapping[str, Any],
    found: StateZooConfig,
    defaults: Mapping[str, Any],
    source: str,
    body: Mapping[str, Any],
) -> None:
    """Raise where a setting is neither at its default nor what the file has."""
    asked = {key: value for key, value in _given(settings).items() if key not in HEAD}
    if asked["mixers"] == defaults.get("mixers"):
        asked["mixers"] = found.mixers
    if asked.get("tie_directions") is False and not (body or found.bidirectional):
        raise ValueError("tie_directions: false needs bidirectional: true.")
    more = {"bidirectional": found.bidirectional, **asked}
    more["n_layers"] = max(asked["n_layers"], found.n_layers)
    wanted = StateZooConfig(**more)
    wanted.n_layers = asked["n_layers"]
    _check_same_mixers(wanted, found, source)
    if wanted.vocab_size != found.vocab_size:
        raise ValueError(
            f"{source!r} has vocab_size {found.vocab_size}, the data {wanted.vocab_size}: give the "
            f"data the tokenizer of the weights, --data.tokenizer {source}; language models can go "
            "on with more symbols, or others, by --model.vocabulary extend or new."
        )
    usual = StateZooConfig(**defaults)
    for key in asked.keys() - {"mixers", "vocab_size"} - body.keys():
        default = None if key in ("bidirectional", "complement") else getattr(usual, key)
        _check_same(key, getattr(wanted, key), getattr(found, key), default, source)


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
        other = f", set --model.attention '{{{key}: {asked}}}'" if key in WEIGHTLESS else ""
        raise ValueError(
            f"{source!r} has {key} {has!r}, asked for was {asked!r}: "
            f"leave the setting out{other}, or start without pretrained weights."
        )


def _listed(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def load_network(source: str | Path) -> StateZooPreTrainedModel:
    """Return the network of a checkpoint, a folder, a short name or a Hub name, as it was saved.

    Raises:
        ValueError: If the checkpoint or folder cannot be read.
    """
    place = shipped.resolve(source)
    if Path(place).is_file() or place.endswith(".ckpt"):
        return _network_of(ckpt.read(place), place)
    if not Path(place).exists() and place.count("/") != 1:
        raise ckpt.CheckpointError(
            f"there is no checkpoint or model folder {place!r}{shipped.near(place)}."
        )
    with no_progress_bars():
        return statezoo.load(place)


def _network_of(content: Mapping[str, Any], path: str) -> StateZooPreTrainedModel:
    """Return the network of a checkpoint's content."""
    ckpt.class_path(content, path)
    ours = content[ckpt.KEY]
    name, config = ours.get("network", StateZooForCausalLM.__name__), ours.get("config")
    if name not in [*NETWORKS] or not isinstance(config, Mapping):
        raise ckpt.CheckpointError(f"{path!r} holds a {name}, which is no network here.")
    weights = ckpt.network_weights(content)
    shapes = {key: tuple(x.shape) for key, x in weights.items()}
    net = NETWORKS[name](checked_config(config, shapes, NETWORKS[name], path))
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise ckpt.CheckpointError(f"{path!r}: {' '.join(str(error).split())[:300]}") from error
    return net


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers' bars, which are for large models, off the screen."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def export(
    net: StateZooPreTrainedModel,
    folder: str | Path,
    tokenizer: Mapping[str, bytes] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a network as a Hub folder that ``AutoModelFor...`` of its task reads.

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
    with no_progress_bars():
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
