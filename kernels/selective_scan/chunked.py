"""Spans of tokens whose decays and writes are computed together, then stepped through in place.

A decay per channel *and* state leaves no matrix product to be found: every form touches all ``E N``
numbers of every token. What is left to win is passes over memory. Forward needs five (exponents,
exponential, writes, the recurrence as one fused multiply-add, the read as a batched product), on a
span that stays in the cache with ``E`` contiguous; nothing of size ``T E N`` is ever allocated. The
backward pass keeps the states before each span, and recomputes the span.
"""

import torch
from torch import Tensor

from statezoo.kernels.selective_scan._edges import Flagged, Known, edges

SPAN = 2**19  # numbers in each of four buffers


def span(x: Tensor, N: int) -> int:
    """Choose the tokens a span from shapes alone."""
    return min(64, max(16, SPAN // max(1, x.shape[0] * x.shape[2] * N)))


def n_saved(x: Tensor, N: int) -> int:
    """Count the saved states."""
    return -(-x.shape[1] // span(x, N))


class _Span:
    """Inputs of a span ``[L B *]`` and, in shared buffers ``[L B N E]``, its decays and states."""

    def __init__(
        self, buffers: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
        negative: bool, s: int, e: int,
    ) -> None:  # fmt: skip
        def load(z: Tensor) -> Tensor:
            return z[:, s:e].transpose(0, 1).to(A.dtype).contiguous()

        self.load, self.s, self.A, self.negative = load, s, A, negative
        self.x, self.dt, self.B, self.C = load(x), load(dt), load(B), load(C)
        self.dtx = self.dt * self.x
        self.a, self.h, self.g, self.w = (buffers[i, : e - s] for i in range(4))
        torch.mul(self.dt[:, :, None], A, out=self.a).exp_()
        if negative:
            self.a.mul_(2).sub_(1)

    def scan(
        self, before: Tensor, h0: Tensor, bounds: Known | Flagged, final: Tensor | None
    ) -> Tensor:
        """Fill in the states after each token, starting ``before``; return the last."""
        torch.mul(self.dtx[:, :, None], self.B[..., None], out=self.h)
        self.before = []
        for i, (a, h) in enumerate(zip(self.a.unbind(0), self.h.unbind(0), strict=True)):
            self.before.append(bounds.pick(True, self.s + i, before, h0))
            before = h.addcmul_(a, self.before[i])
            if final is not None:
                bounds.note(False, self.s + i, h, final)
        return before

    def read(self) -> Tensor:
        """Return ``C h``, ``[L B E]``."""
        return (self.C[:, :, None] @ self.h)[:, :, 0]

    def scan_backward(
        self, dy: Tensor, after: Tensor, d_final: Tensor, d0: Tensor, bounds: Known | Flagged
    ) -> Tensor:
        """Fill in the gradients of the states; return that of the state before the span."""
        torch.mul(dy[:, :, None], self.C[..., None], out=self.g)
        for i in reversed(range(self.g.shape[0])):
            g = self.g[i].add_(bounds.pick(False, self.s + i, after, d_final))
            after = torch.mul(self.a[i], g, out=self.w[i])
            bounds.note(True, self.s + i, after, d0)
        return after.clone()

    def exponents(self) -> Tensor:
        """Return the gradients of ``dt A``, ``[L B N E]``."""
        if self.negative:  # the decay is 2 e^z - 1, its derivative the decay + 1
            self.w.add_(self.g)
        for w, before in zip(self.w.unbind(0), self.before, strict=True):
            w.mul_(before)
        return self.w


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, negative: bool,
    h0: Tensor, cu: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return outputs, final states ``[S E N]``, and the states before each span ``[n B N E]``."""
    bounds, L = edges(x.shape[1], cu), span(x, A.shape[1])
    h0, A = h0.mT.contiguous(), A.mT.to(h0.dtype).contiguous()  # [S N E], [N E]
    y, final = x.new_empty(x.shape), h0.clone()
    saved = h0.new_zeros(n_saved(x, A.shape[0]), x.shape[0], *A.shape)
    buffers = h0.new_empty(4, min(L, x.shape[1]), *saved.shape[1:])
    before = saved.new_zeros(saved.shape[1:])
    for j in range(saved.shape[0]):
        s, e = j * L, min((j + 1) * L, x.shape[1])
        saved[j] = before
        part = _Span(buffers, x, dt, A, B, C, negative, s, e)
        before = part.scan(saved[j], h0, bounds, final)
        out = part.read()
        if D is not None:
            out.addcmul_(part.x, D.to(out.dtype))
        y[:, s:e] = out.transpose(0, 1)
    return y, final.mT.contiguous(), saved


def backward(
    dy: Tensor, d_final: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, negative: bool, h0: Tensor, cu: Tensor | None, saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, dt, A, B, C, D (empty where there is none) and initial states."""
    bounds, L = edges(x.shape[1], cu), span(x, A.shape[1])
    wide, A_dtype = h0.dtype, A.dtype
    h0, A = h0.mT.contiguous(), A.mT.to(wide).contiguous()
    dx, ddt, dB, dC = (z.new_empty(z.shape) for z in (x, dt, B, C))
    d_final = d_final.mT.contiguous()
    d0, dA, dD = d_final.clone(), torch.zeros_like(A), h0.new_zeros(A.shape[1])
    after = saved.new_zeros(saved.shape[1:])
    buffers = h0.new_empty(4, min(L, x.shape[1]), *saved.shape[1:])
    for j in reversed(range(saved.shape[0])):
        s, e = j * L, min((j + 1) * L, x.shape[1])
        part = _Span(buffers, x, dt, A, B, C, negative, s, e)
        part.scan(saved[j], h0, bounds, None)
        d = part.load(dy)
        after = part.scan_backward(d, after, d_final, d0, bounds)
        z = part.exponents()
        d_dtx = (part.B[:, :, None] @ part.g)[:, :, 0]
        spare = part.a  # not needed any more
        dC[:, s:e] = torch.mul(part.h, d[:, :, None], out=spare).sum(-1).transpose(0, 1)
        dB[:, s:e] = torch.mul(part.g, part.dtx[:, :, None], out=spare).sum(-1).transpose(0, 1)
        dA += torch.mul(z, part.dt[:, :, None], out=spare).sum((0, 1))
        d_dt = z.mul_(A).sum(2)
        ddt[:, s:e] = d_dt.addcmul_(d_dtx, part.x).transpose(0, 1)
        d_x = d_dtx.mul_(part.dt)
        if D is not None:
            d_x.addcmul_(d, D.to(wide))
            dD += (d * part.x).sum((0, 1))
        dx[:, s:e] = d_x.transpose(0, 1)
    d_D = x.new_empty(0) if D is None else dD.to(D.dtype, copy=True)
    return dx, ddt, dA.mT.to(A_dtype, copy=True).contiguous(), dB, dC, d_D, d0.mT.contiguous()
