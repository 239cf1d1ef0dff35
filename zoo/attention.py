"""Softmax attention with rotary positions."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from statezoo.kernels._varlen import segment_ids
from statezoo.kernels.attention import KV, attention, empty
from statezoo.zoo.mixer import Mixer, State, state_bytes
from statezoo.zoo.norm import RMSNorm


class AttentionState(NamedTuple):
    """Keys and values still visible, and the tokens ``seen [N]`` by each sequence."""

    kv: KV
    seen: Tensor


class Attention(Mixer):
    """Multi-head softmax attention over the whole past, or a window of it.

    Its state grows with the past, or up to the window. ``"transformer"`` names a model of these.

    Args:
        d_model: Width of the stream.
        n_heads: Heads.
        n_kv_heads: Heads of keys and values, shared by groups of heads; default ``n_heads``.
        rope_base: Base of the rotary positions' wave lengths; 0 or ``None`` for no positions.
        window: How many last tokens a token sees, itself included; default all.
        sinks: How many first tokens stay visible beyond the window.
        qkv_bias: Whether queries, keys and values have a bias.
        qk_norm: Whether queries and keys are normalised (RMS) per head, before the rotation.
        norm_eps: Added under the root of these norms.

    Raises:
        ValueError: If the width cannot be cut into heads, or a size is out of range.

    Source: Vaswani et al., arXiv:1706.03762v7; rotary positions after Su et al.,
    arXiv:2104.09864v5, section 3.2, with channel ``i`` paired to ``i + K/2``.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        n_kv_heads: int | None = None,
        rope_base: float | None = 10000.0,
        window: int | None = None,
        sinks: int = 0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        kv_heads = n_kv_heads or n_heads
        if n_heads < 1 or d_model % n_heads or n_heads % kv_heads:
            raise ValueError(
                f"attention: d_model={d_model} must be a multiple of n_heads={n_heads}, and that "
                f"of n_kv_heads={kv_heads}."
            )
        if (window is not None and window < 1) or sinks < 0 or (sinks and window is None):
            raise ValueError(
                f"attention: window must be at least 1, and sinks at least 0, with a window; "
                f"got window={window}, sinks={sinks}."
            )
        K = d_model // n_heads
        if rope_base and K % 2:
            raise ValueError(f"attention: rotary positions need an even head width, got {K}.")
        self.width, self.kv_heads, self.rope_base = K, kv_heads, rope_base
        self.window, self.sinks = window, sinks
        self.q_proj = nn.Linear(d_model, d_model, bias=qkv_bias)
        self.k_proj = nn.Linear(d_model, kv_heads * K, bias=qkv_bias)
        self.v_proj = nn.Linear(d_model, kv_heads * K, bias=qkv_bias)
        self.q_norm = RMSNorm(K, norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(K, norm_eps) if qk_norm else nn.Identity()
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, AttentionState | None]:
        """Mix ``x [B T D]`` along time, continuing from ``state``."""
        past, seen = state or (None, None)
        q, k, v = (
            y.unflatten(-1, (-1, self.width))
            for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope_base:
            position = positions(x, seen, cu_seqlens)
            q, k = (rotate(y, position, self.rope_base).to(v.dtype) for y in (q, k))
        q, k = q.to(v.dtype), k.to(v.dtype)
        o, present = attention(
            q, k, v, window=self.window, sinks=self.sinks, cu_seqlens=cu_seqlens, past=past
        )
        y = self.o_proj(o.flatten(-2))
        if present is None:
            return y, None
        new = x.shape[1] if cu_seqlens is None else cu_seqlens.long().diff()
        seen = torch.zeros_like(present.length) if seen is None else seen
        return y, AttentionState(present, seen + new)

    def initial_state(self, n: int, like: Tensor) -> AttentionState:
        """Return an empty past of ``n`` sequences."""
        kv = empty(
            n, self.kv_heads, self.width, self.width, like, window=self.window, sinks=self.sinks
        )
        return AttentionState(kv, torch.zeros_like(kv.length))

    def state_size(self, T: int) -> int:
        """Return the bytes of state of one sequence after ``T`` tokens."""
        L = T if self.window is None else self.sinks + self.window - 1
        kv = 2 * state_bytes(L, self.kv_heads, self.width, dtype=self.q_proj.weight.dtype)
        return kv + 2 * torch.long.itemsize


def positions(x: Tensor, seen: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Count the tokens before each, in its own sequence: ``[B T]``, or ``[1 T]``."""
    step = torch.arange(x.shape[1], device=x.device)
    if cu_seqlens is None:
        return step[None] if seen is None else step + seen[:, None]
    own = segment_ids(cu_seqlens, x.shape[1])
    step = step - cu_seqlens.long()[own]
    return (step if seen is None else step + seen[own])[None]


def rotate(x: Tensor, position: Tensor, base: float) -> Tensor:
    """Turn channel pairs ``(i, i + K/2)`` of ``x [B T H K]`` by ``position * base^(-2i/K)``."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    half = x.shape[-1] // 2
    rate = base ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    angle = (position[..., None].to(dtype) * rate)[..., None, :]  # [B T 1 K/2]
    a, b = x.to(dtype).chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
