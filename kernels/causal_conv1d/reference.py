"""The sum as printed, a tap at a time: the oracle of every other form."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from statezoo.kernels._dispatch import accumulator
from statezoo.kernels._varlen import check_bounds


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, S: Tensor, cu: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Convolve; shapes as in the op, ``S`` given, differentiable by autograd."""
    if cu is not None:
        check_bounds(cu, x.shape[1])
        bounds = cu.tolist()
        parts = [
            run(x[:, a:b], weight, bias, silu, S[i : i + 1], None)
            for i, (a, b) in enumerate(pairwise(bounds))
        ]
        return torch.cat([y for y, _ in parts], 1), torch.cat([S for _, S in parts])
    T, W, dtype = x.shape[1], weight.shape[1], accumulator(x, weight, bias, S)
    inputs = torch.cat([S.to(dtype).mT, x.to(dtype)], 1)  # [B W-1+T D]
    y = x.new_zeros(x.shape, dtype=dtype)
    for j in range(W):
        y = y + weight[:, j].to(dtype) * inputs[:, j : j + T]
    if bias is not None:
        y = y + bias.to(dtype)
    y = F.silu(y) if silu else y
    return y.to(x.dtype), inputs[:, T:].mT
