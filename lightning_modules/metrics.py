"""Means over all that is scored, bits of information, and the rows of a split, as torchmetrics."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


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


class Columns:
    """Labels and answers of some rows; no tuple, as torchmetrics squeezes those of a single row."""

    def __init__(self, *columns: Tensor) -> None:
        self.columns = columns

    def __getitem__(self, number: int) -> Tensor:
        return self.columns[number]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.columns)


class Rows(Metric):
    """All labels and answers of a split, from all processes, as scores of the whole need them.

    Torchmetrics' own scores differ from what a small split needs: the area under a ROC curve takes
    an absent class for 0, R2 refuses a single row, and none can weigh rows, as the bootstrap does.
    """

    full_state_update = False
    labels: list[Tensor]
    answers: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("labels", [], dist_reduce_fx="cat")
        self.add_state("answers", [], dist_reduce_fx="cat")

    def update(self, labels: Tensor, answers: Tensor) -> None:
        """Add the rows of a batch, ``[n ...]`` both; there may be none."""
        self.labels.append(labels.detach())
        self.answers.append(answers.detach())

    def compute(self) -> Columns:
        """Return all labels and answers."""
        return Columns(dim_zero_cat(self.labels), dim_zero_cat(self.answers))
