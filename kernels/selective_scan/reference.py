"""The recurrence as printed, a step per token: the oracle of every other form."""

from itertools import pairwise

import torch
from torch import Tensor, einsum

from statezoo.kernels._dispatch import accumulator
from statezoo.kernels._varlen import check_bounds


def run(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, negative: bool,
    h: Tensor, cu: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the recurrence; shapes as in the op, ``h`` given, differentiable by autograd."""
    if cu is not None:
        check_bounds(cu, x.shape[1])
        parts = [
            run(x[:, a:b], dt[:, a:b], A, B[:, a:b], C[:, a:b], D, negative, h[i : i + 1], None)
            for i, (a, b) in enumerate(pairwise(cu.tolist()))
        ]
        return torch.cat([y for y, _ in parts], 1), torch.cat([h for _, h in parts])
    narrow, dtype, out = x.dtype, accumulator(x, dt, A, B, C, D, h), []
    x, dt, A, B, C, h = (z.to(dtype) for z in (x, dt, A, B, C, h))
    for t in range(x.shape[1]):
        decay = (dt[:, t, :, None] * A).exp()
        decay = 2 * decay - 1 if negative else decay
        h = decay * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        out.append(einsum("ben,bn->be", h, C[:, t]))
    y = torch.stack(out, 1) if out else torch.zeros_like(x)
    return (y if D is None else y + D.to(dtype) * x).to(narrow), h
