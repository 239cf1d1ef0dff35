r"""Chunk-parallel form on any device, with its own backward pass.

Inside a chunk :math:`O = (QK^\top \circ D) V`, across chunks the state is carried:

.. math::
    O \mathrel{+}= (Q e^{head}) S, \qquad S \leftarrow e^{total} S + (K e^{tail})^\top V .

Chunks are worked on in spans of a few; the backward pass keeps the state at each span's start and
recomputes the rest, so that memory stays near that of inputs and outputs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from statezoo.kernels import _decay
from statezoo.kernels._varlen import Chunks, chunk_size, n_sequences
from statezoo.kernels.gated_linear_attention import reference

SPAN = 2048  # tokens x lanes worked on at once: intermediate results stay in the cache


class _Call(NamedTuple):
    """What forward and backward agree on: layout, sizes, spans."""

    chunks: Chunks
    span: int
    groups: int  # value heads per key head


def _sizes(v: Tensor, cu: Tensor | None) -> tuple[int, int]:
    """Choose the tokens a chunk and the chunks a span, from shapes alone."""
    B, T, Hv = v.shape[:3]
    C = chunk_size(T, 1 if cu is None else n_sequences(v, cu))
    return C, max(1, SPAN // (C * B * Hv))


def _call(q: Tensor, v: Tensor, cu: Tensor | None) -> _Call:
    B, T, H = q.shape[:3]
    C, span = _sizes(v, cu)
    return _Call(Chunks(B, T, C, cu), span, v.shape[2] // H)


def saved_like(q: Tensor, k: Tensor, v: Tensor, S0: Tensor, cu: Tensor | None) -> Tensor:
    """Allocate the saved states, ``[spans lanes K V]`` (``[spans Hv K V]`` if packed)."""
    (C, span), T = _sizes(v, cu), v.shape[1]
    n = -(-T // C) if cu is None else T // C + n_sequences(v, cu)
    lanes = S0.shape[1] if cu is not None else S0.shape[0] * S0.shape[1]
    return S0.new_zeros(-(-n // span), lanes, *S0.shape[2:])


class _Span:
    """The chunks of one span, loaded and with their decays summed; lanes are ``B * Hv``."""

    def __init__(
        self, call: _Call, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, a: int, b: int,
        dtype: torch.dtype, scale: float,
    ) -> None:  # fmt: skip
        load = call.chunks.load
        self.q = load(q, a, b, dtype).mul_(scale)
        self.k, self.v = load(k, a, b, dtype), load(v, a, b, dtype)
        if call.groups > 1:
            self.q, self.k = (x.repeat_interleave(call.groups, 1) for x in (self.q, self.k))
        self.per_channel = g is not None and g.ndim == 4
        self.levels: _decay.Levels | None = None
        self.D: Tensor | None = None
        self.q_head, self.k_tail = self.q, self.k
        self.total = self.v.new_ones(b - a, 1, 1, 1)
        if g is None:
            return
        gates = load(g, a, b, dtype)
        if self.per_channel:
            self.levels = _decay.Levels(gates)
            self.head, self.tail, total = self.levels.decay
            self.total = total[..., None]  # [n G K 1]
        else:
            self.D = _decay.products(gates).tril_()
            self.head, self.tail, _ = (x[..., None] for x in _decay.of_chunk(gates, -1))
            self.total = self.head[:, :, -1:]  # [n G 1 1]
        self.q_head, self.k_tail = self.q * self.head, self.k * self.tail

    def scores(self) -> Tensor:
        """Return the decayed, causal products of queries and keys, ``[n G C C]``."""
        if self.levels is not None:
            return self.levels.scores(self.q, self.k)
        A = self.q @ self.k.mT
        return A.tril_() if self.D is None else A.mul_(self.D)


def _states(
    span: _Span, call: _Call, S: Tensor, S0: Tensor, a: int, final: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Carry ``S`` through a span: the state before each chunk ``[n G K V]``, and the last."""
    writes = span.k_tail.mT @ span.v
    before = torch.empty_like(writes)
    for i in range(writes.shape[0]):
        before[i] = call.chunks.enter(S, S0, a + i)
        S = torch.addcmul(writes[i], before[i], span.total[i])
        if final is not None:
            call.chunks.leave(S, final, a + i)
    return before, S


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, S0: Tensor, cu: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs, final state, and the state before each span."""
    if q.shape[1] == 1 and cu is None:
        return *reference.run(q, k, v, g, scale, S0, cu), S0.unsqueeze(0).clone()
    call = _call(q, v, cu)
    o, final = call.chunks.empty_like(v), S0.clone()
    saved = saved_like(q, k, v, S0, cu)
    S0, lanes = _lanes(S0, cu), _lanes(final, cu)
    S = S0.new_zeros(S0.shape[-3:])
    for j, (a, b) in enumerate(call.chunks.spans(call.span)):
        saved[j] = S
        span = _Span(call, q, k, v, g, a, b, S0.dtype, scale)
        before, S = _states(span, call, S, S0, a, lanes)
        out = span.scores() @ span.v
        call.chunks.store(o, out.add_(span.q_head @ before), a)
    return call.chunks.trim(o), final, saved


def backward(
    do: Tensor, d_final: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float,
    S0: Tensor, cu: Tensor | None, saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k, v, g (empty where there is none) and the initial state."""
    call = _call(q, v, cu)
    grads = [call.chunks.empty_like(x) for x in (q, k, v)]
    dg = None if g is None else call.chunks.empty_like(g)
    d_initial = d_final.clone()
    S0, d_final, lanes = _lanes(S0, cu), _lanes(d_final, cu), _lanes(d_initial, cu)
    dS = torch.zeros_like(saved[0]) if len(saved) else S0
    for j, (a, b) in reversed(list(enumerate(call.chunks.spans(call.span)))):
        span = _Span(call, q, k, v, g, a, b, S0.dtype, scale)
        before, _ = _states(span, call, saved[j], S0, a, None)
        dout = call.chunks.load(do, a, b, S0.dtype)
        after = span.q_head.mT @ dout  # becomes the gradient of the state after each chunk
        for i in reversed(range(b - a)):
            dS = call.chunks.enter_backward(dS, d_final, a + i)
            reads, after[i] = after[i].clone(), dS
            dS = torch.addcmul(reads, dS, span.total[i])
            call.chunks.leave_backward(dS, lanes, a + i)
        for out, x in zip([*grads, dg], _span_backward(span, dout, before, after), strict=True):
            if out is not None and x is not None:
                call.chunks.store(out, _sum_groups(x, out.shape[2] * call.chunks.B), a)
    dq, dk, dv = (call.chunks.trim(x) for x in grads)
    return (
        dq.mul_(scale),
        dk,
        dv,
        call.chunks.trim(dg) if dg is not None else q.new_empty(0),
        d_initial,
    )


def _span_backward(
    span: _Span, dout: Tensor, before: Tensor, after: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of the scaled q, of k, v and g, ``[n G C *]`` each."""
    A, dA = span.scores(), dout @ span.v.mT
    dv = (A.mT @ dout).add_(span.k_tail @ after)
    dq_head, dk_tail = dout @ before.mT, span.v @ after.mT
    if span.levels is not None:
        dq, dk = span.levels.scores_backward(dA, span.q, span.k)
        at_head = (span.q * dq).sub_(span.k * dk).addcmul_(span.q_head, dq_head)
        at_total = (before * after).sum(-1).mul_(span.total[..., 0])
        dg = _decay.gate_gradient(at_head, span.k_tail * dk_tail, at_total, 2)
        return dq.addcmul_(dq_head, span.head), dk.addcmul_(dk_tail, span.tail), dv, dg
    if span.D is None:
        dA.tril_()
        return (dA @ span.k).add_(dq_head), (dA.mT @ span.q).add_(dk_tail), dv, None
    between = (A * dA).tril_(-1)
    at_head = between.sum(-1) - between.sum(-2) + (span.q_head * dq_head).sum(-1)
    at_total = (before * after).sum((-1, -2)).mul_(span.total[..., 0, 0])
    dg = _decay.gate_gradient(at_head, (span.k_tail * dk_tail).sum(-1), at_total, 2)
    dA.mul_(span.D)
    dq = (dA @ span.k).addcmul_(dq_head, span.head)
    return dq, (dA.mT @ span.q).addcmul_(dk_tail, span.tail), dv, dg


def _lanes(S: Tensor, cu: Tensor | None) -> Tensor:
    """View a state ``[N H K V]`` by lanes: ``[N*H K V]``, or ``[N H K V]`` as it is if packed."""
    return S.flatten(0, 1) if cu is None else S


def _sum_groups(x: Tensor, lanes: int) -> Tensor:
    """Add the gradients of value heads that share a key head."""
    return x if x.shape[1] == lanes else x.view(x.shape[0], lanes, -1, *x.shape[2:]).sum(2)
