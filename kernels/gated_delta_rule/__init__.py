"""Error-correcting key-value memory: DeltaNet, Gated DeltaNet, DeltaProduct, KDA."""

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from statezoo.kernels._dispatch import Backend, accumulator, resolve
from statezoo.kernels._exchange import on_slice
from statezoo.kernels._varlen import check_packing, check_state, n_sequences
from statezoo.kernels.gated_delta_rule import _op, reference, sequence
from statezoo.kernels.sequence import current

__all__ = ["gated_delta_rule", "l2_norm"]


def gated_delta_rule(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T *n H K"],
    v: Float[Tensor, "B T *n Hv V"],
    beta: Float[Tensor, "B T *n Hv"],
    g: Float[Tensor, "B T Hv *channel"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "N Hv K V"] | None = None,
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "B T Hv V"], Float[Tensor, "N Hv K V"]]:
    r"""Correct and read a decaying key-value memory, one token at a time.

    .. math::
        S_t = \tilde S_t + \beta_t k_t (v_t - \tilde S_t^\top k_t)^\top,
        \qquad \tilde S_t = \mathrm{Diag}(e^{g_t}) S_{t-1},
        \qquad o_t = \mathrm{scale} \cdot S_t^\top q_t

    With ``n`` keys a token the memory decays once, is corrected ``n`` times in order, and is read
    after the last: the transition is a product of ``n`` generalised Householder matrices.

    Args:
        q: Queries.
        k: Keys of unit L2 norm (:func:`l2_norm`), used as given; longer keys let the memory grow
            without bound. ``[B T H K]``, or ``[B T n H K]`` for ``n`` writes a token.
        v: Values ``[B T Hv V]`` or ``[B T n Hv V]``; ``Hv`` is a multiple of ``H``, value heads
            ``h * Hv/H`` onwards share the queries and keys of head ``h``.
        beta: Write strength ``[B T Hv]`` or ``[B T n Hv]``: in [0, 1], or [0, 2] for negative
            eigenvalues (2 is a reflection).
        g: Log decay, at most 0, applied before the first write of a token: ``[B T Hv]`` for one
            gate a head, ``[B T Hv K]`` for one a key channel, ``None`` for no decay. 0 keeps the
            memory, -20 clears it.
        scale: Multiplies the output; default ``K ** -0.5``.
        initial_state: Memory before the first token; default zeros.
        cu_seqlens: Bounds ``0 .. T`` of sequences packed along ``T``; needs ``B = 1``. Empty
            sequences hand their initial state on.
        backend: ``"reference"`` (a step per token), ``"torch"`` (chunk-parallel, any device),
            ``"triton"`` (fused, NVIDIA) or ``"auto"``, which goes by the tensors' device.

    Returns:
        Outputs in the dtype of ``v``, final memory in float32 (float64 if any input is).

    Raises:
        ValueError: If shapes disagree or the backend cannot run.

    Example:
        >>> q, k, v = torch.randn(3, 2, 100, 4, 16)
        >>> o, S = gated_delta_rule(q, l2_norm(k), v, beta=torch.rand(2, 100, 4))
        >>> o.shape, S.shape
        (torch.Size([2, 100, 4, 16]), torch.Size([2, 4, 16, 16]))

    Source: Yang et al., Gated Delta Networks, arXiv:2412.06464v3, eq. 10, with K-first state;
    several writes a token after Siems et al., DeltaProduct, arXiv:2502.10297; gates per channel
    after Kimi Linear, arXiv:2510.26692; chunk form after Yang et al., arXiv:2406.06484.
    """
    _check(q, k, v, beta, g)
    check_packing("gated_delta_rule", q, cu_seqlens)
    Hv, V, K = v.shape[-2], v.shape[-1], q.shape[-1]
    N = n_sequences(q, cu_seqlens)
    check_state("gated_delta_rule", initial_state, (N, Hv, K, V))
    S0 = v.new_zeros(N, Hv, K, V) if initial_state is None else initial_state
    S0 = S0.to(accumulator(q, k, v, beta, g, initial_state))
    scale = K**-0.5 if scale is None else scale
    if k.ndim == 4:
        k, v, beta = k.unsqueeze(2), v.unsqueeze(2), beta.unsqueeze(2)
    args = (q, k, v, beta, g, scale, S0, cu_seqlens)
    local, shard = partial(_run, resolve(backend, q)), current()
    return local(*args) if shard is None else on_slice(sequence.run, shard, *args, local)


def _run(
    name: str, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float,
    S0: Tensor, cu: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if name == "reference":
        return reference.run(q, k, v, beta, g, scale, S0, cu)
    o, S, _ = _op.op(q, k, v, beta, g, scale, S0, cu, name)
    return o, S


def l2_norm(x: Float[Tensor, "*any"], eps: float = 1e-6) -> Float[Tensor, "*any"]:
    r"""Scale the last axis to unit length, :math:`x / \sqrt{\sum x^2 + \epsilon}`.

    Args:
        x: Vectors; the arithmetic is in float32 (float64 for float64), and so is the result:
            rounding unit keys to bfloat16 lets the memory grow at ``beta = 2``.
        eps: Keeps a zero vector zero, with a finite gradient.
    """
    x = x.to(accumulator(x))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def _check(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None) -> None:
    writes = k.shape[2:-2]
    same = (
        q.ndim == 4
        and k.ndim == v.ndim == beta.ndim + 1
        and k.shape == (*q.shape[:2], *writes, *q.shape[2:])
        and v.shape[:-2] == (*q.shape[:2], *writes)
        and beta.shape == v.shape[:-1]
        and len(writes) < 2
        and 0 not in writes
    )
    if not same or v.shape[-2] % q.shape[2]:
        raise ValueError(
            "gated_delta_rule needs q [B T H K], k [B T H K], v [B T Hv V], beta [B T Hv], or k, "
            "v, beta with an axis n after T, with equal B, T and n, and Hv a multiple of H; got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, beta {tuple(beta.shape)}."
        )
    head = (*q.shape[:2], v.shape[-2])
    gates = (head, (*head, q.shape[-1]))
    if g is not None and tuple(g.shape) not in gates:
        raise ValueError(
            f"gated_delta_rule needs g {tuple(gates[0])} or {tuple(gates[1])}, got "
            f"{tuple(g.shape)}."
        )
