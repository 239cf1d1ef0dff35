r"""What the operations cost, told to ``torch.utils.flop_counter.FlopCounterMode``.

Counted is the work of the model, whatever form computes it: the products that write to the state
and read from it, two FLOPs for each multiply-add. A chunk-parallel form does more of them, and a
backward pass that recomputes does some twice; neither is useful work, so neither counts (as in
Chowdhery et al., PaLM, arXiv:2204.02311v5, appendix B). Decays, norms and other elementwise work
do not count either. Per token and head of width ``K x V``, forward:

==========================  ==================================================================
gated_linear_attention      ``4 K V``: the write ``k v^T``, the read ``S^T q``
gated_delta_rule            ``(4 n + 2) K V`` for ``n`` writes: each reads ``S^T k`` and writes
selective_scan              ``4 N`` a channel: the write ``dt B x``, the read ``C h``
causal_conv1d               ``2 W`` a channel, of ``W`` taps
linear_cross_entropy        ``2 D W``, the logits of ``W`` symbols; as often for each gradient
==========================  ==================================================================

A backward pass has two products for each of the forward pass. Importing this registers the
formulas.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from statezoo.kernels.causal_conv1d import _op as _conv  # noqa: F401
from statezoo.kernels.gated_delta_rule import _op as _delta  # noqa: F401
from statezoo.kernels.gated_linear_attention import _op as _linear  # noqa: F401
from statezoo.kernels.linear_cross_entropy import _op as _loss  # noqa: F401
from statezoo.kernels.selective_scan import _op as _scan  # noqa: F401

__all__ = ["attention_flops", "visible_pairs"]

Shape = Sequence[int]
OPS = torch.ops.statezoo


@register_flop_formula(OPS.gated_linear_attention)
def linear_attention_flops(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """Count ``4 K V`` for each token and value head."""
    return 4 * prod(v) * k[-1]


@register_flop_formula(OPS.gated_linear_attention_backward)
def linear_attention_backward_flops(
    do: Shape, d_final: Shape, q: Shape, k: Shape, v: Shape, *_: Any, **__: Any
) -> int:
    """Count twice the forward pass."""
    return 2 * linear_attention_flops(q, k, v)


@register_flop_formula(OPS.gated_delta_rule)
def delta_rule_flops(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """Count ``4 K V`` for each write and ``2 K V`` for each read; ``v [B T n Hv V]``."""
    n = v[2]
    return (4 * n + 2) * (prod(v) // max(n, 1)) * k[-1]


@register_flop_formula(OPS.gated_delta_rule_backward)
def delta_rule_backward_flops(
    do: Shape, d_final: Shape, q: Shape, k: Shape, v: Shape, *_: Any, **__: Any
) -> int:
    """Count twice the forward pass."""
    return 2 * delta_rule_flops(q, k, v)


@register_flop_formula(OPS.selective_scan)
def scan_flops(x: Shape, dt: Shape, A: Shape, *_: Any, **__: Any) -> int:
    """Count ``4 N`` for each token and channel."""
    return 4 * prod(x) * A[1]


@register_flop_formula(OPS.selective_scan_backward)
def scan_backward_flops(
    dy: Shape, d_final: Shape, x: Shape, dt: Shape, A: Shape, *_: Any, **__: Any
) -> int:
    """Count twice the forward pass."""
    return 2 * scan_flops(x, dt, A)


@register_flop_formula(OPS.causal_conv1d)
def conv_flops(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """Count ``2 W`` for each token and channel."""
    return 2 * prod(x) * weight[1]


@register_flop_formula(OPS.causal_conv1d_backward)
def conv_backward_flops(
    dy: Shape, d_final: Shape, x: Shape, weight: Shape, *_: Any, **__: Any
) -> int:
    """Count twice the forward pass."""
    return 2 * conv_flops(x, weight)


@register_flop_formula(OPS.linear_cross_entropy_total)
def loss_and_gradients_flops(
    x: Shape, weight: Shape, targets: Shape, ignore_index: int, chunk: int, need_x: bool,
    need_weight: bool, **_: Any,
) -> int:  # fmt: skip
    """Count the logits, and the gradients that the same pass computes."""
    return 2 * prod(x) * weight[0] * (1 + need_x + need_weight)


@register_flop_formula(OPS.linear_cross_entropy)
def loss_flops(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """Count the logits."""
    return 2 * prod(x) * weight[0]


@register_flop_formula(OPS.linear_cross_entropy_backward)
def loss_backward_flops(
    scale: Shape, lse: Shape, x: Shape, weight: Shape, targets: Shape, ignore_index: int,
    chunk: int, need_x: bool, need_weight: bool, **_: Any,
) -> int:  # fmt: skip
    """Count the gradients, not the logits made again for them."""
    return 2 * prod(x) * weight[0] * (need_x + need_weight)


def visible_pairs(T: int, window: int | None = None, sinks: int = 0) -> int:
    """Count the pairs of a query and a token that it sees, over a sequence of ``T`` tokens."""
    if window is None or window >= T:
        return T * (T + 1) // 2
    near = window * (window + 1) // 2 + (T - window) * window
    rest = T - window  # queries with tokens beyond their window: 1, 2, .. rest of them
    few = min(sinks, rest)
    return near + few * (few + 1) // 2 + (rest - few) * few


def attention_flops(q: Shape, k: Shape, v: Shape, window: int | None = None, sinks: int = 0) -> int:
    """Count the forward pass of attention: ``2 (K + V)`` for each head and pair that it sees.

    What a causal mask hides is no work of the model, though some kernels compute it; the MFU of
    PaLM counts it too, and is up to twice as high for this part.

    Args:
        q: Shape ``[B T H K]`` of the queries.
        k: Shape of the keys.
        v: Shape ``[B T Hkv V]`` of the values.
        window: How many last tokens are visible; None for all.
        sinks: How many first ones stay so.
    """
    return 2 * q[0] * q[2] * (k[-1] + v[-1]) * visible_pairs(q[1], window, sinks)
