"""The loss in Hugging Face's convention: labels are the tokens themselves, shifted in here."""

import torch
import torch.nn.functional as F
from torch import Tensor

from statezoo.kernels.linear_cross_entropy import linear_cross_entropy

IGNORE = -100


def next_tokens(labels: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Say for every position the token that follows, or -100 where none is to be scored.

    Args:
        labels: Tokens ``[B T]``, -100 where not scored.
        attention_mask: Padding; neither it nor what follows it is scored.
        cu_seqlens: Bounds of packed sequences; none predicts the next one's first token.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    if attention_mask is not None:
        real = attention_mask[:, attention_mask.shape[1] - labels.shape[1] :].bool()
        targets = targets.masked_fill(~(real & F.pad(real[:, 1:], (0, 1))), IGNORE)
    if cu_seqlens is not None:
        starts = torch.zeros_like(targets[0], dtype=torch.bool)
        starts = F.pad(starts, (0, 1)).index_fill(0, cu_seqlens.long(), True)
        targets = targets.masked_fill(starts[1:], IGNORE)
    return targets


def mean_loss(x: Tensor, weight: Tensor, targets: Tensor, n: Tensor | int | None) -> Tensor:
    """Average the nats of all scored tokens, over ``n`` where it is given.

    Args:
        x: Stream after the final norm ``[B T D]``.
        weight: Head ``[W D]``.
        targets: Next tokens ``[B T]``.
        n: What the sum is divided by, instead of the number of scored tokens.
    """
    if n is None:
        return linear_cross_entropy(x, weight, targets, ignore_index=IGNORE)
    total: Tensor = linear_cross_entropy(x, weight, targets, ignore_index=IGNORE, reduction="sum")
    return total / n
