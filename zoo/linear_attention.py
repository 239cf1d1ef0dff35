"""Linear attention."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statezoo.kernels._dispatch import Backend
from statezoo.kernels.gated_linear_attention import gated_linear_attention
from statezoo.zoo.heads import head_width
from statezoo.zoo.mixer import Mixer, State, state_bytes
from statezoo.zoo.norm import RMSNorm


def features(x: Tensor, feature_map: str) -> Tensor:
    """Apply a feature map to queries or keys."""
    if feature_map == "elu":
        return F.elu(x) + 1
    return F.relu(x) if feature_map == "relu" else x


class LinearAttentionState(NamedTuple):
    """Memory ``S [N H K V]``, with a last column for the sum of keys if outputs are normalised."""

    S: Tensor


class LinearAttention(Mixer):
    r"""Attention without softmax: a sum of outer products of keys and values, read by queries.

    .. math::
        S_t = S_{t-1} + \phi(k_t) v_t^\top, \qquad
        y_t = W_o \mathrm{norm}(K^{-1/2} S_t^\top \phi(q_t))

    or, normalised as attention is, :math:`y_t = W_o (S_t^\top \phi(q_t) / z_t^\top \phi(q_t))` with
    :math:`z_t = \sum_{s \le t} \phi(k_s)`.

    Args:
        d_model: Width of the stream.
        n_heads: Heads.
        expand_k: Width of all queries over ``d_model``.
        expand_v: Width of all values over ``d_model``.
        feature_map: What is applied to queries and keys; ``"elu"`` is ``elu(x) + 1``.
        normalize: Whether outputs are divided by the sum of their weights (needs positive
            features), instead of being RMS-normed per head.
        norm_eps: Added under the root of the output norm, or to the sum of weights.
        backend: Implementation of the recurrence.

    Raises:
        ValueError: If the widths cannot be cut into heads, or features may be negative where their
            sum divides.

    Source: Katharopoulos et al., arXiv:2006.16236v3, eq. 16 to 20; the norm instead of the sum
    after Qin et al., arXiv:2210.10340.
    """

    reads = ("q_proj",)
    writes = ("k_proj", "v_proj")

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        feature_map: Literal["elu", "relu", "identity"] = "elu",
        normalize: bool = False,
        norm_eps: float = 1e-6,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if normalize and feature_map == "identity":
            raise ValueError(
                "linear_attention: normalize needs positive features: feature_map 'elu' or 'relu'."
            )
        self.K = head_width(self.name, "expand_k * d_model", expand_k * d_model, n_heads)
        self.V = head_width(self.name, "expand_v * d_model", expand_v * d_model, n_heads)
        self.feature_map, self.normalize, self.norm_eps = feature_map, normalize, norm_eps
        self.backend = backend
        self.q_proj = nn.Linear(d_model, n_heads * self.K, bias=False)
        self.k_proj = nn.Linear(d_model, n_heads * self.K, bias=False)
        self.v_proj = nn.Linear(d_model, n_heads * self.V, bias=False)
        self.norm = nn.Identity() if normalize else RMSNorm(self.V, norm_eps)
        self.o_proj = nn.Linear(n_heads * self.V, d_model, bias=False)

    def recur(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LinearAttentionState]:
        """Write and read the memories, ``[B T H V]``."""
        (S,) = state or (None,)
        q, k = (
            features(y, self.feature_map).unflatten(-1, (-1, self.K))
            for y in (self.q_proj(x), self.k_proj(x))
        )  # [B T H K]
        v = self.v_proj(x).unflatten(-1, (-1, self.V))
        if self.normalize:
            v = F.pad(v, (0, 1), value=1.0)
        o, S = gated_linear_attention(
            q, k, v, initial_state=S, cu_seqlens=cu_seqlens, backend=self.backend
        )
        if self.normalize:
            o = o[..., :-1] / (o[..., -1:] + self.norm_eps)
        return o, LinearAttentionState(S)

    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        """Norm and project what was read."""
        y: Tensor = self.o_proj(self.norm(o).flatten(-2))
        return y

    def state_size(self, T: int) -> int:
        """Return the bytes of state of one sequence, whatever ``T``."""
        dtype = torch.promote_types(self.q_proj.weight.dtype, torch.float32)
        return state_bytes(self.q_proj.out_features, self.V + self.normalize, dtype=dtype)
