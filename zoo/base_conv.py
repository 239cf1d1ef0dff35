"""The gated convolution of BASED."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from statezoo.kernels._dispatch import Backend
from statezoo.zoo.conv import CausalConv
from statezoo.zoo.mixer import Mixer, State, state_bytes


class BaseConvState(NamedTuple):
    """The last inputs of the convolution, ``[N expand*D d_conv-1]``."""

    conv: Tensor


class BaseConv(Mixer):
    r"""A short convolution times a gate: precise about the last few tokens, blind to older ones.

    .. math:: u, z = W_{in} x, \qquad y = W_{out} (\mathrm{silu}(\mathrm{conv}(u)) \odot z)

    Args:
        d_model: Width of the stream.
        expand: Width of each branch over ``d_model``.
        d_conv: Taps of the convolution.
        backend: Implementation of the convolution.

    Raises:
        ValueError: If a size is below 1.

    Source: Arora et al., BASED, arXiv:2402.18668v2, appendix E.1 and its code.
    """

    observable = False

    def __init__(
        self, d_model: int, *, expand: float = 2.0, d_conv: int = 3, backend: Backend = "auto"
    ) -> None:
        super().__init__()
        width = int(expand * d_model)
        if min(width, d_conv) < 1:
            raise ValueError(
                f"base_conv: expand * d_model = {width} and d_conv={d_conv} must be at least 1."
            )
        self.in_proj = nn.Linear(d_model, 2 * width, bias=False)
        self.conv = CausalConv(width, d_conv, backend=backend)
        self.out_proj = nn.Linear(width, d_model, bias=False)

    def forward(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, BaseConvState]:
        """Mix ``x [B T D]`` along time, continuing from ``state``."""
        (conv,) = state or (None,)
        u, z = self.in_proj(x).chunk(2, -1)
        u, conv = self.conv(u, conv, cu_seqlens)
        return self.out_proj(u * z), BaseConvState(conv)

    def state_size(self, T: int) -> int:
        """Return the bytes of state of one sequence, whatever ``T``."""
        dtype = torch.promote_types(self.in_proj.weight.dtype, torch.float32)
        return state_bytes(*self.conv.weight[:, 0, 1:].shape, dtype=dtype)
