"""The short convolution in front of many mixers."""

from typing import Literal

from torch import Tensor, nn

from statezoo.kernels._dispatch import Backend
from statezoo.kernels.causal_conv1d import causal_conv1d
from statezoo.zoo import init


class CausalConv(nn.Module):
    """Depthwise causal convolution along time.

    Args:
        width: Channels.
        d_conv: Taps: the token itself and ``d_conv - 1`` before it.
        bias: Whether a bias is added.
        activation: What follows.
        backend: Implementation to run.
    """

    def __init__(
        self,
        width: int,
        d_conv: int = 4,
        *,
        bias: bool = False,
        activation: Literal["silu"] | None = "silu",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.activation, self.backend = activation, backend
        self.weight = nn.Parameter(init.conv_weight(width, d_conv))
        self.bias = nn.Parameter(init.conv_weight(width, d_conv)[:, 0, 0].clone()) if bias else None

    def forward(
        self, x: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Convolve ``x [B T D]``, continuing from the inputs ``state [N D d_conv-1]``."""
        return causal_conv1d(
            x,
            self.weight[:, 0],
            self.bias,
            activation=self.activation,
            initial_state=state,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
