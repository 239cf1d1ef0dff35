"""The selective scan with decays between -1 and 1, for Mamba with negative eigenvalues."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from statezoo.kernels._dispatch import accumulator
from statezoo.kernels._varlen import check_bounds, check_packing, n_sequences, segment_ids

CHUNK = 64  # tokens whose [E N] states are in memory at once


def signed_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Run a scan per channel, whose decay may be negative.

    .. math::
        S_t = (2 e^{\Delta_t A} - 1) S_{t-1} + \Delta_t x_t B_t^\top, \qquad y_t = S_t C_t + D x_t

    Args:
        x: Inputs ``[B T E]``.
        dt: Step sizes ``[B T E]``, above 0.
        A: Rates ``[E N]``, below 0.
        B: Writes ``[B T N]``.
        C: Reads ``[B T N]``.
        D: Skip ``[E]``.
        initial_state: ``[sequences E N]``; default zeros.
        cu_seqlens: Bounds of sequences packed along ``T``; needs ``B = 1``.

    Returns:
        Outputs ``[B T E]`` in the dtype of ``x``, and the final state in float32 (float64 if an
        input is).

    Raises:
        ValueError: If ``cu_seqlens`` does not fit.

    Source: Grazzi et al., Unlocking State-Tracking in Linear RNNs, arXiv:2411.12537v2, section 4.
    """
    check_packing("signed_scan", x, cu_seqlens)
    acc, T = accumulator(x, dt, A, initial_state), x.shape[1]
    shape = (n_sequences(x, cu_seqlens), *A.shape)
    S0 = x.new_zeros(shape, dtype=acc) if initial_state is None else initial_state.to(acc)
    step = torch.arange(T, device=x.device)
    if cu_seqlens is None:
        S, final = S0, S0
        own, first = torch.zeros_like(step), torch.zeros_like(step, dtype=torch.bool)
        last = torch.full((1,), T - 1, device=x.device)
    else:
        check_bounds(cu_seqlens, T)
        cu, own = cu_seqlens.long(), segment_ids(cu_seqlens, T)
        S, final = torch.zeros_like(S0[:1]), S0
        first, last = step == cu[own], torch.where(cu.diff() > 0, cu[1:] - 1, -1)
    inputs, out = [y.to(acc) for y in (x, dt, B, C)], []
    for i in range(0, T, CHUNK):
        part = slice(i, i + CHUNK)
        chunk = (*(y[:, part] for y in inputs), A.to(acc), S, S0, own[part], first[part])
        y, h = checkpoint(_chunk, *chunk, use_reentrant=False, preserve_rng_state=False)
        S, here = h[:, -1], (last >= i) & (last < i + h.shape[1])
        if cu_seqlens is None:
            final = S
        else:
            ends = h[0, (last - i).clamp(0, h.shape[1] - 1)]  # [sequences E N]
            final = torch.where(here[:, None, None], ends, final)
        out.append(y)
    y = torch.cat(out, 1) if out else inputs[0]
    return (y + D.to(acc) * inputs[0]).to(x.dtype), final


def _chunk(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor,
    S: Tensor, S0: Tensor, own: Tensor, first: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return outputs and all states ``[B L E N]`` after a state ``S``, by a scan of log2(L) steps.

    Where a sequence begins (``first``), its own initial state takes the place of what came before.
    """
    a = 2 * (dt[..., None] * A).exp() - 1
    h = (dt * x)[..., None] * B[:, :, None]
    begin = first[:, None, None]
    if S0.shape[0] != S.shape[0] or x.shape[0] == 1:
        h, a = torch.where(begin, h + a * S0[own], h), torch.where(begin, 0, a)
    n = 1
    while n < x.shape[1]:
        pad = (0, 0, 0, 0, n, 0)
        h = h + a * F.pad(h[:, :-n], pad)
        a = a * F.pad(a[:, :-n], pad, value=1.0)
        n *= 2
    h = h + a * S[:, None]
    return torch.einsum("blen,bln->ble", h, C), h
