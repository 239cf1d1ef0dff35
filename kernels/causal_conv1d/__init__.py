"""Short causal convolution of every channel on its own, with its inputs carried as state."""

from functools import partial
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from statezoo.kernels._dispatch import Backend, accumulator, resolve
from statezoo.kernels._exchange import on_slice
from statezoo.kernels._varlen import check_packing, check_state, n_sequences
from statezoo.kernels.causal_conv1d import _op, reference, sequence
from statezoo.kernels.sequence import current

__all__ = ["causal_conv1d"]


def causal_conv1d(
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "D W"],
    bias: Float[Tensor, " D"] | None = None,
    *,
    activation: Literal["silu"] | None = None,
    initial_state: Float[Tensor, "N D W-1"] | None = None,
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "N D W-1"]]:
    r"""Mix each channel with its own last ``W`` inputs.

    .. math:: y_t = \phi\Big(b + \sum_{j=0}^{W-1} w_{W-1-j} \, x_{t-j}\Big)

    Inputs before the first are those of ``initial_state``, oldest first.

    Args:
        x: Inputs.
        weight: Taps, the last one for the current input (the layout of ``nn.Conv1d``, squeezed).
        bias: Added to every output; default none.
        activation: ``"silu"``, or ``None`` for the identity.
        initial_state: The ``W - 1`` inputs before ``x``; default zeros.
        cu_seqlens: Bounds ``0 .. T`` of sequences packed along ``T``; needs ``B = 1``. Nothing
            leaks from one to the next; they may be empty or shorter than the taps.
        backend: ``"reference"``, ``"torch"`` (any device), ``"triton"`` (fused, NVIDIA) or
            ``"auto"``, which goes by the tensors' device.

    Returns:
        Outputs in the dtype of ``x``, and the last ``W - 1`` inputs (state included, before the
        activation) in float32 (float64 if any input is).

    Raises:
        ValueError: If shapes disagree, the activation is unknown, or the backend cannot run.

    Example:
        >>> x, weight = torch.randn(2, 100, 8), torch.randn(8, 4)
        >>> y, state = causal_conv1d(x, weight, activation="silu")
        >>> y.shape, state.shape
        (torch.Size([2, 100, 8]), torch.Size([2, 8, 3]))

    Source: Gu and Dao, Mamba, arXiv:2312.00752v2, section 3.4 (the convolution before the scan).
    """
    _check(x, weight, bias, activation)
    check_packing("causal_conv1d", x, cu_seqlens)
    D, W = weight.shape
    shape = (n_sequences(x, cu_seqlens), D, W - 1)
    check_state("causal_conv1d", initial_state, shape)
    S0 = x.new_zeros(shape) if initial_state is None else initial_state
    S0 = S0.to(accumulator(x, weight, bias, initial_state))
    args = (x, weight, bias, activation == "silu", S0, cu_seqlens)
    local, shard = partial(_run, resolve(backend, x)), current()
    return local(*args) if shard is None else on_slice(sequence.run, shard, *args, local)


def _run(
    name: str, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, S0: Tensor,
    cu: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if name == "reference":
        return reference.run(x, weight, bias, silu, S0, cu)
    y, S = _op.op(x, weight, bias, silu, S0, cu, name)
    return y, S


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] < 1:
        raise ValueError(
            "causal_conv1d needs x [B T D] and weight [D W] with W >= 1, got x "
            f"{tuple(x.shape)}, weight {tuple(weight.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"causal_conv1d needs bias {tuple(weight.shape[:1])}, got {tuple(bias.shape)}."
        )
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be None or 'silu', got {activation!r}.")
