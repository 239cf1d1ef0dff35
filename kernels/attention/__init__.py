"""Softmax attention over the whole past or a window of it, for baselines and hybrids."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from statezoo.kernels._exchange import on_slice
from statezoo.kernels._varlen import check_bounds, check_packing, n_sequences, segment_ids
from statezoo.kernels.attention import sequence
from statezoo.kernels.sequence import Shard, current

__all__ = ["KV", "attention", "empty", "keep"]


class KV(NamedTuple):
    """Keys and values seen before.

    Attributes:
        k: Keys ``[N L Hkv K]``, right-aligned: the last one is the newest. With a window,
            ``L = sinks + window - 1``, and the first ``sinks`` slots hold the first tokens.
        v: Values ``[N L Hkv V]``.
        length: Real entries of each sequence, ``[N]`` int64; the other slots are zero.
    """

    k: Tensor
    v: Tensor
    length: Tensor


def empty(
    n: int, heads: int, K: int, V: int, like: Tensor, *, window: int | None = None, sinks: int = 0
) -> KV:
    """Return the past of ``n`` sequences before their first token; dtype and device of ``like``."""
    L = 0 if window is None else sinks + window - 1
    k, v = (like.new_zeros(n, L, heads, width) for width in (K, V))
    return KV(k, v, torch.zeros(n, dtype=torch.long, device=like.device))


def attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T Hkv K"],
    v: Float[Tensor, "B T Hkv V"],
    *,
    scale: float | None = None,
    window: int | None = None,
    sinks: int = 0,
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
    past: KV | None = None,
) -> tuple[Float[Tensor, "B T H V"], KV | None]:
    r"""Read a weighted mean of the visible past, the token itself included.

    .. math::
        o_t = \sum_{s \in \mathcal{V}_t} \mathrm{softmax}_s(\mathrm{scale} \cdot q_t^\top k_s) v_s,
        \qquad \mathcal{V}_t = \{s \le t : t - s < \mathrm{window} \text{ or } s < \mathrm{sinks}\}

    Args:
        q: Queries.
        k: Keys; ``H`` is a multiple of ``Hkv``, query heads ``h * H/Hkv`` onwards share key head
            ``h``.
        v: Values.
        scale: Multiplies the scores; default ``K ** -0.5``.
        window: How many last tokens are visible, itself included; default all.
        sinks: How many first tokens of each sequence stay visible beyond the window.
        cu_seqlens: Bounds ``0 .. T`` of sequences packed along ``T``; needs ``B = 1``.
        past: What an earlier call with the same ``window`` and ``sinks`` returned, or
            :func:`empty`. Not inside a :class:`~statezoo.kernels.sequence.Shard`, where the keys
            and values of all slices are gathered, with a window too.

    Returns:
        Outputs in the dtype of ``v``, and the past for the next call (``None`` if packed without
        ``past``).

    Raises:
        ValueError: If shapes disagree or a size is out of range.

    Example:
        >>> q, k, v = torch.randn(3, 2, 100, 4, 16)
        >>> o, past = attention(q, k, v, window=32)
        >>> o, past = attention(q[:, :1], k[:, :1], v[:, :1], window=32, past=past)
        >>> o.shape, past.k.shape
        (torch.Size([2, 1, 4, 16]), torch.Size([2, 31, 4, 16]))

    Source: Vaswani et al., arXiv:1706.03762v7, eq. 1; sinks after Xiao et al., arXiv:2309.17453v4,
    section 3.2.
    """
    sinks = 0 if window is None else sinks
    _check(q, k, v, window, sinks)
    check_packing("attention", q, cu_seqlens)
    N, T = n_sequences(q, cu_seqlens), q.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if past is not None:
        _check_past(k, v, past, N, window, sinks)
    if (shard := current()) is not None:
        return _on_slice(shard, q, k, v, scale, window, sinks, cu_seqlens, past)
    if cu_seqlens is not None:
        return _packed(q, k, v, scale, window, sinks, cu_seqlens, past)
    if past is None:
        return _from_start(q, k, v, scale, window, sinks)
    o = _continue(q, k, v, past, scale, window, sinks)
    return o, keep(past, k, v, past.length + T, window, sinks)


def _on_slice(
    shard: Shard, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, sinks: int,
    cu: Tensor | None, past: KV | None,
) -> tuple[Tensor, KV | None]:  # fmt: skip
    """Attend from a slice of time: its first sequence began on an earlier one, maybe."""
    if past is not None:
        raise ValueError(
            "attention goes on from a past on one process only: leave the Shard, or give no past."
        )
    k, v, n = on_slice(sequence.gather, shard, q, k, v, cu)
    if cu is None:
        return _from_start(q, k, v, scale, window, sinks)
    T, L, parts = q.shape[1], k.shape[1], []
    if n > 0:
        seen = L - T + n
        parts = [_fresh(q[:, :n], k[:, :seen], v[:, :seen], scale, window, sinks)]
    if n < T:
        q, k, v = q[:, n:], k[:, L - T + n :], v[:, L - T + n :]
        parts += [_packed(q, k, v, scale, window, sinks, cu[1:] - n, None)[0]]
    return torch.cat(parts, 1), None


def _from_start(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, sinks: int
) -> tuple[Tensor, KV]:
    """Attend to all keys ``[B L *]``, the last of which are the queries' own."""
    start = torch.zeros(len(q), dtype=torch.long, device=q.device)
    present = KV(k[:, :0], v[:, :0], start)
    return _fresh(q, k, v, scale, window, sinks), keep(
        present, k, v, start + k.shape[1], window, sinks
    )


def _packed(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, sinks: int,
    cu_seqlens: Tensor, past: KV | None,
) -> tuple[Tensor, KV | None]:  # fmt: skip
    """Attend within packed sequences, and to the past of each."""
    T = q.shape[1]
    check_bounds(cu_seqlens, T)
    cu = cu_seqlens.long()
    lengths, own = cu.diff(), segment_ids(cu, T)
    step = torch.arange(int(lengths.max()), device=q.device)
    slot = torch.where(step < lengths[:, None], cu[:-1, None] + step, T)  # [N longest]
    q, k, v = (F.pad(x[0], (0, 0, 0, 0, 0, 1))[slot] for x in (q, k, v))  # right-padded
    if past is None:
        o, present = _fresh(q, k, v, scale, window, sinks), None
    else:
        o = _continue(q, k, v, past, scale, window, sinks)
        present = keep(past, k, v, past.length + lengths, window, sinks, ragged=True)
    return o[own, torch.arange(T, device=q.device) - cu[own]][None], present


def _visible(query: Tensor, key: Tensor, window: int | None, sinks: int) -> Tensor:
    """Compare positions ``[... T]`` and ``[... L]`` to a mask ``[... T L]``."""
    distance = query[..., :, None] - key[..., None, :]
    if window is None:
        return distance >= 0
    return (distance >= 0) & ((distance < window) | (key[..., None, :] < sinks))


def _softmax(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    if mask is None and k.shape[1] > q.shape[1]:
        from torch.nn.attention.bias import causal_lower_right  # slow to import

        mask = causal_lower_right(q.shape[1], k.shape[1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [N H T *]
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )
    return o.transpose(1, 2)


def _fresh(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, sinks: int) -> Tensor:
    """Attend from a sequence's last tokens to all of it; cost grows with ``T * window``."""
    L = k.shape[1]
    if window is None or window >= L:
        return _softmax(q, k, v, scale, None)
    out, start, block = [], L - q.shape[1], max(window, 128)
    position = torch.arange(L, device=q.device)
    for a in range(start, L, block):
        b, low = min(a + block, L), max(a - window + 1, 0)
        near = [slice(0, min(sinks, low)), slice(low, b)]
        keys, values, at = (torch.cat([x[:, s] for s in near], 1) for x in (k, v, position[None]))
        mask = _visible(position[a:b], at[0], window, sinks)
        out.append(_softmax(q[:, a - start : b - start], keys, values, scale, mask))
    return torch.cat(out, 1)


def _continue(
    q: Tensor, k: Tensor, v: Tensor, past: KV, scale: float, window: int | None, sinks: int
) -> Tensor:
    """Attend to the past and to the tokens so far.

    Positions count from what is kept, as if nothing had been dropped: only differences matter, and
    nothing is dropped before all sinks are filled.
    """
    T, L = q.shape[1], past.k.shape[1]
    start = past.length[:, None]
    new = start + torch.arange(T, device=q.device)
    slot = torch.arange(L, device=q.device)
    old = torch.where(slot < sinks, slot, start - L + slot)
    real = torch.where(slot < sinks, slot < start, old >= start.clamp(max=sinks))
    mask = _visible(new, torch.cat([old, new], 1), window, sinks)
    mask = mask & F.pad(real, (0, T), value=True)[:, None]
    k, v = torch.cat([past.k.to(k.dtype), k], 1), torch.cat([past.v.to(v.dtype), v], 1)
    return _softmax(q, k, v, scale, mask[:, None])


def keep(
    past: KV,
    k: Tensor,
    v: Tensor,
    total: Tensor,
    window: int | None,
    sinks: int = 0,
    ragged: bool = False,
) -> KV:
    """Return what the next call needs of a past and the tokens after it.

    Args:
        past: What was kept so far, with the same window and sinks.
        k: New keys ``[N T Hkv K]``; right-padded if ``ragged``.
        v: New values.
        total: Tokens of each sequence, ``past.length`` and the new ones.
        window: How many last tokens are visible.
        sinks: How many first ones stay so.
        ragged: Whether sequences have different numbers of new tokens.
    """
    P, T = past.k.shape[1], k.shape[1]
    k, v = torch.cat([past.k.to(k.dtype), k], 1), torch.cat([past.v.to(v.dtype), v], 1)
    if window is None and not ragged:
        return KV(k, v, total)
    L = int(total.max()) if window is None else window - 1
    position = total[:, None] - L + torch.arange(L, device=k.device)  # [N L]
    real = position >= total.clamp(max=sinks)[:, None]
    source = P + position - past.length[:, None]
    if sinks:
        first = torch.arange(sinks, device=k.device).expand(len(total), -1)
        filled = past.length.clamp(max=sinks)[:, None]
        source = torch.cat([torch.where(first < filled, first, P + first - filled), source], 1)
        real = torch.cat([first < total[:, None], real], 1)
    source = torch.where(real, source, P + T)
    rows = torch.arange(len(total), device=k.device)[:, None]
    k, v = (F.pad(x, (0, 0, 0, 0, 0, 1))[rows, source] for x in (k, v))
    return KV(k, v, total if window is None else total.clamp(max=sinks + L))


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: int) -> None:
    same = q.ndim == k.ndim == v.ndim == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2]
    if not same or q.shape[3] != k.shape[3] or k.shape[2] != v.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(
            "attention needs q [B T H K], k [B T Hkv K] and v [B T Hkv V], H a multiple of Hkv; "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}."
        )
    if (window is not None and window < 1) or sinks < 0:
        raise ValueError(
            f"attention needs window >= 1 or None and sinks >= 0, got {window}, {sinks}."
        )


def _check_past(k: Tensor, v: Tensor, past: KV, N: int, window: int | None, sinks: int) -> None:
    L = past.k.shape[1] if window is None else sinks + window - 1
    for x, y in ((past.k, k), (past.v, v)):
        if x.shape != (N, L, *y.shape[2:]) or past.length.shape != (N,):
            raise ValueError(
                f"attention: past needs keys and values {(N, L, *y.shape[2:])} and length [{N}], "
                f"got {tuple(x.shape)} and {list(past.length.shape)}: another window?"
            )
