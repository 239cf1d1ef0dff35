r"""What sharded ops share: their collectives, and states handed from slice to slice.

A slice is an affine map of the state, :math:`S_r = A_r S_{r-1} + Z_r`, with ``Z`` what the slice
leaves of no state at all. Every process gathers all ``(Z, A)`` and works out what enters its own
slice; the backward pass gathers the gradients of what entered, and runs the adjoint maps backwards.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from statezoo.kernels._varlen import Chunks, chunk_size, n_sequences
from statezoo.kernels.sequence import Shard, note

R = TypeVar("R")


def on_slice(run: Callable[..., R], shard: Shard, x: Tensor, *args: Any) -> R:
    """Call the form of an op for slices, in the precision of its tensors and uncompiled."""
    if torch.compiler.is_compiling():
        run = torch.compiler.disable(run)
    with torch.autocast(x.device.type, enabled=False):
        return run(shard, x, *args)


def all_gather(
    shard: Shard, op: str, direction: Literal["forward", "backward"], x: Tensor
) -> Tensor:
    """Stack ``x`` of all processes, ``[size *]``."""
    x = x.contiguous()
    out = x.new_empty(shard.size, *x.shape)
    dist.all_gather(list(out.unbind()), x, group=shard.group)
    note(op, direction, x, "all_gather")
    return out


def reduce_scatter(shard: Shard, op: str, x: Tensor) -> Tensor:
    """Add ``x [size *]`` up over all processes and return this one's row."""
    x = x.contiguous()
    out = torch.empty_like(x[0])
    dist.reduce_scatter(out, list(x.unbind()), group=shard.group)
    note(op, "backward", x, "reduce_scatter")
    return out


class Crossing:
    """The sequences of one call that run across slices.

    They are all of the call's where the shard is not packed. Where it is, the call has the shard's
    documents, or a few sequences (memories) for each: those of the first document come in, those
    of the last go out.

    Args:
        shard: The slice.
        op: Name of the op.
        x: A tensor of the call ``[B T *]``.
        cu: Bounds of its packed sequences.

    Attributes:
        n: How many come in, and go out.

    Raises:
        ValueError: If the call does not fit the slice.
    """

    def __init__(self, shard: Shard, op: str, x: Tensor, cu: Tensor | None) -> None:
        self.shard, self.op, N = shard, op, n_sequences(x, cu)
        documents = 1 if shard.cu_seqlens is None else shard.cu_seqlens.shape[0] - 1
        if cu is None and (shard.cu_seqlens is not None or x.shape[1] != shard.T):
            raise ValueError(
                f"{op}: inside a Shard of T={shard.T} tokens"
                + (", packed, it needs cu_seqlens." if shard.cu_seqlens is not None else "")
                + (f", got {x.shape[1]}." if x.shape[1] != shard.T else "")
            )
        if N % documents:
            raise ValueError(
                f"{op}: needs the {documents} documents of the Shard's slice, or as many sequences "
                f"for each, got {N}."
            )
        self.n = N if shard.cu_seqlens is None else N // documents

    def begin(self, S0: Tensor) -> Tensor:
        """Clear initial states ``[N *]`` of sequences that began on an earlier slice."""
        return torch.cat([S0[: self.n] * (not self.shard.continues), S0[self.n :]])

    def exchange(self, final: Tensor, A: Tensor | None, matrix: bool = False) -> Tensor:
        """Return the states that come in, ``[n *]``, zero where nothing does.

        Args:
            final: States ``[N *]`` after the slice, run from :meth:`begin`.
            A: What the slice does to each state that comes in: a factor that broadcasts to it, or
                with ``matrix`` a matrix in front of its last two axes; ``None`` leaves it as is.
            matrix: Whether it is.
        """
        Z = final[final.shape[0] - self.n :]
        S: Tensor = _Exchange.apply(Z, A, self.shard, self.op, matrix)  # type: ignore[no-untyped-call]
        return S

    def add(self, states: Tensor, S: Tensor) -> Tensor:
        """Add ``S [n *]`` to the states ``[N *]`` of the sequences that come in."""
        return torch.cat([states[: self.n] + S, states[self.n :]])

    def read(self, q: Tensor, S: Tensor, cu: Tensor | None) -> Tensor:
        """Read states ``[n H K V]`` that came in with queries ``[B T H K]``: ``[B T H V]``."""
        if cu is None:
            return torch.einsum("bthk,bhkv->bthv", q, S)
        N, T = cu.shape[0] - 1, q.shape[1]
        chunks = Chunks(1, T, chunk_size(T, N), cu)
        S = F.pad(S, [0] * 7 + [N - self.n])[chunks.segment.clamp(max=N - 1)]  # [chunks H K V]
        o = chunks.empty_like(q[..., :1].expand(*q.shape[:3], S.shape[-1]))
        chunks.store(o, chunks.load(q, 0, chunks.n, q.dtype) @ S, 0)
        return chunks.trim(o)


class _Exchange(torch.autograd.Function):
    """One gather of all slices' maps forward, one of the gradients of incoming states backward."""

    @staticmethod
    def forward(
        ctx: Any, Z: Tensor, A: Tensor | None, shard: Shard, op: str, matrix: bool
    ) -> Tensor:
        parts = [Z] if A is None else [Z, A.to(Z.dtype)]
        sent = torch.cat([x.flatten() for x in parts])
        got = all_gather(shard, op, "forward", sent).split([x.numel() for x in parts], 1)
        states, *maps = (x.view(-1, *part.shape) for x, part in zip(got, parts, strict=True))
        ctx.maps = maps[0] if maps else None
        ctx.shard, ctx.op, ctx.matrix = shard, op, matrix
        S = torch.zeros_like(Z)
        for r in range(shard.rank):
            S = (
                states[r] + _through(ctx, r, S)
                if shard.slices[r + 1].before
                else torch.zeros_like(S)
            )
        ctx.save_for_backward(S)
        return S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dS: Tensor) -> tuple[Tensor | None, ...]:
        shard, (S,) = ctx.shard, ctx.saved_tensors
        got = all_gather(shard, ctx.op, "backward", dS)
        d = torch.zeros_like(dS)  # gradient of the states that go out of slice r
        for r in range(shard.size - 2, shard.rank - 1, -1):
            d = got[r + 1] + _through(ctx, r + 1, d, adjoint=True)
            d = d if shard.slices[r + 1].before else torch.zeros_like(d)
        dA = None
        if ctx.needs_input_grad[1]:
            own = ctx.maps[shard.rank]
            dA = d @ S.mT if ctx.matrix else (d * S).sum_to_size(own.shape)
            dA = dA * (len(shard.slices[shard.rank].bounds) == 2)
        return d, dA, None, None, None


def _through(ctx: Any, r: int, S: Tensor, adjoint: bool = False) -> Tensor:
    """Take a state, or its gradient back, through slice ``r``: not beyond its first document."""
    if len(ctx.shard.slices[r].bounds) > 2:
        return torch.zeros_like(S)
    if ctx.maps is None:
        return S
    A: Tensor = ctx.maps[r]
    if not ctx.matrix:
        return A * S
    return A.mT @ S if adjoint else A @ S
