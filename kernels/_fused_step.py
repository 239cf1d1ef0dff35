"""One token for all sequences at once, in one kernel: decoding with either matrix-state op."""

# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
# (arguments of Triton kernels are pointers and tiles, which Python's types do not know)
import torch
import triton
import triton.language as tl
from torch import Tensor

from statezoo.kernels._fused import Launch, block, launch, put, scan_block, tile


@triton.jit
def _step(
    q, k, v, beta, g, S0, o, final, scale, WRITES: tl.constexpr, H: tl.constexpr, HV: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
    DELTA: tl.constexpr,
):  # fmt: skip
    """Decay, write and read a block of a state's values; ``GATE`` 1 is per head, 2 per channel."""
    parts: tl.constexpr = (V + BV - 1) // BV
    pid, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    n, hv = (pid // HV).to(tl.int64), pid % HV
    h = hv // (HV // H)
    kk, vv = tl.arange(0, BK), part * BV + tl.arange(0, BV)
    lane = pid.to(tl.int64)
    S = tile(S0 + lane * K * V, kk, vv, V, K, V)
    if GATE == 1:
        S *= tl.exp(tl.load(g + lane).to(tl.float32))
    if GATE == 2:
        S *= tl.exp(tl.load(g + lane * K + kk, mask=kk < K, other=0.0).to(tl.float32))[:, None]
    for j in range(WRITES):
        write = n * WRITES + j
        kt = tl.load(k + (write * H + h) * K + kk, mask=kk < K, other=0.0).to(tl.float32)
        vt = tl.load(v + (write * HV + hv) * V + vv, mask=vv < V, other=0.0).to(tl.float32)
        if DELTA:
            strength = tl.load(beta + write * HV + hv).to(tl.float32)
            vt = strength * (vt - tl.sum(S * kt[:, None], 0))
        S += kt[:, None] * vt[None, :]
    qt = tl.load(q + (n * H + h) * K + kk, mask=kk < K, other=0.0).to(tl.float32)
    out = tl.sum(S * qt[:, None], 0) * scale
    tl.store(o + lane * V + vv, out.to(o.dtype.element_ty), mask=vv < V)
    put(final + lane * K * V, S, kk, vv, V, K, V)


def one_token(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, g: Tensor | None, scale: float, S0: Tensor
) -> tuple[Tensor, Tensor]:
    """Return outputs ``[B 1 HV V]`` and the next state of one token with ``n`` writes.

    Args:
        q: Queries ``[B 1 H K]``.
        k: Keys ``[B 1 n H K]``.
        v: Values ``[B 1 n HV V]``.
        beta: Write strengths ``[B 1 n HV]``; ``None`` adds instead of correcting.
        g: Log decays ``[B 1 HV]`` or ``[B 1 HV K]``.
        scale: Multiplies the output.
        S0: States ``[B HV K V]``.
    """
    (B, _, n, HV, V), (H, K) = v.shape, q.shape[2:]
    q, k, v, S0 = (x.contiguous() for x in (q, k, v, S0))
    o, final = v.new_empty(B, 1, HV, V), torch.empty_like(S0)
    BK = block(K, 256)
    BV = scan_block(V, 64 if BK < 128 else 32, B * HV, q.device)
    launch(
        _step, B * HV * -(-V // BV), Launch(4, 1), q.device, q=q, k=k, v=v,
        beta=None if beta is None else beta.contiguous(), g=None if g is None else g.contiguous(),
        S0=S0, o=o, final=final, scale=scale, WRITES=n, H=H, HV=HV, K=K, V=V, BK=BK, BV=BV,
        GATE=0 if g is None else g.ndim - 2, DELTA=beta is not None,
    )  # fmt: skip
    return o, final
