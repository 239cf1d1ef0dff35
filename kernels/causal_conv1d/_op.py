"""Registration with ``torch.library``: torch.compile sees one node, autograd our backward pass."""

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from statezoo.kernels.causal_conv1d import chunked


def _module(backend: str) -> ModuleType:
    """Import Triton only when it is used."""
    return chunked if backend == "torch" else importlib.import_module(f"{__package__}.triton")


@torch.library.custom_op("statezoo::causal_conv1d", mutates_args=())
def op(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, S0: Tensor, cu: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run a backend's forward pass."""
    y, S = _module(backend).forward(x, weight, bias, silu, S0, cu)
    return y, S


@op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, S0: Tensor, cu: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), S0.new_empty(S0.shape)


@torch.library.custom_op("statezoo::causal_conv1d_backward", mutates_args=())
def backward_op(
    dy: Tensor, d_final: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool,
    S0: Tensor, cu: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run a backend's backward pass."""
    dx, dW, db, dS0 = _module(backend).backward(dy, d_final, x, weight, bias, silu, S0, cu)
    return dx, dW, db, dS0


@backward_op.register_fake
def _(
    dy: Tensor, d_final: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool,
    S0: Tensor, cu: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    db = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), db, S0.new_empty(S0.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, silu, S0, cu, backend = inputs
    ctx.save_for_backward(x, weight, bias, S0, cu)
    ctx.silu, ctx.backend = silu, backend


def _backward(ctx: Any, dy: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, S0, cu = ctx.saved_tensors
    dx, dW, db, dS0 = backward_op(dy, d_final, x, weight, bias, ctx.silu, S0, cu, ctx.backend)
    return dx, dW, None if bias is None else db, None, dS0, None, None


op.register_autograd(_backward, setup_context=_setup)
