"""What concerns the tokens of each sequence, packed or not: the one before, and their sum."""

from math import pi

import torch
from torch import Tensor

from statezoo.kernels._dispatch import Backend
from statezoo.kernels.causal_conv1d import causal_conv1d
from statezoo.kernels.gated_linear_attention import gated_linear_attention


def shift(
    x: Tensor, start: Tensor, cu_seqlens: Tensor | None, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Give every token of ``x [B T ...]`` its predecessor, the first that of ``start [N ...]``.

    Returns:
        The predecessors, and each sequence's last token ``[N ...]``.
    """
    flat, before = x.flatten(2), start.flatten(1)[..., None]
    taps = torch.arange(1.0, -1.0, -1.0, dtype=x.dtype, device=x.device)  # the one before, itself
    y, last = causal_conv1d(
        flat,
        taps.repeat(flat.shape[-1], 1),
        initial_state=before,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    return y.view_as(x), last.view_as(start)


def running_sum(
    x: Tensor, start: Tensor, cu_seqlens: Tensor | None, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Add ``x [B T H i]`` up in each sequence, from ``start [N H i]`` on, modulo a full turn.

    Returns:
        The sums up to each token, and those of the whole sequences ``[N H i]``.
    """
    one = torch.ones_like(x[..., :1])  # a memory of one key that never fades
    total, last = gated_linear_attention(
        one, one, x, initial_state=start[:, :, None], cu_seqlens=cu_seqlens, backend=backend
    )
    return total.remainder(2 * pi), last[:, :, 0].remainder(2 * pi)
