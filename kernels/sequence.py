"""One sequence on several processes: which slice of time this one holds, and what it sends."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import TracebackType
from typing import Literal, NamedTuple

import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor

__all__ = ["Shard", "Traffic", "current", "traffic"]

_open: list["Shard"] = []  # of the process: autograd may recompute on threads of its own
_logs: list[list["Traffic"]] = []


class Slice(NamedTuple):
    """What documents do in a slice of time.

    Attributes:
        bounds: Bounds of its documents, counted from its first token.
        before: Tokens of the first on earlier slices.
        after: Tokens of the last on later slices.
    """

    bounds: list[int]
    before: int
    after: int

    @classmethod
    def of(cls, bounds: list[int] | None, start: int, stop: int) -> "Slice":
        """Cut ``start`` to ``stop`` out of the whole; one sequence without end if not packed."""
        if bounds is None:
            return cls([0, stop - start], start, 1)
        last = stop == bounds[-1]  # whose empty documents at the end are this slice's
        here = [
            (a, b)
            for a, b in pairwise(bounds)
            if (a < stop or last) and (b > start or a == b == start)
        ]
        ends = [min(b, stop) - start for _, b in here]
        return cls([0, *ends], max(start - here[0][0], 0), max(here[-1][1] - stop, 0))


class Shard:
    """This process's slice of time, of sequences that run across all processes of a group.

    Inside ``with shard:`` every op of :mod:`statezoo.kernels` takes its tensors for the slice of
    tokens ``start`` to ``start + T`` and gives what one process would give there for the whole, in
    values and gradients: states, the inputs of convolutions, and keys and values of attention come
    from the other processes. All of these must call the same ops in the same order. The backward
    pass may come after the ``with``; activations recomputed in it need it again.

    Without ``cu_seqlens``, all sequences of a batch run across all slices. With it, the documents
    of the slice are packed: the first may go on from the slice before, the last into the next.
    An ``initial_state`` counts where its sequence begins; final states are those after the slice.

    Args:
        group: Processes in the order of their slices; default all.
        T: Tokens of a slice, alike on all processes.
        cu_seqlens: Bounds ``0 .. size * T`` of documents packed along the whole, alike on all
            processes. An empty document belongs to one slice only: that of the token after it.

    Attributes:
        rank: Number of this process in the group.
        size: Processes of the group.
        T: Tokens of a slice.
        start: First token of this slice, ``rank * T``.
        cu_seqlens: Bounds ``0 .. T`` of the documents in this slice, or ``None``.
        before: Tokens on earlier slices of the sequence that this slice begins with.
        continues: Whether there are such.
        goes_on: Whether the sequence that this slice ends with has tokens on the next.
        slices: What the documents do in each slice.

    Raises:
        ValueError: On every process, if ``T`` or ``cu_seqlens`` differ between them or do not fit
            together, or if there are no processes.

    Example:
        >>> with Shard(group, T=len_of_slice) as shard:  # doctest: +SKIP
        ...     o, S = gated_linear_attention(shard.take(q), shard.take(k), shard.take(v))

    Source: Sun et al., LASP-2, arXiv:2502.07563, for states and for keys and values (LASP-2H).
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        T: int,
        cu_seqlens: Int[Tensor, " N+1"] | None = None,
    ) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                "Shard needs a process group of torch.distributed, and there is none: start with "
                "torchrun, and call torch.distributed.init_process_group first."
            )
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.T, self.start = T, self.rank * T
        bounds = None if cu_seqlens is None else cu_seqlens.tolist()
        _check(T, bounds, self.group, self.size)
        self.slices = [Slice.of(bounds, r * T, (r + 1) * T) for r in range(self.size)]
        own = self.slices[self.rank]
        self.before, self.continues, self.goes_on = own.before, own.before > 0, own.after > 0
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.new_tensor(own.bounds)

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """Cut this slice out of ``x``, whose axis ``dim`` is the whole time.

        Raises:
            ValueError: If that axis has not ``size * T`` entries.
        """
        if x.shape[dim] != self.size * self.T:
            raise ValueError(
                f"Shard.take needs {self.size} slices of {self.T} tokens along axis {dim}, "
                f"{self.size * self.T} in all, got {tuple(x.shape)}."
            )
        return x.narrow(dim, self.start, self.T)

    def __enter__(self) -> "Shard":
        _open.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _open.pop()


def current() -> Shard | None:
    """Return the shard whose ``with`` was opened last and is open, if any."""
    return _open[-1] if _open else None


class Traffic(NamedTuple):
    """One collective of an op.

    Attributes:
        op: Name of the op.
        direction: Pass that it belongs to.
        bytes: What this process put in.
        collective: Its name.
    """

    op: str
    direction: Literal["forward", "backward"]
    bytes: int
    collective: str


@contextmanager
def traffic() -> Iterator[list[Traffic]]:
    """Note every collective of sharded ops, on any thread, until the ``with`` is left."""
    log: list[Traffic] = []
    _logs.append(log)
    try:
        yield log
    finally:
        _logs[:] = [other for other in _logs if other is not log]


def note(op: str, direction: Literal["forward", "backward"], sent: Tensor, collective: str) -> None:
    """Tell every open :func:`traffic` of a collective."""
    for log in _logs:
        log.append(Traffic(op, direction, sent.numel() * sent.element_size(), collective))


def _check(T: int, bounds: list[int] | None, group: dist.ProcessGroup | None, size: int) -> None:
    """Compare what all processes were given, so that all of them stop where one is wrong."""
    given: list[tuple[int, list[int] | None]] = [(0, None)] * size
    dist.all_gather_object(given, (T, bounds), group=group)
    lengths = [length for length, _ in given]
    if len(set(lengths)) > 1 or T < 1:
        raise ValueError(
            "Shard needs slices of one length of at least 1 on all processes, got T = "
            f"{', '.join(map(str, lengths))} on ranks 0 to {size - 1}: pad or cut the sequence to "
            f"a multiple of {size}."
        )
    if any(other != bounds for _, other in given):
        raise ValueError(
            "Shard needs cu_seqlens of the whole sequence, alike on all processes, and they differ."
        )
    if bounds is not None and (bounds[0], bounds[-1], sorted(bounds)) != (0, size * T, bounds):
        raise ValueError(
            f"Shard: cu_seqlens must rise from 0 to {size} slices of T={T}, {size * T}, got "
            f"{bounds[:4]}..{bounds[-2:]}."
        )
