"""Padded batches run packed: no mixer ever sees a padding token."""

import torch
import torch.nn.functional as F
from torch import Tensor


class Padding:
    """The real tokens of a padded batch.

    Args:
        mask: ``[B T]``, nonzero where a token is real; zeros may stand anywhere.

    Attributes:
        cu_seqlens: Bounds ``[B+1]`` of the sequences once packed.
    """

    def __init__(self, mask: Tensor) -> None:
        self.shape = mask.shape
        real = mask.bool()
        self.index = real.flatten().nonzero()[:, 0]
        self.cu_seqlens = F.pad(real.sum(1).cumsum(0), (1, 0)).to(torch.int32)

    def pack(self, x: Tensor) -> Tensor:
        """Take the real tokens of ``x [B T ...]`` as ``[1 n ...]``."""
        return x.flatten(0, 1)[self.index][None]

    def unpack(self, x: Tensor) -> Tensor:
        """Put ``x [1 n D]`` back to ``[B T D]``, zero where there is padding."""
        out = x.new_zeros(self.shape[0] * self.shape[1], x.shape[-1])
        return out.index_copy(0, self.index, x[0]).view(*self.shape, -1)


def find_padding(attention_mask: Tensor | None, B: int, T: int) -> Padding | None:
    """Read an attention mask over the past and the ``T`` present tokens, or these alone.

    Returns:
        Where the real ones of the present tokens stand, or ``None`` if all are real.

    Raises:
        ValueError: If the mask is not ``[B, T or more]``.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[0] != B or attention_mask.shape[1] < T:
        raise ValueError(
            f"attention_mask must be [B={B}, T={T} or more] with 1 for real tokens, got "
            f"{tuple(attention_mask.shape)}; causality needs no mask here."
        )
    mask = attention_mask[:, attention_mask.shape[1] - T :]
    return None if bool((mask != 0).all()) else Padding(mask)
