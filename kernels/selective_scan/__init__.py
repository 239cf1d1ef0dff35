"""Selective scan: diagonal recurrences, a decay per channel and state (Mamba-1, S4D, S6)."""

from functools import partial

from jaxtyping import Float, Int
from torch import Tensor

from statezoo.kernels._dispatch import Backend, accumulator, resolve
from statezoo.kernels._exchange import on_slice
from statezoo.kernels._varlen import check_packing, check_state, n_sequences
from statezoo.kernels.selective_scan import _op, reference, sequence
from statezoo.kernels.sequence import current

__all__ = ["selective_scan"]


def selective_scan(
    x: Float[Tensor, "B T E"],
    dt: Float[Tensor, "B T E"],
    A: Float[Tensor, "E N"],
    B: Float[Tensor, "B T N"],
    C: Float[Tensor, "B T N"],
    D: Float[Tensor, " E"] | None = None,
    *,
    negative_eigenvalues: bool = False,
    initial_state: Float[Tensor, "S E N"] | None = None,
    cu_seqlens: Int[Tensor, " S+1"] | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "B T E"], Float[Tensor, "S E N"]]:
    r"""Drive ``N`` decaying states a channel with the input, and read their weighted sum.

    .. math::
        h_t = e^{\Delta_t A} h_{t-1} + \Delta_t B_t x_t, \qquad y_t = C_t h_t + D x_t

    Args:
        x: Inputs.
        dt: Step sizes, positive (after the softplus).
        A: Decay rates, negative: a state fades by ``exp(dt * A)`` a token.
        B: Weights of the input in each state, shared by the channels.
        C: Weights of each state in the output, shared by the channels.
        D: Weight of the input in the output; default none.
        negative_eigenvalues: Decay by ``2 exp(dt * A) - 1`` in (-1, 1) instead, so that a state can
            flip its sign.
        initial_state: States before the first token; default zeros.
        cu_seqlens: Bounds ``0 .. T`` of sequences packed along ``T``; needs ``B = 1``. Empty
            sequences hand their initial state on.
        backend: ``"reference"`` (autograd through a step per token), ``"torch"`` (spans of tokens
            with their own backward pass, any device), ``"triton"`` (fused, NVIDIA) or ``"auto"``,
            which goes by the tensors' device.

    Returns:
        Outputs in the dtype of ``x``, final states in float32 (float64 if any input is).

    Raises:
        ValueError: If shapes disagree or the backend cannot run.

    Example:
        >>> x, dt, A = torch.randn(2, 100, 8), torch.rand(2, 100, 8), -torch.rand(8, 4)
        >>> y, h = selective_scan(x, dt, A, torch.randn(2, 100, 4), torch.randn(2, 100, 4))
        >>> y.shape, h.shape
        (torch.Size([2, 100, 8]), torch.Size([2, 8, 4]))

    Source: Gu and Dao, Mamba, arXiv:2312.00752v2, eq. 2 and algorithm 2, with the input's weight
    :math:`\Delta B` of the published code; the negative eigenvalues from Grazzi et al.,
    arXiv:2411.12537v4.
    """
    _check(x, dt, A, B, C, D)
    check_packing("selective_scan", x, cu_seqlens)
    shape = (n_sequences(x, cu_seqlens), *A.shape)
    check_state("selective_scan", initial_state, shape)
    h0 = x.new_zeros(shape) if initial_state is None else initial_state
    h0 = h0.to(accumulator(x, dt, A, B, C, D, initial_state))
    args = (x, dt, A, B, C, D, negative_eigenvalues, h0, cu_seqlens)
    local, shard = partial(_run, resolve(backend, x)), current()
    return local(*args) if shard is None else on_slice(sequence.run, shard, *args, local)


def _run(
    name: str, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    negative: bool, h0: Tensor, cu: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if name == "reference":
        return reference.run(x, dt, A, B, C, D, negative, h0, cu)
    y, h, _ = _op.op(x, dt, A, B, C, D, negative, h0, cu, name)
    return y, h


def _check(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> None:
    if x.ndim != 3 or dt.shape != x.shape or A.ndim != 2 or A.shape[0] != x.shape[2]:
        raise ValueError(
            "selective_scan needs x, dt [B T E] and A [E N], got x "
            f"{tuple(x.shape)}, dt {tuple(dt.shape)}, A {tuple(A.shape)}."
        )
    want = (*x.shape[:2], A.shape[1])
    if tuple(B.shape) != want or tuple(C.shape) != want:
        raise ValueError(
            f"selective_scan needs B and C {want}, got {tuple(B.shape)} and {tuple(C.shape)}."
        )
    if D is not None and D.shape != A.shape[:1]:
        raise ValueError(f"selective_scan needs D {tuple(A.shape[:1])}, got {tuple(D.shape)}.")
