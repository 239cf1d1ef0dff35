"""Registration with ``torch.library``: torch.compile sees one node, autograd our backward pass."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from statezoo.kernels._dispatch import accumulator
from statezoo.kernels._varlen import check_bounds, segment_ids

CHUNK = 128  # queries at once


class _Match(NamedTuple):
    """Which tokens ``keys`` a chunk of ``queries`` reads, by the order of number ``i``."""

    i: int
    queries: slice  # of the T that ask
    keys: slice  # of the L in line
    mask: Tensor  # [B C keys], in the dtype that sums are in
    size: Tensor  # of the sets, [B C 1], at least 1


def _codes(ids: Tensor, cu: Tensor | None) -> Tensor:
    """Number tokens ``[B L]`` such that those of other sequences are other tokens."""
    if cu is None:
        return ids.long()
    check_bounds(cu, ids.shape[1])
    return ids.long() + (segment_ids(cu, ids.shape[1]) << 32)


def _matches(
    codes: Tensor, T: int, orders: list[int], window: int, dtype: torch.dtype
) -> Iterator[_Match]:
    """Compare chunks of the last ``T`` tokens with all before, order by order."""
    L, most = codes.shape[1], max(orders)
    line = F.pad(codes, (most, 0), value=-2)  # the code of token s is line[:, most + s]
    place = torch.arange(L, device=codes.device)
    for a in range(L - T, L, CHUNK):
        b = min(a + CHUNK, L)
        low = max(a - window + 2, 0) if window else 0
        high = max(b - 1, low)
        distance = place[a:b, None] - place[low:high]
        match = (distance > 0).expand(len(codes), -1, -1)
        for n in range(1, most + 1):  # an n-gram is the same if the shorter one is, and one more
            q, k = most + 1 - n, most - n
            match = match & (line[:, q + a : q + b, None] == line[:, None, k + low : k + high])
            if window:
                match = match & (distance < window - n)
            for i, order in enumerate(orders):
                if order == n:
                    size = match.sum(-1, keepdim=True).clamp(min=1)
                    yield _Match(
                        i, slice(a + T - L, b + T - L), slice(low, high), match.to(dtype), size
                    )


@torch.library.custom_op("statezoo::ngram_mean", mutates_args=())
def means(
    h: Tensor, ids: Tensor, cu: Tensor | None, T: int, orders: list[int], window: int
) -> Tensor:
    """Return the means ``[B T n*D]``; window 0 for none."""
    acc, codes = accumulator(h), _codes(ids, cu)
    out = h.new_zeros(h.shape[0], T, len(orders), h.shape[2])
    h = h.to(acc)
    with torch.autocast(h.device.type, enabled=False):
        for m in _matches(codes, T, orders, window, acc):
            out[:, m.queries, m.i] = ((m.mask @ h[:, m.keys]) / m.size).to(out.dtype)
    return out.flatten(2)


@means.register_fake
def _(h: Tensor, ids: Tensor, cu: Tensor | None, T: int, orders: list[int], window: int) -> Tensor:
    return h.new_empty(h.shape[0], T, len(orders) * h.shape[2])


@torch.library.custom_op("statezoo::ngram_mean_backward", mutates_args=())
def means_backward(
    d: Tensor, ids: Tensor, cu: Tensor | None, orders: list[int], window: int
) -> Tensor:
    """Return the gradient ``[B L D]`` of the vectors, of that of the means ``d [B T n*D]``."""
    acc, T, codes = accumulator(d), d.shape[1], _codes(ids, cu)
    d = d.to(acc).unflatten(2, (len(orders), -1))
    dh = d.new_zeros(*ids.shape, d.shape[-1])
    with torch.autocast(d.device.type, enabled=False):
        for m in _matches(codes, T, orders, window, acc):
            dh[:, m.keys] += m.mask.mT @ (d[:, m.queries, m.i] / m.size)
    return dh


@means_backward.register_fake
def _(d: Tensor, ids: Tensor, cu: Tensor | None, orders: list[int], window: int) -> Tensor:
    return d.new_empty(*ids.shape, d.shape[2] // len(orders), dtype=accumulator(d))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, ids, cu, _, ctx.orders, ctx.window = inputs
    ctx.dtype = h.dtype
    ctx.save_for_backward(ids, cu)


def _backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
    ids, cu = ctx.saved_tensors
    dh = means_backward(d, ids, cu, ctx.orders, ctx.window).to(ctx.dtype)
    return dh, None, None, None, None, None


means.register_autograd(_backward, setup_context=_setup)
