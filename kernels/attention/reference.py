"""Attention as printed, a token and a sequence at a time: the oracle."""

from itertools import pairwise

import torch
from torch import Tensor, einsum

from statezoo.kernels._dispatch import accumulator


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    window: int | None = None,
    sinks: int = 0,
    cu: Tensor | None = None,
) -> Tensor:
    """Attend within whole sequences; shapes as in the op, differentiable by autograd."""
    if cu is not None:
        bounds = cu.tolist()
        parts = [
            run(q[:, a:b], k[:, a:b], v[:, a:b], scale, window, sinks) for a, b in pairwise(bounds)
        ]
        return torch.cat(parts, 1)
    out, dtype = [], accumulator(q, k, v)
    repeat = q.shape[2] // k.shape[2]
    keys, values = (x.to(dtype).repeat_interleave(repeat, 2) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    for t in range(q.shape[1]):
        seen = [s for s in range(t + 1) if window is None or t - s < window or s < sinks]
        score = scale * einsum("bhk,bshk->bhs", q[:, t].to(dtype), keys[:, seen])
        out.append(einsum("bhs,bshv->bhv", score.softmax(-1), values[:, seen]))
    o = torch.stack(out, 1) if out else v.new_zeros(*q.shape[:3], v.shape[3])
    return o.to(v.dtype)
