"""Registration with ``torch.library``: torch.compile sees one node, autograd our backward pass.

``k``, ``v`` and ``beta`` carry the axis of writes, ``[B T n *]``. A backend is a module with
``forward``, ``backward`` and ``saved_like`` as in ``chunked``; what it saves is its own affair.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

MODULES = {"torch": "chunked", "triton": "triton"}


def _module(backend: str) -> Any:
    return import_module(f"statezoo.kernels.gated_delta_rule.{MODULES[backend]}")


@torch.library.custom_op("statezoo::gated_delta_rule", mutates_args=())
def op(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float, S0: Tensor,
    cu: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run a backend's forward pass."""
    with torch.autocast(q.device.type, enabled=False):
        o, S, saved = _module(backend).forward(q, k, v, beta, g, scale, S0, cu)
    return o, S, saved


@op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float, S0: Tensor,
    cu: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    saved = _module(backend).saved_like(q, k, v, S0, cu)
    return v.new_empty(*v.shape[:2], *v.shape[3:]), torch.empty_like(S0), saved


@torch.library.custom_op("statezoo::gated_delta_rule_backward", mutates_args=())
def backward_op(
    do: Tensor, d_final: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None,
    scale: float, S0: Tensor, cu: Tensor | None, saved: Tensor, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run a backend's backward pass: gradients of q, k, v, beta, g (empty where none) and S0."""
    args = (do, d_final, q, k, v, beta, g, scale, S0, cu, saved)
    with torch.autocast(q.device.type, enabled=False):
        dq, dk, dv, dbeta, dg, dS0 = _module(backend).backward(*args)
    return dq, dk, dv, dbeta, q.new_empty(0) if dg is None else dg, dS0


@backward_op.register_fake
def _(
    do: Tensor, d_final: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None,
    scale: float, S0: Tensor, cu: Tensor | None, saved: Tensor, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dg = q.new_empty(0) if g is None else g.new_empty(g.shape)
    dq, dk, dv, dbeta, dS0 = (x.new_empty(x.shape) for x in (q, k, v, beta, S0))
    return dq, dk, dv, dbeta, dg, dS0


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, beta, g, scale, S0, cu, backend = inputs
    ctx.save_for_backward(q, k, v, beta, g, S0, cu, output[2])
    ctx.scale, ctx.backend = scale, backend


def _backward(ctx: Any, do: Tensor, d_final: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, beta, g, S0, cu, saved = ctx.saved_tensors
    dq, dk, dv, dbeta, dg, dS0 = backward_op(
        do, d_final, q, k, v, beta, g, ctx.scale, S0, cu, saved, ctx.backend
    )
    return dq, dk, dv, dbeta, None if g is None else dg, None, dS0, None, None


op.register_autograd(_backward, setup_context=_setup)
