"""Additive key-value memory with decay: linear attention, RetNet, Mamba-2 (SSD), GLA, HGRN2."""

from functools import partial

from jaxtyping import Float, Int
from torch import Tensor

from statezoo.kernels._dispatch import Backend, accumulator, resolve
from statezoo.kernels._exchange import on_slice
from statezoo.kernels._varlen import check_packing, check_state, n_sequences
from statezoo.kernels.gated_linear_attention import _op, reference, sequence
from statezoo.kernels.sequence import current

__all__ = ["gated_linear_attention"]


def gated_linear_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T Hv V"],
    g: Float[Tensor, "B T Hv *channel"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "N Hv K V"] | None = None,
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "B T Hv V"], Float[Tensor, "N Hv K V"]]:
    r"""Add to and read from a decaying key-value memory, one token at a time.

    .. math::
        S_t = \mathrm{Diag}(e^{g_t}) S_{t-1} + k_t v_t^\top,
        \qquad o_t = \mathrm{scale} \cdot S_t^\top q_t

    Args:
        q: Queries.
        k: Keys.
        v: Values; ``Hv`` is a multiple of ``H``, value heads ``h * Hv/H`` onwards share key head
            ``h`` (Mamba-2's groups).
        g: Log decay, at most 0, applied before the write: ``[B T Hv]`` for one gate a head,
            ``[B T Hv K]`` for one a key channel, ``None`` for no decay. 0 keeps the memory, -20
            clears it.
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
        >>> o, S = gated_linear_attention(q, k, v)
        >>> o.shape, S.shape
        (torch.Size([2, 100, 4, 16]), torch.Size([2, 4, 16, 16]))

    Source: Yang et al., Gated Linear Attention Transformers, arXiv:2312.06635v6, eq. 3, with
    K-first state; chunk form after section 4.
    """
    _check(q, k, v, g)
    check_packing("gated_linear_attention", q, cu_seqlens)
    (_, _, Hv, V), K = v.shape, q.shape[-1]
    N = n_sequences(q, cu_seqlens)
    check_state("gated_linear_attention", initial_state, (N, Hv, K, V))
    S0 = v.new_zeros(N, Hv, K, V) if initial_state is None else initial_state
    S0 = S0.to(accumulator(q, k, v, g, initial_state))
    scale = K**-0.5 if scale is None else scale
    args = (q, k, v, g, scale, S0, cu_seqlens)
    local, shard = partial(_run, resolve(backend, q)), current()
    return local(*args) if shard is None else on_slice(sequence.run, shard, *args, local)


def _run(
    name: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, S0: Tensor,
    cu: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if name == "reference":
        return reference.run(q, k, v, g, scale, S0, cu)
    o, S, _ = _op.op(q, k, v, g, scale, S0, cu, name)
    return o, S


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> None:
    same = q.ndim == v.ndim == 4 and k.shape == q.shape and v.shape[:2] == q.shape[:2]
    if not same or v.shape[2] % q.shape[2]:
        raise ValueError(
            "gated_linear_attention needs q, k [B T H K] and v [B T Hv V] with equal B and T, and "
            f"Hv a multiple of H; got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}."
        )
    if g is not None and (g.shape[:3] != v.shape[:3] or g.shape[3:] not in ((), (q.shape[-1],))):
        raise ValueError(
            "gated_linear_attention needs g [B T Hv] or [B T Hv K] beside q "
            f"{tuple(q.shape)} and v {tuple(v.shape)}, got {tuple(g.shape)}."
        )
