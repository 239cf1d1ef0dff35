r"""The op on a slice of time, which is an affine map of the state that came in.

One run with values ``[v, 0]`` and initial state ``[S_0, I]`` gives, with :math:`M_t` the product of
the transitions up to token ``t``, both :math:`o_t^{local}, Z` and :math:`M_t^\top q_t, M_T`:

.. math::
    o_t = o_t^{local} + \mathrm{scale} \cdot (M_t^\top q_t)^\top S_{in}, \qquad
    S_{out} = M_T S_{in} + Z
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from statezoo.kernels._exchange import Crossing
from statezoo.kernels.sequence import Shard


def run(
    shard: Shard, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float,
    S0: Tensor, cu: Tensor | None, local: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return outputs and final states of the slice; ``local`` is the op of one process."""
    crossing, (N, Hv, K, V) = Crossing(shard, "gated_delta_rule", q, cu), S0.shape
    eye = torch.eye(K, dtype=S0.dtype, device=S0.device).expand(N, Hv, K, K)
    wide = torch.cat([crossing.begin(S0), eye], -1)
    o, S = local(q, k, F.pad(v, (0, K)), beta, g, scale, wide, cu)
    (o, reads), (S, M) = o.split([V, K], -1), S.split([V, K], -1)
    M = M[: crossing.n]
    incoming = crossing.exchange(S, M, matrix=True)
    o = o + crossing.read(reads.to(S.dtype), incoming, cu).to(o.dtype)
    return o, crossing.add(S, M @ incoming)
