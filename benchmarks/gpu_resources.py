"""Compiles the fused kernels for a Hopper GPU that need not be there.

python benchmarks/gpu_resources.py [--widths 128] [--gates head] prints registers, bytes of spilled
registers and of shared memory of every kernel of the additive op and the delta rule; exits 1 if
one does not compile or does not fit.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # compile, not interpret: before triton is imported

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from statezoo.kernels._fused import Launch
from statezoo.kernels.gated_delta_rule import triton as delta
from statezoo.kernels.gated_linear_attention import triton as additive

SHARED = 227 * 1024  # bytes a program may have on compute capability 9.0
POINTERS = {
    torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float16: "*fp16",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


class Job(NamedTuple):
    """A kernel with the arguments of one launch."""

    kernel: Any
    how: Launch
    args: dict[str, Any]

    @property
    def compiled_in(self) -> tuple[object, ...]:
        """What the compiled kernel depends on."""
        fixed = (p.name for p in self.kernel.params if p.is_constexpr)
        return (self.kernel.__name__, self.how, *(self.args[n] for n in fixed))


def jobs(
    K: int, V: int, gate: str, dtype: torch.dtype, T: int = 128, groups: int = 1,
    packed: bool = False,
) -> list[Job]:  # fmt: skip
    """Record the launches of both ops, forward and backward, without running them."""
    found: list[Job] = []

    def record(kernel: Any, programs: int, how: Launch, device: object, **args: Any) -> None:
        found.append(Job(kernel, how, args))

    q, k = torch.zeros(2, 1, T, 2, K, dtype=dtype)
    v = torch.zeros(1, T, 2 * groups, V, dtype=dtype)
    beta, S0 = torch.zeros(1, T, 1, 2 * groups), torch.zeros(1, 2 * groups, K, V)
    head, channel = torch.zeros(1, T, 2 * groups), torch.zeros(1, T, 2 * groups, K)
    g = {"none": None, "head": head, "channel": channel}[gate]
    cu = torch.tensor([0, T], dtype=torch.int32) if packed else None
    before = additive.launch, delta.launch
    additive.launch = delta.launch = record  # type: ignore[assignment]
    try:
        additive.forward(q, k, v, g, 1.0, S0, cu)
        additive.backward(v, S0, q, k, v, g, 1.0, S0, cu, S0)
        k, v = k.unsqueeze(2), v.unsqueeze(2)
        _, _, X = delta.forward(q, k, v, beta, g, 1.0, S0, cu)
        delta.backward(v[:, :, 0], S0, q, k, v, beta, g, 1.0, S0, cu, X)
    finally:
        additive.launch, delta.launch = before
    return list({job.compiled_in: job for job in found}.values())


def compiled(job: Job) -> tuple[int, int, int]:
    """Compile for compute capability 9.0: registers, spilled bytes, shared bytes."""
    signature, fixed, aligned = {}, {}, {}
    for i, p in enumerate(job.kernel.params):
        x = job.args[p.name]
        if p.is_constexpr or x is None:
            signature[p.name] = "constexpr"
            fixed[(i,)] = x
        elif isinstance(x, Tensor):
            signature[p.name] = POINTERS[x.dtype]
            aligned[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[p.name] = "fp32" if isinstance(x, float) else "i32"
    source = ASTSource(job.kernel, signature, fixed, aligned)
    out = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=job.how._asdict())
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(out.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage gave no registers: {usage.stdout}{usage.stderr}")
    return int(found[1]), int(found[2]), int(out.metadata.shared)


def main() -> int:
    """Compile and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--gates", nargs="+", default=["none", "head", "channel"])
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16"], help="bfloat16 float32 float16"
    )
    asked = parser.parse_args()
    columns = [
        "kernel",
        "K = V",
        "gate",
        "dtype",
        "warps",
        "stages",
        "registers",
        "spilled",
        "shared",
    ]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    wrong = 0
    for dtype in asked.dtypes:
        for K in asked.widths:
            for gate in asked.gates:
                for job in jobs(K, K, gate, getattr(torch, dtype)):
                    name = job.kernel.__name__ + "'" * bool(job.args.get("REVERSE"))
                    module = job.kernel.__module__.split(".")[-2]
                    registers, spilled, shared = compiled(job)
                    wrong += shared > SHARED
                    cells = (
                        f"{module}.{name}",
                        K,
                        gate,
                        dtype,
                        *job.how,
                        registers,
                        spilled,
                        shared,
                    )
                    print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
