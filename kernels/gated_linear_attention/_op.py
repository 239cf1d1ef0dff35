"""Registration with ``torch.library``: torch.compile sees one node, autograd our backward pass."""

from typing import Any

import torch
from torch import Tensor

from statezoo.kernels.gated_linear_attention import chunked


@torch.library.custom_op("statezoo::gated_linear_attention", mutates_args=())
def op(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, S0: Tensor, cu: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run a backend's forward pass."""
    return chunked.forward(q, k, v, g, scale, S0, cu)


@op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, S0: Tensor, cu: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    lanes = S0.shape[1:] if cu is not None else (S0.shape[0] * S0.shape[1], *S0.shape[2:])
    saved = S0.new_empty(chunked.n_spans(q, v, cu), *lanes)
    return torch.empty_like(v), torch.empty_like(S0), saved


@torch.library.custom_op("statezoo::gated_linear_attention_backward", mutates_args=())
def backward_op(
    do: Tensor, d_final: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float,
    S0: Tensor, cu: Tensor | None, saved: Tensor, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run a backend's backward pass."""
    return chunked.backward(do, d_final, q, k, v, g, scale, S0, cu, saved)


@backward_op.register_fake
def _(
    do: Tensor, d_final: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float,
    S0: Tensor, cu: Tensor | None, saved: Tensor, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dg = q.new_empty(0) if g is None else torch.empty_like(g)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dg, torch.empty_like(S0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, g, scale, S0, cu, backend = inputs
    ctx.save_for_backward(q, k, v, g, S0, cu, output[2])
    ctx.scale, ctx.backend = scale, backend


def _backward(ctx: Any, do: Tensor, d_final: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, g, S0, cu, saved = ctx.saved_tensors
    dq, dk, dv, dg, dS0 = backward_op(
        do, d_final, q, k, v, g, ctx.scale, S0, cu, saved, ctx.backend
    )
    return dq, dk, dv, None if g is None else dg, None, dS0, None, None


op.register_autograd(_backward, setup_context=_setup)
