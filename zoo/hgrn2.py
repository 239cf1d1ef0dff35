"""HGRN2."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statezoo.kernels._dispatch import Backend
from statezoo.kernels.gated_linear_attention import gated_linear_attention
from statezoo.zoo.heads import head_width
from statezoo.zoo.mixer import Mixer, State, state_bytes
from statezoo.zoo.norm import RMSNorm


class HGRN2State(NamedTuple):
    """Memory ``S [N H K V]``."""

    S: Tensor


class HGRN2(Mixer):
    r"""Gated linear attention whose keys are what the forget gates leave open.

    .. math::
        f_t = b + (1 - b) \sigma(W_f x_t), \qquad
        S_t = \mathrm{Diag}(f_t) S_{t-1} + (1 - f_t) (W_i x_t)^\top, \qquad
        y_t = W_o \mathrm{norm}(K^{-1/2} S_t^\top \mathrm{silu}(W_q x_t))

    The lower bound ``b`` of the forget gates is learned per channel, as a logit. In the published
    model all layers' bounds come from one table, by a cumulative softmax over depth: they rise
    from exactly 0 in the first layer, and start at ``i/L`` in layer ``i`` of ``L``. Here every
    layer has its own, with the same start: the same functions, and any such table loads exactly,
    but training does not tie the layers.

    Args:
        d_model: Width of the stream.
        n_heads: Heads.
        lower_bound: Where the bounds start, in [0, 1); 0 is no bound, now and later. Default
            ``i / L`` in layer ``i`` of ``L``, at least 1e-4.
        norm_eps: Added under the root of the output norm, which runs over all heads.
        backend: Implementation of the recurrence.

    Raises:
        ValueError: If the width cannot be cut into heads, or the bound is out of range.

    Source: Qin et al., arXiv:2404.07904v2, section 3.2; scale and norm as in public checkpoints.
    """

    reads = ("q_proj",)
    writes = ("f_proj", "i_proj")

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        lower_bound: float | None = None,
        norm_eps: float = 1e-6,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if lower_bound is not None and not 0 <= lower_bound < 1:
            raise ValueError(f"hgrn2: lower_bound must lie in [0, 1), got {lower_bound}.")
        self.K = head_width(self.name, "d_model", d_model, n_heads)
        self.lower_bound, self.backend = lower_bound, backend
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.f_proj = nn.Linear(d_model, d_model, bias=False)
        self.i_proj = nn.Linear(d_model, d_model, bias=False)
        self.bound_bias: nn.Parameter | None = None
        if lower_bound != 0:
            start = torch.logit(torch.tensor(0.5 if lower_bound is None else lower_bound))
            self.bound_bias = nn.Parameter(start.repeat(d_model))
        self.g_norm = RMSNorm(d_model, norm_eps)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def reset_parameters(self, n_layers: int) -> None:
        """Start the bounds as published, rising with depth, where no other start is set."""
        if self.lower_bound is None and self.bound_bias is not None:
            start = torch.logit(torch.tensor(self.layer / n_layers), eps=1e-4)
            nn.init.constant_(self.bound_bias, start.item())

    def recur(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, HGRN2State]:
        """Write and read the memories, ``[B T H V]``."""
        (S,) = state or (None,)
        f = self.f_proj(x)
        g = F.logsigmoid(f.to(torch.promote_types(f.dtype, torch.float32)))  # log f
        if self.bound_bias is not None:
            b = self.bound_bias.to(g.dtype)
            g = torch.logaddexp(F.logsigmoid(b), F.logsigmoid(-b) + g)
        q, k, v, g = (
            y.unflatten(-1, (-1, self.K))
            for y in (F.silu(self.q_proj(x)), -torch.expm1(g).to(f.dtype), self.i_proj(x), g)
        )  # [B T H K]
        o, S = gated_linear_attention(
            q, k, v, g, initial_state=S, cu_seqlens=cu_seqlens, backend=self.backend
        )
        return o, HGRN2State(S)

    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        """Norm and project what was read."""
        y: Tensor = self.o_proj(self.g_norm(o.flatten(-2)))
        return y

    def state_size(self, T: int) -> int:
        """Return the bytes of state of one sequence, whatever ``T``."""
        dtype = torch.promote_types(self.q_proj.weight.dtype, torch.float32)
        return state_bytes(self.q_proj.out_features, self.K, dtype=dtype)
