"""Tokens cut into chunks: one layout for batches and for sequences packed along time.

Chunk-parallel code sees ``[n G C *]``: ``n`` chunks in time order, ``G`` independent lanes (batch
times heads) and ``C`` tokens, zero where a chunk is not full. With ``cu_seqlens`` every sequence
starts a chunk of its own, so that no chunk holds tokens of two. Nothing here waits for a GPU: the
number of chunks follows from ``T`` and ``N`` alone, as an upper bound.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def n_sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """Count the sequences in ``x [B T ...]``: ``B``, or the packed ones."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def check_packing(op: str, x: Tensor, cu_seqlens: Tensor | None) -> None:
    """Check dtype, shape and batch size of ``cu_seqlens`` (its values: :class:`Chunks`).

    Raises:
        ValueError: If it is not an int vector of at least two bounds, or if ``x`` has ``B != 1``.
    """
    if cu_seqlens is None:
        return
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"{op}: cu_seqlens needs to be an int vector [N+1] of bounds 0..T with N >= 1, got "
            f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}."
        )
    if x.shape[0] != 1:
        raise ValueError(
            f"{op}: packed sequences lie along T, so cu_seqlens needs B = 1, got B = {x.shape[0]}: "
            "flatten the batch first."
        )


def check_bounds(cu_seqlens: Tensor, T: int) -> None:
    """Check the values of ``cu_seqlens``, where reading them does not stall a GPU.

    Raises:
        ValueError: If the bounds do not rise from 0 to ``T``.
    """
    if cu_seqlens.device.type != "cpu":
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != T or sorted(bounds) != bounds:
        raise ValueError(f"cu_seqlens must rise from 0 to T={T}, got {bounds[:4]}..{bounds[-2:]}.")


def check_state(op: str, state: Tensor | None, shape: tuple[int, ...]) -> None:
    """Check the shape of an initial state.

    Raises:
        ValueError: If it differs from ``shape``.
    """
    if state is not None and tuple(state.shape) != shape:
        raise ValueError(f"{op}: initial_state must be {shape}, got {tuple(state.shape)}.")


def segment_ids(cu_seqlens: Tensor, T: int) -> Tensor:
    """Number the packed sequence of every token, ``[T]``."""
    return torch.searchsorted(
        cu_seqlens[1:].long(), torch.arange(T, device=cu_seqlens.device), right=True
    )


def chunk_size(T: int, N: int, most: int = 64, least: int = 16) -> int:
    """Choose a power of two near the mean length of ``N`` sequences of ``T`` tokens in all."""
    C = least
    while most > C < T // max(N, 1):
        C *= 2
    return C


class Chunks:
    """The layout of one call.

    Args:
        B: Sequences, 1 if packed.
        T: Tokens along time.
        C: Tokens a chunk.
        cu_seqlens: Bounds of packed sequences.
    """

    def __init__(self, B: int, T: int, C: int, cu_seqlens: Tensor | None) -> None:
        self.B, self.T, self.C = B, T, C
        self.packed = cu_seqlens is not None
        if cu_seqlens is None:
            self.n = -(-T // C)
            return
        check_bounds(cu_seqlens, T)
        cu = cu_seqlens.long()
        N = cu.shape[0] - 1
        starts = F.pad(((cu.diff() + C - 1) // C).cumsum(0), (1, 0))  # [N+1] first chunk of each
        self.n = int(starts[-1]) if cu.device.type == "cpu" else T // C + N
        chunk = torch.arange(self.n, device=cu.device)
        self.segment = torch.searchsorted(starts[1:], chunk, right=True)  # [n], N past the end
        own = self.segment.clamp(max=N - 1)
        self.first = chunk == starts[own]
        self.last = chunk == starts[own + 1] - 1
        within = (chunk - starts[own])[:, None] * C + torch.arange(C, device=cu.device)  # [n C]
        token = cu[own, None] + within
        inside = (token < cu[own + 1, None]) & (self.segment < N)[:, None]
        self.token = torch.where(inside, token, T).flatten()  # [n*C], T where there is none

    def spans(self, n: int) -> Iterator[tuple[int, int]]:
        """Cut the chunks into runs of at most ``n``, in time order."""
        return ((i, min(i + n, self.n)) for i in range(0, self.n, n))

    def load(self, x: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Copy chunks ``start`` to ``stop`` of ``x [B T H *]`` as ``[n B*H C *]``."""
        n, C = stop - start, self.C
        if self.packed:
            token = self.token[start * C : stop * C]
            rows = x[:, token.clamp(max=self.T - 1)]
            rows.masked_fill_((token == self.T).view(1, -1, *[1] * (x.ndim - 2)), 0)
        else:
            rows = x[:, start * C : min(stop * C, self.T)]
            if rows.shape[1] < n * C:
                rows = F.pad(rows, [0, 0] * (x.ndim - 2) + [0, n * C - rows.shape[1]])
        rows = rows.view(self.B, n, C, *x.shape[2:]).movedim(1, 0).movedim(2, 3)  # [n B H C *]
        return rows.to(dtype, copy=True, memory_format=torch.contiguous_format).flatten(1, 2)

    def empty_like(self, x: Tensor) -> Tensor:
        """Allocate an output to be filled by :meth:`store`, and cut by :meth:`trim`."""
        return x.new_empty(x.shape[0], x.shape[1] + self.packed, *x.shape[2:])

    def trim(self, out: Tensor) -> Tensor:
        """Return the tokens of a filled output."""
        return out[:, : self.T]

    def store(self, out: Tensor, x: Tensor, start: int) -> None:
        """Write ``x [n B*H C *]`` to the tokens of ``out [B T H *]`` from chunk ``start`` on."""
        n, C = x.shape[0], self.C
        rows = x.view(n, self.B, -1, *x.shape[2:])  # [n B H C *]
        rows = rows.movedim(2, 3).movedim(0, 1).flatten(1, 2)  # [B n*C H *]
        if self.packed:
            out[0].index_copy_(0, self.token[start * C : (start + n) * C], rows[0].to(out.dtype))
        else:
            out[:, start * C : (start + n) * C] = rows[:, : self.T - start * C]

    def enter(self, S: Tensor, initial: Tensor, i: int) -> Tensor:
        """Return the state before chunk ``i``: the running one, or its sequence's ``initial``.

        States are ``[G *]``; ``initial`` is ``[G *]``, or ``[N G *]`` if packed.
        """
        if not self.packed:
            return initial if i == 0 else S
        return torch.where(self.first[i], self._of(initial, i), S)

    def leave(self, S: Tensor, final: Tensor, i: int) -> None:
        """Note the state after chunk ``i`` in ``final``, shaped as ``initial`` in :meth:`enter`."""
        if not self.packed:
            if i == self.n - 1:
                final.copy_(S)
        else:
            at = self.segment[i].clamp(max=final.shape[0] - 1)
            final[at] = torch.where(self.last[i] & (self.segment[i] < final.shape[0]), S, final[at])

    def enter_backward(self, dS: Tensor, d_final: Tensor, i: int) -> Tensor:
        """Return the gradient of the state after chunk ``i``."""
        if not self.packed:
            return d_final if i == self.n - 1 else dS
        return torch.where(self.last[i], self._of(d_final, i), dS)

    def leave_backward(self, dS: Tensor, d_initial: Tensor, i: int) -> None:
        """Note the gradient of the state before chunk ``i`` in ``d_initial``."""
        if not self.packed:
            if i == 0:
                d_initial.copy_(dS)
        else:
            at = self.segment[i].clamp(max=d_initial.shape[0] - 1)
            here = self.first[i] & (self.segment[i] < d_initial.shape[0])
            d_initial[at] = torch.where(here, dS, d_initial[at])

    def _of(self, per_sequence: Tensor, i: int) -> Tensor:
        return per_sequence[self.segment[i].clamp(max=per_sequence.shape[0] - 1)]
