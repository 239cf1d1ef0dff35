"""Fused form for NVIDIA GPUs: a program per block of tokens and channels."""

# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from statezoo.kernels._varlen import segment_ids
from statezoo.kernels.causal_conv1d import chunked
from statezoo.kernels.causal_conv1d._edges import edges

BT, ROUNDS = 16, 16  # tokens a block; blocks a program when summing over tokens


@triton.jit
def _where(start, seq, t, b, T, PACKED: tl.constexpr):
    """Load the first token of each token's sequence, and the sequence's number."""
    if PACKED:
        first = tl.load(start + t, mask=t < T, other=0)
        number = tl.load(seq + t, mask=t < T, other=0)
    else:
        first = t * 0
        number = t * 0 + b
    return first, number


@triton.jit
def _input(x, S0, t, first, number, d, j, D, stride, live, W: tl.constexpr):
    """Load the inputs ``j`` tokens before ``t``, from ``x`` or from the state in front of it."""
    src = t - j
    inside = (src >= first)[:, None] & live
    before = (src < first)[:, None] & live
    here = tl.load(x + src.to(tl.int64)[:, None] * stride + d[None, :], mask=inside, other=0.0)
    row = number.to(tl.int64)[:, None] * D + d[None, :]
    kept = tl.load(S0 + row * (W - 1) + (W - 1 + src - first)[:, None], mask=before, other=0.0)
    return here.to(tl.float32) + kept.to(tl.float32)


@triton.jit
def _sum_taps(
    x, weight, bias, S0, t, first, number, d, D, stride, live, W: tl.constexpr, BIAS: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Convolve one block, without the activation."""
    acc = tl.zeros([BT, BD], dtype=tl.float32)
    for j in tl.static_range(W):
        w = tl.load(weight + d * W + (W - 1 - j), mask=d < D, other=0.0).to(tl.float32)
        acc += w[None, :] * _input(x, S0, t, first, number, d, j, D, stride, live, W)
    if BIAS:
        acc += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=["T"])
def _forward(
    x, weight, bias, S0, start, seq, y, T, D, stride_b, stride_t, W: tl.constexpr,
    BIAS: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    live = (t < T)[:, None] & (d < D)[None, :]
    first, number = _where(start, seq, t, b, T, PACKED)
    xb = x + b * stride_b
    acc = _sum_taps(xb, weight, bias, S0, t, first, number, d, D, stride_t, live, W, BIAS, BT, BD)
    if SILU:
        acc = acc * tl.sigmoid(acc)
    at = (b * T + t.to(tl.int64))[:, None] * D + d[None, :]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["T"])
def _backward_taps(
    dy, x, weight, bias, S0, start, seq, dpre, partial, T, D, stride_b, stride_t,
    W: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Undo the activation, and sum the gradients of taps and bias over a run of blocks."""
    b = tl.program_id(2).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    rows = tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, BD], dtype=tl.float32)
    xb = x + b * stride_b
    for i in range(ROUNDS):
        t = (tl.program_id(0) * ROUNDS + i) * BT + tl.arange(0, BT)
        live = (t < T)[:, None] & (d < D)[None, :]
        first, number = _where(start, seq, t, b, T, PACKED)
        at = (b * T + t.to(tl.int64))[:, None] * D + d[None, :]
        g = tl.load(dy + at, mask=live, other=0.0).to(tl.float32)
        if SILU:
            pre = _sum_taps(
                xb, weight, bias, S0, t, first, number, d, D, stride_t, live, W, BIAS, BT, BD
            )
            gate = tl.sigmoid(pre)
            g = g * gate * (1 + pre * (1 - gate))
        tl.store(dpre + at, g, mask=live)
        for j in tl.static_range(W):
            u = _input(xb, S0, t, first, number, d, j, D, stride_t, live, W)
            sums += tl.where(rows[:, None] == W - 1 - j, tl.sum(g * u, 0)[None, :], 0.0)
        if BIAS:
            sums += tl.where(rows[:, None] == W, tl.sum(g, 0)[None, :], 0.0)
    block = (tl.program_id(0) * tl.num_programs(2) + b) * (W + 1)
    keep = (rows <= W)[:, None] & (d < D)[None, :]
    tl.store(partial + (block + rows)[:, None] * D + d[None, :], sums, mask=keep)


@triton.jit(do_not_specialize=["T"])
def _backward_inputs(
    dpre, weight, seq, dx, T, D, W: tl.constexpr, PACKED: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Gather what each input gave to the outputs after it, within its sequence."""
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    acc = tl.zeros([BT, BD], dtype=tl.float32)
    if PACKED:
        own = tl.load(seq + t, mask=t < T, other=0)
    for j in tl.static_range(W):
        same = t + j < T
        if PACKED:
            same = same & (tl.load(seq + t + j, mask=same, other=-1) == own)
        at = (b * T + (t + j).to(tl.int64))[:, None] * D + d[None, :]
        g = tl.load(dpre + at, mask=same[:, None] & (d < D)[None, :], other=0.0)
        w = tl.load(weight + d * W + (W - 1 - j), mask=d < D, other=0.0).to(tl.float32)
        acc += w[None, :] * g
    at = (b * T + t.to(tl.int64))[:, None] * D + d[None, :]
    live = (t < T)[:, None] & (d < D)[None, :]
    tl.store(dx + at, acc.to(dx.dtype.element_ty), mask=live)


class _Call:
    """Arguments that forward and backward share."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, S0: Tensor, cu: Tensor | None
    ) -> None:
        self.x = x if x.stride(2) == 1 else x.contiguous()
        self.B, self.T, self.D = x.shape
        self.W = weight.shape[1]
        self.weight, self.S0 = weight.contiguous(), S0.contiguous()
        self.bias = self.weight if bias is None else bias.contiguous()
        self.seq = self.start = S0  # not read unless packed
        if cu is not None:
            seq = segment_ids(cu, self.T)
            self.seq, self.start = seq.int(), cu[seq].int()
        self.flags = {"W": self.W, "PACKED": cu is not None, "BT": BT}
        self.flags["BD"] = min(64, triton.next_power_of_2(self.D))
        self.blocks = triton.cdiv(self.T, BT)
        self.strides = self.x.stride()[:2]

    def grid(self, rounds: int = 1) -> tuple[int, int, int]:
        return triton.cdiv(self.blocks, rounds), triton.cdiv(self.D, self.flags["BD"]), self.B


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, S0: Tensor, cu: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return outputs and final state."""
    call, y = _Call(x, weight, bias, S0, cu), x.new_empty(x.shape)
    if y.numel():
        _launch(
            _forward, call.grid(), call.x, call.weight, call.bias, call.S0, call.start, call.seq,
            y, call.T, call.D, *call.strides, BIAS=bias is not None, SILU=silu, **call.flags,
        )  # fmt: skip
    return y, edges(x, call.W, cu).final(x, S0)


def backward(
    dy: Tensor, d_final: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool,
    S0: Tensor, cu: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, weight, bias (empty where there is none) and initial state."""
    call, dx = _Call(x, weight, bias, S0, cu), x.new_empty(x.shape)
    W, ends = call.W, edges(x, call.W, cu)
    dpre = x.new_empty(x.shape, dtype=torch.float32)
    grid = call.grid(ROUNDS)
    partial = dpre.new_zeros(grid[0], call.B, W + 1, call.D)
    if dx.numel():
        _launch(
            _backward_taps, grid, dy.contiguous(), call.x, call.weight, call.bias, call.S0,
            call.start, call.seq, dpre, partial, call.T, call.D, *call.strides,
            BIAS=bias is not None, SILU=silu, ROWS=triton.next_power_of_2(W + 1), ROUNDS=ROUNDS,
            **call.flags,
        )  # fmt: skip
        _launch(
            _backward_inputs, call.grid(), dpre, call.weight, call.seq, dx, call.T, call.D,
            **call.flags,
        )  # fmt: skip
    sums = partial.sum((0, 1))
    d_state = chunked.through_heads(ends.take(dpre), weight, S0)
    dS0 = ends.final_backward(d_final, dx) + d_state
    db = x.new_empty(0) if bias is None else sums[W].to(bias.dtype, copy=True)
    return dx, sums[:W].mT.to(weight.dtype, copy=True).contiguous(), db, dS0


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **flags: Any) -> None:
    kernel[grid](*args, **flags)
