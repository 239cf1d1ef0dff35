"""Mamba-2: state space duality (SSD)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statezoo.kernels._dispatch import Backend
from statezoo.kernels.gated_linear_attention import gated_linear_attention
from statezoo.zoo import init
from statezoo.zoo.conv import CausalConv
from statezoo.zoo.mixer import Mixer, State, state_bytes
from statezoo.zoo.norm import RMSNorm


class Mamba2State(NamedTuple):
    """Memory ``S [N H d_state head_dim]``, and the last inputs of the convolution."""

    S: Tensor
    conv: Tensor


class Mamba2(Mixer):
    r"""Linear attention with a decay per head, queries and keys shared by groups of heads.

    .. math::
        z, (u, B, C), \delta = W_{in} x, \quad
        (u, B, C) \leftarrow \mathrm{silu}(\mathrm{conv}(u, B, C)), \quad
        \Delta = \mathrm{softplus}(\delta + b), \\
        S_t = e^{-\Delta_t A} S_{t-1} + B_t (\Delta_t u_t)^\top, \qquad
        y_t = W_{out} \, \mathrm{norm}((S_t^\top C_t + D u_t) \odot \mathrm{silu}(z_t))

    Args:
        d_model: Width of the stream.
        d_state: Width of queries ``C`` and keys ``B``.
        head_dim: Width of the values ``u`` of a head.
        expand: Width of all values over ``d_model``.
        n_groups: Groups of heads that share queries and keys; the norm is over a group as well.
        d_conv: Taps of the convolution.
        bias: Whether the projections in and out have a bias.
        conv_bias: Whether the convolution has a bias.
        dt_limit: Smallest and largest step size; default no limits.
        norm_eps: Added under the root of the norm.
        backend: Implementation of convolution and recurrence.

    Raises:
        ValueError: If the width cannot be cut into heads, or these into groups.

    Source: Dao & Gu, Transformers are SSMs, arXiv:2405.21060v1, section 7.1 and figure 6; the order
    gate then norm as in its code.
    """

    writes = ("in_proj",)

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        head_dim: int = 64,
        expand: float = 2.0,
        n_groups: int = 1,
        d_conv: int = 4,
        bias: bool = False,
        conv_bias: bool = True,
        dt_limit: list[float] | None = None,
        norm_eps: float = 1e-5,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        E = int(expand * d_model)
        H = E // max(head_dim, 1)
        if min(H, n_groups, d_state) < 1 or E % head_dim or H % n_groups:
            raise ValueError(
                f"mamba2: expand * d_model = {E} must be a multiple of head_dim={head_dim}, and the"
                f" number of heads {H} of n_groups={n_groups}; d_state={d_state} at least 1."
            )
        if dt_limit is not None and (len(dt_limit) != 2 or not 0 <= dt_limit[0] < dt_limit[1]):
            raise ValueError(f"mamba2: dt_limit is [low, high] from 0 up, got {dt_limit}.")
        self.n_groups, self.d_state, self.head_dim = n_groups, d_state, head_dim
        self.dt_limit, self.backend = dt_limit, backend
        self.widths = (E, n_groups * d_state, n_groups * d_state)
        self.read_width = E
        self.in_proj = init.linear(d_model, E + sum(self.widths) + H, bias)
        self.conv1d = CausalConv(sum(self.widths), d_conv, bias=conv_bias, backend=backend)
        self.dt_bias = nn.Parameter(init.dt_bias(H))
        self.A_log = nn.Parameter(init.A_log(H))
        self.D = nn.Parameter(torch.ones(H))
        self.norm = RMSNorm(E, norm_eps)  # its weight; forward norms each group by itself
        self.out_proj = init.linear(E, d_model, bias)

    def forward(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Mamba2State]:
        """Mix ``x [B T D]`` along time, continuing from ``state``."""
        z, writes = self.in_proj(x).tensor_split([self.read_width], -1)  # one product for both
        o, state = self._recur(writes, state, cu_seqlens)
        return self._read_out(o, z).to(x.dtype), state

    def recur(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Mamba2State]:
        """Write and read the memories, ``[B T H head_dim]``."""
        n = sum(self.widths) + len(self.dt_bias)
        return self._recur(self.in_proj(x)[..., -n:], state, cu_seqlens)

    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        """Gate, norm and project what was read."""
        return self._read_out(o, self.in_proj(x)[..., : self.read_width])

    def _recur(
        self, writes: Tensor, state: State, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Mamba2State]:
        S, conv = state or (None, None)
        uBC, dt = writes.tensor_split([sum(self.widths)], -1)
        uBC, conv = self.conv1d(uBC, conv, cu_seqlens)
        u, B, C = (
            y.unflatten(-1, (-1, width))
            for y, width in zip(
                uBC.split(self.widths, -1), (self.head_dim, self.d_state, self.d_state), strict=True
            )
        )  # [B T H head_dim], [B T n_groups d_state]
        acc = torch.promote_types(dt.dtype, torch.float32)
        dt = F.softplus(dt.to(acc) + self.dt_bias)
        if self.dt_limit is not None:
            dt = dt.clamp(*self.dt_limit)
        g = -self.A_log.to(acc).exp() * dt  # [B T H]
        o, S = gated_linear_attention(
            C, B, (dt[..., None] * u).to(u.dtype), g,
            scale=1.0, initial_state=S, cu_seqlens=cu_seqlens, backend=self.backend,
        )  # fmt: skip
        return o + self.D[:, None] * u, Mamba2State(S, conv)

    def _read_out(self, o: Tensor, z: Tensor) -> Tensor:
        y = o.flatten(-2) * F.silu(z.to(torch.promote_types(z.dtype, torch.float32)))
        y = y.unflatten(-1, (self.n_groups, -1))
        y = F.rms_norm(y, y.shape[-1:], eps=self.norm.eps).flatten(-2) * self.norm.weight
        out: Tensor = self.out_proj(y.to(z.dtype))
        return out

    def reset_parameters(self, n_layers: int) -> None:
        """Shrink the output by the root of the depth, as every layer adds to the stream."""
        init.scale_by_depth(self.out_proj, n_layers)

    def state_size(self, T: int) -> int:
        """Return the bytes of state of one sequence, whatever ``T``."""
        dtype = torch.promote_types(self.in_proj.weight.dtype, torch.float32)
        memory = state_bytes(self.d_state, self.widths[0], dtype=dtype)
        return memory + state_bytes(*self.conv1d.weight[:, 0, 1:].shape, dtype=dtype)
