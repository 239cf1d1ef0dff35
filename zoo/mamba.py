"""Mamba: a selective state space per channel (S6)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statezoo.kernels._dispatch import Backend
from statezoo.kernels.selective_scan import selective_scan
from statezoo.zoo import init
from statezoo.zoo.conv import CausalConv
from statezoo.zoo.mixer import Mixer, State, state_bytes


class MambaState(NamedTuple):
    """Memory ``S [N E d_state]``, and the last inputs of the convolution ``[N E d_conv-1]``."""

    S: Tensor
    conv: Tensor


class Mamba(Mixer):
    r"""A linear recurrence in every channel, whose step size, write and read depend on the token.

    .. math::
        u, z = W_{in} x, \quad u \leftarrow \mathrm{silu}(\mathrm{conv}(u)), \quad
        r, B, C = W_x u, \quad \Delta = \mathrm{softplus}(W_{dt} r + b), \\
        S_t = e^{\Delta_t A} S_{t-1} + \Delta_t u_t B_t^\top, \qquad
        y_t = W_{out} ((S_t C_t + D u_t) \odot \mathrm{silu}(z_t))

    Args:
        d_model: Width of the stream.
        d_state: Numbers kept per channel.
        d_conv: Taps of the convolution.
        expand: Channels over ``d_model``.
        dt_rank: Width of the bottleneck that makes the step sizes; default ``d_model / 16``, up.
        dt_min: Smallest initial step size.
        dt_max: Largest initial step size.
        bias: Whether the projections in and out have a bias.
        conv_bias: Whether the convolution has a bias.
        negative_eigenvalues: Whether the decay is ``2 exp(dt A) - 1``, in (-1, 1), instead of
            ``exp(dt A)``: a memory may then flip its sign, as counting modulo 2 needs.
        backend: Implementation of convolution and recurrence.

    Raises:
        ValueError: If a size is below 1, or the range of step sizes is empty.

    Source: Gu & Dao, Mamba, arXiv:2312.00752v2, algorithm 2 and section 3.6, writes with
    ``dt B`` as its code; negative eigenvalues after Grazzi et al., arXiv:2411.12537v2, section 4.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2.0,
        dt_rank: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        bias: bool = False,
        conv_bias: bool = True,
        negative_eigenvalues: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        E, R = int(expand * d_model), -(-d_model // 16) if dt_rank is None else dt_rank
        if min(E, R, d_state, d_conv) < 1 or not 0 < dt_min <= dt_max:
            raise ValueError(
                f"mamba: expand * d_model = {E}, dt_rank={R}, d_state={d_state} and d_conv={d_conv}"
                f" must be at least 1, and 0 < dt_min={dt_min} <= dt_max={dt_max}."
            )
        self.widths = (R, d_state, d_state)
        self.negative, self.backend = negative_eigenvalues, backend
        self.in_proj = init.linear(d_model, 2 * E, bias)
        self.conv1d = CausalConv(E, d_conv, bias=conv_bias, backend=backend)
        self.x_proj = init.linear(E, R + 2 * d_state, False)
        self.dt_proj = init.keep(nn.Linear(R, E))
        self.A_log = nn.Parameter(init.A_log_s4d(E, d_state))
        self.D = nn.Parameter(torch.ones(E))
        self.out_proj = init.linear(E, d_model, bias)
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(R**-0.5), R**-0.5)
            self.dt_proj.bias.copy_(init.dt_bias(E, dt_min, dt_max))

    def forward(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
        """Mix ``x [B T D]`` along time, continuing from ``state``."""
        S, conv = state or (None, None)
        u, z = self.in_proj(x).chunk(2, -1)  # [B T E]
        u, conv = self.conv1d(u, conv, cu_seqlens)
        r, B, C = self.x_proj(u).split(self.widths, -1)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 steps would be off by 1 %
            dt = self.dt_proj(r.to(self.dt_proj.weight.dtype))
        acc = torch.promote_types(dt.dtype, torch.float32)
        dt, A = F.softplus(dt.to(acc)), -self.A_log.to(acc).exp()
        y, S = selective_scan(
            u, dt, A, B, C, self.D, negative_eigenvalues=self.negative,
            initial_state=S, cu_seqlens=cu_seqlens, backend=self.backend,
        )  # fmt: skip
        return self.out_proj(y * F.silu(z)), MambaState(S, conv)

    def reset_parameters(self, n_layers: int) -> None:
        """Shrink the output by the root of the depth, as every layer adds to the stream."""
        init.scale_by_depth(self.out_proj, n_layers)

    def state_size(self, T: int) -> int:
        """Return the bytes of state of one sequence, whatever ``T``."""
        E, d_state = self.A_log.shape
        dtype = torch.promote_types(self.in_proj.weight.dtype, torch.float32)
        return state_bytes(E, d_state + self.conv1d.weight.shape[-1] - 1, dtype=dtype)
