"""Gated linear attention."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statezoo.kernels._dispatch import Backend
from statezoo.kernels.gated_linear_attention import gated_linear_attention
from statezoo.zoo.conv import CausalConv
from statezoo.zoo.mixer import Mixer, State, state_bytes
from statezoo.zoo.norm import RMSNorm


class GLAState(NamedTuple):
    """Memory ``S [N H K V]``, and the last inputs of the short convolutions, if there are any."""

    S: Tensor
    conv: tuple[Tensor, ...]


class GLA(Mixer):
    r"""Linear attention whose memory fades by a learned rate in every key channel.

    .. math::
        S_t = \mathrm{Diag}(e^{g_t}) S_{t-1} + k_t v_t^\top, \qquad
        y_t = W_o (\mathrm{norm}(K^{-1/2} S_t^\top q_t) \odot \mathrm{silu}(W_g x_t)), \qquad
        g_t = \mathrm{logsigmoid}(W_2 W_1 x_t + b) / 16

    Args:
        d_model: Width of the stream.
        n_heads: Heads.
        n_kv_heads: Heads of keys, values and gates, shared by groups of heads; default ``n_heads``.
        expand_k: Width of all queries over ``d_model``.
        expand_v: Width of all values over ``d_model``.
        gate_rank: Width of the bottleneck that makes the gates.
        gate_logit_normalizer: Divides the log gates: the higher, the slower the memory fades.
        d_conv: Taps of a short convolution on queries, keys and values; 0 for none.
        norm_eps: Added under the root of the output norm.
        backend: Implementation of the recurrence.

    Raises:
        ValueError: If the widths cannot be cut into heads.

    Source: Yang et al., Gated Linear Attention Transformers, arXiv:2312.06635v6, section 4.4; norm,
    scale and initial values as in its code.
    """

    reads = ("q_proj",)
    writes = ("k_proj", "v_proj", "gk_proj")

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        n_kv_heads: int | None = None,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        gate_logit_normalizer: float = 16.0,
        d_conv: int = 0,
        norm_eps: float = 1e-6,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        kv_heads = n_kv_heads or n_heads
        key, value = int(expand_k * d_model), int(expand_v * d_model)
        if min(n_heads, kv_heads, key, value) < 1 or n_heads % kv_heads:
            raise ValueError(f"gla: n_heads={n_heads} must be a multiple of n_kv_heads={kv_heads}.")
        if key % n_heads or value % n_heads:
            raise ValueError(
                f"gla: the key width {key} (expand_k * d_model) and the value width {value} "
                f"(expand_v * d_model) must be multiples of n_heads={n_heads}."
            )
        self.n_heads, self.repeat = n_heads, n_heads // kv_heads
        self.normalizer, self.backend = gate_logit_normalizer, backend
        self.q_proj = nn.Linear(d_model, key, bias=False)
        self.k_proj = nn.Linear(d_model, key // self.repeat, bias=False)
        self.v_proj = nn.Linear(d_model, value // self.repeat, bias=False)
        self.g_proj = nn.Linear(d_model, value, bias=False)
        self.gk_proj = nn.Sequential(
            nn.Linear(d_model, gate_rank, bias=False), nn.Linear(gate_rank, key // self.repeat)
        )
        widths = (key, key // self.repeat, value // self.repeat) if d_conv else ()
        self.conv_shapes = [(width, d_conv - 1) for width in widths]
        if d_conv:
            self.q_conv1d, self.k_conv1d, self.v_conv1d = (
                CausalConv(width, d_conv, backend=backend) for width in widths
            )
        self.g_norm = RMSNorm(value // n_heads, norm_eps)
        self.o_proj = nn.Linear(value, d_model, bias=False)

    def recur(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, GLAState]:
        """Write and read the memories, ``[B T H V]``."""
        S, tails = state or (None, ())
        qkv = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        if self.conv_shapes:
            convs = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
            tails = tails or (None, None, None)
            mixed = [
                conv(y, tail, cu_seqlens) for conv, y, tail in zip(convs, qkv, tails, strict=True)
            ]
            qkv, tails = [y for y, _ in mixed], tuple(tail for _, tail in mixed)
        gate = self.gk_proj(x)
        g = F.logsigmoid(gate.to(torch.promote_types(gate.dtype, torch.float32))) / self.normalizer
        heads = (self.n_heads, *[self.n_heads // self.repeat] * 3)
        q, k, v, g = (
            y.unflatten(-1, (n, -1)) for y, n in zip((*qkv, g), heads, strict=True)
        )  # [B T H K], [B T H V]
        if self.repeat > 1:
            k, v, g = (y.repeat_interleave(self.repeat, 2) for y in (k, v, g))
        o, S = gated_linear_attention(
            q, k, v, g, initial_state=S, cu_seqlens=cu_seqlens, backend=self.backend
        )
        return o, GLAState(S, tails)

    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        """Norm, gate and project what was read."""
        y: Tensor = self.o_proj(self.g_norm(o).flatten(-2) * F.silu(self.g_proj(x)))
        return y

    def state_size(self, T: int) -> int:
        """Return the bytes of state of one sequence, whatever ``T``."""
        dtype, H = self.q_proj.weight.dtype, self.n_heads
        K, V = self.q_proj.out_features // H, self.g_proj.out_features // H
        memory = state_bytes(H, K, V, dtype=torch.promote_types(dtype, torch.float32))
        return memory + sum(state_bytes(*shape, dtype=dtype) for shape in self.conv_shapes)
