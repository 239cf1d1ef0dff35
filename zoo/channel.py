"""Channel mixers: the part of a block that works within a token."""

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    r"""Gated feed-forward layer, :math:`W_3 (\mathrm{silu}(W_1 x) \odot W_2 x)`.

    Args:
        d_model: Width of the stream.
        ratio: Inner width over ``d_model``; 8/3 costs as much as an ungated layer of ratio 4.
        inner: Inner width, instead of a ratio.
        multiple_of: The inner width from ``ratio`` is rounded up to a multiple of this; by default
            256, or 64 where ``d_model`` is below 1024.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202v1, eq. 6.
    """

    def __init__(
        self,
        d_model: int,
        *,
        ratio: float = 8 / 3,
        inner: int | None = None,
        multiple_of: int | None = None,
    ) -> None:
        super().__init__()
        step = multiple_of or (256 if d_model >= 1024 else 64)
        width = inner or step * -(-int(ratio * d_model) // step)
        if width < 1:
            raise ValueError(f"swiglu needs an inner width of at least 1, got {width}.")
        self.gate_proj = nn.Linear(d_model, width, bias=False)
        self.up_proj = nn.Linear(d_model, width, bias=False)
        self.down_proj = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform every token of ``x [B T D]`` by itself."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


CHANNELS: dict[str, type[nn.Module]] = {"swiglu": SwiGLU}
