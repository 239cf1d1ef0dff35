"""The batch that every data module yields and every task reads."""

from __future__ import annotations

from typing import NotRequired, TypedDict

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
            say; ``IGNORE`` where nothing is scored.
        cu_seqlens: ``[N+1]`` int32 bounds of the sequences packed along ``T``; then ``B = 1``.
        n_bytes: int64 scalar, the bytes of text that the scored targets stand for.
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: NotRequired[Tensor]
    n_bytes: NotRequired[Tensor]
