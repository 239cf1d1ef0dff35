"""Times the CPU kernels beside their peers: python benchmarks/cpu_kernels.py [--quick] [--threads 1 2].

Ours and the peer run alternately in this process, forward and backward in float32; a row is the
median of the ratios of neighbouring runs, so that a noisy machine slows both. Times are CPU seconds of
all threads. Peers: flash-linear-attention's naive functions (skipped, and said so, where `fla` is not
importable: it breaks transformers on CPU, so keep it off the environment and on PYTHONPATH for this
script), transformers' torch functions, torch's own attention.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
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
    yield Row(
        f"{title}: scalar gate / fla naive chunk",
        of(ours, *scalar),
        peer(simple, *scalar),
        1.5,
        runs,
    )
    yield Row(
        f"{title}: channel gate / fla naive recurrence",
        of(ours, *channel),
        peer(recurrent, *channel),
        10,
        max(2, runs // 4),
    )
    yield Row(
        f"{title}: channel gate / our scalar gate",
        of(ours, *channel),
        of(ours, *scalar),
        1 / 2,
        runs,
    )
    yield Row(
        f"{title}: gated delta rule / transformers chunk",
        of(delta, *gated),
        of(chunk, *swapped),
        1.3,
        runs,
    )
    double = of(delta, "q", "k2", "v2", "beta2", "head")
    yield Row(f"{title}: two delta steps a token / one", double, of(delta, *gated), 1 / 2.2, runs)
    yield Row(
        f"{title}: delta rule, channel gate / our scalar gate",
        of(delta, "q", "k", "v", "beta", "channel"),
        of(delta, *gated),
        None,
        runs,
    )
    yield Row(f"{title}: scalar gate / softmax attention", of(ours, *scalar), of(sdpa, "q", "k", "v"), None, runs)  # fmt: skip


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
    layer = MambaLayer(MambaMixer(MambaConfig(hidden_size=256, num_hidden_layers=1), 0))

    def of(net: nn.Module, T: int) -> Callable[[], None]:
        x = torch.randn(1, T, 256, requires_grad=True)
        return lambda: net(x).square().sum().backward()

    peer = layer.mixer.slow_forward if hasattr(layer.mixer, "slow_forward") else layer.mixer
    x = torch.randn(1, peer_T, 256, requires_grad=True)
    yield Row(f"Mamba layer, T{peer_T} / transformers", of(layer, peer_T), lambda: peer(x).square().sum().backward(), 20, 1)  # fmt: skip
    u, dt = torch.randn(1, T, 512, requires_grad=True), torch.rand(1, T, 512).requires_grad_()
    A = -torch.arange(1.0, 17).repeat(512, 1).requires_grad_()
    B, C = torch.randn(2, 1, T, 16, requires_grad=True)
    scan = step(lambda *a: selective_scan(*a)[0], [u, dt, A.detach().requires_grad_(), B.detach().requires_grad_(), C.detach().requires_grad_()], torch.randn(1, T, 512))  # fmt: skip
    q, k, v = torch.randn(1, T, 1, 16), torch.randn(1, T, 1, 16), torch.randn(1, T, 8, 64)
    g = F.logsigmoid(torch.randn(1, T, 8))
    ssd = step(lambda *a: gated_linear_attention(*a)[0], [y.requires_grad_() for y in (q, k, v, g)], torch.randn(1, T, 8, 64))  # fmt: skip
    yield Row(
        f"selective scan E512 N16 T{T} / Mamba-2 form of the same state", scan, ssd, 1 / 2, runs
    )
    long = 8 * T
    yield Row(f"Mamba layer T{long}, per token / T{T}", of(layer, long), of(layer, T), 1 / 8 / 1.15, max(2, runs // 4))  # fmt: skip


def cpu_seconds(run: Callable[[], object]) -> float:
    """Return the CPU time of one call, all threads."""
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(row: Row) -> str:
    """Run ours and the peer alternately; return a row of the table."""
    if row.peer is None:
        return f"| {row.name} | | | peer not installed | {row.goal or ''} |"
    row.ours()
    if row.runs > 1:
        row.peer()
    pairs = [(cpu_seconds(row.ours), cpu_seconds(row.peer)) for _ in range(row.runs)]
    ours, peer = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(p / o for o, p in pairs)
    goal = "" if row.goal is None else f"{row.goal:.2f}"
    return f"| {row.name} | {1e3 * ours:.1f} | {1e3 * peer:.1f} | {ratio:.2f} | {goal} |"


MEMORY = {
    "scalar gate": ("gated_linear_attention", ("q", "k", "v", "head")),
    "channel gate": ("gated_linear_attention", ("q", "k", "v", "channel")),
    "gated delta rule": ("gated_delta_rule", ("q", "k", "v", "beta", "head")),
}


def peak(name: str, T: int) -> str:
    """Return the peak memory of forward + backward at length ``T`` beside the tensors themselves."""
    script = f"import sys; sys.path.insert(0, {sys.path[0]!r}); import cpu_kernels as c; c.measure_peak({name!r}, {T})"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip


def measure_peak(name: str, T: int) -> None:
    """Print a row: rise of peak RSS over the bytes of inputs, outputs, gradients (own process)."""
    op, names = MEMORY[name]
    function = {
        "gated_linear_attention": gated_linear_attention,
        "gated_delta_rule": gated_delta_rule,
    }[op]
    warm = tensors(1, 256, 4, 64)
    step(lambda *a: function(*a)[0], [warm[n] for n in names], warm["weight"])()
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    x = tensors(1, T, 4, 64)
    inputs = [x[n] for n in names]
    kept = sum(y.nbytes for y in x.values())
    o, _ = function(*inputs)
    grads = torch.autograd.grad(o, inputs, x["weight"])
    rise = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * 1024
    used = sum(y.nbytes for y in (*inputs, o, x["weight"], *grads))
    rise -= kept - sum(y.nbytes for y in (*inputs, x["weight"]))  # tensors made but not of this op
    print(f"| {name}, T{T} | {used / 2**20:.0f} | {rise / 2**20:.0f} | {rise / used:.2f} | 1.50 |")


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
        print(f"\n{threads} thread(s), forward + backward, float32, CPU ms\n")
        print("| ours / peer | ours | peer | peer : ours | goal |\n| --- | --- | --- | --- | --- |")
        for shape in shapes:
            for row in matrix_rows(shape, runs):
                print(measure(row), flush=True)
        for row in scan_rows(1024, runs, peer_T):
            print(measure(row), flush=True)
    print("\npeak memory, forward + backward, MB\n\n| op | inputs, outputs, gradients | rise of peak RSS | ratio | limit |\n| --- | --- | --- | --- | --- |")  # fmt: skip
    for name in MEMORY:
        print(peak(name, 16384), flush=True)


if __name__ == "__main__":
    main()
