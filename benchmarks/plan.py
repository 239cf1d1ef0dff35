"""Holds plans against real training on this processor: python benchmarks/plan.py [--families ...].

Memory: what a plan says beside the most bytes of live tensors in a real training of three steps,
and beside the rise of resident memory (Linux), each in a process of its own. Time: seconds of a
step as planned, at the efficiency that ``--calibrate`` measures, beside the fastest of the three
(forward, backward and optimiser; of the processor).
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

FAMILIES = ("gla", "gated_deltanet", "mamba2", "mamba", "mom", "attention")
ROWS, T, WIDTH, LAYERS, W = 4, 256, 256, 6, 1000


def resident(key: str) -> int:
    """Read a number of bytes from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def train(name: str, recompute: bool, count: bool) -> dict[str, float]:
    """Make three optimiser steps; return seconds of the best, and bytes."""
    import torch

    from statezoo.lightning_modules.memory import LiveBytes
    from statezoo.lightning_modules.speed import recompute_blocks
    from statezoo.zoo import StateZooConfig, StateZooForCausalLM

    torch.set_num_threads(1)
    config = StateZooConfig(
        d_model=WIDTH, n_layers=LAYERS, vocab_size=W, mixers=[name], tie_embeddings=True
    )
    start = resident("VmRSS")
    net = StateZooForCausalLM(config).train()
    if recompute:
        recompute_blocks(net)
    optimizer = torch.optim.AdamW(net.parameters())
    tokens = torch.randint(0, W, (ROWS, T))
    counter = LiveBytes([*net.parameters(), tokens])
    counter.now = counter.peak = sum(p.nbytes for p in net.parameters())
    seconds = []
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    for _ in range(3):
        begin = time.process_time()
        if count:
            with counter:
                step(net, tokens, optimizer)
        else:
            step(net, tokens, optimizer)
        seconds.append(time.process_time() - begin)
    return {"tensors": counter.peak, "rise": resident("VmHWM") - start, "seconds": min(seconds)}


def step(net, tokens, optimizer) -> None:
    """Make a step as Lightning does: gradients of the step before go after the forward pass."""
    loss = net(input_ids=tokens, labels=tokens).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def planned(name: str, recompute: bool) -> dict[str, float]:
    """Return what a plan says."""
    import torch

    from statezoo.lightning_modules.devices import measured_peak
    from statezoo.plan.cost import Costs, Job, Machine, Way
    from statezoo.plan.machines import calibrated
    from statezoo.zoo import StateZooConfig

    torch.set_num_threads(1)
    config = StateZooConfig(
        d_model=WIDTH, n_layers=LAYERS, vocab_size=W, mixers=[name], tie_embeddings=True
    )
    job = Job(config, 1e6, ROWS * T, T, "32-true")
    machine = Machine("cpu", 1, 1e12, measured_peak(torch.device("cpu")), 0.5, 1e9, gpu=False)
    machine = calibrated(machine, job)
    way = Costs(job, machine).of(Way("auto", recompute, rows=ROWS), exact=True)
    return {"total": way.memory["total"], "seconds": way.step, "efficiency": machine.efficiency}


def apart(call: str) -> dict[str, float]:
    """Run a function of this file in a process of its own."""
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import json, plan; "
    script += f"sys.stdout.write(json.dumps(plan.{call}))"
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    args = parser.parse_args()
    write = sys.stdout.write
    write(
        f"{ROWS} windows of {T}, width {WIDTH}, {LAYERS} layers, {W} symbols, float32, 1 thread\n"
    )
    write("| model | activations | planned MB | tensors MB | ratio | resident MB | ratio | "
          "planned s | measured s (CPU) | efficiency |\n" + "| --- " * 10 + "|\n")  # fmt: skip
    for name in args.families:
        for recompute in (False, True):
            said = apart(f"planned({name!r}, {recompute})")
            truth = apart(f"train({name!r}, {recompute}, True)")
            plain = apart(f"train({name!r}, {recompute}, False)")
            mb, ratio = said["total"] / 1e6, said["total"] / truth["tensors"]
            write(
                f"| {name} | {'recomputed' if recompute else 'kept'} | {mb:.1f} | "
                f"{truth['tensors'] / 1e6:.1f} | {ratio:.3f} | {plain['rise'] / 1e6:.1f} | "
                f"{said['total'] / plain['rise']:.2f} | {said['seconds']:.2f} | "
                f"{plain['seconds']:.2f} | {said['efficiency']:.2f} |\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
