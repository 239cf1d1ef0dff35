"""Checks and times the fused kernels on a GPU: python benchmarks/gpu_kernels.py [--quick].

First every op against its recurrence in float64 (outputs, final state, all gradients), then forward
and forward + backward in bfloat16 beside flash-linear-attention 0.6 (where `fla` is importable),
torch's softmax attention, and the floor: the bytes of inputs, outputs and gradients at 4.3 TB/s, or
the arithmetic at 790 TFLOP/s, whichever takes longer (both measured on an H200). Times are medians
of many runs between CUDA events, ours and peers' in the same process. Prints Markdown.
"""

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BYTES, FLOPS = 4.3e12, 790e12  # per second, measured on an H200: copies, bf16 matrix products
SHAPES = [(8, 4096, 16, 128), (1, 16384, 16, 128), (4, 2048, 8, 64), (2, 8192, 24, 128)]
CHUNK = 64
CHECKED = (2, 500, 2)  # B, T, H of the checks
DEVICE = "cuda"
# bfloat16 operands, states and outputs (2^-9 each), more in gradients of gates; float32 by three
# TF32 products, and exponents from differences of sums over a chunk
ALLOWED = {torch.bfloat16: 4e-2, torch.float32: 2e-4}

Shape = tuple[int, int, int, int]


class Op(NamedTuple):
    """An op with one kind of gate.

    Attributes:
        name: Shown in tables.
        module: Of `statezoo.kernels`, with a function of the same name.
        inputs: Names of what it takes, see `draw`.
        peer: Of fla: module and function.
        products: Matrix products of `K x V` a token, forward.
    """

    name: str
    module: str
    inputs: tuple[str, ...]
    peer: tuple[str, str] | None
    products: float


ADDITIVE, DELTA = "gated_linear_attention", "gated_delta_rule"
OPS = [
    Op("additive, no gate", ADDITIVE, ("q", "k", "v"), ("linear_attn", "chunk_linear_attn"), 2),
    Op("additive, head", ADDITIVE, ("q", "k", "v", "g"), ("simple_gla", "chunk_simple_gla"), 2),
    Op("additive, channel", ADDITIVE, ("q", "k", "v", "gk"), ("gla", "chunk_gla"), 2),
    Op("delta, no gate", DELTA, ("q", "k", "v", "beta"), ("delta_rule", "chunk_delta_rule"), 3),
    Op("delta, head", DELTA, ("q", "k", "v", "beta", "g"),
       ("gated_delta_rule", "chunk_gated_delta_rule"), 3),
    Op("delta, channel", DELTA, ("q", "k", "v", "beta", "gk"), ("kda", "chunk_kda"), 3),
    Op("delta twice, head", DELTA, ("q", "k2", "v2", "beta2", "g"),
       ("gated_delta_product", "chunk_gated_delta_product"), 5),
    Op("scan, 16 states", "selective_scan", ("x", "dt", "A", "Bs", "Cs", "D"), None, 0),
    Op("conv, width 4", "causal_conv1d", ("x", "weight", "bias"), None, 0),
]  # fmt: skip


def draw(shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs of all ops; gates, write strengths and parameters in float32."""
    B, T, H, K = shape
    E, N = H * K, 16
    torch.manual_seed(0)

    def normal(*size: int, to: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, device=DEVICE).to(to)

    def unit(*size: int) -> Tensor:
        return F.normalize(normal(*size), dim=-1).to(dtype)

    return {
        "q": unit(B, T, H, K), "k": unit(B, T, H, K), "v": normal(B, T, H, K, to=dtype),
        "k2": unit(B, T, 2, H, K), "v2": normal(B, T, 2, H, K, to=dtype),
        "g": F.logsigmoid(normal(B, T, H) + 3), "gk": F.logsigmoid(normal(B, T, H, K)) / 16,
        "beta": normal(B, T, H).sigmoid(), "beta2": 2 * normal(B, T, 2, H).sigmoid(),
        "x": normal(B, T, E, to=dtype), "dt": F.softplus(normal(B, T, E) - 3).to(dtype),
        "A": -torch.rand(E, N, device=DEVICE) * 8 - 0.1, "Bs": normal(B, T, N, to=dtype),
        "Cs": normal(B, T, N, to=dtype), "D": normal(E), "weight": normal(E, 4) / 2,
        "bias": normal(E),
    }  # fmt: skip


def leaves(op: Op, drawn: dict[str, Tensor]) -> list[Tensor]:
    """Copies of an op's inputs, to take gradients of."""
    return [drawn[name].detach().clone().requires_grad_() for name in op.inputs]


def ours(op: Op, backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the public function of an op."""
    function = getattr(import_module(f"statezoo.kernels.{op.module}"), op.module)
    return lambda *inputs: function(*inputs, backend=backend)


def peer(op: Op) -> Callable[..., Tensor] | str:
    """Return fla's function of the same inputs, or why there is none."""
    if op.peer is None:
        return "-"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function = getattr(import_module(f"fla.ops.{op.peer[0]}"), op.peer[1])
    except ImportError as error:
        return f"needs {error.name}"

    def run(*inputs: Tensor) -> Tensor:
        named = {
            n.removesuffix("2").replace("gk", "g"): x
            for n, x in zip(op.inputs, inputs, strict=True)
        }
        if "k2" in op.inputs:
            named |= {n: named[n].flatten(1, 2) for n in ("k", "v", "beta")}
            named["num_householder"] = 2
        if op.name == "additive, no gate":
            named["normalize"] = False
        return function(**named)[0]

    return run


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of the same shape."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def check(op: Op, dtype: torch.dtype, K: int) -> float:
    """Largest relative RMS error of outputs, final state and gradients."""
    drawn = draw((*CHECKED, K), dtype)
    results = []
    for wide in (False, True):
        inputs = leaves(op, {n: x.double() if wide else x for n, x in drawn.items()})
        o, S = ours(op, "reference" if wide else "triton")(*inputs)
        torch.manual_seed(1)
        weights = [torch.randn(x.shape, device=x.device).to(x.dtype) for x in (o, S)]
        loss = (o * weights[0]).sum() + (S * weights[1]).sum()
        results.append([o, S, *torch.autograd.grad(loss, inputs)])
    errors = [
        ((a.double() - b).square().mean() / b.square().mean().clamp(min=1e-8)).sqrt().item()
        for a, b in zip(*results, strict=True)
    ]
    return max(errors)


def milliseconds(run: Callable[[], object], budget: float) -> float:
    """Median time of many runs, after warming up."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < budget and len(times) < 100):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def both(
    function: Callable[..., Tensor], inputs: list[Tensor], budget: float
) -> tuple[float, float]:
    """Milliseconds of forward, and of forward and backward."""
    with torch.no_grad():
        weight = torch.randn_like(function(*inputs))
        forward = milliseconds(lambda: function(*inputs), budget)

    def step() -> object:
        return torch.autograd.grad(function(*inputs), inputs, weight)

    return forward, milliseconds(step, budget)


def floors(op: Op, inputs: list[Tensor], o: Tensor, shape: Shape) -> tuple[float, float]:
    """Least milliseconds of forward, and of forward and backward.

    A pass reads its inputs and writes its outputs once. Arithmetic: `K x V` products for each
    write, correction and read, and products inside chunks; the backward pass has twice as many.
    """
    B, T, H, K = shape
    size = sum(x.nbytes for x in inputs)
    moved = (size + o.nbytes, 3 * size + 2 * o.nbytes)  # backward: inputs, do; their gradients
    work = B * T * H * 2 * (op.products * K * K + op.products * CHUNK * K)
    return (
        1e3 * max(moved[0] / BYTES, work / FLOPS),
        1e3 * max(moved[1] / BYTES, 3 * work / FLOPS),
    )


def row(
    op: Op, shape: Shape, drawn: dict[str, Tensor], attention: tuple[float, float], budget: float
) -> str:
    """Time one op at one shape: a row of the table."""
    inputs = leaves(op, drawn)
    run = ours(op, "triton")
    mine = both(lambda *x: run(*x)[0], inputs, budget)
    floor = floors(op, inputs, run(*inputs)[0], shape)
    other = peer(op)
    cells = ["x".join(map(str, shape)), op.name]
    theirs: tuple[float, float] | str = other if isinstance(other, str) else "-"
    if not isinstance(other, str):
        try:
            theirs = both(other, inputs, budget)
        except Exception as error:  # a peer that cannot run is part of the result
            theirs = f"fails: {type(error).__name__}"
    for i in range(2):
        cells.append(f"{mine[i]:.3f}")
        cells += [theirs, "-"] if isinstance(theirs, str) else [
            f"{theirs[i]:.3f}", f"{theirs[i] / mine[i]:.2f}",
        ]  # fmt: skip
        cells += [f"{attention[i] / mine[i]:.2f}", f"{mine[i] / floor[i]:.2f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    """Check, then time; 1 if a check failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="one check an op, two shapes, few runs"
    )
    quick = parser.parse_args().quick
    if not torch.cuda.is_available() or torch.version.hip is not None:
        print("gpu_kernels.py needs an NVIDIA GPU (for CPUs: benchmarks/cpu_kernels.py).")
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| op | K | dtype | largest relative RMS error | allowed | |\n|---|---|---|---|---|---|")
    failed = 0
    for op in OPS:
        for K in (64,) if quick else (64, 128, 256):
            for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32):
                error = check(op, dtype, K)
                good = error <= ALLOWED[dtype]
                failed += not good
                kind = str(dtype).removeprefix("torch.")
                verdict = "ok" if good else "WRONG"
                print(
                    f"| {op.name} | {K} | {kind} | {error:.1e} | {ALLOWED[dtype]:.0e} | {verdict} |"
                )
    print("\nMilliseconds; fla and attention: their time over ours; floor: our time over it.\n")
    kinds = ["ours", "fla", "fla/ours", "sdpa/ours", "ours/floor"]
    heads = [f"{k}, {p}" for p in ("fwd", "fwd+bwd") for k in kinds]
    print("| B x T x H x K | op | " + " | ".join(heads) + " |\n" + "|---" * 12 + "|")
    budget = 50.0 if quick else 400.0
    for shape in SHAPES[2:3] + SHAPES[:1] if quick else SHAPES:
        drawn = draw(shape, torch.bfloat16)
        attention = both(sdpa, [drawn[n].clone().requires_grad_() for n in "qkv"], budget)
        print(f"| {'x'.join(map(str, shape))} | softmax attention | {attention[0]:.3f} |"
              + " |" * 4 + f" {attention[1]:.3f} |" + " |" * 4)  # fmt: skip
        for op in OPS:
            print(row(op, shape, drawn, attention, budget), flush=True)
            torch.cuda.empty_cache()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
