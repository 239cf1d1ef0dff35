"""The recurrence as printed, a step per token and write: the oracle of every other form."""

from itertools import pairwise

import torch
from torch import Tensor, einsum

from statezoo.kernels._dispatch import accumulator
from statezoo.kernels._varlen import check_bounds


def run(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float, S: Tensor,
    cu: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the recurrence; ``k [B T n H K]`` and so on, ``S`` given, differentiable by autograd."""
    if cu is not None:
        check_bounds(cu, q.shape[1])
        parts = []
        for i, (a, b) in enumerate(pairwise(cu.tolist())):
            at = slice(a, b)
            gate = None if g is None else g[:, at]
            inputs = q[:, at], k[:, at], v[:, at], beta[:, at]
            parts.append(run(*inputs, gate, scale, S[i : i + 1], None))
        return torch.cat([o for o, _ in parts], 1), torch.cat([S for _, S in parts])
    out, dtype = [], accumulator(q, k, v, beta, g, S)
    repeat = v.shape[3] // q.shape[2]
    q, k = (x.to(dtype).repeat_interleave(repeat, -2) for x in (q, k))
    S, beta, width = S.to(dtype), beta.to(dtype), v.dtype
    v = v.to(dtype)
    for t in range(q.shape[1]):
        if g is not None:
            decay = g[:, t].to(dtype).exp()
            S = S * (decay[..., None, None] if g.ndim == 3 else decay[..., None])
        for j in range(k.shape[2]):
            error = v[:, t, j] - einsum("bhk,bhkv->bhv", k[:, t, j], S)
            S = S + einsum("bhk,bhv->bhkv", k[:, t, j], beta[:, t, j, :, None] * error)
        out.append(scale * einsum("bhk,bhkv->bhv", q[:, t], S))
    o = torch.stack(out, 1) if out else v[:, :, 0]
    return o.to(width), S
