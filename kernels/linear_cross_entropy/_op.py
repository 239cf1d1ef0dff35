"""Registration with ``torch.library``: torch.compile sees one node, autograd our backward pass."""

from typing import Any

import torch
from torch import Tensor

from statezoo.kernels._dispatch import accumulator
from statezoo.kernels.linear_cross_entropy import chunked


@torch.library.custom_op("statezoo::linear_cross_entropy_total", mutates_args=())
def total(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk: int, need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Sum the losses, and compute the sum's gradients where needed."""
    with torch.autocast(x.device.type, enabled=False):
        ones = x.new_ones(1, dtype=accumulator(x)).expand(x.shape[0])
        return chunked.backward(
            ones, None, x, weight, targets, ignore_index, chunk, need_x, need_weight
        )


@total.register_fake
def _(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk: int, need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx = torch.empty_like(x) if need_x else x.new_empty(0)
    dW = torch.empty_like(weight) if need_weight else weight.new_empty(0)
    return x.new_empty((), dtype=accumulator(x)), dx, dW


def _total_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.needed = inputs[5:]
    ctx.save_for_backward(*output[1:])


def _total_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    dx, dW = (
        d * grad.to(d.dtype) if needed and grad is not None else None
        for d, needed in zip(ctx.saved_tensors, ctx.needed, strict=True)
    )
    return dx, dW, None, None, None, None, None


total.register_autograd(_total_backward, setup_context=_total_setup)


@torch.library.custom_op("statezoo::linear_cross_entropy", mutates_args=())
def per_token(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """Return every token's loss and log-sum-exp."""
    with torch.autocast(x.device.type, enabled=False):
        return chunked.forward(x, weight, targets, ignore_index, chunk)


@per_token.register_fake
def _(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk: int
) -> tuple[Tensor, Tensor]:
    nll = x.new_empty(x.shape[0], dtype=accumulator(x))
    return nll, torch.empty_like(nll)


@torch.library.custom_op("statezoo::linear_cross_entropy_backward", mutates_args=())
def per_token_backward(
    scale: Tensor, lse: Tensor, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int,
    chunk: int, need_x: bool, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Recompute the logits and return the gradients."""
    with torch.autocast(x.device.type, enabled=False):
        return chunked.backward(
            scale, lse, x, weight, targets, ignore_index, chunk, need_x, need_weight
        )[1:]


@per_token_backward.register_fake
def _(
    scale: Tensor, lse: Tensor, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int,
    chunk: int, need_x: bool, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dx = torch.empty_like(x) if need_x else x.new_empty(0)
    return dx, torch.empty_like(weight) if need_weight else weight.new_empty(0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, targets, ctx.ignore_index, ctx.chunk = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, targets, output[1])


def _backward(ctx: Any, scale: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    x, weight, targets, lse = ctx.saved_tensors
    needed = ctx.needs_input_grad[:2]
    if scale is None:
        return None, None, None, None, None
    dx, dW = per_token_backward(
        scale, lse, x, weight, targets, ctx.ignore_index, ctx.chunk, *needed
    )
    return dx if needed[0] else None, dW if needed[1] else None, None, None, None


per_token.register_autograd(_backward, setup_context=_setup)
