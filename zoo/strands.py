r"""Both strands of a double helix, read by one net: equivariance under reverse complement.

The second strand of a sequence is its reverse complement, ``c(x_{T+1-t})``; blocks read both, each
in its own direction, as twice as many sequences with the same parameters. Let ``u`` and ``w`` be
the streams of the two strands, ``w`` turned back so that both say something about the same place.
Reverse complement then swaps ``u`` and ``w`` and reverses time, from which follow

* logits of a masked language model, ``(W u_t + W_c w_t) / 2`` with the rows of ``W_c`` those of
  ``W`` in the order of complements: ``f(RC x) = RC f(x)``;
* hidden states ``(u_t + w_t) / 2``: those of ``RC x`` are those of ``x`` in reversed order, and
  their mean over time is the same.

Strands exchange nothing between layers, as in the parameter-shared Caduceus; each one sees both
sides of a token only if the net is bidirectional.

Source: Schiff et al., Caduceus, arXiv:2403.03234v2, section 3.2.
"""

import torch
from torch import Tensor

from statezoo.zoo.bidirectional import Reversal


class Strands:
    """The tokens of both strands.

    Args:
        ids: Tokens ``[B T]``, read from left to right.
        cu_seqlens: Bounds ``[N+1]`` of sequences packed along ``T``; then ``B = 1``.
        complement: The complement of every token.

    Attributes:
        ids: Tokens ``[2B T]``, or ``[1 2T]`` if packed: the second half are the other strands, in
            their own reading direction.
        cu_seqlens: Bounds ``[2N+1]``, if packed.
    """

    def __init__(self, ids: Tensor, cu_seqlens: Tensor | None, complement: list[int]) -> None:
        self.turn = Reversal(ids, cu_seqlens)
        table = torch.tensor(complement, device=ids.device)
        self.ids = self.turn.join(ids, table[self.turn(ids)].to(ids.dtype))
        self.cu_seqlens = self.turn.doubled

    def align(self, x: Tensor) -> Tensor:
        """Lay the strands' streams ``[2B T D]`` or ``[1 2T D]`` side by side, ``[B T 2D]``."""
        first, second = self.turn.split(x)
        return torch.cat([first, self.turn(second)], -1)


def merge(strands: Tensor) -> Tensor:
    """Take the mean ``[B T D]`` of two strands ``[B T 2D]``."""
    first, second = strands.chunk(2, -1)
    return (first + second) / 2


def head_of_both(weight: Tensor, complement: list[int]) -> Tensor:
    """Widen a head ``[W D]`` to ``[W 2D]``: logits from two strands ``[B T 2D]``."""
    table = torch.tensor(complement, device=weight.device)
    return torch.cat([weight, weight.index_select(0, table)], 1) / 2
