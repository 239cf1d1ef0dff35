"""BASED: linear attention with the Taylor series of the exponential."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statezoo.kernels._dispatch import Backend
from statezoo.kernels.gated_linear_attention import gated_linear_attention
from statezoo.zoo.mixer import Mixer, State, state_bytes


class BasedState(NamedTuple):
    """Memory ``S [N H 1+d+d(d+1)/2 V+1]``; its last column sums the keys."""

    S: Tensor


class Based(Mixer):
    r"""Attention whose exponential is cut after the second order, hence a state of fixed size.

    .. math::
        o_t = \frac{\sum_{s \le t} (1 + a_{ts} + a_{ts}^2 / 2) v_s}
                   {\sum_{s \le t} (1 + a_{ts} + a_{ts}^2 / 2)},
        \qquad a_{ts} = \frac{q_t^\top k_s}{\sqrt d}

    Every weight is at least 1/2. BASED alternates it with window attention and
    :class:`~statezoo.zoo.base_conv.BaseConv`.

    Args:
        d_model: Width of the stream.
        n_heads: Heads.
        feature_dim: Width ``d`` of queries and keys; the state grows with its square.
        backend: Implementation of the recurrence.

    Raises:
        ValueError: If the width cannot be cut into heads.

    Source: Arora et al., BASED, arXiv:2402.18668v2, section 4.1.
    """

    def __init__(
        self, d_model: int, *, n_heads: int = 4, feature_dim: int = 16, backend: Backend = "auto"
    ) -> None:
        super().__init__()
        if min(n_heads, feature_dim) < 1 or d_model % n_heads:
            raise ValueError(
                f"based: d_model={d_model} must be a multiple of n_heads={n_heads}, and "
                f"feature_dim={feature_dim} at least 1."
            )
        self.n_heads, self.backend = n_heads, backend
        self.q_proj = nn.Linear(d_model, n_heads * feature_dim, bias=False)
        self.k_proj = nn.Linear(d_model, n_heads * feature_dim, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, BasedState]:
        """Mix ``x [B T D]`` along time, continuing from ``state``."""
        (S,) = state or (None,)
        q, k, v = (
            y.to(torch.promote_types(y.dtype, torch.float32)).unflatten(-1, (self.n_heads, -1))
            for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )  # [B T H d], [B T H V]
        v = F.pad(v, (0, 1), value=1.0)  # its extra channel reads the sum of all weights
        o, S = gated_linear_attention(
            taylor(q), taylor(k), v,
            scale=1.0, initial_state=S, cu_seqlens=cu_seqlens, backend=self.backend,
        )  # fmt: skip
        o = o[..., :-1] / o[..., -1:]
        return self.o_proj(o.flatten(-2).to(x.dtype)), BasedState(S)

    def state_size(self, T: int) -> int:
        """Return the bytes of state of one sequence, whatever ``T``."""
        H, (width, _) = self.n_heads, self.v_proj.weight.shape
        d = self.q_proj.out_features // H
        dtype = torch.promote_types(self.q_proj.weight.dtype, torch.float32)
        return state_bytes(H, 1 + d + d * (d + 1) // 2, width // H + 1, dtype=dtype)


def taylor(x: Tensor) -> Tensor:
    r"""Map ``x [... d]`` to features whose products are ``1 + a + a^2/2``, ``a = x . y / sqrt(d)``.

    :math:`[1, u_i, u_i^2 / \sqrt 2, u_i u_j]` for ``i < j``, ``u = x / d^(1/4)``: each pair once.
    """
    d = x.shape[-1]
    u = x * d**-0.25
    i, j = torch.triu_indices(d, d, 1, device=x.device)
    return torch.cat([torch.ones_like(u[..., :1]), u, u * u * 0.5**0.5, u[..., i] * u[..., j]], -1)
