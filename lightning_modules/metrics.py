"""Means over all that is scored, bits of information, and correlations, as torchmetrics."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassConfusionMatrix


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


class Matthews(MulticlassConfusionMatrix):
    r"""Matthews' correlation coefficient of labels and predicted classes, exact over batches.

    .. math:: R = \frac{\mathrm{cov}(y, \hat y)}
        {\sqrt{\mathrm{cov}(y, y) \, \mathrm{cov}(\hat y, \hat y)}}

    over one-hot vectors. It is 0, as scikit-learn has it, where labels or predictions are all the
    same class; torchmetrics' own coefficient is another number there.

    Source: Gorodkin, Comparing two K-category assignments by a K-category correlation coefficient,
    2004, eq. 8.
    """

    def compute(self) -> Tensor:
        """Return the coefficient, in [-1, 1]."""
        counts: Tensor = super().compute().double()
        n, labels, said = counts.sum(), counts.sum(1), counts.sum(0)
        both = counts.trace() * n - labels @ said
        norm = ((n**2 - labels @ labels) * (n**2 - said @ said)).sqrt()
        return torch.where(norm > 0, both / norm.clamp(min=1e-300), norm).float()
