"""Means over all scored tokens, and bits of information, as torchmetrics."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class PerCount(Metric):
    """Nats over what they stand for: exact over uneven batches and processes.

    Args:
        bits: Give bits instead of nats.
    """

    full_state_update = False
    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(self, *, bits: bool = False) -> None:
        super().__init__()
        self.scale = 1 / math.log(2) if bits else 1.0
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, count: Tensor) -> None:
        """Add a batch: the sum of its negative log-likelihoods, and tokens (or bytes, bases)."""
        self.total = self.total + nats.detach().to(self.total)
        self.count = self.count + count.detach().to(self.count)

    def compute(self) -> Tensor:
        """Return nats (or bits) per token (or byte, base); NaN where nothing was scored."""
        return (self.scale * self.total / self.count).float()
