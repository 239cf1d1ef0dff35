"""One vector per sequence, from the stream over its tokens."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from statezoo.kernels._varlen import segment_ids
from statezoo.zoo.padding import find_padding
from statezoo.zoo.slices import refuse_slice

Pooling = Literal["mean", "last", "first", "profile"]
TERMS = 64
"""Cosines by which a profile describes the course of the stream along a sequence."""


def pool(
    x: Tensor,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    how: Pooling = "mean",
) -> Tensor:
    """Sum up the real tokens of each sequence.

    Args:
        x: Stream ``[B T D]``.
        attention_mask: 1 for tokens, 0 for padding, anywhere.
        cu_seqlens: Bounds ``[N+1]`` of packed sequences.
        how: The mean over the tokens, or the last or first of them, or the ``profile``: the
            first 64 terms of the orthonormal cosine transform (DCT-II) along the sequence, which
            tell where in it something stands.

    Returns:
        ``[B D]``, or ``[N D]`` if packed, ``[N 64D]`` as a profile; zero for a sequence without
        tokens.

    Raises:
        ValueError: If ``x`` is a slice of time.
    """
    refuse_slice(pooling=how)
    B, T = x.shape[:2]
    padding = find_padding(attention_mask, B, T)
    if padding is not None:
        flat, cu = padding.pack(x)[0], padding.cu_seqlens.long()
    elif cu_seqlens is not None:
        flat, cu = x[0], cu_seqlens.long()
    else:
        flat, cu = x.flatten(0, 1), torch.arange(0, (B + 1) * T, T, device=x.device)
    if how == "mean":
        acc = flat.to(torch.promote_types(x.dtype, torch.float32))
        total = acc.new_zeros(len(cu) - 1, x.shape[-1])
        total = total.index_add(0, segment_ids(cu, len(flat)), acc)
        return (total / cu.diff().clamp(min=1)[:, None]).to(x.dtype)
    if how == "profile":
        return _profile(flat, cu)
    at = cu[1:] - 1 if how == "last" else cu[:-1]
    found = F.pad(flat, (0, 0, 0, 1))  # a row of zeros at the end
    return found[at.where(cu.diff() > 0, len(flat))]


def _profile(x: Tensor, cu: Tensor) -> Tensor:
    """Return the first cosine terms of each part of ``x [T D]`` along time, ``[N 64D]``."""
    lengths, own = cu.diff(), segment_ids(cu, len(x))
    place = torch.arange(len(x), device=x.device) - cu[own]
    rows = x.new_zeros(len(lengths), max(1, int(lengths.max())), x.shape[-1])
    rows = rows.index_put((own, place), x)  # [N T D], each sequence from 0 on
    acc = torch.promote_types(x.dtype, torch.float32)
    T = lengths.clamp(min=1)[:, None, None].to(acc)
    t = torch.arange(rows.shape[1], device=x.device, dtype=acc)[:, None]
    k = torch.arange(TERMS, device=x.device, dtype=acc)
    cosines = (torch.pi * k * (t + 0.5) / T).cos() * (2 / T).sqrt()  # [N T k]
    cosines = torch.where(k == 0, cosines / 2**0.5, cosines) * (k < T) * (t < T)
    return (cosines.to(x.dtype).mT @ rows).flatten(1)
