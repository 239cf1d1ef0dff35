"""Fused form for NVIDIA GPUs, parallel over channels and chunks of tokens.

Each program holds ``[BT BE N]`` numbers: a block of tokens, a block of channels and all states. In
a block the recurrence is an associative scan. Chunks of a few blocks first find their own last
state and total decay, one small kernel carries the states from chunk to chunk, and then every chunk
runs again from its true start. The backward pass is the same, mirrored.
"""

# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from statezoo.kernels._varlen import segment_ids

BT, ROUNDS = 16, 4  # tokens a block, blocks a chunk
LAST_STATE, OUTPUTS, STARTS = 0, 1, 2  # what the forward kernel is run for


def n_saved(x: Tensor) -> int:
    """Count the saved states: one a chunk."""
    return -(-x.shape[1] // (BT * ROUNDS))


@triton.jit
def _then(a1, b1, a2, b2):
    """Compose two steps ``h -> a h + b``."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _decay(dt, A, NEGATIVE: tl.constexpr):
    a = tl.exp(dt[:, :, None] * A[None])
    if NEGATIVE:
        a = 2 * a - 1
    return a


@triton.jit
def _rows(p, base, t, T, i, width):
    """Load rows ``t`` of ``p``, columns ``i``: zeros outside."""
    at = (base + t.to(tl.int64))[:, None] * width + i[None, :]
    mask = ((t >= 0) & (t < T))[:, None] & (i < width)[None, :]
    return tl.load(p + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _edges(flags, seq, t, b, T, PACKED: tl.constexpr):
    """Say which tokens are first and last of their sequence, and its number."""
    if PACKED:
        flag = tl.load(flags + t, mask=t < T, other=0)
        first = (flag & 1) != 0
        last = (flag & 2) != 0
        number = tl.load(seq + t, mask=t < T, other=0).to(tl.int64)
    else:
        first = t == 0
        last = t == T - 1
        number = t * 0 + b
    return first, last, number


@triton.jit
def _row(x, i, BT: tl.constexpr):
    """Pick row ``i`` of a block ``[BT BE N]``."""
    return tl.sum(tl.where((tl.arange(0, BT) == i)[:, None, None], x, 0.0), 0)


@triton.jit(do_not_specialize=["T", "chunks"])
def _forward(
    x, dt, A, B, C, D, h0, flags, seq, before, states, decays, y, final, T, E, chunks,
    N: tl.constexpr, NEGATIVE: tl.constexpr, PACKED: tl.constexpr, HAS_D: tl.constexpr,
    MODE: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, NP: tl.constexpr,
    ROUNDS: tl.constexpr,
):  # fmt: skip
    """Run one chunk for its last state and decay, its outputs, or its blocks' first states."""
    chunk, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    n = tl.arange(0, NP)
    en = e[:, None] * N + n[None, :]
    live = (e < E)[:, None] & (n < N)[None, :]
    rates = tl.load(A + en, mask=live, other=0.0).to(tl.float32)
    own = (b * chunks + chunk) * E * N + en
    h = tl.zeros([BE, NP], dtype=tl.float32)
    if MODE != 0:
        h = tl.load(before + own, mask=live, other=0.0)
    total = tl.full([BE, NP], 1.0, dtype=tl.float32)
    for i in range(ROUNDS):
        t = (chunk * ROUNDS + i) * BT + tl.arange(0, BT)
        if MODE == 2:
            at = ((b * chunks + chunk) * ROUNDS + i) * E * N + en
            tl.store(states + at, h, mask=live)
        xs = _rows(x, b * T, t, T, e, E)
        step = _rows(dt, b * T, t, T, e, E)
        a = _decay(step, rates, NEGATIVE)
        w = (step * xs)[:, :, None] * _rows(B, b * T, t, T, n, N)[:, None, :]
        first, last, number = _edges(flags, seq, t, b, T, PACKED)
        where = number[:, None, None] * E * N + en[None]
        start = first[:, None, None] & live[None]
        w += a * tl.load(h0 + where, mask=start, other=0.0)
        a = tl.where(first[:, None, None], 0.0, a)
        upto, hs = tl.associative_scan((a, w), 0, _then)
        hs += upto * h[None]
        if MODE == 1:
            out = tl.sum(hs * _rows(C, b * T, t, T, n, N)[:, None, :], 2)
            if HAS_D:
                out += xs * tl.load(D + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
            at = (b * T + t.to(tl.int64))[:, None] * E + e[None, :]
            tl.store(y + at, out.to(y.dtype.element_ty), mask=(t < T)[:, None] & (e < E)[None, :])
            tl.store(final + where, hs, mask=last[:, None, None] & live[None])
        h = _row(hs, BT - 1, BT)
        total *= _row(upto, BT - 1, BT)
    if MODE == 0:
        tl.store(states + own, h, mask=live)
        tl.store(decays + own, total, mask=live)


@triton.jit(do_not_specialize=["chunks"])
def _carry(states, decays, chunks, size, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """Replace each chunk's own last state by the true state before it (after it, in reverse)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(1).to(tl.int64)
    h = tl.zeros([BLOCK], dtype=tl.float32)
    for j in range(chunks):
        chunk = chunks - 1 - j if REVERSE else j
        at = (b * chunks + chunk) * size + i
        last = tl.load(states + at, mask=i < size, other=0.0)
        decay = tl.load(decays + at, mask=i < size, other=0.0)
        tl.store(states + at, h, mask=i < size)
        h = last + decay * h


@triton.jit
def _state_gradients(
    dt, C, dy, d_final, rates, t, T, e, E, n, b, en, live, last, number, N: tl.constexpr,
    NEGATIVE: tl.constexpr,
):  # fmt: skip
    """Scan backwards over a block: gradients of its states, and their decays to its end."""
    reads = _rows(dy, b * T, t, T, e, E)[:, :, None] * _rows(C, b * T, t, T, n, N)[:, None, :]
    where = number[:, None, None] * E * N + en[None]
    ends = last[:, None, None] & live[None]
    reads += tl.load(d_final + where, mask=ends, other=0.0)
    a = _decay(_rows(dt, b * T, t + 1, T, e, E), rates, NEGATIVE)
    a = tl.where((last | (t + 1 >= T))[:, None, None], 0.0, a)
    return tl.associative_scan((a, reads), 0, _then, reverse=True)


@triton.jit(do_not_specialize=["T", "chunks"])
def _backward_states(
    dt, A, C, dy, d_final, flags, seq, states, decays, T, E, chunks, N: tl.constexpr,
    NEGATIVE: tl.constexpr, PACKED: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
    NP: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Find the gradient of each chunk's first state from its own outputs, and its total decay."""
    chunk, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    n = tl.arange(0, NP)
    en = e[:, None] * N + n[None, :]
    live = (e < E)[:, None] & (n < N)[None, :]
    rates = tl.load(A + en, mask=live, other=0.0).to(tl.float32)
    g = tl.zeros([BE, NP], dtype=tl.float32)
    total = tl.full([BE, NP], 1.0, dtype=tl.float32)
    for i in range(ROUNDS):
        t = (chunk * ROUNDS + ROUNDS - 1 - i) * BT + tl.arange(0, BT)
        _, last, number = _edges(flags, seq, t, b, T, PACKED)
        upto, gs = _state_gradients(
            dt, C, dy, d_final, rates, t, T, e, E, n, b, en, live, last, number, N, NEGATIVE
        )
        g = _row(gs + upto * g[None], 0, BT)
        total *= _row(upto, 0, BT)
    own = (b * chunks + chunk) * E * N + en
    tl.store(states + own, g, mask=live)
    tl.store(decays + own, total, mask=live)


@triton.jit(do_not_specialize=["T", "chunks"])
def _backward(
    x, dt, A, B, C, D, h0, dy, d_final, flags, seq, starts, after, dx, ddt, dA, dB, dC, d0, T, E,
    chunks, N: tl.constexpr, NEGATIVE: tl.constexpr, PACKED: tl.constexpr, HAS_D: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr, NP: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one chunk; those summed over tokens or channels in parts."""
    chunk, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    n = tl.arange(0, NP)
    en = e[:, None] * N + n[None, :]
    live = (e < E)[:, None] & (n < N)[None, :]
    rates = tl.load(A + en, mask=live, other=0.0).to(tl.float32)
    own = (b * chunks + chunk) * E * N + en
    g = tl.load(after + own, mask=live, other=0.0)
    rate_sum = tl.zeros([BE, NP], dtype=tl.float32)
    for i in range(ROUNDS):
        block = chunk * ROUNDS + ROUNDS - 1 - i
        t = block * BT + tl.arange(0, BT)
        first, last, number = _edges(flags, seq, t, b, T, PACKED)
        where = number[:, None, None] * E * N + en[None]
        start = first[:, None, None] & live[None]
        # the state before each token: tokens one earlier, the block's first state in front
        at = ((b * chunks + chunk) * ROUNDS + ROUNDS - 1 - i) * E * N + en
        h = tl.load(starts + at, mask=live, other=0.0)
        ahead = (tl.arange(0, BT) == 0)[:, None, None]
        earlier = _rows(dt, b * T, t - 1, T, e, E)
        w = (earlier * _rows(x, b * T, t - 1, T, e, E))[:, :, None]
        w = tl.where(ahead, h[None], w * _rows(B, b * T, t - 1, T, n, N)[:, None, :])
        w = tl.where(start, tl.load(h0 + where, mask=start, other=0.0), w)
        a = tl.where(ahead | start, 0.0, _decay(earlier, rates, NEGATIVE))
        _, hp = tl.associative_scan((a, w), 0, _then)
        upto, gs = _state_gradients(
            dt, C, dy, d_final, rates, t, T, e, E, n, b, en, live, last, number, N, NEGATIVE
        )
        gs += upto * g[None]
        g = _row(gs, 0, BT)
        xs = _rows(x, b * T, t, T, e, E)
        step = _rows(dt, b * T, t, T, e, E)
        d = _rows(dy, b * T, t, T, e, E)
        weights = _rows(B, b * T, t, T, n, N)[:, None, :]
        a = _decay(step, rates, NEGATIVE)
        tl.store(d0 + where, a * gs, mask=start)
        hs = a * hp + (step * xs)[:, :, None] * weights
        tn = (tl.program_id(0) * tl.num_programs(2) + b) * T + t.to(tl.int64)
        part = tn[:, None] * N + n[None, :]
        keep = (t < T)[:, None] & (n < N)[None, :]
        tl.store(dC + part, tl.sum(hs * d[:, :, None], 1), mask=keep)
        tl.store(dB + part, tl.sum(gs * (step * xs)[:, :, None], 1), mask=keep)
        z = gs * hp * (a + 1 if NEGATIVE else a)
        rate_sum += tl.sum(z * step[:, :, None], 0)
        through = tl.sum(gs * weights, 2)
        te = (b * T + t.to(tl.int64))[:, None] * E + e[None, :]
        keep = (t < T)[:, None] & (e < E)[None, :]
        d_step = tl.sum(z * rates[None], 2) + through * xs
        tl.store(ddt + te, d_step.to(ddt.dtype.element_ty), mask=keep)
        d_x = through * step
        if HAS_D:
            d_x += d * tl.load(D + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
        tl.store(dx + te, d_x.to(dx.dtype.element_ty), mask=keep)
    tl.store(dA + own, rate_sum, mask=live)


class _Call:
    """Arguments that all kernels share."""

    def __init__(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
        negative: bool, h0: Tensor, cu: Tensor | None,
    ) -> None:  # fmt: skip
        (self.batch, self.T, self.E), self.N = x.shape, A.shape[1]
        self.x, self.dt, self.A, self.B, self.C = (z.contiguous() for z in (x, dt, A, B, C))
        self.h0, self.D = h0.contiguous(), self.A if D is None else D.contiguous()
        self.flags = self.seq = self.h0  # not read unless packed
        if cu is not None:
            seq = segment_ids(cu, self.T)
            t = torch.arange(self.T, device=cu.device)
            self.seq = seq.int()
            self.flags = (t == cu[seq]).int() + 2 * (t == cu[seq + 1] - 1).int()
        self.chunks = n_saved(x)
        NP = triton.next_power_of_2(self.N)
        lanes = 256 if NP <= 32 else 128  # of a block, each a token deep: what registers hold
        BE = min(max(1, lanes // NP), triton.next_power_of_2(self.E))
        self.blocks = triton.cdiv(self.E, BE)
        self.sizes = {"N": self.N, "NP": NP, "BE": BE, "BT": BT, "ROUNDS": ROUNDS}
        self.sizes |= {"NEGATIVE": negative, "PACKED": cu is not None, "num_warps": 8}
        self.has_d = D is not None

    def states(self, rounds: int = 1) -> Tensor:
        """Allocate a state for each chunk."""
        return self.h0.new_empty(self.batch, self.chunks * rounds, self.E, self.N)

    def run(self, kernel: Any, *args: Any, **flags: Any) -> None:
        """Launch over channels, chunks and sequences of the batch."""
        grid = (self.blocks, self.chunks, self.batch)
        kernel[grid](*args, self.T, self.E, self.chunks, **flags, **self.sizes)

    def forward(self, mode: int, before: Tensor, states: Tensor, y: Tensor, final: Tensor) -> None:
        """Launch the forward kernel; ``y`` stands for the decays where there is no output."""
        self.run(
            _forward, self.x, self.dt, self.A, self.B, self.C, self.D, self.h0, self.flags,
            self.seq, before, states, y, y, final, HAS_D=self.has_d, MODE=mode,
        )  # fmt: skip

    def carry(self, states: Tensor, decays: Tensor, reverse: bool) -> None:
        """Hand states on from chunk to chunk."""
        size = self.E * self.N
        grid = (triton.cdiv(size, 256), self.batch)
        _carry[grid](states, decays, self.chunks, size, REVERSE=reverse, BLOCK=256)


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, negative: bool,
    h0: Tensor, cu: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return outputs, final states, and the states before each chunk ``[B n E N]``."""
    call = _Call(x, dt, A, B, C, D, negative, h0, cu)
    y, final, saved = x.new_empty(x.shape), call.h0.clone(), call.states()
    if y.numel():
        decays = call.states()
        call.forward(LAST_STATE, saved, saved, decays, final)
        call.carry(saved, decays, reverse=False)
        call.forward(OUTPUTS, saved, saved, y, final)
    return y, final, saved


def backward(
    dy: Tensor, d_final: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, negative: bool, h0: Tensor, cu: Tensor | None, saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, dt, A, B, C, D (empty where there is none) and initial states."""
    call = _Call(x, dt, A, B, C, D, negative, h0, cu)
    dx, ddt, d0 = x.new_empty(x.shape), dt.new_empty(dt.shape), d_final.contiguous().clone()
    dB, dC = h0.new_empty(2, call.blocks, *B.shape).unbind(0)
    dA = call.states()
    if dx.numel():
        dy, d_final = dy.contiguous(), d_final.contiguous()
        after, decays, starts = call.states(), call.states(), call.states(ROUNDS)
        call.run(
            _backward_states, call.dt, call.A, call.C, dy, d_final, call.flags, call.seq, after,
            decays,
        )  # fmt: skip
        call.carry(after, decays, reverse=True)
        call.forward(STARTS, saved, starts, dx, d0)
        call.run(
            _backward, call.x, call.dt, call.A, call.B, call.C, call.D, call.h0, dy, d_final,
            call.flags, call.seq, starts, after, dx, ddt, dA, dB, dC, d0, HAS_D=call.has_d,
        )  # fmt: skip
    dD = x.new_empty(0)
    if D is not None:
        dD = (dy.float() * x.float()).sum((0, 1)).to(D.dtype)
    grads = (dA.sum((0, 1)).to(A.dtype), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype))
    return dx, ddt, *grads, dD, d0
