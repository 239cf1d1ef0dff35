"""Decay inside a chunk, as sums or products over the steps between two tokens.

No difference of cumulative sums is ever taken: a gate of -1e4 then costs no digit of its
neighbours, and no exponent is ever positive.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Decay(NamedTuple):
    """Decays of a chunk ``[... C]`` (a gate a head) or ``[... C K]`` (one a channel).

    Attributes:
        head: From the chunk's start to after token ``i``: ``exp(sum_{t <= i} g_t)``.
        tail: From after token ``j`` to the chunk's end: ``exp(sum_{t > j} g_t)``.
        total: Across the chunk, without the axis ``C``.
    """

    head: Tensor
    tail: Tensor
    total: Tensor


def products(g: Tensor) -> Tensor:
    """Decay from after ``j`` to ``i`` of gates ``[... C]``: ``[... i j]``, 1 above the diagonal.

    A running product of single decays: an exponential a gate, not one a pair.
    """
    C = g.shape[-1]
    later = torch.ones(C, C, dtype=torch.bool, device=g.device).tril(-1)
    return torch.where(later, g.exp()[..., None], 1.0).cumprod(-2)


def of_chunk(g: Tensor, dim: int) -> Decay:
    """Decays of whole chunks along ``dim``, the axis ``C``."""
    head = g.cumsum(dim)
    tail = g.flip(dim).cumsum(dim).flip(dim)
    tail = torch.cat(
        [tail.narrow(dim, 1, g.shape[dim] - 1), torch.zeros_like(g.narrow(dim, 0, 1))], dim
    )
    head, tail = head.exp_(), tail.exp_()
    return Decay(head, tail, head.select(dim, -1))


def gate_gradient(at_head: Tensor, at_tail: Tensor, at_total: Tensor, dim: int) -> Tensor:
    """Turn gradients of the logs of :class:`Decay` along ``dim`` into those of the gates."""
    dg = at_head.flip(dim).cumsum(dim).flip(dim)
    dg += at_tail.cumsum(dim) - at_tail
    return dg.add_(at_total.unsqueeze(dim))


class Levels:
    r"""Scores of per-channel gates.

    .. math:: A_{ij} = \sum_k a_{ik} b_{jk} e^{\sum_{j<t\le i} g_{tk}}

    The chunk is halved again and again: at each level the rows of every second half meet the
    columns of the first half before it, both decayed to the boundary between them, so that all is
    matrix products and no factor is above 1. The diagonal is plain.

    Args:
        g: Gates ``[n G C K]``, ``C`` a power of two.
    """

    def __init__(self, g: Tensor) -> None:
        self.C = g.shape[2]
        self.levels: list[tuple[int, Tensor, Tensor]] = []  # half, row decay, column decay
        head, half = g.exp(), 1  # decays inside blocks of `half` tokens
        tail = torch.ones_like(head)
        while half < self.C:
            left, right = (self._halves(x, half).squeeze(-2) for x in (head, tail))
            row, column = left[..., 1, :, :].clone(), right[..., 0, :, :].clone()
            self.levels.append((half, row, column))
            left[..., 1, :, :].mul_(left[..., 0, -1:, :])
            right[..., 0, :, :].mul_(row[..., -1:, :])
            half *= 2
        self.decay = Decay(head, tail, head[:, :, -1])

    def scores(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply rows ``a`` and columns ``b [n G C K]`` into ``A [n G C C]``, 0 above.

        Both may have several rows a token, ``[n G C*r K]``, which share its decay; all rows of a
        token meet all columns of it.
        """
        A = a.new_zeros(*a.shape[:3], b.shape[2])
        self._diagonal(A).copy_(
            (self._tokens(a)[..., None, :] * self._tokens(b)[..., None, :, :]).sum(-1)
        )
        for half, row, column in self.levels:
            rows = self._decayed(self._halves(a, half)[:, :, :, 1], row)
            columns = self._decayed(self._halves(b, half)[:, :, :, 0], column)
            self._corner(A, half).copy_(rows @ columns.mT)
        return A

    def scores_backward(self, dA: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``da, db``; the gates' part is ``cumulated a * da - b * db`` (see the callers)."""
        diagonal = self._diagonal(dA)[..., None]
        da = (diagonal * self._tokens(b)[..., None, :, :]).sum(-2).view(a.shape)
        db = (diagonal * self._tokens(a)[..., None, :]).sum(-3).view(b.shape)
        for half, row, column in self.levels:
            corner = self._corner(dA, half)
            rows = self._decayed(self._halves(a, half)[:, :, :, 1], row)
            columns = self._decayed(self._halves(b, half)[:, :, :, 0], column)
            for x, dx, part, decay in (
                (da, _product(corner, columns), 1, row),
                (db, _product(corner.mT, rows), 0, column),
            ):
                here = self._halves(x, half)[:, :, :, part]
                here.addcmul_(dx.view(here.shape), decay[..., None, :])
        return da, db

    def _tokens(self, x: Tensor) -> Tensor:
        """View ``[n G C*r K]`` as ``[n G C r K]``."""
        return x.view(*x.shape[:2], self.C, -1, x.shape[-1])

    @staticmethod
    def _decayed(x: Tensor, decay: Tensor) -> Tensor:
        """Decay ``x [n G blocks half r K]`` and join its rows: ``[n G blocks half*r K]``."""
        return (x * decay[..., None, :]).flatten(3, 4)

    def _halves(self, x: Tensor, half: int) -> Tensor:
        """View ``[n G C*r K]`` as ``[n G blocks 2 half r K]``."""
        n, G, R, K = x.shape
        return x.view(n, G, self.C // (2 * half), 2, half, R // self.C, K)

    def _diagonal(self, A: Tensor) -> Tensor:
        """View the scores inside tokens, ``[n G C r r']``."""
        n, G, R, Q = A.shape
        tokens = A.view(n, G, self.C, R // self.C, self.C, Q // self.C)
        return tokens.diagonal(dim1=2, dim2=4).movedim(-1, 2)

    def _corner(self, A: Tensor, half: int) -> Tensor:
        """View the lower left corners ``[n G blocks half*r half*r']`` of the diagonal blocks."""
        n, G, R, Q = A.shape
        blocks = self.C // (2 * half)
        tiles = A.view(n, G, blocks, 2, R // (2 * blocks), blocks, 2, Q // (2 * blocks))
        return tiles[:, :, :, 1, :, :, 0].diagonal(dim1=2, dim2=4).movedim(-1, 2)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices; many tiny ones are quicker one number at a time."""
    if max(a.shape[-2:]) > 2:
        return a @ b
    return (a[..., None] * b[..., None, :, :]).sum(-2)
