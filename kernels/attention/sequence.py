"""The op on a slice of time: keys and values of all slices are gathered, queries stay.

Source: Sun et al., LASP-2, arXiv:2502.07563, section 3.3 (LASP-2H), with windows and documents.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from statezoo.kernels._exchange import all_gather, reduce_scatter
from statezoo.kernels.sequence import Shard


def gather(
    shard: Shard, q: Tensor, k: Tensor, v: Tensor, cu: Tensor | None
) -> tuple[Tensor, Tensor, int]:
    """Return the keys and values that the slice's first sequence and later ones see.

    Those are the tokens ``[B L *]`` from the first sequence's start, on earlier slices maybe, to
    the slice's end; and how many of the slice's ``T`` tokens belong to the first.
    """
    if q.shape[1] != shard.T or (cu is None) != (shard.cu_seqlens is None):
        has = "no cu_seqlens" if shard.cu_seqlens is None else "cu_seqlens"
        raise ValueError(
            f"attention: inside a Shard of {shard.T} tokens, with {has}, got {q.shape[1]} tokens "
            f"with{'out' if cu is None else ''} cu_seqlens."
        )
    kv: Tensor = _Gather.apply(torch.cat([k, v], -1), shard)  # type: ignore[no-untyped-call]
    k, v = kv[:, shard.start - shard.before : shard.start + shard.T].split(
        [k.shape[-1], v.shape[-1]], -1
    )
    return k, v, shard.slices[shard.rank].bounds[1]


class _Gather(torch.autograd.Function):
    """Put slices ``[B T *]`` together along time; backward, add every process's gradients up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return all_gather(shard, "attention", "forward", x).movedim(0, 1).flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        d = d.unflatten(1, (ctx.shard.size, -1)).movedim(1, 0)
        return reduce_scatter(ctx.shard, "attention", d), None
