r"""Chunk-parallel form on any device, with its own backward pass.

A chunk holds ``C`` tokens and ``R = n C`` writes. Its *rows* are the queries and, below them, the
write directions :math:`\beta k`. All rows meet all keys in one product, decayed and causal: the
queries' part :math:`P` reads, the writes' part :math:`L` (strictly lower) is what a write changes
for the later ones. With the state :math:`S` before the chunk, the values written in the end are

.. math::
    N = (I + L)^{-1} (\beta V - (\beta K e^{head}) S), \qquad O = P N + (Q e^{head}) S,
    \qquad S \leftarrow e^{total} S + (K e^{tail})^\top N .

The inverse is that of a unit triangular matrix, by substitution and blocks: its entries stay small
where powers of :math:`L` explode (equal keys). Chunks are worked on in spans of a few; the backward
pass keeps the state at each span's start and recomputes the rest.

Source: Yang et al., arXiv:2406.06484, section 3; Gated Delta Networks, arXiv:2412.06464v3, 3.3.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from statezoo.kernels import _decay
from statezoo.kernels._varlen import Chunks, chunk_size, n_sequences
from statezoo.kernels.gated_delta_rule import reference

SPAN = 2048  # writes x lanes worked on at once: intermediate results stay in the cache
ROWS = 64  # most writes a chunk: where each step costs launches, few and long ones win
ROWS_CPU = 32  # fewer products inside chunks
BLOCK = 32  # triangles up to this size are inverted by substitution


class _Inputs(NamedTuple):
    """The op's inputs; ``k v beta`` with the axis of writes, ``[B T n *]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None
    scale: float


class _Call(NamedTuple):
    """What forward and backward agree on: layout and sizes."""

    chunks: Chunks
    span: int
    groups: int  # value heads per key head
    n: int  # writes a token
    causal: Tensor  # which keys a row sees, [C+R R]


def _sizes(q: Tensor, k: Tensor, v: Tensor, cu: Tensor | None) -> tuple[int, int, int]:
    """Return tokens a chunk, chunks a span, and the number of spans (packed: an upper bound)."""
    (B, T), n = q.shape[:2], k.shape[2]
    N = 1 if cu is None else n_sequences(q, cu)
    rows = ROWS_CPU if q.device.type == "cpu" else ROWS
    most = 1 << (max(1, rows // n).bit_length() - 1)
    C = chunk_size(T, N, most, min(16, most))
    span = max(1, SPAN // (C * n * B * v.shape[3]))
    return C, span, -(-(-(-T // C) if cu is None else T // C + N) // span)


def _call(x: _Inputs, cu: Tensor | None) -> _Call:
    C, span, _ = _sizes(x.q, x.k, x.v, cu)
    B, T, H = x.q.shape[:3]
    n = x.k.shape[2]
    causal = _causal(C, n, x.k.device)
    return _Call(Chunks(B, T, C, cu), span, x.v.shape[3] // H, n, causal)


def saved_like(q: Tensor, k: Tensor, v: Tensor, S0: Tensor, cu: Tensor | None) -> Tensor:
    """Allocate the state before each span, ``[spans lanes K V]``, from shapes alone."""
    lanes = S0.shape[1] if cu is not None else S0.shape[0] * S0.shape[1]
    return S0.new_zeros(_sizes(q, k, v, cu)[2], lanes, *S0.shape[2:])


class _Span:
    """The chunks of one span, loaded, with decays and scores; lanes are ``B * Hv``.

    Attributes:
        rows: Scaled queries, then write directions ``[n G C+R K]``; ``row_head`` decayed from the
            chunk's start.
        k: Keys ``[n G R K]``; ``k_tail`` decayed to the chunk's end.
        P: Reads ``[n G C R]``.
        T: ``(I + L)^-1``, ``[n G R R]``.
    """

    def __init__(self, call: _Call, x: _Inputs, a: int, b: int, dtype: torch.dtype) -> None:
        def load(y: Tensor) -> Tensor:
            return call.chunks.load(y.movedim(2, 3), a, b, dtype).flatten(2, 3)

        self.C, self.n = call.chunks.C, call.n
        q = call.chunks.load(x.q, a, b, dtype).mul_(x.scale)
        self.k, self.v, self.beta = load(x.k), load(x.v), load(x.beta)[..., None]
        if call.groups > 1:
            q, self.k = (y.repeat_interleave(call.groups, 1) for y in (q, self.k))
        self.rows = torch.cat([q, self.k * self.beta], 2)
        self.row_head, self.k_tail = self.rows, self.k
        self.total = self.v.new_ones(()).expand(b - a, 1, 1, 1)  # [n G K 1], or 1 for K
        self.levels: _decay.Levels | None = None
        self.weights = call.causal.to(dtype)
        self.gated = x.g is not None
        if x.g is not None:
            self._decay(call.chunks.load(x.g, a, b, dtype))
        scores = self._scores()
        self.P, self.T = scores[:, :, : self.C], _inverse(scores[:, :, self.C :])

    def _decay(self, g: Tensor) -> None:
        if g.ndim == 4:
            self.levels = _decay.Levels(g)
            head, tail, total = self.levels.decay
            self.total = total[..., None]
        else:
            D = _repeat(_decay.products(g), self.n, 3)
            self.weights = torch.cat([D, _repeat(D, self.n, 2)], 2).mul_(self.weights)
            head, tail = (x[..., None] for x in _decay.of_chunk(g, -1)[:2])
            self.total = head[:, :, -1:]
        self.head = torch.cat([head, _repeat(head, self.n, 2)], 2)  # [n G C+R K], or 1 for K
        self.tail = _repeat(tail, self.n, 2)
        self.row_head, self.k_tail = self.rows * self.head, self.k * self.tail

    def _scores(self) -> Tensor:
        """Return ``P`` above ``L``, ``[n G C+R R]``."""
        if self.levels is None:
            return (self.rows @ self.k.mT).mul_(self.weights)
        q, w = self.rows[:, :, : self.C], self.rows[:, :, self.C :]
        P, L = (self.levels.scores(y.contiguous(), self.k) for y in (q, w))
        return torch.cat([P, L.tril_(-1)], 2)

    def scores_backward(self, d: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of rows and keys; ``d`` is overwritten."""
        if self.levels is None:
            d.mul_(self.weights)
            return d @ self.k, d.mT @ self.rows
        halves = (
            (slice(self.C), d[:, :, : self.C]),
            (slice(self.C, None), d[:, :, self.C :].tril(-1)),
        )
        parts = [
            self.levels.scores_backward(dA.contiguous(), self.rows[:, :, at].contiguous(), self.k)
            for at, dA in halves
        ]
        return torch.cat([da for da, _ in parts], 2), parts[0][1].add_(parts[1][1])

    def gate_gradient(
        self, at_rows: Tensor, at_k: Tensor, at_tail: Tensor, at_total: Tensor
    ) -> Tensor:
        """Sum gradients of log decays, ``[n G * K]``, over writes, and return those of g."""

        def tokens(x: Tensor) -> Tensor:
            x = x if self.levels is not None else x.sum(-1)
            return x if self.n == 1 else x.view(*x.shape[:2], self.C, self.n, *x.shape[3:]).sum(3)

        at_head = tokens(at_rows[:, :, self.C :] - at_k)
        at_q, at_total = at_rows[:, :, : self.C], (at_total * self.total).sum(-1)
        if self.levels is None:
            at_q, at_total = at_q.sum(-1), at_total.sum(-1)
        return _decay.gate_gradient(at_head.add_(at_q), tokens(at_tail), at_total, 2)


def _repeat(x: Tensor, n: int, dim: int) -> Tensor:
    return x if n == 1 else x.repeat_interleave(n, dim)


def _causal(C: int, n: int, device: torch.device) -> Tensor:
    """Tell which keys a row sees: a query those up to its token's, a write those before."""
    key = torch.arange(n * C, device=device)
    return key <= torch.cat([key[n - 1 :: n], key - 1])[:, None]


def _inverse(L: Tensor) -> Tensor:
    """Invert ``I + L``; only what is strictly below the diagonal of ``L [... R R]`` is read."""
    R = L.shape[-1]
    if R <= BLOCK or R % 2:
        one = torch.eye(R, dtype=L.dtype, device=L.device).expand_as(L)
        T: Tensor = torch.linalg.solve_triangular(L, one, upper=False, unitriangular=True)
        return T
    h = R // 2
    first, second = _inverse(torch.stack([L[..., :h, :h], L[..., h:, h:]]))
    T = L.new_zeros(L.shape)
    T[..., :h, :h], T[..., h:, h:] = first, second
    T[..., h:, :h] = (second @ (L[..., h:, :h] @ first)).neg_()
    return T


def _scan(
    span: _Span, call: _Call, S: Tensor, S0: Tensor, a: int, final: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Carry ``S`` through a span.

    Returns:
        The state before each chunk ``[n G K V]``, the values written ``[n G R V]``, the last state.
    """
    N = span.beta * span.v
    before = N.new_empty(*N.shape[:2], *S.shape[-2:])
    writes = span.row_head[:, :, span.C :]
    chunks = zip(writes, N, span.T, span.k_tail.mT, span.total, strict=True)
    for i, (w, x, T, k, total) in enumerate(chunks):
        before[i] = S = call.chunks.enter(S, S0, a + i)
        torch.bmm(T, torch.baddbmm(x, w, S, alpha=-1), out=x)
        S = torch.baddbmm(S * total, k, x)
        if final is not None:
            call.chunks.leave(S, final, a + i)
    return before, N, S


def forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float, S0: Tensor,
    cu: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return outputs, final state, and the state before each span."""
    saved = saved_like(q, k, v, S0, cu)
    if q.shape[1] == 1 and cu is None:
        return *reference.run(q, k, v, beta, g, scale, S0, cu), saved
    x = _Inputs(q, k, v, beta, g, scale)
    call = _call(x, cu)
    o, final = call.chunks.empty_like(v[:, :, 0]), S0.clone()
    S0, lanes = _lanes(S0, cu), _lanes(final, cu)
    S = S0.new_zeros(S0.shape[-3:])
    for j, (a, b) in enumerate(call.chunks.spans(call.span)):
        saved[j] = S
        span = _Span(call, x, a, b, S0.dtype)
        before, N, S = _scan(span, call, S, S0, a, lanes)
        out = (span.row_head[:, :, : call.chunks.C] @ before).add_(span.P @ N)
        call.chunks.store(o, out, a)
    return call.chunks.trim(o), final, saved


def backward(
    do: Tensor, d_final: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None,
    scale: float, S0: Tensor, cu: Tensor | None, saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Return the gradients of q, k, v, beta, g (None where there is none) and the initial state."""
    x = _Inputs(q, k, v, beta, g, scale)
    call = _call(x, cu)
    chunks = call.chunks
    grads = [chunks.empty_like(q), *(chunks.empty_like(y).movedim(2, 3) for y in (k, v, beta))]
    dg = None if g is None else chunks.empty_like(g)
    d_initial = d_final.clone()
    S0, d_final, lanes = _lanes(S0, cu), _lanes(d_final, cu), _lanes(d_initial, cu)
    dS = S0.new_zeros(S0.shape[-3:])
    for j, (a, b) in reversed(list(enumerate(chunks.spans(call.span)))):
        span = _Span(call, x, a, b, S0.dtype)
        before, N, _ = _scan(span, call, saved[j], S0, a, None)
        dout = chunks.load(do, a, b, S0.dtype)
        dN = span.P.mT @ dout
        d_read = torch.cat([dout, dN], 2)  # gradient of the rows' products with S
        after = torch.empty_like(before)
        steps = zip(dN, d_read, span.T.mT, span.k_tail, span.row_head.mT, span.total, strict=True)
        for i, (d, read, T, k, rows, total) in reversed(list(enumerate(steps))):
            after[i] = dS = chunks.enter_backward(dS, d_final, a + i)
            read[:, chunks.C :] = (T @ torch.baddbmm(d, k, dS)).neg_()
            dS = torch.baddbmm(dS * total, rows, read)
            chunks.leave_backward(dS, lanes, a + i)
        found = _span_backward(span, d_read, N, before, after)
        for out, y in zip([*grads, dg], found, strict=True):
            if out is not None and y is not None:
                _store(call, out, y, a)
    dq, dk, dv, dbeta = (chunks.trim(y) for y in grads)
    dk, dv, dbeta = (y.movedim(2, 3) for y in (dk, dv, dbeta))
    return dq.mul_(scale), dk, dv, dbeta, None if dg is None else chunks.trim(dg), d_initial


def _span_backward(
    span: _Span, d_read: Tensor, N: Tensor, before: Tensor, after: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of the scaled q, of k, v, beta and g, ``[n G * *]`` each."""
    C, dg = span.C, None
    dw, dk = span.scores_backward(d_read @ N.mT)
    dw_head, dk_tail = d_read @ before.mT, N @ after.mT
    if span.gated:
        at_k = span.k * dk
        dw.addcmul_(dw_head, span.head)
        dk_tail.mul_(span.tail)
        dg = span.gate_gradient(span.rows * dw, at_k, span.k * dk_tail, before * after)
    else:
        dw.add_(dw_head)
    dk.add_(dk_tail)
    d_write, dv = dw[:, :, C:], d_read[:, :, C:].neg()
    dbeta = (d_write * span.k).sum(-1) + (dv * span.v).sum(-1)
    dk.addcmul_(d_write, span.beta)
    dv.mul_(span.beta)
    dk, dv, dbeta = (x.view(*x.shape[:2], C, span.n, *x.shape[3:]) for x in (dk, dv, dbeta))
    return dw[:, :, :C], dk, dv, dbeta, dg


def _store(call: _Call, out: Tensor, x: Tensor, a: int) -> None:
    """Write gradients to ``out [B T H *]``, adding those of value heads that share a key head."""
    lanes = call.chunks.B * out.shape[2]
    if x.shape[1] != lanes:
        x = x.view(x.shape[0], lanes, -1, *x.shape[2:]).sum(2)
    call.chunks.store(out, x, a)


def _lanes(S: Tensor, cu: Tensor | None) -> Tensor:
    """View a state ``[N H K V]`` by lanes: ``[N*H K V]``, or ``[N H K V]`` as it is if packed."""
    return S.flatten(0, 1) if cu is None else S
