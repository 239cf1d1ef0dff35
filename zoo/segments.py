"""What concerns the tokens of each sequence, packed or not: its last, the one before, their sum."""

from math import pi

import torch
from torch import Tensor

from statezoo.kernels._dispatch import Backend
from statezoo.kernels._varlen import segment_ids
from statezoo.kernels.gated_linear_attention import gated_linear_attention


def last(x: Tensor, start: Tensor, cu: Tensor) -> Tensor:
    """Take each sequence's last token of ``x [B T ...]``, that of ``start [N ...]`` if empty."""
    flat = torch.cat([start, x.flatten(0, 1)])
    index = torch.where(cu.diff() > 0, len(start) + cu[1:] - 1, torch.arange(len(start)).to(cu))
    return flat[index]


def shift(x: Tensor, start: Tensor, cu: Tensor) -> Tensor:
    """Give every token of ``x [B T ...]`` its predecessor, the first that of ``start [N ...]``."""
    step = torch.arange(x.shape[0] * x.shape[1], device=x.device)
    own = segment_ids(cu, len(step))
    index = torch.where(step == cu[own], own, len(start) + step - 1)
    return torch.cat([start, x.flatten(0, 1)])[index].view_as(x)


def running_sum(x: Tensor, start: Tensor, cu_seqlens: Tensor | None, backend: Backend) -> Tensor:
    """Add ``x [B T H i]`` up in each sequence, from ``start [N H i]`` on, modulo a full turn."""
    one = torch.ones_like(x[..., :1])  # a memory of one key that never fades
    total, _ = gated_linear_attention(
        one, one, x, initial_state=start[:, :, None], cu_seqlens=cu_seqlens, backend=backend
    )
    return total.remainder(2 * pi)
