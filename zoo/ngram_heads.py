"""n-gram heads: what came after the last tokens, the last times that they were there."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statezoo.kernels._varlen import segment_ids
from statezoo.kernels.attention import KV, keep
from statezoo.kernels.ngram_mean import ngram_mean
from statezoo.kernels.sequence import current
from statezoo.zoo.mixer import Mixer, State, state_bytes
from statezoo.zoo.slices import with_earlier

ORDERS = [1, 2, 3]


class NgramState(NamedTuple):
    """The tokens that still count, right-aligned; other slots are zero.

    Attributes:
        ids: The tokens ``[N L]``.
        h: What the mixer read there, ``[N L D]``.
        length: Real entries of each sequence, ``[N]`` int64.
    """

    ids: Tensor
    h: Tensor
    length: Tensor


class NgramHeads(Mixer):
    r"""Heads that look where the last tokens stood before, and read what followed: by no weight.

    .. math::
        y_t = W_0 h_t + \sum_n W_n a_{tn}, \qquad
        a_{tn} = \frac{1}{|M_{tn}|} \sum_{s \in M_{tn}} h_s, \qquad
        M_{tn} = \{ s < t : x_{s-n..s-1} = x_{t-n+1..t} \}

    ``x`` are the tokens, ``h`` is the stream, and ``a`` is 0 where the last ``n`` tokens are new.
    Put one layer between those of another mixer. Its state is the past, as that of attention, or
    with a window the last of it: then a token sees what it would if the text began with the window.

    Tokens are compared, not the stream, so the net needs ``input_ids``. Of a sequence that lies on
    several processes, tokens and stream of the earlier slices are gathered.

    Args:
        d_model: Width of the stream.
        orders: Lengths ``n`` of the n-grams, each with a map ``W_n``.
        window: How many last tokens count, the token itself included, copies of the n-gram as well
            as what follows; default all.

    Raises:
        ValueError: If an order is below 1 or there twice, or a window too short for it.

    Source: Akyuerek et al., In-Context Language Learning, arXiv:2401.12973, n-gram heads.
    """

    observable = False
    learnable = ()
    reads_ids = True

    def __init__(
        self, d_model: int, *, orders: list[int] = ORDERS, window: int | None = None
    ) -> None:
        super().__init__()
        if not orders or min(orders) < 1 or len(set(orders)) < len(orders):
            raise ValueError(f"ngram_heads: orders must be different, from 1 on; got {[*orders]}.")
        if window is not None and window < max(orders) + 2:
            raise ValueError(
                f"ngram_heads: a window must be at least {max(orders) + 2}, for {max(orders)} "
                f"tokens, one that follows and the token itself; got window={window}."
            )
        self.orders, self.window = [*orders], window
        self.h_proj = nn.Linear(d_model, d_model, bias=False)
        self.a_proj = nn.Linear(len(orders) * d_model, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        state: State = None,
        cu_seqlens: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> tuple[Tensor, NgramState | None]:
        """Mix ``x [B T D]`` along time, continuing from ``state``; ``ids [B T]`` are the tokens.

        Raises:
            ValueError: If there are no tokens.
        """
        if ids is None:
            raise ValueError(
                "ngram_heads compares tokens, and got none: give the net input_ids, not "
                "inputs_embeds, or take a net without ngram_heads."
            )
        present: NgramState | None = None
        if state is None and (cu_seqlens is not None or current() is not None):
            line, h, bounds = with_earlier(ids, x, cu_seqlens)
            a = self.read(h, line, x.shape[1], bounds)  # nobody continues
        else:
            past = NgramState(*(state or self.initial_state(len(x), x)))
            a, present = self.go_on(x, ids, past, cu_seqlens)
        return self.h_proj(x) + self.a_proj(a), present

    def read(self, h: Tensor, ids: Tensor, T: int, cu_seqlens: Tensor | None = None) -> Tensor:
        """Return the means ``[B T n*D]`` for the last ``T`` of the tokens ``h [B L D]``."""
        return ngram_mean(
            h, ids, orders=self.orders, window=self.window, queries=T, cu_seqlens=cu_seqlens
        )

    def go_on(
        self, x: Tensor, ids: Tensor, past: NgramState, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, NgramState]:
        """Return the means ``[B T n*D]`` for tokens after ``past``, and the state after them."""
        P, T = past.ids.shape[1], x.shape[1]
        own, step = None, torch.arange(T, device=x.device)
        new: int | Tensor = T
        if cu_seqlens is not None:  # a row for each sequence, right-padded
            cu = cu_seqlens.long()
            own, new = segment_ids(cu, T), cu.diff()
            place = torch.arange(int(new.max()), device=x.device)
            place = torch.where(place < new[:, None], cu[:-1, None] + place, T)  # [N longest]
            x, ids = F.pad(x[0], (0, 0, 0, 1))[place], F.pad(ids[0], (0, 1))[place]
            step = step - cu[own]
        empty = torch.arange(P, device=x.device) < P - past.length[:, None]
        line = torch.cat([past.ids.masked_fill(empty, -1), ids], 1)
        h = torch.cat([past.h.to(x.dtype), x], 1)
        a = self.read(h, line, x.shape[1])
        before = KV(past.ids[..., None, None], past.h[:, :, None], past.length)
        after = keep(
            before, ids[..., None, None], x[:, :, None], past.length + new,
            self.window, ragged=own is not None,
        )  # fmt: skip
        present = NgramState(after.k[..., 0, 0], after.v[:, :, 0], after.length)
        return a if own is None else a[own, step][None], present

    def initial_state(self, n: int, like: Tensor) -> NgramState:
        """Return an empty past of ``n`` sequences."""
        L = 0 if self.window is None else self.window - 1
        ids = torch.zeros(n, L, dtype=torch.long, device=like.device)
        return NgramState(ids, like.new_zeros(n, L, self.h_proj.in_features), ids.new_zeros(n))

    def state_size(self, T: int) -> int:
        """Return the bytes of state of one sequence after ``T`` tokens."""
        L = T if self.window is None else self.window - 1
        h = state_bytes(L, self.h_proj.in_features, dtype=self.h_proj.weight.dtype)
        return h + (L + 1) * torch.long.itemsize
