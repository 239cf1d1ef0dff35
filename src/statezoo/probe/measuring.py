"""What a trained model says on problems whose answers are known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from statezoo.datamodules.batch import IGNORE
from statezoo.datamodules.synthetic import Example

if TYPE_CHECKING:
    from statezoo.datamodules import Synthetic

__all__ = ["MEASURES", "measure", "solved"]

MEASURES = {
    "tokens": "share of scored tokens that are right",
    "sequences": "share of problems of which all scored tokens are right",
    "legal": "share of scored tokens at which the likeliest symbol may come",
}
"""The accuracies, each between 0 and 1."""

TOKENS = 1 << 14
"""Tokens that are read at once."""


def measure(net: Any, data: Synthetic, split: str) -> dict[int, dict[str, Any]]:
    """Measure a causal model at each of the test's lengths.

    Args:
        net: The model.
        data: Gives the problems.
        split: ``val`` or ``test``.

    Returns:
        By length: ``problems``, ``scored`` tokens, ``chance`` of a token, the accuracies of
        :data:`MEASURES`, ``nll`` in nats a scored token, ``cumulative``, the share of problems of
        which the first 1, 2 ... scored tokens are all right, where problems have equally many, and,
        where the true law of what comes is known, the mean total ``variation`` from it.
    """
    was = net.training
    net.eval()
    try:
        return {
            length: {"chance": data.task.chance(length), **_measure(net, data, split, length)}
            for length in data.test_lengths
        }
    finally:
        net.train(was)


def solved(net: Any, data: Synthetic, name: str) -> bool:
    """Say whether all validation problems of the longest test length are solved.

    Args:
        net: The model.
        data: Gives the problems.
        name: The accuracy that counts.
    """
    was = net.training
    net.eval()
    try:
        return bool(_measure(net, data, "val", max(data.test_lengths), name)[name] == 1)
    finally:
        net.train(was)


@torch.inference_mode()
def _measure(
    net: Any, data: Synthetic, split: str, length: int, stop_below: str | None = None
) -> dict[str, Any]:
    """Measure at a length; with ``stop_below``, only until that accuracy is below 1."""
    right: list[Any] = []  # of each problem, whether each scored token is
    legal: list[Any] = []
    variation: list[Any] = []
    nats = 0.0
    for examples in _batches(data, split, length):
        logs = _log_laws(net, examples)
        for one, log in zip(examples, logs, strict=True):
            targets = one.targets[one.targets != IGNORE]
            nats -= float(log[np.arange(len(targets)), targets].sum())
            said = log.argmax(-1)
            right.append(said == targets)
            if one.laws is None:
                legal.append(said == targets)
                continue
            laws = one.laws[one.targets != IGNORE]
            legal.append(laws[np.arange(len(said)), said] > 0)
            variation.append(np.abs(np.exp(log) - laws).sum(-1) / 2)
        if stop_below and not all(x.all() for x in (legal if stop_below == "legal" else right)):
            break
    scored = np.concatenate(right)
    found: dict[str, Any] = {
        "problems": len(right),
        "scored": len(scored),
        "tokens": float(scored.mean()),
        "sequences": float(np.mean([x.all() for x in right])),
        "legal": float(np.concatenate(legal).mean()),
        "nll": nats / len(scored),
    }
    if len({len(x) for x in right}) == 1 and len(right[0]) > 1:
        found["cumulative"] = np.minimum.accumulate(np.stack(right), 1).mean(0).tolist()
    if variation:
        found["variation"] = float(np.concatenate(variation).mean())
    return found


def _batches(data: Synthetic, split: str, length: int) -> Iterator[list[Example]]:
    """Yield problems of a length, together about ``TOKENS`` tokens."""
    batch: list[Example] = []
    size = 0
    for index in range(data.examples[split]):
        batch.append(data.task.example(data.seed, split, index, length))
        size += len(batch[-1].tokens)
        if size >= TOKENS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _log_laws(net: Any, examples: list[Example]) -> list[Any]:
    """Return log probabilities ``[scored W]`` of each problem, from one causal pass."""
    tokens = torch.zeros(len(examples), max(len(one.tokens) for one in examples), dtype=torch.int64)
    scored = torch.zeros_like(tokens, dtype=torch.bool)
    for row, one in enumerate(examples):
        tokens[row, : len(one.tokens)] = torch.from_numpy(one.tokens)
        scored[row, : len(one.tokens)] = torch.from_numpy(one.targets != IGNORE)
    device = next(net.parameters()).device
    hidden: Tensor = net.model(input_ids=tokens.to(device)).last_hidden_state
    logs = net.lm_head(hidden[scored.to(device)]).float().log_softmax(-1).cpu()
    return [part.numpy() for part in logs.split(scored.sum(1).tolist())]
