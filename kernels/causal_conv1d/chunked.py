r"""``W`` shifted products in the layout ``[B T D]``, a cache-sized span of tokens at a time.

On CPU this is 3 to 6 times faster, forward and backward, than ``F.conv1d`` on the transposed input,
and no slower than ``F.conv2d`` on the same memory as channels-last, whose backward pass is slower.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from statezoo.kernels.causal_conv1d._edges import edges

SPAN = 2**17  # numbers worked on at once: intermediate results stay in the cache


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, S0: Tensor, cu: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return outputs and final state."""
    W, ends = weight.shape[1], edges(x, weight.shape[1], cu)
    taps, b = _taps(weight, bias, S0.dtype)
    y = x.new_empty(x.shape[0], x.shape[1] + (cu is not None), x.shape[2])
    n = _span(x)
    for a in range(W - 1, x.shape[1], n):
        u = x[:, a - W + 1 : a + n].to(S0.dtype)
        y[:, a : a + u.shape[1] - W + 1] = _convolve(u, taps, b, silu)
    head = _convolve(ends.heads(x, S0), taps, b, silu)
    return ends.put(y, head), ends.final(x, S0)


def backward(
    dy: Tensor, d_final: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool,
    S0: Tensor, cu: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, weight, bias (empty where there is none) and initial state."""
    W, ends = weight.shape[1], edges(x, weight.shape[1], cu)
    taps, b = _taps(weight, bias, S0.dtype)
    dx = x.new_zeros(x.shape, dtype=S0.dtype)
    sums = S0.new_zeros(W + 1, x.shape[2])  # gradients of the taps, and of the bias
    n = _span(x)
    for a in range(W - 1, x.shape[1], n):
        u = x[:, a - W + 1 : a + n].to(S0.dtype)
        d = dy[:, a : a + n].to(S0.dtype)
        d = d if ends.body is None else d.where(ends.body[a - W + 1 : a - W + 1 + n], 0)
        _convolve_backward(d, u, taps, b, silu, dx[:, a - W + 1 : a + n], sums)
    heads = ends.heads(x, S0)
    d_heads = torch.zeros_like(heads)
    _convolve_backward(ends.take(dy).to(S0.dtype), heads, taps, b, silu, d_heads, sums)
    ends.add(dx, d_heads[:, W - 1 :])
    dS0 = ends.final_backward(d_final, dx) + d_heads[:, : W - 1].mT
    db = x.new_empty(0) if bias is None else sums[W].to(bias.dtype, copy=True)
    return dx.to(x.dtype), sums[:W].mT.to(weight.dtype, copy=True).contiguous(), db, dS0


def through_heads(d: Tensor, weight: Tensor, S0: Tensor) -> Tensor:
    """Turn gradients before the activation at the first tokens ``[N k D]`` into the state's."""
    taps, _ = _taps(weight, None, S0.dtype)
    W = taps.shape[0]
    dS = S0.new_zeros(S0.shape[0], W - 1 + d.shape[1], S0.shape[1])
    for j in range(W):
        dS[:, j : j + d.shape[1]].addcmul_(d, taps[j])
    return dS[:, : W - 1].mT


def _span(x: Tensor) -> int:
    return max(16, SPAN // max(1, x.shape[0] * x.shape[2]))


def _taps(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Lay the taps out as ``[W D]``."""
    taps = weight.mT.to(dtype, memory_format=torch.contiguous_format).contiguous()
    return taps, None if bias is None else bias.to(dtype)


def _convolve(u: Tensor, taps: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Convolve ``u [B L D]`` where all inputs are known: ``[B L-W+1 D]``."""
    W = taps.shape[0]
    T = u.shape[1] - W + 1
    y = u[:, :T] * taps[0] if bias is None else torch.addcmul(bias, u[:, :T], taps[0])
    for j in range(1, W):
        y.addcmul_(u[:, j : j + T], taps[j])
    return F.silu(y, inplace=True) if silu else y


def _convolve_backward(
    d: Tensor, u: Tensor, taps: Tensor, bias: Tensor | None, silu: bool, du: Tensor, sums: Tensor
) -> None:
    """Add the gradients of :func:`_convolve` to ``du [B L D]`` and ``sums [W+1 D]``."""
    W, T = taps.shape[0], d.shape[1]
    if silu:
        d = torch.ops.aten.silu_backward(d, _convolve(u, taps, bias, False))
    for j in range(W):
        du[:, j : j + T].addcmul_(d, taps[j])
        sums[j] += (d * u[:, j : j + T]).sum((0, 1))
    if bias is not None:
        sums[W] += d.sum((0, 1))
