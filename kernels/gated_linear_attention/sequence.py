r"""The op on a slice of time: what came in fades by the slice's decays, and is read besides.

.. math::
    o_t = o_t^{local} + \mathrm{scale} \cdot (q_t e^{c_t})^\top S_{in}, \qquad
    S_{out} = e^{c_T} S_{in} + Z, \qquad c_t = \sum_{s \le t} g_s

Source: Sun et al., LASP-2, arXiv:2502.07563, algorithm 2, with decay.
"""

from collections.abc import Callable

from torch import Tensor

from statezoo.kernels._exchange import Crossing
from statezoo.kernels.sequence import Shard

Local = Callable[..., tuple[Tensor, Tensor]]


def run(
    shard: Shard, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, S0: Tensor,
    cu: Tensor | None, local: Local,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return outputs and final states of the slice; ``local`` is the op of one process."""
    crossing = Crossing(shard, "gated_linear_attention", q, cu)
    o, S = local(q, k, v, g, scale, crossing.begin(S0), cu)
    reads, A = q.to(S.dtype).repeat_interleave(v.shape[2] // q.shape[2], 2) * scale, None
    if g is not None:
        c, total = _cumulated(g.to(S.dtype), cu, local)
        per_head = (..., None) if g.ndim == 3 else (...,)
        reads, A = reads * c.exp()[per_head], total[: crossing.n].exp()[per_head][..., None]
    incoming = crossing.exchange(S, A)
    o = o + crossing.read(reads, incoming, cu).to(o.dtype)
    return o, crossing.add(S, incoming if A is None else A * incoming)


def _cumulated(g: Tensor, cu: Tensor | None, local: Local) -> tuple[Tensor, Tensor]:
    """Add gates ``[B T ...]`` up in each sequence: so far, and in all ``[N ...]``.

    Packed, by the op itself, as a memory of one key that never fades.
    """
    if cu is None:
        c = g.cumsum(1)
        return c, c[:, -1]
    one = g.new_ones(1, g.shape[1], 1, 1)
    values = g.flatten(2)[:, :, None]
    zero = g.new_zeros(cu.shape[0] - 1, 1, 1, values.shape[-1])
    c, total = local(one, one, values, None, 1.0, zero, cu)
    return c.view(g.shape), total.view(-1, *g.shape[2:])
