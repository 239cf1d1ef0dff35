"""What the Triton backends share: packing for kernels, block sizes, launching.

Imported only when a fused backend runs. A kernel works on one chunk of one sequence and head, or
walks over the chunks of one sequence. It finds its tokens by arithmetic, or, packed, from two small
tables made on the device: no length is ever read back, and none is part of a compiled kernel.
"""

# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
# (arguments of Triton kernels are pointers and tiles, which Python's types do not know)
import os
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from statezoo.kernels._varlen import check_bounds, chunk_size, n_sequences

MOST = 64  # tokens a chunk: one tile of the tensor cores' 64 rows
WIDEST = 256  # channels of a key or value


class Layout(NamedTuple):
    """Where the chunks of a call lie.

    Attributes:
        C: Tokens a chunk.
        T: Tokens of a sequence, or of all that are packed.
        N: Sequences.
        n: Chunks of a sequence; of all (as an upper bound) if packed.
        total: Chunks in all.
        cu: Bounds of packed sequences, or None.
        starts: First chunk of each packed sequence, and the end ``[N+1]``.
        segment: Packed sequence of each chunk ``[n]``; ``N`` where there is none.
    """

    C: int
    T: int
    N: int
    n: int
    total: int
    cu: Tensor | None
    starts: Tensor | None
    segment: Tensor | None

    @property
    def tables(self) -> dict[str, Any]:
        """The arguments that every kernel takes."""
        tables = {"cu": self.cu, "starts": self.starts, "segment": self.segment}
        return tables | {"T": self.T, "N": self.N, "NT": self.n, "C": self.C}


def tokens_a_chunk(T: int, cu: Tensor | None) -> int:
    """Choose the chunk size: 16, 32 or 64, no matter how large ``T`` is beyond that."""
    return chunk_size(T, 1 if cu is None else cu.shape[0] - 1, MOST)


def layout(x: Tensor, cu: Tensor | None) -> Layout:
    """Lay out the chunks of ``x [B T ...]`` without waiting for the device."""
    (B, T), C = x.shape[:2], tokens_a_chunk(x.shape[1], cu)
    if cu is None:
        n = -(-T // C)
        return Layout(C, T, B, n, B * n, None, None, None)
    check_bounds(cu, T)
    N = n_sequences(x, cu)
    n = T // C + N
    starts = F.pad(((cu.diff() + C - 1) // C).cumsum(0), (1, 0))
    segment = torch.searchsorted(starts[1:], torch.arange(n, device=cu.device), right=True)
    return Layout(C, T, N, n, n, cu.contiguous(), starts.int(), segment.int())


def operands(v: Tensor) -> tuple[torch.dtype, str]:
    """Choose the dtype of matrix operands, and how the tensor cores take float32.

    bfloat16 where v, and so the output, is. float16 has too small a range for states and goes
    through TF32, which has as many digits. float32 means three TF32 products each: errors near
    float32's, at several times the speed of plain float32 arithmetic.
    """
    if v.dtype == torch.bfloat16:
        return torch.bfloat16, "tf32"
    return torch.float32, "tf32" if v.dtype == torch.float16 else "tf32x3"


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round once what every kernel would round, ``x [...]`` contiguous; never widen."""
    return (x.to(dtype) if dtype.itemsize < x.dtype.itemsize else x).contiguous()


def check_widths(op: str, K: int, V: int) -> None:
    """Check that tiles fit on a multiprocessor.

    Raises:
        ValueError: If keys or values are wider than 256.
    """
    if max(K, V) > WIDEST:
        raise ValueError(
            f"{op}: backend 'triton' takes K and V up to {WIDEST}, got K={K}, V={V}; use 'torch'."
        )


def block(width: int, most: int) -> int:
    """Return the power of two from 16 to ``most`` that covers ``width`` best."""
    return max(16, min(most, 1 << (width - 1).bit_length()))


class Hardware(NamedTuple):
    """A GPU's multiprocessors, and the bytes of shared memory that a program may have."""

    units: int
    shared: int


@cache
def hardware(device: torch.device) -> Hardware:
    """Look up a GPU."""
    with on(device):
        found = triton.runtime.driver.active.utils.get_device_properties(
            torch.cuda.current_device()
        )
    return Hardware(found["multiprocessor_count"], found["max_shared_mem"])


def scan_block(width: int, most: int, programs: int, device: torch.device) -> int:
    """Shrink a state's block until walks over time, ``programs`` of each block, about fill the GPU.

    A walk takes as long as its chain of chunks, however narrow: more of them cost nothing.
    """
    size = block(width, most)
    if device.type != "cuda":
        return size
    while size > 16 and programs * -(-width // size) < 0.75 * hardware(device).units:
        size //= 2
    return size


class Launch(NamedTuple):
    """How many warps a program has, and how many loads ahead a loop runs."""

    num_warps: int
    num_stages: int


SEARCHED = [Launch(warps, stages) for warps in (2, 4, 8) for stages in (1, 2, 3, 4)]
_found: dict[tuple[object, ...], Launch] = {}


def on(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` the current one: kernels are launched there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def depth(device: torch.device, most: int, bytes_a_stage: int) -> int:
    """Choose how many loads ahead a loop runs, by what shared memory has room for."""
    shared = hardware(device).shared if device.type == "cuda" else 227 * 1024
    return max(1, min(most, int(shared / bytes_a_stage - 0.6)))  # the rest holds operands


def launch(kernel: Any, programs: int, how: Launch, device: torch.device, **args: Any) -> None:
    """Run ``kernel`` on a one-dimensional grid.

    ``STATEZOO_AUTOTUNE=1`` times other numbers of warps and stages once per kernel and widths.
    """
    if not programs:
        return
    with on(device):
        if os.environ.get("STATEZOO_AUTOTUNE") == "1" and device.type == "cuda":
            how = _search(kernel, programs, how, args)
        while True:
            try:
                kernel[(programs,)](**args, **how._asdict())
                return
            except OutOfResources:  # smaller GPUs have less shared memory
                if how.num_stages == 1:
                    raise
                how = Launch(how.num_warps, how.num_stages - 1)


def _search(kernel: Any, programs: int, default: Launch, args: dict[str, Any]) -> Launch:
    """Find the fastest launch; the key holds what is compiled in: widths, flags and dtypes."""
    lengths = ("T", "N", "NT", "tokens")
    fixed = {n: x for n, x in args.items() if isinstance(x, int | str) and n not in lengths}
    dtypes = [x.dtype for x in args.values() if isinstance(x, Tensor)]
    key = (kernel.__module__, kernel.__name__, *fixed.items(), *dtypes)
    if key not in _found:
        copies = {n: x.clone() if isinstance(x, Tensor) else x for n, x in args.items()}
        times = {}
        for how in dict.fromkeys([default, *SEARCHED]):
            with suppress(OutOfResources):
                times[how] = triton.testing.do_bench(
                    lambda how=how: kernel[(programs,)](**copies, **how._asdict()),
                    return_mode="median",
                )
        _found[key] = min(times, key=lambda how: times[how], default=default)
    return _found[key]


@triton.jit
def chunk_of(pid, cu, starts, segment, T, N, NT, C: tl.constexpr, PACKED: tl.constexpr):
    """Return the first token of a chunk (counted over the batch), and how many it has."""
    if PACKED:
        n = tl.load(segment + pid)
        used = n < N
        chunk = pid - tl.load(starts + n, mask=used, other=0)
        first = tl.load(cu + n, mask=used, other=0).to(tl.int64) + chunk * C
        length = tl.load(cu + n + 1, mask=used, other=0).to(tl.int64) - first
    else:
        n = pid // NT
        chunk = pid % NT
        first = n.to(tl.int64) * T + chunk * C
        length = (T - chunk * C).to(tl.int64)
    return first, tl.minimum(length, C).to(tl.int32)


@triton.jit
def sequence_of(n, cu, starts, T, NT, PACKED: tl.constexpr):
    """Return the first token of a sequence, its first chunk, and its length."""
    if PACKED:
        first = tl.load(cu + n).to(tl.int64)
        chunk = tl.load(starts + n).to(tl.int64)
        length = (tl.load(cu + n + 1).to(tl.int64) - first).to(tl.int32)
    else:
        first = n.to(tl.int64) * T
        chunk = n.to(tl.int64) * NT
        length = T
    return first, chunk, length


@triton.jit
def tile(base, rows, columns, stride, n_rows, n_columns):
    """Load ``[rows columns]`` of a matrix, zero outside ``n_rows`` and ``n_columns``."""
    inside = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def put(base, x, rows, columns, stride, n_rows, n_columns):
    """Store ``[rows columns]`` of a matrix, nothing outside ``n_rows`` and ``n_columns``."""
    inside = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    at = base + rows[:, None] * stride + columns[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=inside)
