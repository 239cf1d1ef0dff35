"""An op on slices of time in several processes, against the plain op on the whole.

The oracle knows nothing of :class:`Shard`: outputs and states after slice ``r`` are those of one
call with all tokens up to its end, and the loss counts all of them once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tests.kernels.harness import Case, Inputs, bounds
from torch import Tensor

TIMEOUT = 600  # seconds that processes may take


@dataclass(frozen=True)
class Layout:
    """Tokens in sequences, cut into slices of time.

    Attributes:
        name: Shown in test names.
        T: Tokens of a slice.
        lengths: Of the documents packed along time; none for a batch of two sequences.
        memories: Into how many of them tokens are sent, one each; 0 means no memories, and where
            there are, the last one gets nothing.
    """

    name: str
    T: int
    lengths: tuple[int, ...] = ()
    memories: int = 0


class Whole:
    """All tokens of a layout: which sequence, time and memory each belongs to."""

    def __init__(self, layout: Layout, size: int) -> None:
        total = layout.T * size
        self.packed, self.n = bool(layout.lengths), max(layout.memories, 1)
        if self.packed:
            assert sum(layout.lengths) == total
            self.seq = torch.arange(len(layout.lengths)).repeat_interleave(
                torch.tensor(layout.lengths)
            )
            self.time = torch.arange(total)
            self.cu: Tensor | None = bounds(list(layout.lengths))
            self.ends = list(pairwise(self.cu.tolist()))
        else:
            self.seq, self.time = torch.arange(2).repeat_interleave(total), torch.arange(2 * total)
            self.time, self.cu, self.ends = self.time % total, None, [(0, total)] * 2
        used = max(layout.memories - 1, 1)
        self.memory = torch.randint(used, self.seq.shape) if layout.memories else 0 * self.seq
        self.plain = not self.packed and not layout.memories
        self.total = total

    def sequences(self, start: int, stop: int) -> Tensor:
        """Those with tokens in a slice; an empty one is with the token after it, or the last."""
        last = self.total - 1
        own = [
            i for i, (a, b) in enumerate(self.ends)
            if (range(max(a, start), min(b, stop)) if a < b else start <= min(a, last) < stop)
        ]  # fmt: skip
        return torch.tensor(own)

    def states(self, sequences: Tensor) -> Tensor:
        """Where the states of their memories are."""
        return (sequences[:, None] * self.n + torch.arange(self.n)).flatten()

    def call(self, case: Case, inputs: Inputs, backend: str, start: int, stop: int):
        """Run the op on a slice: its tokens, their outputs, its sequences, their final states."""
        sequences = self.sequences(start, stop)
        key = (self.seq * self.n + self.memory) * self.total + self.time
        inside = (self.time >= start) & (self.time < stop)
        token = key.masked_fill(~inside, key.max() + 1).argsort()[: int(inside.sum())]
        if self.plain:
            shape, cu = (2, -1), None
        else:
            shape, lanes = (1, -1), (self.seq * self.n + self.memory)[token]
            count = torch.bincount(lanes, minlength=len(self.ends) * self.n)
            cu = bounds(count[self.states(sequences)].tolist())
        mine = {
            name: x if name in case.parameters else x[0, token].unflatten(0, shape)
            for name, x in inputs.items()
            if name != "initial_state"
        }
        if "initial_state" in inputs:
            mine["initial_state"] = inputs["initial_state"][self.states(sequences)]
        o, S = case.run(mine, backend, cu)
        return token, o.flatten(0, 1), sequences, S


def draw(case: Case, whole: Whole, dtype: torch.dtype, gate: float | None) -> Inputs:
    """Inputs of all tokens ``[1 tokens *]`` and initial states of all memories."""
    inputs = case.make(1, len(whole.seq), dtype)
    if "initial_state" in inputs:
        inputs["initial_state"] = case.make(len(whole.ends) * whole.n, 1, dtype)["initial_state"]
    if gate is not None:
        g = inputs[case.gate]
        g[torch.rand(g.shape) < 0.3] = gate
    return inputs


def loss_of(o: Tensor, token: Tensor, S: Tensor, at: Tensor, r: int) -> Tensor:
    """Weigh outputs and states with fixed numbers of their token, and of their sequence."""
    weight = [torch.sin(1 + r + 3.0 * x).to(o) for x in (token, at)]
    each = [torch.cos(torch.arange(x[0].numel()).to(o)) for x in (o, S)]
    parts = zip((o, S), weight, each, strict=True)
    return sum((x.flatten(1) * w[:, None] * e).sum() for x, w, e in parts)


def compare(
    case: Case, layout: Layout, backend: str, dtype: torch.dtype, gate: float | None, seed: int
) -> tuple[dict[str, float], list[Any]]:
    """Return the largest relative RMS error of each result, and the traffic."""
    from statezoo.kernels.sequence import Shard, traffic

    torch.manual_seed(seed)
    rank, size = dist.get_rank(), dist.get_world_size()
    whole, T = Whole(layout, size), layout.T
    inputs = draw(case, whole, dtype, gate)
    want, got = ({n: x.clone().requires_grad_() for n, x in inputs.items()} for _ in range(2))

    wide = {n: x.detach().double().requires_grad_() for n, x in want.items()}
    loss = torch.zeros(())
    for r in range(size):
        token, o, sequences, S = whole.call(case, wide, "reference", 0, (r + 1) * T)
        here, own = whole.time[token] >= r * T, whole.sequences(r * T, (r + 1) * T)
        kept = torch.isin(sequences, own).repeat_interleave(S.shape[0] // len(sequences))
        at = whole.states(sequences) if S.shape[0] != len(sequences) else sequences
        o, S = o[here], S[kept]
        loss = loss + loss_of(o, token[here], S, at[kept], r)
        if r == rank:
            expected = {"o": o[token[here].argsort()], "S": S}
    grads = torch.autograd.grad(loss, list(wide.values()))
    expected |= {f"d{n}": d for n, d in zip(wide, grads, strict=True)}

    with traffic() as log:
        with Shard(None, T, whole.cu):
            token, o, sequences, S = whole.call(case, got, backend, rank * T, (rank + 1) * T)
        at = whole.states(sequences) if S.shape[0] != len(sequences) else sequences
        grads = torch.autograd.grad(loss_of(o, token, S, at, rank), list(got.values()))
    for d in grads:
        dist.all_reduce(d)  # tokens of other slices have none here
    found = {"o": o[token.argsort()], "S": S}
    found |= {f"d{n}": d for n, d in zip(got, grads, strict=True)}
    return {n: rms_error(found[n].detach(), expected[n].detach()) for n in expected}, log


def rms_error(got: Tensor, want: Tensor) -> float:
    """Relative to the values' own size; infinite if shapes differ or anything is not finite."""
    if got.shape != want.shape or not got.isfinite().all():
        return float("inf")
    size = want.double().square().mean().sqrt().clamp(min=1e-2)
    return float(((got.double() - want.double()).square().mean().sqrt() / size).nan_to_num(0.0))


def together(job: Callable[..., Any], size: int, folder: Path, *args: Any) -> list[Any]:
    """Run ``job(*args)`` in ``size`` gloo processes and return what each returned.

    Raises:
        ProcessRaisedException: If one failed, with its traceback.
        RuntimeError: If they took too long.
    """
    folder.mkdir()
    processes = mp.start_processes(
        _process, (size, folder, job, args), nprocs=size, join=False, start_method="spawn"
    )
    deadline = monotonic() + TIMEOUT
    try:
        while not processes.join(timeout=1, grace_period=5):
            if monotonic() > deadline:
                raise RuntimeError(f"{size} processes took more than {TIMEOUT} s.")
    finally:
        for process in processes.processes:
            process.kill()
    from statezoo.kernels.sequence import Traffic

    with torch.serialization.safe_globals([Traffic]):
        return [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(size)]


def _process(rank: int, size: int, folder: Path, job: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # what nobody wrote is NaN
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size)
    torch.save(job(*args), folder / f"{rank}.pt")
    dist.destroy_process_group()
