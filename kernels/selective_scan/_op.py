"""Registration with ``torch.library``: torch.compile sees one node, autograd our backward pass."""

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from statezoo.kernels.selective_scan import chunked


def _module(backend: str) -> ModuleType:
    """Import Triton only when it is used."""
    return chunked if backend == "torch" else importlib.import_module(f"{__package__}.triton")


@torch.library.custom_op("statezoo::selective_scan", mutates_args=())
def op(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, negative: bool,
    h0: Tensor, cu: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run a backend's forward pass."""
    with torch.autocast(x.device.type, enabled=False):
        y, h, saved = _module(backend).forward(x, dt, A, B, C, D, negative, h0, cu)
    return y, h, saved


@op.register_fake
def _(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, negative: bool,
    h0: Tensor, cu: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    E, N = A.shape
    if backend == "torch":
        saved = h0.new_empty(chunked.n_saved(x, N), x.shape[0], N, E)
    else:
        saved = h0.new_empty(x.shape[0], _module(backend).n_saved(x), E, N)
    return x.new_empty(x.shape), h0.new_empty(h0.shape), saved


@torch.library.custom_op("statezoo::selective_scan_backward", mutates_args=())
def backward_op(
    dy: Tensor, d_final: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, negative: bool, h0: Tensor, cu: Tensor | None, saved: Tensor, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run a backend's backward pass."""
    args = (dy, d_final, x, dt, A, B, C, D, negative, h0, cu, saved)
    with torch.autocast(x.device.type, enabled=False):
        dx, ddt, dA, dB, dC, dD, dh0 = _module(backend).backward(*args)
    return dx, ddt, dA, dB, dC, dD, dh0


@backward_op.register_fake
def _(
    dy: Tensor, d_final: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, negative: bool, h0: Tensor, cu: Tensor | None, saved: Tensor, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, ddt, dA, dB, dC, dh0 = (z.new_empty(z.shape) for z in (x, dt, A, B, C, h0))
    return dx, ddt, dA, dB, dC, x.new_empty(0) if D is None else D.new_empty(D.shape), dh0


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, dt, A, B, C, D, negative, h0, cu, backend = inputs
    ctx.save_for_backward(x, dt, A, B, C, D, h0, cu, output[2])
    ctx.negative, ctx.backend = negative, backend


def _backward(ctx: Any, dy: Tensor, d_final: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, dt, A, B, C, D, h0, cu, saved = ctx.saved_tensors
    dx, ddt, dA, dB, dC, dD, dh0 = backward_op(
        dy, d_final, x, dt, A, B, C, D, ctx.negative, h0, cu, saved, ctx.backend
    )
    return dx, ddt, dA, dB, dC, None if D is None else dD, None, dh0, None, None


op.register_autograd(_backward, setup_context=_setup)
