"""Softmax attention with rotary positions."""

from math import pi
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from statezoo.kernels._varlen import segment_ids
from statezoo.kernels.attention import KV, attention, empty
from statezoo.zoo.mixer import Mixer, State, state_bytes
from statezoo.zoo.norm import RMSNorm
from statezoo.zoo.slices import tokens_before

SCALING = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
"""Keys of rope_scaling, by their names in transformers."""


class AttentionState(NamedTuple):
    """Keys and values still visible, and the tokens ``seen [N]`` by each sequence."""

    kv: KV
    seen: Tensor


class Heads(nn.Module):
    """Queries, keys and values of the heads of an attention layer, and the way back to the stream.

    For :class:`Attention` and what takes its weights. Settings are those of :class:`Attention`.

    Args:
        d_model: Width of the stream.
        n_heads: Heads.
        n_kv_heads: Heads of keys and values.
        head_dim: Width of a head.
        rope_base: Base of the rotary positions.
        rope_scaling: How they are stretched.
        qkv_bias: Whether queries, keys and values have a bias.
        qk_norm: Whether queries and keys are normalised.
        norm_eps: Added under the root of these norms.

    Raises:
        ValueError: If the width cannot be cut into heads, or a size is out of range.
    """

    name: ClassVar[str]

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int | None,
        head_dim: int | None,
        rope_base: float | None,
        rope_scaling: dict[str, Any] | None,
        qkv_bias: bool,
        qk_norm: bool,
        norm_eps: float,
    ) -> None:
        super().__init__()
        H, kv = n_heads, n_heads if n_kv_heads is None else n_kv_heads
        if min(H, kv) < 1 or H % kv or (head_dim is None and d_model % H):
            raise ValueError(
                f"{self.name}: d_model={d_model} must be a multiple of n_heads={H}, unless "
                f"head_dim is given, and n_heads a multiple of n_kv_heads={kv}."
            )
        K = d_model // H if head_dim is None else head_dim
        if K < 1 or (rope_base and K % 2):
            raise ValueError(
                f"{self.name}: rotary positions need an even head width, at least 2; got {K}."
            )
        if rope_scaling is not None:
            check_scaling(self.name, rope_scaling)
        self.width, self.kv_heads, self.repeat = K, kv, H // kv
        self.rope_base, self.rope_scaling = rope_base, rope_scaling
        self.q_proj = nn.Linear(d_model, H * K, bias=qkv_bias)
        self.k_proj = nn.Linear(d_model, kv * K, bias=qkv_bias)
        self.v_proj = nn.Linear(d_model, kv * K, bias=qkv_bias)
        self.q_norm = RMSNorm(K, norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(K, norm_eps) if qk_norm else nn.Identity()
        self.o_proj = nn.Linear(H * K, d_model, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries ``[B T H K]``, keys and values ``[B T kv_heads K]``, without positions."""
        q, k, v = (
            y.unflatten(-1, (-1, self.width))
            for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v

    def turn(self, y: Tensor, position: Tensor) -> Tensor:
        """Give queries or keys their positions, if there are any."""
        if not self.rope_base:
            return y
        return rotate(y, position, self.rope_base, self.rope_scaling).to(y.dtype)


class Attention(Heads, Mixer):
    """Multi-head softmax attention over the whole past, or a window of it.

    Its state grows with the past, or up to the window. ``"transformer"`` names a model of these.

    Args:
        d_model: Width of the stream.
        n_heads: Heads.
        n_kv_heads: Heads of keys and values, shared by groups of heads; default ``n_heads``.
        head_dim: Width of a head; default ``d_model / n_heads``.
        rope_base: Base of the rotary positions' wave lengths; 0 or ``None`` for no positions.
        rope_scaling: How trained positions were stretched: ``factor`` alone for all wave lengths,
            or with ``low_freq_factor``, ``high_freq_factor`` and
            ``original_max_position_embeddings`` for long ones, as in Llama 3.1.
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
        head_dim: int | None = None,
        rope_base: float | None = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        window: int | None = None,
        sinks: int = 0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(
            d_model, n_heads, n_kv_heads, head_dim, rope_base, rope_scaling, qkv_bias, qk_norm,
            norm_eps,
        )  # fmt: skip
        if (window is not None and window < 1) or sinks < 0 or (sinks and window is None):
            raise ValueError(
                f"attention: window must be at least 1, and sinks at least 0, with a window; "
                f"got window={window}, sinks={sinks}."
            )
        self.window, self.sinks = window, sinks

    def forward(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, AttentionState | None]:
        """Mix ``x [B T D]`` along time, continuing from ``state``."""
        past, seen = state or (None, None)
        seen = tokens_before(x, cu_seqlens) if seen is None else seen
        q, k, v = self.project(x)
        position = positions(x, seen, cu_seqlens)
        q, k = self.turn(q, position), self.turn(k, position)
        o, present = attention(
            q, k, v, window=self.window, sinks=self.sinks, cu_seqlens=cu_seqlens, past=past
        )
        return self.o_proj(o.flatten(-2)), advance(present, seen, x, cu_seqlens)

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


def advance(
    present: KV | None, seen: Tensor | None, x: Tensor, cu_seqlens: Tensor | None
) -> AttentionState | None:
    """Return the state after ``x [B T D]``; ``None`` where nobody continues."""
    if present is None:  # packed from the start
        return None
    new = x.shape[1] if cu_seqlens is None else cu_seqlens.long().diff()
    return AttentionState(
        present, new + (torch.zeros_like(present.length) if seen is None else seen)
    )


def positions(x: Tensor, seen: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Count the tokens before each, in its own sequence: ``[B T]``, or ``[1 T]``."""
    step = torch.arange(x.shape[1], device=x.device)
    if cu_seqlens is None:
        return step[None] if seen is None else step + seen[:, None]
    own = segment_ids(cu_seqlens, x.shape[1])
    step = step - cu_seqlens.long()[own]
    return (step if seen is None else step + seen[own])[None]


def rotate(
    x: Tensor, position: Tensor, base: float, scaling: dict[str, Any] | None = None
) -> Tensor:
    """Turn channel pairs ``(i, i + K/2)`` of ``x [B T H K]`` by ``position * base^(-2i/K)``."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    half = x.shape[-1] // 2
    rate = base ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    if scaling is not None:
        rate = stretch(rate, scaling)
    angle = (position[..., None].to(dtype) * rate)[..., None, :]  # [B T 1 K/2]
    a, b = x.to(dtype).chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def stretch(rate: Tensor, scaling: dict[str, Any]) -> Tensor:
    r"""Slow rotations down, all or only those that turn too rarely within the trained length.

    .. math::
        \theta' = \theta \left(\gamma + \frac{1 - \gamma}{\mathrm{factor}}\right), \qquad
        \gamma = \frac{L \theta / 2\pi - \mathrm{low}}{\mathrm{high} - \mathrm{low}}
        \text{ within } [0, 1]

    where ``L`` is the trained length; without one, gamma is 0.

    Source: Chen et al., arXiv:2306.15595v2, eq. 4; Grattafiori et al., The Llama 3 Herd of Models,
    arXiv:2407.21783v3, as released with Llama 3.1.
    """
    kept: Tensor | float = 0.0
    if len(scaling) > 1:
        low, high, length = (scaling[key] for key in SCALING[1:])
        kept = ((length * rate / (2 * pi) - low) / (high - low)).clamp(0, 1)
    slowed: Tensor = rate * (kept + (1 - kept) / scaling["factor"])
    return slowed


def check_scaling(name: str, scaling: dict[str, Any]) -> None:
    """Refuse what is no scaling of positions.

    Raises:
        ValueError: If keys are missing or unknown, or values out of range.
    """
    known = [{"factor"}, set(SCALING)]
    numbers = all(isinstance(x, int | float) and x > 0 for x in scaling.values())
    ordered = scaling.get(SCALING[1], 0) < scaling.get(SCALING[2], 1)
    if scaling.keys() not in known or not numbers or not ordered:
        raise ValueError(
            f"{name}: rope_scaling needs a factor above 0, alone or with {', '.join(SCALING[1:])} "
            f"(low below high); got {scaling}."
        )
