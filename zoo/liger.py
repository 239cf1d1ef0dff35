"""Liger: the weights of an attention layer, read as a gated recurrence beside a window."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statezoo.kernels._dispatch import Backend
from statezoo.kernels.attention import attention, empty
from statezoo.kernels.gated_linear_attention import gated_linear_attention
from statezoo.zoo.attention import AttentionState, positions, rotate
from statezoo.zoo.mixer import Mixer, State, state_bytes


class LigerState(NamedTuple):
    """Memory ``S [N H K K]``, and the past of the window."""

    S: Tensor
    window: AttentionState


class Liger(Mixer):
    r"""Half gated linear attention, half window attention, on the same queries, keys and values.

    .. math::
        S_t = \mathrm{Diag}(\sigma(k_t)^{1/16}) S_{t-1} + \mathrm{softmax}(k_t) v_t^\top, \qquad
        y_t = \tfrac12 W_o (S_t^\top \mathrm{softmax}(q_t) +
              \mathrm{attention}_{t-w<s\le t}(R_t q_t, R_s k_s, v_s))

    It has the parameters of :class:`~statezoo.zoo.attention.Attention` and no other, so that a
    trained Transformer turns into it by its weights alone.

    Args:
        d_model: Width of the stream.
        n_heads: Heads.
        n_kv_heads: Heads of keys, values and gates, shared by groups of heads; default ``n_heads``.
        window: How many last tokens the attention half sees, itself included.
        rope_base: Base of the wave lengths of its rotary positions; the recurrence has none.
        gate_logit_normalizer: Divides the log gates: the higher, the slower the memory fades.
        qkv_bias: Whether queries, keys and values have a bias.
        backend: Implementation of the recurrence.

    Raises:
        ValueError: If the width cannot be cut into heads of even width, or the window is empty.

    Source: Lan et al., Liger, arXiv:2503.01496v2, section 3.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        n_kv_heads: int | None = None,
        window: int = 64,
        rope_base: float = 10000.0,
        gate_logit_normalizer: float = 16.0,
        qkv_bias: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        kv_heads = n_kv_heads or n_heads
        if min(n_heads, kv_heads, window) < 1 or d_model % (2 * n_heads) or n_heads % kv_heads:
            raise ValueError(
                f"liger: d_model={d_model} must be an even multiple of n_heads={n_heads}, that a "
                f"multiple of n_kv_heads={kv_heads}, and window={window} at least 1."
            )
        self.width, self.kv_heads, self.window = d_model // n_heads, kv_heads, window
        self.repeat, self.rope_base = n_heads // kv_heads, rope_base
        self.normalizer, self.backend = gate_logit_normalizer, backend
        self.q_proj = nn.Linear(d_model, d_model, bias=qkv_bias)
        self.k_proj = nn.Linear(d_model, kv_heads * self.width, bias=qkv_bias)
        self.v_proj = nn.Linear(d_model, kv_heads * self.width, bias=qkv_bias)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LigerState | None]:
        """Mix ``x [B T D]`` along time, continuing from ``state``."""
        S, window = state or (None, None)
        past, seen = window or (None, None)
        q, k, v = (
            y.unflatten(-1, (-1, self.width))
            for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )  # [B T H K], [B T kv_heads K]
        position = positions(x, seen, cu_seqlens)
        turned = [rotate(y, position, self.rope_base).to(v.dtype) for y in (q, k)]
        near, present = attention(
            turned[0], turned[1], v, window=self.window, cu_seqlens=cu_seqlens, past=past
        )
        acc = torch.promote_types(k.dtype, torch.float32)
        g = F.logsigmoid(k.to(acc)) / self.normalizer
        q, k = (y.softmax(-1, dtype=acc).to(v.dtype) for y in (q, k))
        k, v, g = (y.repeat_interleave(self.repeat, 2) for y in (k, v, g))
        far, S = gated_linear_attention(
            q, k, v, g, scale=1.0, initial_state=S, cu_seqlens=cu_seqlens, backend=self.backend
        )
        y = self.o_proj((0.5 * (near + far)).flatten(-2))
        if present is None:  # packed from the start: nobody continues
            return y, None
        new = x.shape[1] if cu_seqlens is None else cu_seqlens.long().diff()
        seen = torch.zeros_like(present.length) if seen is None else seen
        return y, LigerState(S, AttentionState(present, seen + new))

    def initial_state(self, n: int, like: Tensor) -> LigerState:
        """Return the empty memory and past of ``n`` sequences."""
        K, dtype = self.width, torch.promote_types(like.dtype, torch.float32)
        S = like.new_zeros(n, self.kv_heads * self.repeat, K, K, dtype=dtype)
        kv = empty(n, self.kv_heads, K, K, like, window=self.window)
        return LigerState(S, AttentionState(kv, torch.zeros_like(kv.length)))

    def state_size(self, T: int) -> int:
        """Return the bytes of state of one sequence, whatever ``T``."""
        K, dtype = self.width, self.q_proj.weight.dtype
        memory = state_bytes(
            self.kv_heads * self.repeat, K, K, dtype=torch.promote_types(dtype, torch.float32)
        )
        kv = 2 * state_bytes(self.window - 1, self.kv_heads, K, dtype=dtype)
        return memory + kv + 2 * torch.long.itemsize
