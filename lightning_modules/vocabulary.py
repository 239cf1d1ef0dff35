"""Pretrained weights for data with more symbols, or others, than they were trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from statezoo.lightning_modules.checkpoint import TOKENS_FILE
from statezoo.zoo import StateZooConfig
from statezoo.zoo.config import LABELS
from statezoo.zoo.model import StateZooPreTrainedModel

Vocabulary = Literal["same", "extend", "new"]

TABLES = ("embeddings.weight", "lm_head.weight")
"""Last parts of the names of tensors that have a row per symbol."""


def with_vocabulary(
    net: StateZooPreTrainedModel,
    vocab_size: int,
    how: Vocabulary,
    complement: Sequence[int] | None = None,
) -> StateZooPreTrainedModel:
    """Return a copy of a trained net that reads and writes other symbols; the layers stay.

    Args:
        net: The trained net.
        vocab_size: Number of symbols.
        how: ``extend`` keeps the rows of the embedding and the head, new symbols begin at the mean
            of these; ``new`` begins all rows anew.
        complement: The complement of each symbol, for a net that reads both strands.

    Raises:
        ValueError: If there are fewer symbols than rows to keep, or complements are missing.

    Source: of the mean, Hewitt, Initializing New Word Embeddings for Pretrained Language Models,
    2021.
    """
    config, had = net.config, int(net.config.vocab_size)
    if how == "extend" and vocab_size < had:
        raise ValueError(
            f"vocabulary: extend needs data with all {had} symbols of the weights and more, the "
            f"data has {vocab_size}: make a tokenizer with statezoo tokenizer extend, or use "
            "--model.vocabulary new."
        )
    if config.complement is not None and complement is None:
        raise ValueError(
            f"vocabulary: {how} of weights that read both strands needs the complement of every "
            "symbol: use data of DNA and --model.reverse_complement equivariant."
        )
    keys = [*config.own_keys(), *LABELS]
    kept = {key: value for key, value in config.to_dict().items() if key in keys}
    kept.pop("num_labels", None)
    if how == "new":
        kept |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    kept |= {"vocab_size": vocab_size}
    if config.complement is not None:
        kept["complement"] = list(complement or [])
    new: StateZooPreTrainedModel = type(net)(StateZooConfig(**kept))
    new.to(device=net.device, dtype=net.dtype)  # type: ignore[call-arg]
    fresh, tensors = new.state_dict(), net.state_dict()
    for name, x in tensors.items():
        if name.endswith(TABLES):
            tensors[name] = fresh[name] if how == "new" else _extended(x, vocab_size)
    new.load_state_dict(tensors)
    new.train(net.training)
    return new


def _extended(table: Tensor, n: int) -> Tensor:
    """Return ``table [W D]`` with more rows, ``[n D]``, equal to the mean of the others."""
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(n - len(table), -1)])


def check_vocabulary(how: str, pretrained: object, tune: str, new_rows: bool) -> None:
    """Raise where a choice of vocabulary makes no sense.

    Raises:
        ValueError: If the choice is unknown, there are no pretrained weights, or the rows of new
            symbols would not be trained.
    """
    if how not in get_args(Vocabulary):
        raise ValueError(f"vocabulary must be same, extend or new, got {how!r}.")
    if how != "same" and pretrained is None:
        raise ValueError(
            f"vocabulary: {how} is about the symbols of pretrained weights, and these are fresh: "
            "give --model.pretrained NAME_OR_PATH, or leave it out."
        )
    if new_rows and tune != "full":
        raise ValueError(
            f"vocabulary: {how} brings new symbols, which tune: {tune} would not learn to read: "
            "use tune: full; --model.optim.rates '{\"model.layers.*\": 0}' trains them alone."
        )


def check_extends(of_weights: Mapping[str, bytes], of_data: Mapping[str, bytes]) -> None:
    """Compare the symbols of weights and data, where both are known.

    Raises:
        ValueError: If a symbol of the weights has another number in the data, or none.
    """
    had, has = symbols(of_weights), symbols(of_data)
    for symbol, number in had.items() if has else ():
        if has.get(symbol) != number:
            place = f"number {has[symbol]}" if symbol in has else "missing"
            raise ValueError(
                f"vocabulary: extend needs a tokenizer that numbers the symbols of the weights as "
                f"theirs does, but {symbol!r}, number {number} of the weights, is {place} in the "
                "data: make one with statezoo tokenizer extend, or use --model.vocabulary new."
            )


def symbols(files: Mapping[str, bytes]) -> dict[str, int]:
    """Return the symbols of a tokenizer's files with their numbers; none where it has no list."""
    content = json.loads(files.get(TOKENS_FILE, b"{}"))
    model: Any = content.get("model")
    vocab = model.get("vocab", {}) if isinstance(model, dict) else {}
    found = dict(vocab) if isinstance(vocab, dict) else {s: i for i, (s, *_) in enumerate(vocab)}
    return found | {token["content"]: token["id"] for token in content.get("added_tokens") or []}
