"""The op on a slice of time: the last inputs of the slices before come in as its state.

A slice pushes its own inputs into what came in, and what is left goes out: for one shorter than the
taps, that still holds inputs from further back.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from statezoo.kernels._exchange import Crossing
from statezoo.kernels.causal_conv1d._edges import edges
from statezoo.kernels.sequence import Shard


def run(
    shard: Shard, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, S0: Tensor,
    cu: Tensor | None, local: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return outputs and final states of the slice; ``local`` is the op of one process."""
    crossing, n = Crossing(shard, "causal_conv1d", x, cu), S0.shape[2]
    S0 = crossing.begin(S0)
    if n:
        last = edges(x, n + 1, cu).final(x, S0).mT  # [N W-1 D]
        length = torch.full_like(S0[:, 0, 0], x.shape[1]) if cu is None else cu.diff()
        step = torch.arange(n, device=x.device)
        kept = step == step[:, None] + length[: crossing.n, None, None]  # moved up by the length
        S0 = crossing.add(S0, crossing.exchange(last, kept.to(last.dtype), matrix=True).mT)
    return local(x, weight, bias, silu, S0, cu)
