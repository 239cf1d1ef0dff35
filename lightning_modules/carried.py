"""States carried from batch to batch: truncated back-propagation through time.

A batch that has ``starts`` goes on, in the rows where that is false, where the batch before ended.
Its forward pass begins with the states that the mixers had there, as they were, so what it computes
is what one long forward pass would; gradients end at the join.
"""

from __future__ import annotations

from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from statezoo.datamodules.batch import Batch
from statezoo.zoo.cache import cache_from_tensors, cache_to_tensors, states_of

__all__ = ["Carried", "check_bounded"]

LONG = 1 << 40


def check_bounded(net: Any) -> None:
    """Refuse a network of which a state grows from batch to batch.

    Raises:
        ValueError: If a mixer keeps its whole past.
    """
    for layer, mixer in enumerate(net.model.mixers()):
        if mixer.state_size(2 * LONG) > mixer.state_size(LONG):
            raise ValueError(
                f"data.carry needs states of fixed size, and layer {layer}, {mixer.name}, keeps "
                f"its whole past: give it a window, {{name: {mixer.name}, window: 256}}, or set "
                "data.carry to false."
            )


class Carried:
    """The states of all layers after the batch before, one of each row.

    Args:
        cache: They themselves, cut from the graph; None before the first batch.
        rows: How many rows there were.
    """

    def __init__(self, cache: Cache | None = None, rows: int = 0) -> None:
        self.cache, self.rows = cache, rows

    def begin(self, body: Any, batch: Batch) -> Cache:
        """Return the states that the sequences of a batch begin with.

        Args:
            body: The network, without its head.
            batch: Has ``starts``.

        Raises:
            ValueError: If the batch goes on and there is no batch before it.
        """
        cache: Cache = DynamicCache(config=body.config)
        starts = batch["starts"]
        if bool(starts.all()):
            return cache
        if self.cache is None or self.rows != len(starts):
            raise ValueError(
                f"a batch goes on in {int((~starts).sum())} of {len(starts)} rows, and there are "
                f"states of {self.rows}: resume with a checkpoint of a run with data.carry and "
                "as many rows, or start a new run from its weights."
            )
        first, _, n = _edges(batch)
        like = batch["tokens"].new_zeros((), dtype=body.embeddings.weight.dtype)
        layers = zip(body.layers, states_of(cache), states_of(self.cache), strict=True)
        for block, new, old in layers:
            fresh = block.first_state(n, like)
            new.put(_replaced(fresh, old.state, n, first[~starts], ~starts), old.seen)
        return cache

    def keep(self, cache: Cache, batch: Batch) -> None:
        """Keep the states with which the rows of a batch end."""
        _, last, _ = _edges(batch)
        for layer in states_of(cache):
            layer.map(lambda x: x.detach()[last])
        self.cache, self.rows = cache, len(last)

    def tensors(self, ranks: int) -> dict[str, Tensor] | None:
        """Return the states of the rows of all processes by name, in the order of the streams.

        Every process must ask. None before the first batch.

        Args:
            ranks: How many processes share each batch, which have their rows in turn.
        """
        if self.cache is None:
            return None
        own = {name: x.cpu() for name, x in cache_to_tensors(self.cache).items() if name != "seen"}
        found: list[Any] = [own]
        if ranks > 1:
            found = [None] * ranks
            dist.all_gather_object(found, own)
        return {name: torch.stack([x[name] for x in found], 1).flatten(0, 1) for name in own}

    @classmethod
    def of(cls, net: Any, tensors: dict[str, Tensor], rank: int, ranks: int) -> Carried:
        """Take back this process's rows of what :meth:`tensors` had returned.

        Args:
            net: The network.
            tensors: The states of the rows of all processes.
            rank: Number of this process among those that share each batch.
            ranks: How many those are, of which there may be more or fewer now.

        Raises:
            ValueError: If the states are those of another network.
        """
        mine = {name: x[rank::ranks].clone() for name, x in tensors.items()}
        seen = torch.zeros(net.config.n_layers, dtype=torch.long)
        rows = len(next(iter(mine.values())))
        return cls(cache_from_tensors(net, {**mine, "seen": seen}), rows)


def _edges(batch: Batch) -> tuple[Tensor, Tensor, int]:
    """Return which sequence each row begins with, which it ends with, and how many there are."""
    rows, bounds = len(batch["starts"]), batch.get("cu_seqlens")
    number = torch.arange(rows + 1, device=batch["tokens"].device)
    if bounds is None:
        return number[:-1], number[:-1], rows
    at = number * (batch["tokens"].numel() // rows)
    edges = torch.searchsorted(bounds.long(), at)
    return edges[:-1], edges[1:] - 1, len(bounds) - 1


def _replaced(fresh: Any, carried: Any, n: int, at: Tensor, rows: Tensor) -> Any:
    """Put rows of a carried state in the place of sequences ``at`` of a fresh one of ``n``."""
    if isinstance(carried, Tensor):
        zeros = carried.new_zeros(n, *carried.shape[1:])
        base = zeros if fresh is None else fresh.to(carried.dtype)
        return base.index_copy(0, at, carried[rows])
    if carried is None:
        return fresh
    pairs = zip(repeat(None) if fresh is None else fresh, carried, strict=fresh is not None)
    parts = [_replaced(a, b, n, at, rows) for a, b in pairs]
    return type(carried)(*parts) if hasattr(carried, "_fields") else tuple(parts)
