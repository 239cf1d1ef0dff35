r"""Both directions of time.

A bidirectional block runs its mixer over every sequence and over its reversal, and takes the mean:

.. math::
    y = \tfrac12 \left( f(x) + R\, f'(R x) \right), \qquad (R x)_t = x_{T+1-t}

with ``f' = f`` where the directions are tied. The mean, not the sum, lets what ``f`` makes of a
token alone pass unchanged: tied, a net gives a sequence of one token the same as its causal twin,
whose parameters have the same names and shapes.
"""

import torch
from torch import Tensor

from statezoo.kernels._varlen import check_bounds, check_packing, segment_ids
from statezoo.zoo.initial_state import InitialState, begin
from statezoo.zoo.mixer import Mixer


class Reversal:
    """Turns every sequence of a batch, or of a pack, round in time.

    Args:
        x: ``[B T ...]``, for its shape.
        cu_seqlens: Bounds ``[N+1]`` of sequences packed along ``T``; then ``B = 1``.

    Attributes:
        doubled: Bounds ``[2N+1]`` of what :meth:`join` makes of two packs.

    Raises:
        ValueError: If the bounds do not fit ``x``.
    """

    def __init__(self, x: Tensor, cu_seqlens: Tensor | None) -> None:
        check_packing("bidirectional", x, cu_seqlens)
        self.index: Tensor | None = None
        self.doubled: Tensor | None = None
        if cu_seqlens is not None:
            T = x.shape[1]
            check_bounds(cu_seqlens, T)
            cu = cu_seqlens.long()
            own = segment_ids(cu, T)
            self.index = cu[own] + cu[own + 1] - 1 - torch.arange(T, device=cu.device)
            self.doubled = torch.cat([cu_seqlens, cu_seqlens[1:] + T])
        self.axis = 0 if cu_seqlens is None else 1

    def __call__(self, x: Tensor) -> Tensor:
        """Reverse ``x [B T ...]`` within each sequence; twice is nothing."""
        return x.flip(1) if self.index is None else x.index_select(1, self.index)

    def join(self, x: Tensor, other: Tensor) -> Tensor:
        """Put twice as many sequences into one batch ``[2B T ...]`` or pack ``[1 2T ...]``."""
        return torch.cat([x, other], self.axis)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Undo :meth:`join`."""
        first, second = x.chunk(2, self.axis)
        return first, second


def both_ways(
    mixer: Mixer,
    back: Mixer | None,
    learnt: tuple[InitialState | None, InitialState | None],
    x: Tensor,
    cu_seqlens: Tensor | None,
    reversal: Reversal,
    ids: Tensor | None,
) -> Tensor:
    """Mix ``x [B T D]`` along time in both directions.

    Args:
        mixer: Runs forward in time.
        back: Runs backward; ``None`` if ``mixer`` does both, in one call on twice the sequences.
        learnt: Learnt initial states of the two.
        x: The stream after its norm.
        cu_seqlens: Bounds of packed sequences.
        reversal: The reversal of sequences such as ``x``.
        ids: The tokens ``[B T]``, if they are known.
    """
    turned = None if ids is None else reversal(ids)
    if back is None:
        twice = reversal.join(x, reversal(x))
        start, tokens = begin(learnt[0], twice, reversal.doubled), None
        if ids is not None and turned is not None:
            tokens = reversal.join(ids, turned)
        both, _ = mixer.mix(twice, start, reversal.doubled, tokens)
        ahead, behind = reversal.split(both)
    else:
        ahead, _ = mixer.mix(x, begin(learnt[0], x, cu_seqlens), cu_seqlens, ids)
        behind, _ = back.mix(reversal(x), begin(learnt[1], x, cu_seqlens), cu_seqlens, turned)
    return (ahead + reversal(behind)) / 2
