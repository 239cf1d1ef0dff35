"""Normalisation."""

import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """Root mean square norm over the last axis, in the dtype of its input also under autocast.

    Source: Zhang & Sennrich, arXiv:1910.07467v1, eq. 4.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x``; torch itself computes in float32 for narrower dtypes."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)
