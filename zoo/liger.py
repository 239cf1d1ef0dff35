"""Liger: the weights of an attention layer, read as a gated recurrence beside a window."""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from statezoo.kernels._dispatch import Backend
from statezoo.kernels.attention import attention, empty
from statezoo.kernels.gated_delta_rule import gated_delta_rule, l2_norm
from statezoo.kernels.gated_linear_attention import gated_linear_attention
from statezoo.zoo.attention import AttentionState, Heads, advance, positions
from statezoo.zoo.mixer import Mixer, State, state_bytes
from statezoo.zoo.slices import tokens_before

Recurrence = Literal["gla", "gated_deltanet", "mamba2"]
Arm = Literal["both", "recurrence", "window"]


class LigerState(NamedTuple):
    """Memory ``S [N H K K]``, and the past of the window; ``None`` for an arm that is left out."""

    S: Tensor | None
    window: AttentionState | None


class Liger(Heads, Mixer):
    r"""Half gated recurrence, half window attention, on the same queries, keys and values.

    .. math::
        y_t = \tfrac12 W_o (o_t + \mathrm{attention}_{t-w<s\le t}(R_t q_t, R_s k_s, v_s))

    It has the parameters of :class:`~statezoo.zoo.attention.Attention` and no other, so that a
    trained Transformer turns into it by its weights alone: the gates come from the keys. With
    :math:`a_t = \sigma(k_t)^{1/16}` the recurrence, which knows no positions, is one of

    ``gla``, as published: a decay for each key channel, positive keys and queries,

    .. math:: S_t = \mathrm{Diag}(a_t) S_{t-1} + \mathrm{softmax}(k_t) v_t^\top, \qquad
              o_t = S_t^\top \mathrm{softmax}(q_t);

    ``mamba2``: one decay a head, the geometric mean of those. Mamba-2 ties it to the step that
    scales what is written, :math:`a_t = e^{A \Delta_t}`; as :math:`\log\sigma(k) =
    -\mathrm{softplus}(-k)`, the mean of :math:`\mathrm{softplus}(-k_t)` over channels is that step,
    at :math:`A = -1/16`,

    .. math:: S_t = e^{-\Delta_t/16} S_{t-1} + \Delta_t\, \mathrm{softmax}(k_t) v_t^\top;

    ``gated_deltanet``: the same decay, and a write that corrects what the memory has under a key by
    the part :math:`\beta_t`, the mean of :math:`\sigma(k_t)`. That needs keys of unit length that
    differ from each other, as :math:`\hat k = k/|k|` do and softmaxes hardly,

    .. math:: S_t = \bar a_t S_{t-1} + \beta_t \hat k_t (v_t - \bar a_t S_{t-1}^\top \hat k_t)^\top,
              \qquad o_t = S_t^\top \hat q_t.

    Args:
        d_model: Width of the stream.
        n_heads: Heads.
        n_kv_heads: Heads of keys, values and gates, shared by groups of heads; default ``n_heads``.
        head_dim: Width of a head; default ``d_model / n_heads``.
        window: How many last tokens the attention half sees, itself included.
        recurrence: What the other half is.
        arm: Both halves, or one of them alone, then with weight 1.
        rope_base: Base of the wave lengths of the window's rotary positions; 0 or ``None`` for
            none. The recurrence has none.
        rope_scaling: How trained positions were stretched, as in ``Attention``.
        gate_logit_normalizer: Divides the log gates: the higher, the slower the memory fades.
        qkv_bias: Whether queries, keys and values have a bias.
        qk_norm: Whether queries and keys are normalised (RMS) per head, in both halves.
        norm_eps: Added under the root of these norms.
        backend: Implementation of the recurrence.

    Raises:
        ValueError: If the width cannot be cut into heads, or the window is empty.

    Source: Lan et al., Liger, arXiv:2503.01496v2, section 3; ``mamba2`` and ``gated_deltanet`` are
    our own, after Dao & Gu, arXiv:2405.21060v1, section 7, and Yang et al., arXiv:2412.06464v3,
    eq. 10.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int = 64,
        recurrence: Recurrence = "gla",
        arm: Arm = "both",
        rope_base: float | None = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        gate_logit_normalizer: float = 16.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            d_model, n_heads, n_kv_heads, head_dim, rope_base, rope_scaling, qkv_bias, qk_norm,
            norm_eps,
        )  # fmt: skip
        if window < 1:
            raise ValueError(f"liger: window must be at least 1, got window={window}.")
        self.window, self.recurrence, self.arm = window, recurrence, arm
        self.normalizer, self.backend = gate_logit_normalizer, backend

    def forward(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LigerState | None]:
        """Mix ``x [B T D]`` along time, continuing from ``state``."""
        S, window = state or (None, None)
        q, k, v = self.project(x)
        read = []
        if self.arm != "recurrence":
            past, seen = window or (None, None)
            seen = tokens_before(x, cu_seqlens) if seen is None else seen
            position = positions(x, seen, cu_seqlens)
            near, present = attention(
                self.turn(q, position),
                self.turn(k, position),
                v,
                window=self.window,
                cu_seqlens=cu_seqlens,
                past=past,
            )
            window = advance(present, seen, x, cu_seqlens)
            read.append(near)
        if self.arm != "window":
            far, S = self.remember(q, k, v, S, cu_seqlens)
            read.append(far)
        y = self.o_proj((torch.stack(read).sum(0) / len(read)).flatten(-2))
        if window is None and self.arm != "recurrence":  # packed from the start: nobody continues
            return y, None
        return y, LigerState(S, window)

    def remember(
        self, q: Tensor, k: Tensor, v: Tensor, S: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run the recurrence over queries ``[B T H K]``, keys and values ``[B T kv_heads K]``."""
        acc = torch.promote_types(k.dtype, torch.float32)
        k, v = (y.repeat_interleave(self.repeat, 2) for y in (k, v))
        q, k = q.to(acc), k.to(acc)
        g = F.logsigmoid(k) / self.normalizer
        if self.recurrence != "gla":
            g = g.mean(-1)  # [B T H]
        if self.recurrence == "gated_deltanet":
            beta = k.sigmoid().mean(-1)
            return gated_delta_rule(
                l2_norm(q), l2_norm(k), v, beta, g,
                scale=1.0, initial_state=S, cu_seqlens=cu_seqlens, backend=self.backend,
            )  # fmt: skip
        if self.recurrence == "mamba2":
            v = v * (-self.normalizer * g)[..., None].to(v.dtype)
        q, k = (y.softmax(-1).to(v.dtype) for y in (q, k))
        return gated_linear_attention(
            q, k, v, g, scale=1.0, initial_state=S, cu_seqlens=cu_seqlens, backend=self.backend
        )

    def initial_state(self, n: int, like: Tensor) -> LigerState:
        """Return the empty memory and past of ``n`` sequences."""
        K, S, window = self.width, None, None
        if self.arm != "window":
            dtype = torch.promote_types(like.dtype, torch.float32)
            S = like.new_zeros(n, self.kv_heads * self.repeat, K, K, dtype=dtype)
        if self.arm != "recurrence":
            kv = empty(n, self.kv_heads, K, K, like, window=self.window)
            window = AttentionState(kv, torch.zeros_like(kv.length))
        return LigerState(S, window)

    def state_size(self, T: int) -> int:
        """Return the bytes of state of one sequence, whatever ``T``."""
        K, H, dtype = self.width, self.kv_heads * self.repeat, self.q_proj.weight.dtype
        memory = state_bytes(H, K, K, dtype=torch.promote_types(dtype, torch.float32))
        kv = 2 * state_bytes(self.window - 1, self.kv_heads, K, dtype=dtype)
        near = kv + 2 * torch.long.itemsize
        return {"both": memory + near, "recurrence": memory, "window": near}[self.arm]
