"""RetNet."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statezoo.kernels._dispatch import Backend
from statezoo.kernels.gated_linear_attention import gated_linear_attention
from statezoo.zoo.attention import positions, rotate
from statezoo.zoo.heads import head_width
from statezoo.zoo.mixer import Mixer, State, state_bytes
from statezoo.zoo.norm import RMSNorm
from statezoo.zoo.slices import tokens_before


class RetNetState(NamedTuple):
    """Memory ``S [N H K V]``, and the tokens ``seen [N]`` by each sequence."""

    S: Tensor
    seen: Tensor


class RetNet(Mixer):
    r"""Linear attention with rotary positions, whose memory fades at a fixed rate in every head.

    .. math::
        S_t = \gamma_h S_{t-1} + k_t v_t^\top, \qquad \gamma_h = 1 - 2^{-5-h}, \qquad
        y_t = W_o (\mathrm{norm}(K^{-1/2} S_t^\top q_t) \odot \mathrm{silu}(W_g x_t))

    Args:
        d_model: Width of the stream.
        n_heads: Heads, ``h`` from 0.
        expand_k: Width of all queries over ``d_model``.
        expand_v: Width of all values over ``d_model``.
        rope_base: Base of the rotary positions' wave lengths.
        norm_eps: Added under the root of the output norm.
        backend: Implementation of the recurrence.

    Raises:
        ValueError: If the widths cannot be cut into heads, or a head is odd.

    Source: Sun et al., arXiv:2307.08621v4, eq. 5 to 8; RMS norm per head, and rotations without
    their xPos growth, as in public checkpoints.
    """

    reads = ("q_proj",)
    writes = ("k_proj", "v_proj")

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-6,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.K = head_width(self.name, "expand_k * d_model", expand_k * d_model, n_heads)
        self.V = head_width(self.name, "expand_v * d_model", expand_v * d_model, n_heads)
        if self.K % 2:
            raise ValueError(f"retnet: rotary positions need an even head width, got {self.K}.")
        self.n_heads, self.rope_base, self.backend = n_heads, rope_base, backend
        self.q_proj = nn.Linear(d_model, n_heads * self.K, bias=False)
        self.k_proj = nn.Linear(d_model, n_heads * self.K, bias=False)
        self.v_proj = nn.Linear(d_model, n_heads * self.V, bias=False)
        self.g_proj = nn.Linear(d_model, n_heads * self.V, bias=False)
        self.g_norm = RMSNorm(self.V, norm_eps)
        self.o_proj = nn.Linear(n_heads * self.V, d_model, bias=False)

    def recur(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, RetNetState]:
        """Write and read the memories, ``[B T H V]``."""
        S, seen = state or (None, None)
        v = self.v_proj(x).unflatten(-1, (-1, self.V))
        seen = tokens_before(v, cu_seqlens) if seen is None else seen
        position = positions(v, seen, cu_seqlens)
        q, k = (
            rotate(y.unflatten(-1, (-1, self.K)), position, self.rope_base).to(v.dtype)
            for y in (self.q_proj(x), self.k_proj(x))
        )  # [B T H K]
        dtype = torch.promote_types(v.dtype, torch.float32)
        h = torch.arange(self.n_heads, device=v.device, dtype=dtype)
        g = torch.log1p(-torch.exp2(-5 - h)).expand(*v.shape[:2], -1)  # [B T H]
        o, S = gated_linear_attention(
            q, k, v, g, initial_state=S, cu_seqlens=cu_seqlens, backend=self.backend
        )
        new = v.shape[1] if cu_seqlens is None else cu_seqlens.long().diff()
        seen = torch.zeros(S.shape[0], dtype=torch.long, device=v.device) if seen is None else seen
        return o, RetNetState(S, seen + new)

    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        """Norm, gate and project what was read."""
        y: Tensor = self.o_proj(self.g_norm(o).flatten(-2) * F.silu(self.g_proj(x)))
        return y

    def state_size(self, T: int) -> int:
        """Return the bytes of state of one sequence, whatever ``T``."""
        dtype = torch.promote_types(self.q_proj.weight.dtype, torch.float32)
        return state_bytes(self.n_heads, self.K, self.V, dtype=dtype) + torch.long.itemsize
