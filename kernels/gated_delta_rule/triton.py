r"""Fused kernels: the additive op's, with the values that are written in the end in place of v.

With :math:`L` the decayed products of a chunk's writes with each other's keys (strictly lower, rows
times beta) and :math:`S` the state before the chunk, what is written in the end is

.. math::
    N = (I + L)^{-1} (\beta V - (\beta K e^{head}) S) = U - W S .

:func:`_inverse` has :math:`X = (I + L)^{-1}`, :func:`_writes` U and W, :func:`_walk` carries the
state and finds N; outputs are then those of ``gated_linear_attention`` with v = N. Backward,
:func:`_walk_back` carries the gradients of the state and of N, :func:`_value_gradients` has those
of :math:`R = (I + L) N`, namely :math:`X^\top dN`, and with it of v and :math:`dL = -dR\,N^\top`;
:func:`_key_gradients` adds what comes through L and W to the gradients of k, beta and g. X is
saved, the rest recomputed. With n writes a token these are n steps of their own; the first decays,
the last reads. Gates and their levels: see the additive op's ``triton.py``.

Source: Yang et al., arXiv:2406.06484, section 3.2; Gated Delta Networks, arXiv:2412.06464v3.
"""

# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
# (arguments of Triton kernels are pointers and tiles, which Python's types do not know)
import torch
import triton
import triton.language as tl
from torch import Tensor

from statezoo.kernels._fused import (
    Launch,
    block,
    check_widths,
    chunk_of,
    depth,
    launch,
    layout,
    narrow,
    operands,
    put,
    scan_block,
    sequence_of,
    tile,
    tokens_a_chunk,
)
from statezoo.kernels._fused_step import one_token
from statezoo.kernels.gated_linear_attention.triton import (
    FREE,
    HEAD,
    Call,
    decay_to_boundary,
    pairs,
    sum_groups,
)


@triton.jit
def _merge(X, stride, start, length, SIZE: tl.constexpr):
    """Invert a block ``(A 0; L B)`` whose diagonal blocks are: the corner becomes ``-B L A``."""
    rows = tl.arange(0, SIZE)
    corner = X + (start + SIZE) * stride + start
    A = tile(X + start * stride + start, rows, rows, stride, length - start, SIZE)
    L = tile(corner, rows, rows, stride, length - start - SIZE, SIZE)
    B = tile(corner + SIZE, rows, rows, stride, length - start - SIZE, SIZE)
    found = -tl.dot(B, tl.dot(L, A, input_precision="tf32x3"), input_precision="tf32x3")
    tl.debug_barrier()  # all have read L
    put(corner, found, rows, rows, stride, length - start - SIZE, SIZE)


@triton.jit(do_not_specialize=FREE)
def _inverse(
    k, beta, c, work, X, cu, starts, segment, T, N, NT,
    C: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    LEVELS: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Invert ``I + L`` in float32: blocks of 16 by substitution, then pairs of blocks.

    ``work`` holds L, block by block replaced by the inverse; the barriers order a program's own
    stores and loads.
    """
    pid, hv = tl.program_id(0) // HV, tl.program_id(0) % HV
    first, length = chunk_of(pid, cu, starts, segment, T, N, NT, C, PACKED)
    if length <= 0:
        return
    h = hv // (HV // H)
    DT: tl.constexpr = X.dtype.element_ty
    rows = tl.arange(0, C)
    inside = rows < length
    L = tl.zeros([C, C], tl.float32)
    for at in range(0, K, BK):
        kk = at + tl.arange(0, BK)
        kt = tile(k + (first * H + h) * K, rows, kk, H * K, length, K)
        if GATE == 2:
            base = c + (first * HV + hv) * K
            sums = tile(base, rows, kk, HV * K, length, K)
            for level in tl.range(0, LEVELS):
                to = decay_to_boundary(base, sums, rows, kk, HV * K, length, K, level)
                met = (kt * to).to(DT)
                A = tl.dot(met, tl.trans(met), input_precision=IP)
                L += tl.where(pairs(rows, level, False), A, 0.0)
        else:
            L = tl.dot(kt.to(DT), tl.trans(kt.to(DT)), L, input_precision=IP)
    before = (rows[:, None] > rows[None, :]) & inside[:, None]
    if GATE == 1:
        sums = tl.load(c + (first + rows) * HV + hv, mask=inside, other=0.0)
        L *= tl.exp(tl.where(before, sums[:, None] - sums[None, :], 0.0))
    strength = tl.load(beta + (first + rows) * HV + hv, mask=inside, other=0.0).to(tl.float32)
    stride = HV * C
    own = work + (first * HV + hv) * C
    put(own, tl.where(before, L * strength[:, None], 0.0), rows, rows, stride, length, C)
    tl.debug_barrier()
    b, j = tl.arange(0, C // 16)[:, None], tl.arange(0, 16)[None, :]
    i = tl.arange(0, 16)[None, :, None]
    inverse = tl.zeros([C // 16, 16, 16], tl.float32)
    for r in range(1, 16):
        line = b * 16 + r
        known = (line < length) & (j < r)
        row = -tl.load(own + line * stride + b * 16 + j, mask=known, other=0.0)
        row += tl.sum(row[:, :, None] * inverse, 1)
        inverse = tl.where(i == r, row[:, None, :], inverse)
    inverse += tl.where(i == j[:, None, :], 1.0, 0.0)
    tl.debug_barrier()  # all have read the diagonal blocks
    lines = b[:, :, None] * 16 + i
    to = own + lines * stride + b[:, :, None] * 16 + j[:, None, :]
    tl.store(to, inverse, mask=lines < length)
    tl.debug_barrier()
    for pair in tl.static_range(C // 32):
        _merge(own, stride, pair * 32, length, 16)
    tl.debug_barrier()
    if C == 64:
        _merge(own, stride, 0, length, 32)
        tl.debug_barrier()
    done = tile(own, rows, rows, stride, length, C)
    put(X + (first * HV + hv) * C, done, rows, rows, stride, length, C)


@triton.jit(do_not_specialize=FREE)
def _writes(
    k, v, beta, c, X, U, W, cu, starts, segment, T, N, NT,
    C: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """Multiply X by what a chunk would write, ``U``, and by what it would read first, ``W``."""
    pid, hv = tl.program_id(0) // HV, tl.program_id(0) % HV
    first, length = chunk_of(pid, cu, starts, segment, T, N, NT, C, PACKED)
    if length <= 0:
        return
    h = hv // (HV // H)
    DT: tl.constexpr = X.dtype.element_ty
    rows = tl.arange(0, C)
    inside = rows < length
    Xt = tile(X + (first * HV + hv) * C, rows, rows, HV * C, length, C)
    strength = tl.load(beta + (first + rows) * HV + hv, mask=inside, other=0.0).to(tl.float32)
    for at in range(0, V, BV):
        vv = at + tl.arange(0, BV)
        vt = tile(v + (first * HV + hv) * V, rows, vv, HV * V, length, V)
        u = tl.dot(Xt, (vt * strength[:, None]).to(DT), input_precision=IP)
        put(U + (first * HV + hv) * V, u, rows, vv, HV * V, length, V)
    if GATE == 1:
        sums = tl.load(c + (first + rows) * HV + hv, mask=inside, other=0.0)
        strength *= tl.exp(sums)
    for at in range(0, K, BK):
        kk = at + tl.arange(0, BK)
        kt = tile(k + (first * H + h) * K, rows, kk, H * K, length, K) * strength[:, None]
        if GATE == 2:
            kt *= tl.exp(tile(c + (first * HV + hv) * K, rows, kk, HV * K, length, K))
        w = tl.dot(Xt, kt.to(DT), input_precision=IP)
        put(W + (first * HV + hv) * K, w, rows, kk, HV * K, length, K)


@triton.jit(do_not_specialize=FREE)
def _walk(
    k, W, U, c, S0, states, new, final, cu, starts, segment, T, N, NT,
    C: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """Carry a block of the state's values along a sequence; keep it before every chunk, and N."""
    parts = tl.cdiv(V, BV)
    pid, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    n, hv = pid // HV, pid % HV
    h = hv // (HV // H)
    sequence, chunk, T_n = sequence_of(n, cu, starts, T, NT, PACKED)
    DT: tl.constexpr = states.dtype.element_ty
    rows, kk, vv = tl.arange(0, C), tl.arange(0, BK), part * BV + tl.arange(0, BV)
    own = pid.to(tl.int64) * K * V
    S = tile(S0 + own, kk, vv, V, K, V)
    for i in range(0, tl.cdiv(T_n, C)):
        first = sequence + i * C
        length = tl.minimum(T_n - i * C, C)
        put(states + ((chunk + i) * HV + hv) * K * V, S, kk, vv, V, K, V)
        w = tile(W + (first * HV + hv) * K, rows, kk, HV * K, length, K)
        u = tile(U + (first * HV + hv) * V, rows, vv, HV * V, length, V)
        written = u - tl.dot(w, S.to(DT), input_precision=IP)
        put(new + (first * HV + hv) * V, written, rows, vv, HV * V, length, V)
        at_k = k + (first * H + h) * K + rows[None, :] * (H * K) + kk[:, None]
        kt = tl.load(at_k, mask=(rows[None, :] < length) & (kk[:, None] < K), other=0.0)
        if GATE == 1:
            sums = tl.load(c + (first + rows) * HV + hv, mask=rows < length, other=0.0)
            total = tl.load(c + (first + length - 1) * HV + hv)
            written *= tl.exp(total - sums)[:, None]
            S *= tl.exp(total)
        if GATE == 2:
            base = c + (first * HV + hv) * K
            at_c = base + rows[None, :] * (HV * K) + kk[:, None]
            sums = tl.load(at_c, mask=(rows[None, :] < length) & (kk[:, None] < K), other=0.0)
            total = tl.load(base + (length - 1) * (HV * K) + kk, mask=kk < K, other=0.0)
            kt = kt * tl.exp(total[:, None] - sums)
            S *= tl.exp(total)[:, None]
        S = tl.dot(kt.to(DT), written.to(DT), S, input_precision=IP)
    put(final + own, S, kk, vv, V, K, V)


@triton.jit(do_not_specialize=FREE)
def _walk_back(
    q, k, W, do, d_inner, c, d_final, d_states, d_new, d_initial, scale, cu, starts, segment,
    T, N, NT, C: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
    PACKED: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Carry the state's gradient back; keep it after every chunk, and the gradient of N.

    ``d_inner`` is the part of the latter that comes through the chunk's own outputs.
    """
    parts = tl.cdiv(V, BV)
    pid, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    n, hv = pid // HV, pid % HV
    h = hv // (HV // H)
    sequence, chunk, T_n = sequence_of(n, cu, starts, T, NT, PACKED)
    DT: tl.constexpr = d_states.dtype.element_ty
    rows, kk, vv = tl.arange(0, C), tl.arange(0, BK), part * BV + tl.arange(0, BV)
    own = pid.to(tl.int64) * K * V
    dS = tile(d_final + own, kk, vv, V, K, V)
    count = tl.cdiv(T_n, C)
    for step in range(0, count):
        i = count - 1 - step
        first = sequence + i * C
        length = tl.minimum(T_n - i * C, C)
        put(d_states + ((chunk + i) * HV + hv) * K * V, dS, kk, vv, V, K, V)
        kt = tile(k + (first * H + h) * K, rows, kk, H * K, length, K)
        turned = (rows[None, :] < length) & (kk[:, None] < K)
        at_q = q + (first * H + h) * K + rows[None, :] * (H * K) + kk[:, None]
        qt = tl.load(at_q, mask=turned, other=0.0).to(tl.float32) * scale
        at_w = W + (first * HV + hv) * K + rows[None, :] * (HV * K) + kk[:, None]
        w = tl.load(at_w, mask=turned, other=0.0)
        dot = tile(do + (first * HV + hv) * V, rows, vv, HV * V, length, V)
        inner = tile(d_inner + (first * HV + hv) * V, rows, vv, HV * V, length, V)
        if GATE == 2:
            base = c + (first * HV + hv) * K
            total = tl.load(base + (length - 1) * (HV * K) + kk, mask=kk < K, other=0.0)
            tail = total[None, :] - tile(base, rows, kk, HV * K, length, K)
            kt = kt * tl.exp(tl.where(rows[:, None] < length, tail, 0.0))
        d_written = tl.dot(kt.to(DT), dS.to(DT), input_precision=IP)
        if GATE == 1:
            sums = tl.load(c + (first + rows) * HV + hv, mask=rows < length, other=0.0)
            total = tl.load(c + (first + length - 1) * HV + hv)
            d_written *= tl.exp(tl.where(rows < length, total - sums, 0.0))[:, None]
            qt *= tl.exp(sums)[None, :]
            dS *= tl.exp(total)
        if GATE == 2:
            at_c = base + rows[None, :] * (HV * K) + kk[:, None]
            qt *= tl.exp(tl.load(at_c, mask=turned, other=0.0))
            dS *= tl.exp(total)[:, None]
        d_written += inner
        put(d_new + (first * HV + hv) * V, d_written, rows, vv, HV * V, length, V)
        dS = tl.dot(qt.to(DT), dot.to(DT), dS, input_precision=IP)
        dS -= tl.dot(w, d_written.to(DT), input_precision=IP)
    put(d_initial + own, dS, kk, vv, V, K, V)


@triton.jit(do_not_specialize=FREE)
def _value_gradients(
    v, beta, X, new, d_new, d_rows, dL, dv, dbeta, cu, starts, segment, T, N, NT,
    C: tl.constexpr, HV: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    PACKED: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Gradients of R and v, and of L and beta as far as they come through these."""
    pid, hv = tl.program_id(0) // HV, tl.program_id(0) % HV
    first, length = chunk_of(pid, cu, starts, segment, T, N, NT, C, PACKED)
    if length <= 0:
        return
    DT: tl.constexpr = X.dtype.element_ty
    rows = tl.arange(0, C)
    inside = rows < length
    Xt = tl.trans(tile(X + (first * HV + hv) * C, rows, rows, HV * C, length, C))
    strength = tl.load(beta + (first + rows) * HV + hv, mask=inside, other=0.0).to(tl.float32)
    d_strength = tl.zeros([C], tl.float32)
    acc = tl.zeros([C, C], tl.float32)
    values = (first * HV + hv) * V
    for at in range(0, V, BV):
        vv = at + tl.arange(0, BV)
        vt = tile(v + values, rows, vv, HV * V, length, V)
        written = tile(new + values, rows, vv, HV * V, length, V)
        d_written = tile(d_new + values, rows, vv, HV * V, length, V)
        dR = tl.dot(Xt, d_written, input_precision=IP)
        put(d_rows + values, dR, rows, vv, HV * V, length, V)
        put(dv + values, dR * strength[:, None], rows, vv, HV * V, length, V)
        d_strength += tl.sum(vt * dR, 1)
        acc = tl.dot(dR.to(DT), tl.trans(written), acc, input_precision=IP)
    acc = tl.where(rows[:, None] > rows[None, :], -acc, 0.0)
    put(dL + (first * HV + hv) * C, acc, rows, rows, HV * C, length, C)
    tl.store(dbeta + (first + rows) * HV + hv, d_strength, mask=inside)


@triton.jit(do_not_specialize=[*FREE, "tokens"])
def _key_gradients(
    k, beta, c, states, d_rows, dL, dk, dbeta, dg, cu, starts, segment, T, N, NT, tokens,
    C: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr, GATE: tl.constexpr,
    PACKED: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Add what comes through L and W to a block of k's gradient and its part of beta's and g's."""
    parts: tl.constexpr = (K + BK - 1) // BK
    part, hv = tl.program_id(0) % parts, tl.program_id(0) // parts % HV
    pid = tl.program_id(0) // (parts * HV)
    first, length = chunk_of(pid, cu, starts, segment, T, N, NT, C, PACKED)
    if length <= 0:
        return
    h = hv // (HV // H)
    DT: tl.constexpr = states.dtype.element_ty
    rows, kk = tl.arange(0, C), part * BK + tl.arange(0, BK)
    inside = rows < length
    strength = tl.load(beta + (first + rows) * HV + hv, mask=inside, other=0.0).to(tl.float32)
    kt = tile(k + (first * H + h) * K, rows, kk, H * K, length, K)
    P = tile(dL + (first * HV + hv) * C, rows, rows, HV * C, length, C).to(tl.float32)
    d_row = tl.zeros([C, BK], tl.float32)  # gradient of beta k as it meets keys and state
    for at in range(0, V, BV):
        vv = at + tl.arange(0, BV)
        dR = tile(d_rows + (first * HV + hv) * V, rows, vv, HV * V, length, V)
        S = tile(states + (pid.to(tl.int64) * HV + hv) * K * V, kk, vv, V, K, V)
        d_row = tl.dot(dR, tl.trans(S), d_row, input_precision=IP)
    d_row = -d_row
    if GATE == 2:
        base = c + (first * HV + hv) * K
        sums = tile(base, rows, kk, HV * K, length, K)
        d_row *= tl.exp(sums)
        d_column = tl.zeros([C, BK], tl.float32)
        for level in tl.range(0, LEVELS):
            to = decay_to_boundary(base, sums, rows, kk, HV * K, length, K, level)
            met = tl.where(pairs(rows, level, False), P, 0.0)
            near = (kt * to).to(DT)
            d_row += to * tl.dot(met.to(DT), near, input_precision=IP)
            met = tl.trans((met * strength[:, None]).to(DT))
            d_column += to * tl.dot(met, near, input_precision=IP)
    else:
        if GATE == 1:
            sums = tl.load(c + (first + rows) * HV + hv, mask=inside, other=0.0)
            before = (rows[:, None] > rows[None, :]) & inside[:, None]
            P *= tl.exp(tl.where(before, sums[:, None] - sums[None, :], 0.0))
            d_row *= tl.exp(sums)[:, None]
        d_row = tl.dot(P.to(DT), kt.to(DT), d_row, input_precision=IP)
        P *= strength[:, None]
        d_column = tl.dot(tl.trans(P.to(DT)), kt.to(DT), input_precision=IP)
    at_beta = dbeta + (part.to(tl.int64) * tokens + first + rows) * HV + hv
    tl.store(at_beta, tl.sum(kt * d_row, 1), mask=inside)
    d_row *= strength[:, None]
    to_k = dk + (first * HV + hv) * K
    found = d_row + d_column + tile(to_k, rows, kk, HV * K, length, K)
    put(to_k, found, rows, kk, HV * K, length, K)
    if GATE == 1:
        gates = tl.cumsum(tl.sum(kt * d_row - kt * d_column, 1), 0, reverse=True)
        at_g = dg + (part.to(tl.int64) * tokens + first + rows) * HV + hv
        tl.store(at_g, gates, mask=inside)
    if GATE == 2:
        gates = tl.cumsum(kt * d_row - kt * d_column, 0, reverse=True)
        to_g = dg + (first * HV + hv) * K
        gates += tile(to_g, rows, kk, HV * K, length, K)
        put(to_g, gates, rows, kk, HV * K, length, K)


def _lengths(exact: Tensor, rounded: Tensor) -> Tensor:
    """Compare the squared lengths of keys ``[B T H K]`` before and after rounding, ``[B T H]``.

    A write strength times this keeps the eigenvalue ``1 - beta |k|^2`` of a step: unit keys rounded
    to bfloat16 are up to 1.0015 long, and a memory would grow 20-fold over 512 writes to one key at
    ``beta = 2``.
    """
    exact, rounded = (x.float().square().sum(-1) for x in (exact, rounded))
    return exact / rounded.clamp(min=1e-30)


class _Delta:
    """One call: the inputs with writes as steps of their own, and the kernels that differ.

    Args:
        q: Queries ``[B T H K]``.
        k: Keys ``[B T n H K]``.
        v: Values ``[B T n HV V]``.
        beta: Write strengths ``[B T n HV]``.
        g: Gates.
        cu: Bounds of packed sequences.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, cu: Tensor | None
    ) -> None:
        self.n = n = k.shape[2]
        self.how = operands(v)
        self.ratio: Tensor | None = None
        self.k, self.v = (narrow(x.flatten(1, 2), self.how[0]) for x in (k, v))
        self.beta = beta.flatten(1, 2).contiguous()
        if self.k.dtype != k.dtype:
            self.ratio = _lengths(k.flatten(1, 2), self.k).repeat_interleave(
                v.shape[3] // k.shape[3], 2
            )
            self.beta = self.beta * self.ratio
        self.q = self.spread(narrow(q, self.how[0]), n - 1)
        g = None if g is None else self.spread(g, 0)
        at = layout(self.k, None if cu is None else cu * n)
        self.call = Call(self.q, self.v, g, self.how, at)
        self.B, self.T = self.k.shape[:2]
        # the walks hold all K channels of a block of values
        wide = self.how[0] == torch.float32
        self.size = 4 if wide else 2
        self.BK = block(self.call.K, 256)
        lanes = at.N * self.call.HV
        most = (32 if wide else 64) if self.BK <= 128 else (16 if wide else 32)
        self.BV = scan_block(self.call.V, most, lanes, q.device)
        self.programs = lanes * -(-self.call.V // self.BV)
        self.walkers = 8 if wide or self.BK > 128 or self.BK * self.BV > 4096 else 4

    def spread(self, x: Tensor, step: int) -> Tensor:
        """Put a token's ``x [B T *]`` at one of its steps, zero at the others: ``[B T*n *]``."""
        if self.n == 1:
            return x.contiguous()
        out = x.new_zeros(*x.shape[:2], self.n, *x.shape[2:])
        out[:, :, step] = x
        return out.flatten(1, 2)

    def gather(self, x: Tensor, step: int) -> Tensor:
        """Take one step of each token, ``[B T*n *]`` as ``[B T *]``."""
        if self.n == 1:
            return x
        return x.view(x.shape[0], -1, self.n, *x.shape[2:])[:, :, step].contiguous()

    def per_token(self, *widths: int, dtype: torch.dtype | None = None) -> Tensor:
        """Allocate ``[B T *widths]`` in the operands' dtype."""
        return self.q.new_empty(self.B, self.T, *widths, dtype=dtype or self.how[0])

    def fixed(self, *names: str) -> dict[str, object]:
        """Return the arguments that kernels share, less those named."""
        return {n: x for n, x in self.call.common.items() if n not in names}

    def warps(self) -> int:
        """Return warps for a kernel over chunks: two warpgroups where gates need the registers."""
        return 8 if self.call.gate > HEAD else 4

    def inverse(self) -> Tensor:
        """Return X, ``[B T HV C]``."""
        call, C = self.call, self.call.at.C
        work = self.per_token(call.HV, C, dtype=torch.float32)
        X = self.per_token(call.HV, C)
        launch(
            _inverse, call.at.total * call.HV, Launch(4, 2), call.device, k=self.k,
            beta=self.beta, c=call.c, work=work, X=X, **self.fixed("V"), BK=call.BK,
            LEVELS=C.bit_length() - 1,
        )  # fmt: skip
        return X

    def writes(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return U and W."""
        call = self.call
        U, W = self.per_token(call.HV, call.V), self.per_token(call.HV, call.K)
        launch(
            _writes, call.at.total * call.HV, Launch(4, 2), call.device, k=self.k, v=self.v,
            beta=self.beta, c=call.c, X=X, U=U, W=W, **call.common, BK=call.BK,
            BV=block(call.V, 64),
        )  # fmt: skip
        return U, W

    def walk(self, X: Tensor, S0: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the state before every chunk, N, the final state, and W."""
        call, (U, W) = self.call, self.writes(X)
        states, new, final = call.states(S0), self.per_token(call.HV, call.V), torch.empty_like(S0)
        stage = call.at.C * (2 * self.BK + self.BV) * self.size
        how = Launch(self.walkers, depth(call.device, 3, stage))
        launch(
            _walk, self.programs, how, call.device, k=self.k, W=W, U=U, c=call.c, S0=S0,
            states=states, new=new, final=final, **call.common, BK=self.BK, BV=self.BV,
        )  # fmt: skip
        return states, new, final, W

    def walk_back(
        self, W: Tensor, do: Tensor, d_inner: Tensor, d_final: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of the state after every chunk, of N, and of the initial state."""
        call = self.call
        d_states, d_new = call.states(d_final), self.per_token(call.HV, call.V)
        d_initial = torch.empty_like(d_final)
        stage = call.at.C * (3 * self.BK + 2 * self.BV) * self.size
        how = Launch(self.walkers, depth(call.device, 2, stage))
        launch(
            _walk_back, self.programs, how, call.device, q=self.q, k=self.k, W=W,
            do=do, d_inner=d_inner, c=call.c, d_final=d_final,
            d_states=d_states, d_new=d_new, d_initial=d_initial, scale=scale, **call.common,
            BK=self.BK, BV=self.BV,
        )  # fmt: skip
        return d_states, d_new, d_initial

    def value_gradients(
        self, X: Tensor, new: Tensor, d_new: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the gradients of R, L, v and a part of beta's."""
        call = self.call
        d_rows, dL = self.per_token(call.HV, call.V), self.per_token(call.HV, call.at.C)
        dv = torch.empty_like(self.v)
        dbeta = self.per_token(call.HV, dtype=torch.float32)
        how, BV = (Launch(8, 2), 64) if self.size == 2 else (Launch(4, 2), 32)
        launch(
            _value_gradients, call.at.total * call.HV, how, call.device, v=self.v,
            beta=self.beta, X=X, new=new, d_new=d_new, d_rows=d_rows, dL=dL, dv=dv, dbeta=dbeta,
            **self.fixed("H", "K", "GATE"), BV=block(call.V, BV),
        )  # fmt: skip
        return d_rows, dL, dv, dbeta

    def key_gradients(
        self, states: Tensor, d_rows: Tensor, dL: Tensor, dk: Tensor, dg: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Add to the gradients of k and g (per channel); return parts of beta's and g's."""
        call = self.call
        parts = -(-call.K // call.BK)
        dbeta = self.q.new_empty(parts, self.B, self.T, call.HV, dtype=torch.float32)
        if call.gate == HEAD:
            dg = torch.empty_like(dbeta)
        launch(
            _key_gradients, call.at.total * call.HV * parts, Launch(self.warps(), 2), call.device,
            k=self.k, beta=self.beta, c=call.c, states=states, d_rows=d_rows, dL=dL, dk=dk,
            dbeta=dbeta, dg=dg, tokens=self.B * self.T, **call.common, BK=call.BK,
            BV=block(call.V, 64), LEVELS=call.at.C.bit_length() - 1,
        )  # fmt: skip
        return dbeta.sum(0), dg.sum(0) if dg is not None and call.gate == HEAD else dg


def saved_like(q: Tensor, k: Tensor, v: Tensor, S0: Tensor, cu: Tensor | None) -> Tensor:
    """Allocate X, ``[B T*n HV C]``."""
    (B, T, n), HV = k.shape[:3], v.shape[3]
    C = tokens_a_chunk(T * n, cu)
    return q.new_empty(B, T * n, HV, C, dtype=operands(v)[0])


def forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float, S0: Tensor,
    cu: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return outputs, final state, and X (left out for a single token)."""
    check_widths("gated_delta_rule", q.shape[-1], v.shape[-1])
    if q.shape[1] == 1 and cu is None:
        return *one_token(q, k, v, beta, g, scale, S0), saved_like(q, k, v, S0, cu).zero_()
    run = _Delta(q, k, v, beta, g, cu)
    X = run.inverse()
    states, new, final, _ = run.walk(X, S0.contiguous())
    o = run.call.outputs(run.q, run.k, new, states, scale, v.dtype)
    return run.gather(o, run.n - 1), final, X


def backward(
    do: Tensor, d_final: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None,
    scale: float, S0: Tensor, cu: Tensor | None, saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Return the gradients of q, k, v, beta, g and the initial state."""
    run = _Delta(q, k, v, beta, g, cu)
    call, do = run.call, run.spread(do, run.n - 1)
    X = run.inverse() if q.shape[1] == 1 else saved
    states, new, _, W = run.walk(X, S0.contiguous())
    d_inner = call.outputs(run.k, run.q, do, None, scale, run.how[0], reverse=True)
    d_states, d_new, dS0 = run.walk_back(W, do, d_inner, d_final.contiguous(), scale)
    d_rows, dL, dv, dbeta = run.value_gradients(X, new, d_new)
    shared = call.HV != call.H
    dtypes = (torch.float32, torch.float32) if shared else (q.dtype, k.dtype)
    dq, dk, dg = call.qk_gradients(run.q, run.k, new, states, do, d_states, scale, dtypes)
    more_beta, more = run.key_gradients(states, d_rows, dL, dk, dg)
    if shared:
        dq, dk = sum_groups(dq, call.H, q.dtype), sum_groups(dk, call.H, k.dtype)
    if g is not None and dg is not None and more is not None:
        dg = dg + more if call.gate == HEAD else more
        dg = run.gather(dg, 0).to(g.dtype)
    dbeta += more_beta
    dbeta = (dbeta if run.ratio is None else dbeta * run.ratio).to(beta.dtype)
    dq = run.gather(dq, run.n - 1)
    return dq, dk.view(k.shape), dv.view(v.shape), dbeta.view(beta.shape), dg, dS0
