"""The batch that every data module yields and every task reads."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NotRequired, TypedDict

from torch import Tensor

__all__ = ["IGNORE", "Batch"]

IGNORE = -100
"""Target of a position that is not scored."""


class Batch(TypedDict):
    """Tokens with the answer expected at each of them.

    A rank of a distributed validation may get a batch without any scored target, so that all
    ranks see equally many batches.

    Attributes:
        tokens: ``[B T]`` int64, what the model reads.
        targets: ``[B T]`` int64, already aligned: ``targets[t]`` is what position ``t`` must
            say; ``IGNORE`` where nothing is scored. Not in batches of labelled sequences.
        cu_seqlens: ``[N+1]`` int32 bounds of the sequences packed along ``T``; then ``B = 1``.
        attention_mask: ``[B T]``, 1 for tokens and 0 for padding on the right; only where lengths
            differ.
        n_bytes: int64 scalar, what the scored targets stand for: bytes of text, bases, notes; the
            data module names it, ``unit``.
        starts: ``[B]`` bool, rows that do not go on where they ended in the batch before; only
            where states are carried. A packed batch has as many rows, of equal length.
        weights: ``[B T]`` float32, what each target counts in the training loss. Validation counts
            all alike, and logs those of weight 1 beside.
        labels: ``[B]`` int64 classes, one per sequence (``[N]`` if packed), ``IGNORE`` if unknown;
            ``[B C]`` float32 in {0, 1} of several labels at once, or ``[B R]`` float32 numbers,
            NaN if unknown; or ``[B T]`` int64 tags, ``IGNORE`` where unknown, not due or padding.
            The data's ``label_kind`` says which.
        ids: Names of the sequences, for tables of predictions.
        tagged: ``[B T]`` bool, where a tag is due, known or not; in batches to predict tags of.
        shard: Where several processes share each sequence, which slice of time this one has: the
            network runs within it. ``SequenceParallel`` adds it.
    """

    tokens: Tensor
    targets: NotRequired[Tensor]
    cu_seqlens: NotRequired[Tensor]
    attention_mask: NotRequired[Tensor]
    n_bytes: NotRequired[Tensor]
    starts: NotRequired[Tensor]
    weights: NotRequired[Tensor]
    labels: NotRequired[Tensor]
    ids: NotRequired[list[str]]
    tagged: NotRequired[Tensor]
    shard: NotRequired[AbstractContextManager[Any]]
