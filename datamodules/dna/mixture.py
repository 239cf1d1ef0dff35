r"""Many orders at once: what fixed contexts of a sequence say together.

The log probabilities of all orders are added with weights and normalised again,

.. math::
    p(b \mid c) \propto \exp \sum_k (u_{k, n_k} + v_{k, m}) \log p_k(b \mid c_k),
    \qquad p_k(b \mid c_k) = \frac{n(c_k b) + a}{n(c_k) + 4 a}

where :math:`n_k` is the size of :math:`n(c_k)` and :math:`m` the longest order that has seen its
context. The weights maximise the likelihood of the end of the training sequence, counts there being
of the rest; then they stay as they are while the counts of the whole take their place.

Source: Mattern, Linear and geometric mixtures, arXiv:1302.2820v1, eq. 7 (one set of weights).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from statezoo.datamodules.dna.baselines import Codes, Counts, Keys, keys_of

__all__ = ["mixture_bits"]

ORDERS = (1, 2, 3, 4, 6, 8, 9, 10, 11, 12, 13, 14, 16, 18, 20, 24)
_PSEUDO = 1 / 16  # a: contexts that were seen few times may speak clearly, weights answer for them
_SIZES = 12  # classes of n(c): 0, 1, 2-3, 4-7, ...
_HELD = 100_000  # bases on which weights are fitted, at most
_SHORT = 5_000  # pieces below this are held out whole, every tenth of them
_PART = 1 << 18  # bases that are scored at once


class _Evidence(NamedTuple):
    """What one order says about ``T`` bases: ``[T 4]`` log p, ``[T]`` class of n, whether seen."""

    logs: NDArray[np.float32]
    size: NDArray[np.int64]
    seen: NDArray[np.bool_]


def mixture_bits(train: Sequence[Codes], counts: Counts, keys: Keys) -> float:
    """Bits per base of ``keys`` under a mixture whose weights and counts are of ``train`` alone.

    Args:
        train: Pieces of codes 0 to 3, 4 for N.
        counts: Their counts.
        keys: ``keys_of`` the test sequence.
    """
    by_size, by_longest = _fit(*_hold_out(train))
    nats = 0.0
    for start in range(0, len(keys), _PART):
        part = keys[start : start + _PART]
        logits = np.zeros((len(part), 4), dtype=np.float32)
        longest = np.zeros(len(part), dtype=np.int64)
        for k in reversed(range(len(ORDERS))):
            found = _evidence(counts, part, ORDERS[k])
            longest = np.where(longest == 0, (k + 1) * found.seen, longest)
            weight = by_size[k, found.size] + by_longest[k, longest]
            logits += weight[:, None] * found.logs
        top = logits.max(axis=1, keepdims=True)
        total = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
        said = np.take_along_axis(logits, (part % 5)[:, None], axis=1)[:, 0]
        nats += float((total - said).sum(dtype=np.float64))
    return float(nats / len(keys) / np.log(2))


def _hold_out(train: Sequence[Codes]) -> tuple[list[Codes], list[Codes]]:
    """The last tenth of each long piece, and every tenth short piece."""
    kept, held = [], []
    for number, part in enumerate(train):
        cut = len(part) * 9 // 10
        if len(part) < _SHORT:
            cut = 0 if number % 10 == 9 else len(part)
        kept.append(part[:cut])
        held.append(part[cut:])
    if not sum(map(len, held)):  # fewer than ten short pieces
        return list(train), list(train)
    return kept, list(_first(held, _HELD))


def _first(parts: Sequence[Codes], size: int) -> Iterator[Codes]:
    """About ``size`` letters, the same share of each part."""
    share = min(1.0, size / sum(map(len, parts)))
    return (part[: int(np.ceil(len(part) * share))] for part in parts)


def _evidence(counts: Counts, keys: Keys, order: int) -> _Evidence:
    n = counts.of(keys, order)
    total = n.sum(axis=1)
    p = (n + _PSEUDO) / (total + 4 * _PSEUDO)[:, None]
    size = np.minimum(np.frexp(total)[1], _SIZES - 1).astype(np.int64)
    return _Evidence(np.log(4 * p).astype(np.float32), size, total > 0)


def _fit(
    kept: Sequence[Codes], held: Sequence[Codes]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weights ``[orders, sizes]`` and ``[orders, longest]`` of largest likelihood on ``held``."""
    keys = np.sort(np.concatenate([keys_of(part) for part in held]))
    counts, orders = Counts(kept), ORDERS
    found = [_evidence(counts, keys, order) for order in orders]
    del counts
    seen = np.stack([evidence.seen for evidence in found])  # [K T]
    ranks = np.arange(1, len(orders) + 1)[:, None]
    longest = torch.from_numpy((seen * ranks).max(axis=0))
    logs = torch.from_numpy(np.stack([evidence.logs for evidence in found]))  # [K T 4]
    sizes = torch.from_numpy(np.stack([evidence.size for evidence in found]))
    target = torch.from_numpy(keys % 5)
    by_size = torch.full((len(orders), _SIZES), 1 / len(orders), requires_grad=True)
    by_longest = torch.zeros(len(orders), len(orders) + 1, requires_grad=True)
    solver = torch.optim.LBFGS(
        [by_size, by_longest], max_iter=60, history_size=10, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        solver.zero_grad()
        weight = by_size.gather(1, sizes) + by_longest[:, longest]  # [K T]
        logits = (weight[..., None] * logs).sum(0)
        nats = torch.nn.functional.cross_entropy(logits, target)
        nats = nats + 1e-5 * (by_size.square().sum() + by_longest.square().sum())
        nats.backward()
        return nats

    with torch.enable_grad():
        solver.step(loss)
    return by_size.detach().numpy(), by_longest.detach().numpy()
