"""A net on a slice of time, inside ``with shard:``; what mixers need beside sharded operations."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from statezoo.kernels._exchange import all_gather, on_slice
from statezoo.kernels._varlen import n_sequences
from statezoo.kernels.attention.sequence import gather
from statezoo.kernels.sequence import Shard, current, note

INSTEAD = {
    "attention_mask": "pack the sequences without their padding, Shard(group, T, cu_seqlens)",
    "use_cache": "slices run side by side; carry states on, or generate, on one process",
    "past_key_values": "slices run side by side; carry states on, or generate, on one process",
    "labels": (
        "cut targets that are shifted already with shard.take, and divide the sum of the slices' "
        "losses by the number of all scored tokens"
    ),
    "pooling": "classify each sequence on one process",
    "bidirectional": "run a net that reads both ways on one process a sequence",
    "complement": "run a net that reads both strands on one process a sequence",
}
"""What needs whole sequences, and what to do instead."""


def refuse_slice(**given: Any) -> None:
    """Stop where a slice of time is not enough.

    Args:
        **given: What needs whole sequences, by a name in ``INSTEAD``, if it is not ``None``.

    Raises:
        ValueError: If a shard is open and something is given.
    """
    for name, value in given.items():
        if value is not None and value is not False and current() is not None:
            raise ValueError(
                f"{name} needs whole sequences, and this process has a slice of time: "
                f"{INSTEAD[name]}."
            )


def check_slice(x: Tensor, cu_seqlens: Tensor | None) -> Shard | None:
    """Return the shard that is open, if any, whose slice ``x [B T ...]`` has to be.

    Raises:
        ValueError: If it is not.
    """
    shard = current()
    if shard is None:
        return None
    own = shard.cu_seqlens
    if x.shape[1] != shard.T or (cu_seqlens is None) != (own is None):
        raise ValueError(
            f"the open shard is of slices of {shard.T} tokens, {_packed(own)}, but the net got "
            f"{x.shape[1]} tokens, {_packed(cu_seqlens)}: give it shard.take(tokens) and "
            "cu_seqlens=shard.cu_seqlens."
        )
    if cu_seqlens is not None and own is not None and cu_seqlens.shape != own.shape:
        raise ValueError(
            f"the slice has {len(own) - 1} documents, but cu_seqlens bounds "
            f"{len(cu_seqlens) - 1}: give the net cu_seqlens=shard.cu_seqlens."
        )
    return shard


def _packed(cu_seqlens: Tensor | None) -> str:
    return "unpacked" if cu_seqlens is None else "packed"


def tokens_before(x: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """Count the tokens of each sequence of ``x [B T ...]`` on earlier slices.

    Where a mixer is one of several memories, sequences are those of all memories, and how much of
    them is on other slices only these know: then they all exchange counts.

    Returns:
        Counts ``[N]`` int64; ``None`` outside of a shard.
    """
    shard = current()
    if shard is None:
        return None
    N, own = n_sequences(x, cu_seqlens), shard.cu_seqlens
    before = torch.zeros(N, dtype=torch.long, device=x.device)
    if cu_seqlens is None:
        return before + shard.start
    n = N if own is None else N // (len(own) - 1)  # memories that go on from slice to slice
    if n == 1:
        before[0] = shard.before
        return before
    last = cu_seqlens.long().diff()[-n:]
    counts = all_gather(shard, "positions", "forward", last)
    first = (shard.start - shard.before) // shard.T  # slice where the sequence begins
    before[:n] = counts[first : shard.rank].sum(0)
    return before


def with_earlier(
    ids: Tensor, x: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Put what earlier slices hold of the first sequence before tokens and stream, as attention.

    Args:
        ids: Tokens ``[B T]`` of the slice.
        x: Stream ``[B T D]``.
        cu_seqlens: Bounds of the slice's documents.

    Returns:
        Tokens ``[B L]``, stream ``[B L D]`` and bounds with the earlier ones; outside of a shard
        what was given.
    """
    shard = current()
    if shard is None:
        return ids, x, cu_seqlens
    return on_slice(_gather, shard, x, ids, cu_seqlens)


def _gather(
    shard: Shard, x: Tensor, ids: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    x, _, _ = gather(shard, x, x, x[..., :0], cu_seqlens)
    ids = all_gather(shard, "tokens", "forward", ids).movedim(0, 1).flatten(1)
    ids = ids[:, shard.start - shard.before : shard.start + shard.T]
    if cu_seqlens is not None:
        cu_seqlens = torch.cat([cu_seqlens[:1], cu_seqlens[1:] + shard.before])
    return ids, x, cu_seqlens


def mean_of_slices(x: Tensor, op: str) -> Tensor:
    """Return the mean of ``x`` of all slices, ``op`` being what it is noted as in the traffic.

    It is part of every slice's loss: the losses of all slices add up, and so do their gradients.
    """
    shard = current()
    if shard is None:
        return x
    total: Tensor = _Sum.apply(x, shard, op)  # type: ignore[no-untyped-call]
    return total / shard.size


class _Sum(torch.autograd.Function):
    """An all-reduce each way: the losses of all slices have a part in the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard, op: str) -> Tensor:
        """Add up."""
        ctx.shard, ctx.op = shard, op
        return _all_reduce(x, shard, op, "forward")

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        """Add the gradients up."""
        return _all_reduce(dy, ctx.shard, ctx.op, "backward"), None, None


def _all_reduce(x: Tensor, shard: Shard, op: str, direction: Any) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=shard.group)
    note(op, direction, total, "all_reduce")
    return total
