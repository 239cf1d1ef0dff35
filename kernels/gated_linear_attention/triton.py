r"""Fused kernels, chunk-parallel but for one walk of the state along time.

Forward: the log decays summed inside chunks (:func:`_sums`), the state before every chunk
(:func:`_walk`), all outputs at once (:func:`_outputs`). Backward: the same walk and the same
outputs with time reversed and the parts of q and k exchanged give the gradients of states and of v;
then :func:`_qk_gradients` has those of q, k and g. States before chunks are recomputed, not saved.

Per-channel decay inside a chunk goes by levels, as in ``_decay.Levels``: pairs of tokens whose
indices first differ in bit ``l`` meet in one matrix product, both decayed to the boundary between
their blocks of ``2^l`` tokens, so that no exponent is ever positive and nothing is done per pair.

Gates are taken as at least -40: e^-40 = 4e-18 of a memory is below float32's rounding of whatever
is written next, and a sum over a chunk then stays below 2560, where float32 has steps of 2.4e-4. So
gates of -1e4 cost their neighbours in the chunk 1e-4 at worst (all that large), 4e-6 if alone.
"""

# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
# (arguments of Triton kernels are pointers and tiles, which Python's types do not know)
import torch
import triton
import triton.language as tl
from torch import Tensor

from statezoo.kernels._fused import (
    Launch,
    Layout,
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
)
from statezoo.kernels._fused_step import one_token

NONE, HEAD, CHANNEL = 0, 1, 2
FREE = ["T", "N", "NT"]  # never compiled in


@triton.jit(do_not_specialize=FREE)
def _sums(
    g, c, cu, starts, segment, T, N, NT,
    C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Sum the gates ``[B T D]`` from each chunk's start."""
    pid, part = tl.program_id(0) // tl.cdiv(D, BD), tl.program_id(0) % tl.cdiv(D, BD)
    first, length = chunk_of(pid, cu, starts, segment, T, N, NT, C, PACKED)
    if length <= 0:
        return
    rows, columns = tl.arange(0, C), part * BD + tl.arange(0, BD)
    gates = tile(g + first * D, rows, columns, D, length, D).to(tl.float32)
    put(c + first * D, tl.cumsum(tl.maximum(gates, -40.0), 0), rows, columns, D, length, D)


@triton.jit(do_not_specialize=FREE)
def _walk(
    k, v, c, S0, states, final, scale, cu, starts, segment, T, N, NT,
    C: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr,
    REVERSE: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Carry a block of the state along a sequence; keep it as it is before every chunk.

    Reversed, with q for k and do for v: the gradient of the state, kept as it is after every chunk.
    """
    parts = tl.cdiv(K, BK) * tl.cdiv(V, BV)
    pid, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    n, hv = pid // HV, pid % HV
    h = hv // (HV // H)
    sequence, chunk, T_n = sequence_of(n, cu, starts, T, NT, PACKED)
    DT: tl.constexpr = states.dtype.element_ty
    rows = tl.arange(0, C)
    kk = (part // tl.cdiv(V, BV)) * BK + tl.arange(0, BK)
    vv = (part % tl.cdiv(V, BV)) * BV + tl.arange(0, BV)
    own = pid.to(tl.int64) * K * V
    S = tile(S0 + own, kk, vv, V, K, V)
    count = tl.cdiv(T_n, C)
    for step in range(0, count):
        i = count - 1 - step if REVERSE else step
        first = sequence + i * C
        length = tl.minimum(T_n - i * C, C)
        put(states + ((chunk + i) * HV + hv) * K * V, S, kk, vv, V, K, V)
        at_k = k + (first * H + h) * K + rows[None, :] * (H * K) + kk[:, None]
        kt = tl.load(at_k, mask=(rows[None, :] < length) & (kk[:, None] < K), other=0.0)
        vt = tile(v + (first * HV + hv) * V, rows, vv, HV * V, length, V)
        if GATE == 0:
            kt = kt.to(tl.float32) * scale if REVERSE else kt
        if GATE == 1:
            sums = tl.load(c + (first + rows) * HV + hv, mask=rows < length, other=0.0)
            total = tl.load(c + (first + length - 1) * HV + hv)
            kt = kt * (tl.exp(sums) * scale if REVERSE else tl.exp(total - sums))[None, :]
            S *= tl.exp(total)
        if GATE == 2:
            base = c + (first * HV + hv) * K
            at_c = base + rows[None, :] * (HV * K) + kk[:, None]
            sums = tl.load(at_c, mask=(rows[None, :] < length) & (kk[:, None] < K), other=0.0)
            total = tl.load(base + (length - 1) * (HV * K) + kk, mask=kk < K, other=0.0)
            kt = kt * (tl.exp(sums) * scale if REVERSE else tl.exp(total[:, None] - sums))
            S *= tl.exp(total)[:, None]
        S = tl.dot(kt.to(DT), vt.to(DT), S, input_precision=IP)
    put(final + own, S, kk, vv, V, K, V)


@triton.jit
def decay_to_boundary(base, sums, rows, columns, stride, length, width, level):
    """Decay of every token to the boundary of its level, a tile ``[C K]`` of factors at most 1."""
    boundary = ((rows >> (level + 1)) << (level + 1)) + (1 << level) - 1
    here = tile(base, boundary, columns, stride, length, width)
    later = ((rows >> level) & 1)[:, None] == 1
    between = tl.where(later, sums - here, here - sums)
    return tl.exp(tl.where(tl.maximum(rows, boundary)[:, None] < length, between, 0.0))


@triton.jit
def pairs(rows, level, REVERSE: tl.constexpr):
    """Mark the pairs that meet at a level: row later than column, or earlier if reversed."""
    later = rows[:, None] < rows[None, :] if REVERSE else rows[:, None] > rows[None, :]
    return later & (((rows[:, None] ^ rows[None, :]) >> level) == 1)


@triton.jit(do_not_specialize=FREE)
def _outputs(
    a, b, v, c, states, o, scale, cu, starts, segment, T, N, NT,
    C: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr, GATE: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, STATES: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Read the state before a chunk and the chunk's own writes, for a block of values.

    Reversed, ``a`` is k, ``b`` q, ``v`` the outputs' gradient, ``states`` the gradient of the state
    after the chunk (it holds the scale), and ``o`` becomes the gradient of v. ``STATES`` off leaves
    out what comes from the states.
    """
    parts: tl.constexpr = (V + BV - 1) // BV
    part, hv = tl.program_id(0) % parts, tl.program_id(0) // parts % HV
    pid = tl.program_id(0) // (parts * HV)
    first, length = chunk_of(pid, cu, starts, segment, T, N, NT, C, PACKED)
    if length <= 0:
        return
    h = hv // (HV // H)
    DT: tl.constexpr = states.dtype.element_ty
    rows, vv = tl.arange(0, C), part * BV + tl.arange(0, BV)
    A = tl.zeros([C, C], tl.float32)
    diagonal = tl.zeros([C], tl.float32)
    acc = tl.zeros([C, BV], tl.float32)
    inside = rows < length
    for at in range(0, K, BK):
        kk = at + tl.arange(0, BK)
        at_a = tile(a + (first * H + h) * K, rows, kk, H * K, length, K)
        at_b = tile(b + (first * H + h) * K, rows, kk, H * K, length, K)
        if GATE == 2:
            base = c + (first * HV + hv) * K
            sums = tile(base, rows, kk, HV * K, length, K)
            for level in tl.range(0, LEVELS):
                to = decay_to_boundary(base, sums, rows, kk, HV * K, length, K, level)
                met = tl.dot((at_a * to).to(DT), tl.trans((at_b * to).to(DT)), input_precision=IP)
                A += tl.where(pairs(rows, level, REVERSE), met, 0.0)
            diagonal += tl.sum(at_a.to(tl.float32) * at_b.to(tl.float32), 1)
            if REVERSE:
                total = tl.load(base + (length - 1) * (HV * K) + kk, mask=kk < K, other=0.0)
                sums = total[None, :] - sums
            at_a = at_a * tl.exp(sums)
        else:
            A = tl.dot(at_a.to(DT), tl.trans(at_b.to(DT)), A, input_precision=IP)
        if STATES:
            S = tile(states + (pid.to(tl.int64) * HV + hv) * K * V, kk, vv, V, K, V)
            acc = tl.dot(at_a.to(DT), S, acc, input_precision=IP)
    same = rows[:, None] == rows[None, :]
    if GATE == 2:
        A = tl.where(same, diagonal[:, None], A)
    else:
        later = rows[:, None] <= rows[None, :] if REVERSE else rows[:, None] >= rows[None, :]
        if GATE == 1:
            sums = tl.load(c + (first + rows) * HV + hv, mask=inside, other=0.0)
            between = sums[None, :] - sums[:, None] if REVERSE else sums[:, None] - sums[None, :]
            A *= tl.exp(tl.where(later & inside[:, None] & inside[None, :], between, 0.0))
            if REVERSE:
                sums = tl.load(c + (first + length - 1) * HV + hv) - sums
            acc *= tl.exp(tl.where(inside, sums, 0.0))[:, None]
        A = tl.where(later, A, 0.0)
    if REVERSE:
        A *= scale
    vt = tile(v + (first * HV + hv) * V, rows, vv, HV * V, length, V)
    acc = tl.dot(A.to(DT), vt.to(DT), acc, input_precision=IP)
    if not REVERSE:
        acc *= scale
    put(o + (first * HV + hv) * V, acc, rows, vv, HV * V, length, V)


@triton.jit(do_not_specialize=[*FREE, "tokens"])
def _qk_gradients(
    q, k, v, c, states, do, d_states, dq, dk, dg, scale, cu, starts, segment, T, N, NT,
    tokens, C: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr,
    GATE: tl.constexpr, PACKED: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of q's and k's channels, and their part of the gates'.

    With ``at_head`` and ``at_tail`` the gradients of the sums of gates up to, and from after, each
    token, the gates' own are running sums of these; the diagonal, which no gate touches, is left
    out of both.
    """
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
    dA = tl.zeros([C, C], tl.float32)
    d_head = tl.zeros([C, BK], tl.float32)
    d_tail = tl.zeros([C, BK], tl.float32)
    through = tl.zeros([BK], tl.float32)
    diagonal = tl.zeros([C], tl.float32)
    own = (pid.to(tl.int64) * HV + hv) * K * V
    for at in range(0, V, BV):
        vv = at + tl.arange(0, BV)
        vt = tile(v + (first * HV + hv) * V, rows, vv, HV * V, length, V)
        dot = tile(do + (first * HV + hv) * V, rows, vv, HV * V, length, V)
        S = tile(states + own, kk, vv, V, K, V)
        dS = tile(d_states + own, kk, vv, V, K, V)
        dA = tl.dot(dot.to(DT), tl.trans(vt.to(DT)), dA, input_precision=IP)
        d_head = tl.dot(dot.to(DT), tl.trans(S), d_head, input_precision=IP)
        d_tail = tl.dot(vt.to(DT), tl.trans(dS), d_tail, input_precision=IP)
        if GATE != 0:
            through += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
            diagonal += tl.sum(dot.to(tl.float32) * vt.to(tl.float32), 1)
    dA *= scale
    qt = tile(q + (first * H + h) * K, rows, kk, H * K, length, K)
    kt = tile(k + (first * H + h) * K, rows, kk, H * K, length, K)
    at_q = dq + (first * HV + hv) * K
    at_k = dk + (first * HV + hv) * K
    d_head *= scale
    if GATE == 0:
        P = tl.where(rows[:, None] >= rows[None, :], dA, 0.0).to(DT)
        d_head = tl.dot(P, kt.to(DT), d_head, input_precision=IP)
        d_tail = tl.dot(tl.trans(P), qt.to(DT), d_tail, input_precision=IP)
        put(at_q, d_head, rows, kk, HV * K, length, K)
        put(at_k, d_tail, rows, kk, HV * K, length, K)
    if GATE == 1:
        sums = tl.load(c + (first + rows) * HV + hv, mask=inside, other=0.0)
        total = tl.load(c + (first + length - 1) * HV + hv)
        before = (rows[:, None] > rows[None, :]) & inside[:, None]
        between = tl.where(before, sums[:, None] - sums[None, :], 0.0)
        P = tl.where(before, dA * tl.exp(between), 0.0).to(DT)
        d_head *= tl.exp(sums)[:, None]
        d_tail *= tl.exp(tl.where(inside, total - sums, 0.0))[:, None]
        d_head = tl.dot(P, kt.to(DT), d_head, input_precision=IP)
        d_inner = tl.dot(tl.trans(P), qt.to(DT), input_precision=IP)
        at_head = tl.sum(qt * d_head - kt * d_inner, 1)
        at_tail = tl.sum(kt * d_tail, 1)
        gates = tl.cumsum(at_head, 0, reverse=True) + tl.cumsum(at_tail, 0) - at_tail
        gates += tl.sum(through, 0) * tl.exp(total)
        at = dg + ((part.to(tl.int64) * tokens + first) + rows) * HV + hv
        tl.store(at, gates, mask=inside)
        put(at_q, d_head + (diagonal * scale)[:, None] * kt, rows, kk, HV * K, length, K)
        d_tail += d_inner + (diagonal * scale)[:, None] * qt
        put(at_k, d_tail, rows, kk, HV * K, length, K)
    if GATE == 2:
        base = c + (first * HV + hv) * K
        sums = tile(base, rows, kk, HV * K, length, K)
        total = tl.load(base + (length - 1) * (HV * K) + kk, mask=kk < K, other=0.0)
        d_head *= tl.exp(sums)
        d_tail *= tl.exp(tl.where(inside[:, None], total[None, :] - sums, 0.0))
        d_inner = tl.zeros([C, BK], tl.float32)
        at_tail = kt * d_tail
        gates = tl.cumsum(at_tail, 0) - at_tail + (through * tl.exp(total))[None, :]
        for level in tl.range(0, LEVELS):
            to = decay_to_boundary(base, sums, rows, kk, HV * K, length, K, level)
            P = tl.where(pairs(rows, level, False), dA, 0.0).to(DT)
            d_head += to * tl.dot(P, (kt * to).to(DT), input_precision=IP)
            d_inner += to * tl.dot(tl.trans(P), (qt * to).to(DT), input_precision=IP)
        gates += tl.cumsum(qt * d_head - kt * d_inner, 0, reverse=True)
        put(dg + (first * HV + hv) * K, gates, rows, kk, HV * K, length, K)
        put(at_q, d_head + (diagonal * scale)[:, None] * kt, rows, kk, HV * K, length, K)
        d_tail += d_inner + (diagonal * scale)[:, None] * qt
        put(at_k, d_tail, rows, kk, HV * K, length, K)


def _gate(g: Tensor | None) -> int:
    return NONE if g is None else (HEAD if g.ndim == 3 else CHANNEL)


class Call:
    """One call's layout, widths and flags; launches the kernels above.

    Args:
        q: Queries ``[B T H K]``.
        v: Values ``[B T HV V]``.
        g: Gates.
        how: Dtype and precision of matrix operands.
        at: Where the chunks lie.
    """

    def __init__(
        self, q: Tensor, v: Tensor, g: Tensor | None, how: tuple[torch.dtype, str], at: Layout
    ) -> None:
        self.at, self.device, self.gate = at, q.device, _gate(g)
        self.H, self.K, self.HV, self.V = q.shape[2], q.shape[3], v.shape[2], v.shape[3]
        self.dtype, self.precision = how
        self.common = at.tables | {"PACKED": at.cu is not None, "IP": self.precision}
        self.common |= {"H": self.H, "HV": self.HV, "K": self.K, "V": self.V, "GATE": self.gate}
        wide = self.dtype == torch.float32  # operands and states take twice the room
        self.BK, self.BV = block(self.K, 32 if wide else 64), block(self.V, 64 if wide else 128)
        self.c = None if g is None else self._sums(g.contiguous())

    def _sums(self, g: Tensor) -> Tensor:
        """Log decay from each chunk's start, ``[B T HV]`` or ``[B T HV K]``."""
        c = torch.empty_like(g, dtype=torch.float32)
        D = g[0, 0].numel() if g.numel() else 1
        BD = block(D, 64)
        launch(
            _sums, self.at.total * -(-D // BD), Launch(4, 1), self.device, g=g, c=c,
            **self.at.tables, D=D, BD=BD, PACKED=self.at.cu is not None,
        )  # fmt: skip
        return c

    def states(self, like: Tensor) -> Tensor:
        """Allocate a state per chunk."""
        return like.new_empty(self.at.total, self.HV, self.K, self.V, dtype=self.dtype)

    def walk(
        self, k: Tensor, v: Tensor, S0: Tensor, scale: float = 1.0, reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the state before every chunk (after it, if reversed) and the last one."""
        states, final = self.states(S0), torch.empty_like(S0)
        lanes = self.at.N * self.HV
        BK = block(self.K, 32 if self.dtype == torch.float32 else 64)
        nk = -(-self.K // BK)
        BV = scan_block(self.V, 64, lanes * nk, self.device)
        stage = self.at.C * (BK + BV) * S0.element_size() + self.at.C * BK * 4
        how = Launch(4, depth(self.device, 3, stage))
        launch(
            _walk, lanes * nk * -(-self.V // BV), how, self.device, k=k, v=v, c=self.c,
            S0=S0, states=states, final=final, scale=scale, **self.common, BK=BK, BV=BV,
            REVERSE=reverse,
        )  # fmt: skip
        return states, final

    def outputs(
        self, a: Tensor, b: Tensor, v: Tensor, states: Tensor | None, scale: float,
        dtype: torch.dtype, reverse: bool = False,
    ) -> Tensor:  # fmt: skip
        """Return what rows ``a`` read, ``[B T HV V]``."""
        o = v.new_empty(v.shape, dtype=dtype)
        programs = self.at.total * self.HV * -(-self.V // self.BV)
        warps = 8 if self.gate == CHANNEL or self.BV > 64 else 4
        launch(
            _outputs, programs, Launch(warps, 2), self.device, a=a, b=b, v=v, c=self.c,
            states=a.new_empty(1, dtype=self.dtype) if states is None else states, o=o, scale=scale,
            **self.common, BK=self.BK, BV=self.BV, LEVELS=self.at.C.bit_length() - 1,
            REVERSE=reverse, STATES=states is not None,
        )  # fmt: skip
        return o

    def qk_gradients(
        self, q: Tensor, k: Tensor, v: Tensor, states: Tensor, do: Tensor, d_states: Tensor,
        scale: float, dtypes: tuple[torch.dtype, torch.dtype],
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """Return the gradients of q, k ``[B T HV K]`` and, in float32, of the gates."""
        B, T = q.shape[:2]
        dq, dk = (q.new_empty(B, T, self.HV, self.K, dtype=d) for d in dtypes)
        parts = -(-self.K // self.BK)
        dg = None
        if self.gate == HEAD:
            dg = q.new_empty(parts, B, T, self.HV, dtype=torch.float32)
        if self.gate == CHANNEL:
            dg = torch.empty_like(dq, dtype=torch.float32)
        launch(
            _qk_gradients, self.at.total * self.HV * parts, Launch(8, 2), self.device, q=q, k=k,
            v=v, c=self.c, states=states, do=do, d_states=d_states, dq=dq, dk=dk, dg=dg,
            scale=scale, tokens=B * T, **self.common, BK=self.BK, BV=block(self.V, self.BK),
            LEVELS=self.at.C.bit_length() - 1,
        )  # fmt: skip
        return dq, dk, dg.sum(0) if dg is not None and self.gate == HEAD else dg


def saved_like(q: Tensor, k: Tensor, v: Tensor, S0: Tensor, cu: Tensor | None) -> Tensor:
    """Nothing is saved: an empty tensor."""
    return S0.new_empty(0)


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, S0: Tensor, cu: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs, final state, and an empty tensor."""
    check_widths("gated_linear_attention", q.shape[-1], v.shape[-1])
    if q.shape[1] == 1 and cu is None:
        o, S = one_token(q, k.unsqueeze(2), v.unsqueeze(2), None, g, scale, S0)
        return o, S, S0.new_empty(0)
    how = operands(v)
    q, k, v = (narrow(x, how[0]) for x in (q, k, v))
    call, S0 = Call(q, v, g, how, layout(q, cu)), S0.contiguous()
    states, final = call.walk(k, v, S0)
    return call.outputs(q, k, v, states, scale, v.dtype), final, S0.new_empty(0)


def backward(
    do: Tensor, d_final: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float,
    S0: Tensor, cu: Tensor | None, saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k, v, g (empty where there is none) and the initial state."""
    how, shared = operands(v), v.shape[2] != q.shape[2]
    dtypes = (torch.float32, torch.float32) if shared else (q.dtype, k.dtype)
    wide = q.dtype, k.dtype
    q, k, v = (narrow(x, how[0]) for x in (q, k, v))
    S0, do, d_final = (x.contiguous() for x in (S0, do, d_final))
    call = Call(q, v, g, how, layout(q, cu))
    states, _ = call.walk(k, v, S0)
    d_states, dS0 = call.walk(q, do, d_final, scale, reverse=True)
    dv = call.outputs(k, q, do, d_states, scale, v.dtype, reverse=True)
    dq, dk, dg = call.qk_gradients(q, k, v, states, do, d_states, scale, dtypes)
    if shared:
        dq, dk = (sum_groups(x, q.shape[2], dtype) for x, dtype in zip((dq, dk), wide, strict=True))
    return dq, dk, dv, q.new_empty(0) if g is None or dg is None else dg.to(g.dtype), dS0


def sum_groups(x: Tensor, H: int, dtype: torch.dtype) -> Tensor:
    """Add the gradients of value heads that share a key head: ``[B T HV K]`` as ``[B T H K]``."""
    B, T, _, K = x.shape
    return x.view(B, T, H, -1, K).sum(3).to(dtype)
