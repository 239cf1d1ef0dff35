"""Mamba-3 with one input and one output a head (SISO)."""

from math import pi
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statezoo.kernels._dispatch import Backend
from statezoo.kernels._varlen import n_sequences
from statezoo.kernels.gated_linear_attention import gated_linear_attention
from statezoo.zoo import init
from statezoo.zoo.mixer import Mixer, State, state_bytes
from statezoo.zoo.norm import RMSNorm
from statezoo.zoo.segments import running_sum, shift


class Mamba3State(NamedTuple):
    """Memory ``S [N H K V]``, last key and value, and the angles so far ``[N H angles]``."""

    S: Tensor
    k: Tensor
    v: Tensor
    angle: Tensor


class Mamba3(Mixer):
    r"""Mamba-2 with a two-point write instead of the convolution, and rotating keys.

    .. math::
        S_t = \alpha_t S_{t-1} + (1 - \lambda_t) \Delta_t \alpha_t k_{t-1} v_{t-1}^\top
              + \lambda_t \Delta_t k_t v_t^\top, \qquad \alpha_t = e^{-h(a_t) \Delta_t} \\
        y_t = W_{out} ((S_t^\top q_t + D v_t) \odot \mathrm{silu}(z_t)), \qquad
        q_t, k_t = R(\theta_t) (\mathrm{norm}(C_t, B_t) + b), \quad
        \theta_t = \theta_{t-1} + \pi \Delta_t \tanh(\omega_t)

    with :math:`h(a) = 1 + a` for :math:`a \ge 0`, else :math:`1 / (1 - a)`, at least 1e-4.

    Args:
        d_model: Width of the stream.
        d_state: Width of queries ``C`` and keys ``B``.
        head_dim: Width of the values of a head.
        expand: Width of all values over ``d_model``.
        n_groups: Groups of heads that share queries and keys, up to their biases and angles.
        rope_fraction: Part of the channels of queries and keys that rotates.
        dt_min: Smallest initial step size.
        dt_max: Largest initial step size.
        backend: Implementation of the recurrence.

    Raises:
        ValueError: If the width cannot be cut into heads, or these into groups.

    Source: Lahoti et al., Mamba-3, arXiv:2603.15569, and its code for the function h.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        head_dim: int = 64,
        expand: float = 2.0,
        n_groups: int = 1,
        rope_fraction: float = 0.5,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        E = int(expand * d_model)
        H, turns = E // max(head_dim, 1), int(rope_fraction * d_state) // 2
        if min(H, n_groups) < 1 or E % head_dim or H % n_groups or not 1 <= turns <= d_state // 2:
            raise ValueError(
                f"mamba3: expand * d_model = {E} must be a multiple of head_dim={head_dim}, the "
                f"number of heads {H} of n_groups={n_groups}, and rope_fraction={rope_fraction} of "
                f"d_state={d_state} channels from 2 to all of them."
            )
        self.turns, self.n_groups, self.head_dim, self.backend = turns, n_groups, head_dim, backend
        self.widths = (E, E, *[n_groups * d_state] * 2, H, H, H, turns)
        self.in_proj = init.linear(d_model, sum(self.widths), False)
        self.dt_bias = nn.Parameter(init.dt_bias(H, dt_min, dt_max))
        self.B_bias = nn.Parameter(torch.ones(H, 1, d_state))
        self.C_bias = nn.Parameter(torch.ones(H, 1, d_state))
        self.B_norm, self.C_norm = RMSNorm(d_state, 1e-5), RMSNorm(d_state, 1e-5)
        self.D = nn.Parameter(torch.ones(H))
        self.out_proj = init.linear(E, d_model, False)

    def forward(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Mamba3State]:
        """Mix ``x [B T D]`` along time, continuing from ``state``."""
        z, v, k, q, dt, a, trap, omega = self.in_proj(x).split(self.widths, -1)
        acc = torch.promote_types(v.dtype, torch.float32)
        v, dt, a, trap, omega = (y.to(acc) for y in (v, dt, a, trap, omega))
        v = v.unflatten(-1, (-1, self.head_dim))  # [B T H V]
        q, k = (
            (norm(y.unflatten(-1, (self.n_groups, -1))).to(acc)).repeat_interleave(
                len(bias) // self.n_groups, 2
            )
            + bias[:, 0]
            for norm, bias, y in ((self.C_norm, self.C_bias, q), (self.B_norm, self.B_bias, k))
        )  # [B T H K]
        dt = F.softplus(dt + self.dt_bias)
        g = -dt * torch.where(a >= 0, 1 + a, 1 / (1 + a.abs())).clamp(min=1e-4)
        empty = self.initial_state(n_sequences(x, cu_seqlens), v)
        S, k0, v0, angle0 = map(_or, state or empty, empty)
        turn = pi * dt[..., None] * omega.tanh()[..., None, :]  # [B T H turns]
        angle, last_angle = running_sum(turn, angle0, cu_seqlens, self.backend)
        q, k = rotate_pairs(q, angle), rotate_pairs(k, angle)
        now, before = dt * trap.sigmoid(), dt * (-trap).sigmoid() * g.exp()
        kv, kv0 = torch.cat([k, v], -1), torch.cat([k0, v0], -1)
        (k_before, v_before), (last_k, last_v) = (
            y.split((k.shape[-1], v.shape[-1]), -1)
            for y in shift(kv, kv0, cu_seqlens, self.backend)
        )
        writes = torch.cat([now[..., None] * v, before[..., None] * v_before], 2)
        o, S = gated_linear_attention(  # two memories a head, which are read and kept as a sum
            torch.cat([q, q], 2), torch.cat([k, k_before], 2), writes, torch.cat([g, g], 2),
            scale=1.0, initial_state=torch.cat([S, torch.zeros_like(S)], 1),
            cu_seqlens=cu_seqlens, backend=self.backend,
        )  # fmt: skip
        o, S = (y.unflatten(n, (2, -1)).sum(n) for y, n in ((o, 2), (S, 1)))
        o = o + self.D[:, None] * v
        y = o.flatten(-2) * F.silu(z.to(acc))
        return self.out_proj(y.to(x.dtype)), Mamba3State(S, last_k, last_v, last_angle)

    def initial_state(self, n: int, like: Tensor) -> Mamba3State:
        """Return the empty state of ``n`` sequences."""
        (H, _, K), V = self.B_bias.shape, self.head_dim
        dtype = torch.promote_types(like.dtype, torch.float32)
        shapes = ((H, K, V), (H, K), (H, V), (H, self.turns))
        return Mamba3State(*(like.new_zeros(n, *shape, dtype=dtype) for shape in shapes))

    def reset_parameters(self, n_layers: int) -> None:
        """Shrink the output by the root of the depth, as every layer adds to the stream."""
        init.scale_by_depth(self.out_proj, n_layers)

    def state_size(self, T: int) -> int:
        """Return the bytes of state of one sequence, whatever ``T``."""
        (H, _, K), V = self.B_bias.shape, self.head_dim
        dtype = torch.promote_types(self.in_proj.weight.dtype, torch.float32)
        return state_bytes(H, K * V + K + V + self.turns, dtype=dtype)


def _or(x: Tensor | None, empty: Tensor) -> Tensor:
    return empty if x is None else x


def rotate_pairs(x: Tensor, angle: Tensor) -> Tensor:
    """Turn channel pairs ``(2i, 2i+1)`` of ``x [B T H K]`` by ``angle [B T H i]``."""
    turned, rest = x.split((2 * angle.shape[-1], x.shape[-1] - 2 * angle.shape[-1]), -1)
    a, b = turned[..., ::2], turned[..., 1::2]
    cos, sin = angle.cos(), angle.sin()
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    return torch.cat([turned, rest], -1)
