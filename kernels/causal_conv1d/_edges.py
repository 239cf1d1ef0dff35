"""The first and the last tokens of every sequence, where the convolution meets its state.

Away from a sequence's first ``W - 1`` tokens all inputs lie in ``x``. Those first tokens are worked
on apart, as ``N`` short sequences with the state in front, :meth:`heads`. Nothing waits for a GPU.
"""

import torch
from torch import Tensor

from statezoo.kernels._varlen import check_bounds


class Batch:
    """Sequences of equal length ``T``.

    Attributes:
        body: Which tokens from ``W - 1`` onwards are no heads, ``[T-W+1 1]``; ``None`` means all.
    """

    body: Tensor | None = None

    def __init__(self, T: int, W: int) -> None:
        self.T, self.n, self.k = T, W - 1, min(T, W - 1)

    def heads(self, x: Tensor, S0: Tensor) -> Tensor:
        """Put states in front of the first tokens: ``[N W-1+k D]``."""
        return torch.cat([S0.mT, x[:, : self.k].to(S0.dtype)], 1)

    def take(self, y: Tensor) -> Tensor:
        """Read those tokens' outputs, or gradients: ``[N k D]``, 0 where there is no token."""
        return y[:, : self.k]

    def put(self, y: Tensor, heads: Tensor) -> Tensor:
        """Overwrite those outputs in ``y``, and return its ``T`` tokens."""
        y[:, : self.k] = heads
        return y

    def add(self, dx: Tensor, d: Tensor) -> None:
        """Add gradients ``[N k D]`` of those tokens' inputs to ``dx [B T D]``."""
        dx[:, : self.k] += d

    def final(self, x: Tensor, S0: Tensor) -> Tensor:
        """Return the last inputs, ``[N D W-1]``."""
        kept = S0[..., self.k :]
        return torch.cat([kept, x[:, self.T - self.k :].mT.to(S0.dtype)], 2)

    def final_backward(self, d: Tensor, dx: Tensor) -> Tensor:
        """Add the gradient of :meth:`final` to ``dx``, and return that of the initial state."""
        dx[:, self.T - self.k :] += d[..., self.n - self.k :].mT
        return torch.cat([torch.zeros_like(d[..., : self.k]), d[..., : self.n - self.k]], 2)


class Packed:
    """Sequences one after the other along ``T``; otherwise as :class:`Batch`."""

    def __init__(self, T: int, W: int, cu: Tensor) -> None:
        check_bounds(cu, T)
        self.T, self.n = T, W - 1
        start, length = cu[:-1, None].long(), cu.long().diff()[:, None]
        step = torch.arange(W - 1, device=cu.device)
        self.first = torch.where(step < length, start + step, T)  # [N W-1], T where there is none
        back = length - (W - 1) + step  # position of each last input, negative in the state
        self.last = torch.where(back >= 0, start + back, T)
        self.in_state = (length + step).clamp(max=max(W - 2, 0))
        within = torch.ones(T + 1, 1, dtype=torch.bool, device=cu.device)
        self.body: Tensor | None = within.index_fill_(0, self.first.flatten(), False)[W - 1 : T]

    def _rows(self, x: Tensor, index: Tensor) -> Tensor:
        """Read rows of ``x [1 T D]``, zeros where ``index`` is ``T``."""
        if self.T == 0:
            return x.new_zeros(*index.shape, x.shape[2])
        return x[0, index.clamp(max=self.T - 1)].where((index < self.T)[..., None], 0)

    def heads(self, x: Tensor, S0: Tensor) -> Tensor:
        """Put states in front of the first tokens: ``[N W-1+k D]``."""
        return torch.cat([S0.mT, self._rows(x, self.first).to(S0.dtype)], 1)

    def take(self, y: Tensor) -> Tensor:
        """Read those tokens' outputs, or gradients: ``[N k D]``, 0 where there is no token."""
        return self._rows(y, self.first)

    def put(self, y: Tensor, heads: Tensor) -> Tensor:
        """Overwrite those outputs in ``y``, and return its ``T`` tokens."""
        y[0].index_copy_(0, self.first.flatten(), heads.flatten(0, 1).to(y.dtype))
        return y[:, : self.T]

    def add(self, dx: Tensor, d: Tensor) -> None:
        """Add gradients ``[N k D]`` of those tokens' inputs to ``dx [B T D]``."""
        self._add(dx, self.first, d)

    def _add(self, dx: Tensor, index: Tensor, d: Tensor) -> None:
        if self.T > 0:
            d = d.where((index < self.T)[..., None], 0).flatten(0, 1)
            dx[0].index_add_(0, index.clamp(max=self.T - 1).flatten(), d.to(dx.dtype))

    def final(self, x: Tensor, S0: Tensor) -> Tensor:
        """Return the last inputs, ``[N D W-1]``."""
        kept = S0.gather(2, self.in_state[:, None].expand_as(S0))
        return kept.where((self.last == self.T)[:, None], self._rows(x, self.last).mT.to(S0.dtype))

    def final_backward(self, d: Tensor, dx: Tensor) -> Tensor:
        """Add the gradient of :meth:`final` to ``dx``, and return that of the initial state."""
        self._add(dx, self.last, d.mT)
        kept = d.where((self.last == self.T)[:, None], 0)
        return torch.zeros_like(d).scatter_add_(2, self.in_state[:, None].expand_as(d), kept)


def edges(x: Tensor, W: int, cu: Tensor | None) -> Batch | Packed:
    """Choose by the layout of ``x [B T D]``."""
    return Batch(x.shape[1], W) if cu is None else Packed(x.shape[1], W, cu)
