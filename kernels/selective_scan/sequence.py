r"""The op on a slice of time: once for what it leaves, and again from the states that came in.

Across a slice states fade by the product of its decays,
:math:`h_{out} = (\prod_t a_t) h_{in} + Z`, with :math:`\prod_t e^{\Delta_t A} = e^{A \sum \Delta}`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from statezoo.kernels._exchange import Crossing
from statezoo.kernels._varlen import segment_ids
from statezoo.kernels.sequence import Shard


def run(
    shard: Shard, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    negative: bool, h0: Tensor, cu: Tensor | None, local: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return outputs and final states of the slice; ``local`` is the op of one process."""
    crossing, E = Crossing(shard, "selective_scan", x, cu), x.shape[2]
    h0 = crossing.begin(h0)
    if negative:  # decays of both signs: multiplied by channels without input, from 1 on
        twice = (dt.repeat(1, 1, 2), A.repeat(2, 1))
        start = torch.cat([h0, torch.ones_like(h0)], 1)
        _, h = local(F.pad(x, (0, E)), *twice, B, C, None, negative, start, cu)
        h, decay = h.split(E, 1)
    else:
        _, h = local(x, dt, A, B, C, None, negative, h0, cu)
        decay = (_sums(dt.to(h.dtype), cu)[..., None] * A.to(h.dtype)).exp()
    incoming = crossing.exchange(h, decay[: crossing.n])
    return local(x, dt, A, B, C, D, negative, crossing.add(h0, incoming), cu)


def _sums(dt: Tensor, cu: Tensor | None) -> Tensor:
    """Add step sizes ``[B T E]`` up in each sequence, ``[N E]``."""
    if cu is None:
        return dt.sum(1)
    zero = dt.new_zeros(cu.shape[0] - 1, dt.shape[2])
    return zero.index_add(0, segment_ids(cu, dt.shape[1]), dt[0])
