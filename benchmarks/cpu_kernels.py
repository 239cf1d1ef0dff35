"""Times the CPU kernels beside their peers: python benchmarks/cpu_kernels.py [--quick].

Ours and the peer run alternately in this process, forward and backward in float32; a row is the
median of the ratios of neighbouring runs, so that a noisy machine slows both. Times are CPU time
with one thread, wall time with more (waiting threads burn CPU time). Peers: fla's naive functions
(skipped, and said so, where `fla` cannot be imported: it breaks transformers on CPU, so keep it out
of the environment and on PYTHONPATH for this script), transformers' torch functions, torch's own
attention.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statezoo.kernels.gated_delta_rule import gated_delta_rule, l2_norm
from statezoo.kernels.gated_linear_attention import gated_linear_attention
from statezoo.kernels.selective_scan import selective_scan

SHAPES = [(1, 2048, 4, 64), (4, 1024, 4, 64)]


class Row(NamedTuple):
    """One comparison: what is ours, what is the peer, the ratio to reach (peer / ours)."""

    name: str
    ours: Callable[[], object]
    peer: Callable[[], object] | None
    goal: float | None
    runs: int


def step(run: Callable[..., Tensor], inputs: list[Tensor], weight: Tensor) -> Callable[[], None]:
    """Forward and backward of ``run`` under a fixed output gradient."""

    def go() -> None:
        torch.autograd.grad((run(*inputs) * weight).sum(), inputs)

    return go


def tensors(B: int, T: int, H: int, K: int) -> dict[str, Tensor]:
    """Inputs of every matrix-state op."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, B, T, H, K)
    made = {
        "q": l2_norm(q), "k": l2_norm(k), "v": v, "head": F.logsigmoid(torch.randn(B, T, H)) / 4,
        "channel": F.logsigmoid(torch.randn(B, T, H, K)) / 16, "beta": torch.rand(B, T, H),
        "k2": l2_norm(torch.randn(B, T, 2, H, K)), "v2": torch.randn(B, T, 2, H, K),
        "beta2": 2 * torch.rand(B, T, 2, H), "weight": torch.randn(B, T, H, K),
    }  # fmt: skip
    return {name: x if name == "weight" else x.requires_grad_() for name, x in made.items()}


def fla_naive(module: str, name: str) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Import one of fla's naive functions, where fla is there."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(__import__(f"fla.ops.{module}.naive", fromlist=[name]), name)
    except ImportError:
        return None


def matrix_rows(shape: tuple[int, int, int, int], runs: int) -> Iterator[Row]:
    """Additive and delta rule, against fla's naive forms, transformers, and softmax attention."""
    from transformers.models.qwen3_next import modeling_qwen3_next

    x = tensors(*shape)
    weight, title = x["weight"], "B{} T{} H{} K{}".format(*shape)

    def of(run: Callable[..., Tensor], *names: str) -> Callable[[], None]:
        return step(run, [x[n] for n in names], weight)

    def first(f: Callable[..., tuple[Tensor, Tensor]] | None) -> Callable[..., Tensor] | None:
        return f and (lambda *a: f(*a)[0])

    def peer(f: Callable[..., Tensor] | None, *names: str) -> Callable[[], None] | None:
        return f and of(f, *names)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        swapped = (y.transpose(1, 2) for y in (q, k, v))
        return F.scaled_dot_product_attention(*swapped, is_causal=True).transpose(1, 2)

    ours, delta = first(gated_linear_attention), first(gated_delta_rule)
    chunk = modeling_qwen3_next.torch_chunk_gated_delta_rule
    chunk = first(getattr(chunk, "__wrapped__", chunk))
    simple = first(fla_naive("simple_gla", "naive_chunk_simple_gla"))
    recurrent = first(fla_naive("gla", "naive_recurrent_gla"))
    scalar, channel = ("q", "k", "v", "head"), ("q", "k", "v", "channel")
    gated, swapped = ("q", "k", "v", "beta", "head"), ("q", "k", "v", "head", "beta")
    head, channels = of(ours, *scalar), of(ours, *channel)
    one, two = of(delta, *gated), of(delta, "q", "k2", "v2", "beta2", "head")
    per_channel = of(delta, "q", "k", "v", "beta", "channel")
    few = max(2, runs // 4)
    yield Row(f"{title}: scalar gate / fla naive chunk", head, peer(simple, *scalar), 1.5, runs)
    naive = peer(recurrent, *channel)
    yield Row(f"{title}: channel gate / fla naive recurrence", channels, naive, 10, few)
    yield Row(f"{title}: channel gate / our scalar gate", channels, head, 1 / 2, runs)
    yield Row(f"{title}: delta rule / transformers chunk", one, of(chunk, *swapped), 1.3, runs)
    yield Row(f"{title}: delta rule, 2 steps / 1", two, one, 1 / 2.2, runs)
    yield Row(f"{title}: delta rule, channel gate / scalar gate", per_channel, one, None, runs)
    attend = of(sdpa, "q", "k", "v")
    yield Row(f"{title}: scalar gate / softmax attention", head, attend, None, runs)


class MambaLayer(nn.Module):
    """The scan with the projections of a one-layer Mamba, tied to transformers' own weights."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``x [B T D]``."""
        m = self.mixer
        u, z = m.in_proj(x).chunk(2, -1)
        u = F.silu(m.conv1d(u.mT)[..., : x.shape[1]]).mT
        r, B, C = m.x_proj(u).split([m.time_step_rank, m.ssm_state_size, m.ssm_state_size], -1)
        y, _ = selective_scan(u, F.softplus(m.dt_proj(r)), -m.A_log.exp(), B, C, m.D)
        return m.out_proj(y * F.silu(z))


def scan_rows(T: int, runs: int, peer_T: int) -> Iterator[Row]:
    """Selective scan in a d = 256 layer: against transformers, against Mamba-2's form, over T."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    torch.manual_seed(0)
    theirs = MambaMixer(MambaConfig(hidden_size=256, num_hidden_layers=1), 0)
    layer = MambaLayer(theirs)

    def of(net: nn.Module, T: int) -> Callable[[], None]:
        x = torch.randn(1, T, 256, requires_grad=True)
        return lambda: net(x).square().sum().backward()

    title = f"Mamba layer d256 T{peer_T} / transformers"
    goal = 20 if peer_T == 1024 else None  # the peer is quadratic in T
    yield Row(title, of(layer, peer_T), of(theirs, peer_T), goal, 1)
    drawn = (torch.randn(1, T, 512), torch.rand(1, T, 512), -torch.rand(512, 16))
    inputs = [y.requires_grad_() for y in (*drawn, torch.randn(1, T, 16), torch.randn(1, T, 16))]
    scan = step(lambda *a: selective_scan(*a)[0], inputs, torch.randn(1, T, 512))
    shapes = ((1, T, 1, 16), (1, T, 1, 16), (1, T, 8, 64), (1, T, 8))
    q, k, v, g = (torch.randn(shape) for shape in shapes)
    inputs = [y.requires_grad_() for y in (q, k, v, F.logsigmoid(g))]
    ssd = step(lambda *a: gated_linear_attention(*a)[0], inputs, torch.randn(1, T, 8, 64))
    yield Row(f"selective scan E512 N16 T{T} / Mamba-2's form", scan, ssd, 1 / 2, runs)
    short, long = 4 * T, 16 * T if peer_T < 1024 else 64 * T
    linear = short / long
    title = f"Mamba layer T{long} / T{short}, linear is {linear:.3f}"
    yield Row(title, of(layer, long), of(layer, short), linear / 1.15, max(2, runs // 4))


def seconds(run: Callable[[], object]) -> float:
    """Return the time of one call: of the CPU with one thread, on the wall with more."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return clock() - start


def measure(row: Row) -> str:
    """Run ours and the peer alternately; return a row of the table."""
    if row.peer is None:
        return f"| {row.name} | | | peer not installed | {row.goal or ''} |"
    row.ours()
    if row.runs > 1:
        row.peer()
    pairs = [(seconds(row.ours), seconds(row.peer)) for _ in range(row.runs)]
    ours, peer = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(p / o for o, p in pairs)
    goal = "" if row.goal is None else f"{row.goal:.3g}"
    return f"| {row.name} | {1e3 * ours:.1f} | {1e3 * peer:.1f} | {ratio:.3g} | {goal} |"


MEMORY: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], tuple[str, ...]]] = {
    "scalar gate": (gated_linear_attention, ("q", "k", "v", "head")),
    "channel gate": (gated_linear_attention, ("q", "k", "v", "channel")),
    "gated delta rule": (gated_delta_rule, ("q", "k", "v", "beta", "head")),
}


def peak(name: str, T: int) -> str:
    """Return the peak memory of forward + backward at length ``T`` beside the tensors themselves.

    It runs in a process of its own, since a peak never comes down.
    """
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    script += f"import cpu_kernels; cpu_kernels.measure_peak({name!r}, {T})"
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back at once
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return run.stdout.strip()


def measure_peak(name: str, T: int) -> None:
    """Print a row: rise of resident memory over what inputs, outputs and gradients take (Linux)."""
    function, names = MEMORY[name]
    for length in (256, T):  # the first call brings in what a first call loads
        x = tensors(1, length, 4, 64)
        inputs, weight = [x[n].detach().clone().requires_grad_() for n in names], x["weight"]
        del x
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        start = memory_in_status("VmRSS")
        o, _ = function(*inputs)
        grads = torch.autograd.grad(o, inputs, weight)
        rise = memory_in_status("VmHWM") - start
    given = sum(y.nbytes for y in (*inputs, weight))
    made = sum(y.nbytes for y in (o, *grads))
    print(
        f"| {name}, T{T} | {(given + made) / 2**20:.0f} | {(given + rise) / 2**20:.0f} | "
        f"{(given + rise) / (given + made):.2f} | 1.50 |"
    )


def memory_in_status(key: str) -> int:
    """Read a number of bytes from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one shape, few runs: minutes")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    runs, shapes, peer_T = (4, SHAPES[:1], 256) if args.quick else (11, SHAPES, 1024)
    for threads in args.threads:
        torch.set_num_threads(threads)
        print(f"\n{threads} thread(s), forward + backward, float32, ms\n")
        print("| ours / peer | ours | peer | peer : ours | goal |\n| --- | --- | --- | --- | --- |")
        for shape in shapes:
            for row in matrix_rows(shape, runs):
                print(measure(row), flush=True)
        for row in scan_rows(1024, runs, peer_T):
            print(measure(row), flush=True)
    if not Path("/proc/self/status").exists():
        return  # memory is read off Linux's account of the process
    print("\npeak memory of forward + backward, MiB\n")
    print("| op | inputs, outputs, gradients | peak | ratio | limit |")
    print("| --- | --- | --- | --- | --- |")
    for name in MEMORY:
        print(peak(name, 16384), flush=True)


if __name__ == "__main__":
    main()
