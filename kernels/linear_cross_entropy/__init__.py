"""Cross-entropy of a linear head whose logits never lie in memory all at once."""

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from statezoo.kernels.linear_cross_entropy import _op

__all__ = ["linear_cross_entropy"]

Reduction = Literal["mean", "sum", "none"]
LOGITS = 2**20  # logits in memory at a time, unless a chunk had
LEAST = 256  # fewer tokens: each chunk reads and writes the head's whole gradient


def linear_cross_entropy(
    x: Float[Tensor, "*tokens D"],
    weight: Float[Tensor, "W D"],
    targets: Int[Tensor, "*tokens"],
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    chunk: int | None = None,
) -> Float[Tensor, "..."]:
    r"""Score targets under ``softmax(x @ weight.T)``, in nats, a chunk of tokens at a time.

    .. math:: \ell_t = \log \sum_w e^{\langle W_w, x_t \rangle} - \langle W_{y_t}, x_t \rangle

    ``"mean"`` and ``"sum"`` compute the gradients in the forward pass, while a chunk's logits are
    at hand: three matrix products instead of four, at the price of keeping gradients of the size
    of ``x`` and ``weight`` until the backward pass. ``"none"`` recomputes the logits there, as
    every token's gradient is scaled on its own. Under autocast the products are in autocast's
    dtype; sums are always in float32 (float64 if ``x`` is).

    Args:
        x: Hidden states.
        weight: The head; cast to the dtype of ``x``.
        targets: Index of the right symbol, ``ignore_index`` where none is scored.
        ignore_index: Marks tokens that neither count nor get a gradient.
        reduction: ``"mean"`` over scored tokens (0 where there are none), ``"sum"``, or ``"none"``.
        chunk: Tokens a chunk; default as many as make a million logits, at least 256.

    Returns:
        A scalar in float32 (float64 if ``x`` is), or for ``"none"`` one such number a token.

    Raises:
        ValueError: If shapes disagree, ``reduction`` is unknown, ``chunk`` is not positive, or a
            target is outside the head's rows (looked at on CPU only; a GPU asserts on its own).

    Example:
        >>> x, weight = torch.randn(2, 100, 16), torch.randn(256, 16)
        >>> linear_cross_entropy(x, weight, torch.randint(256, (2, 100))).shape
        torch.Size([])

    Source: gradients in the forward pass after Hsu et al., Liger Kernel, arXiv:2410.10989v2,
    section 3.2.
    """
    _check(x, weight, targets, reduction, chunk)
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    weight = weight.to(x.dtype)
    flat, t = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    chunk = max(LEAST, LOGITS // weight.shape[0]) if chunk is None else chunk
    if reduction == "none":
        nll: Tensor = _op.per_token(flat, weight, t, ignore_index, chunk)[0]
        return nll.view(targets.shape)
    needed = torch.is_grad_enabled()
    total: Tensor = _op.total(
        flat, weight, t, ignore_index, chunk, needed and x.requires_grad,
        needed and weight.requires_grad,
    )[0]  # fmt: skip
    return total if reduction == "sum" else total / (t != ignore_index).sum().clamp(min=1)


def _check(x: Tensor, weight: Tensor, targets: Tensor, reduction: str, chunk: int | None) -> None:
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            "linear_cross_entropy needs x [... D] and weight [W D], got x "
            f"{tuple(x.shape)}, weight {tuple(weight.shape)}."
        )
    if targets.shape != x.shape[:-1] or targets.is_floating_point():
        raise ValueError(
            f"linear_cross_entropy needs int targets {tuple(x.shape[:-1])}, one for each row of x; "
            f"got {targets.dtype} {tuple(targets.shape)}."
        )
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}.")
