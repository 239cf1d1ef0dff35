"""Sequence parallelism: equal to one process, and what it sends, for every mixer.

    python benchmarks/sequence_parallel.py --out FOLDER

Starts 2 and then 4 processes of this machine's CPU, each with a slice of time, and prints two
Markdown tables. First the largest error, of the larger of 1 and the value, of the logits and of all
gradients (added up over the processes) against one process, in float64: two layers, random weights,
a batch of two sequences and a pack of documents that cross slices, auxiliary losses included. Then
what one layer sends, per process and training step: the number of collectives, forward + backward,
and their bytes at each length of the whole sequence, in float32. With --out, both as CSV. Fails if
an error is above 1e-10, or if anything but keys and values grows with the length.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from statezoo.kernels.sequence import Shard, Traffic, traffic
from statezoo.zoo import MIXERS, StateZooConfig, StateZooForCausalLM
from statezoo.zoo.auxiliary import auxiliary_loss

ALLOWED = 1e-10
WORDS, WIDTH, LENGTH = 11, 64, 48
PARTS = {
    "causal_conv1d": "halo", "attention": "keys, values", "router": "router",
    "positions": "positions",
}  # fmt: skip
"""What an operation sends; others send states."""
Row = dict[str, str | int | float]


def make(mixer: str, n_layers: int, dtype: torch.dtype) -> StateZooForCausalLM:
    """Make a net in training mode, the same on all processes, with nothing at zero."""
    torch.manual_seed(0)
    config = StateZooConfig(vocab_size=WORDS, d_model=WIDTH, n_layers=n_layers, mixers=[mixer])
    net = StateZooForCausalLM(config).to(dtype).train()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return net


def step(
    net: StateZooForCausalLM, ids: torch.Tensor, cu: torch.Tensor | None, shard: Shard | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the logits and all gradients of the summed loss, of the whole or of a slice."""
    if shard is not None:
        ids, cu = shard.take(ids), shard.cu_seqlens
    with shard or nullcontext():
        out = net.model(ids, cu_seqlens=cu)
    logits = net.lm_head(out.last_hidden_state)
    loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum")
    beside = auxiliary_loss(out.auxiliary or {})
    if beside is not None:
        loss = loss + beside * ids.numel()
    return logits.detach(), list(torch.autograd.grad(loss, [*net.parameters()]))


def worst(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the largest error, of the larger of 1 and the value, on all processes."""
    error = ((got - want).abs() / want.abs().clamp(min=1)).max().nan_to_num(nan=torch.inf)
    dist.all_reduce(error, op=dist.ReduceOp.MAX)
    return error.item()


def equality(mixer: str) -> Row:
    """Compare slices to the whole."""
    net, size = make(mixer, 2, torch.float64), dist.get_world_size()
    outputs = gradients = 0.0
    for B, bounds in ((2, None), (1, [0, 5, 30, 33, LENGTH])):
        ids = torch.randint(WORDS, (B, LENGTH), generator=torch.Generator().manual_seed(B))
        cu = None if bounds is None else torch.tensor(bounds)
        shard = Shard(None, LENGTH // size, cu)
        want, want_gradients = step(net, ids, cu, None)
        got, got_gradients = step(net, ids, cu, shard)
        outputs = max(outputs, worst(got, shard.take(want)))
        for a, b in zip(got_gradients, want_gradients, strict=True):
            dist.all_reduce(a)
            gradients = max(gradients, worst(a, b))
    return {"mixer": mixer, "processes": size, "outputs": outputs, "gradients": gradients}


def sent(mixer: str, T: int) -> list[Row]:
    """Count the collectives of one layer, and the bytes that this process puts in."""
    net, size = make(mixer, 1, torch.float32), dist.get_world_size()
    ids = torch.randint(WORDS, (1, T), generator=torch.Generator().manual_seed(0))
    shard = Shard(None, T // size)
    with traffic() as log:
        step(net, ids, None, shard)
    log.sort(key=lambda one: _part(one) != "state")
    found: dict[tuple[str, str], Row] = {}
    for one in log:
        key = (_part(one), one.direction)
        row: Row = {"mixer": mixer, "processes": size, "length": T, "part": key[0], "pass": key[1]}
        row = found.setdefault(key, row | {"collectives": 0, "bytes": 0})
        row["collectives"] = int(row["collectives"]) + 1
        row["bytes"] = int(row["bytes"]) + one.bytes
    return [*found.values()]


def _part(one: Traffic) -> str:
    return PARTS.get(one.op, "state")


def work(rank: int, size: int, folder: str, mixers: list[str], lengths: list[int]) -> None:
    """Do what one process does; the last one, which has most to send, writes it down."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet{size}", rank=rank, world_size=size,
        timeout=timedelta(minutes=10),
    )  # fmt: skip
    rows = [equality(mixer) for mixer in mixers]
    traffic_rows = [row for mixer in mixers for T in lengths for row in sent(mixer, T)]
    if rank == size - 1:
        torch.save((rows, traffic_rows), f"{folder}/{size}.pt")
    dist.destroy_process_group()


def show_equality(rows: list[Row]) -> list[str]:
    """Print the first table; return what is wrong."""
    write = sys.stdout.write
    write("\n| mixer | processes | largest error of outputs | of gradients |\n|---|---|---|---|\n")
    for row in rows:
        write("| {mixer} | {processes} | {outputs:.1e} | {gradients:.1e} |\n".format(**row))
    return [
        f"{row['mixer']} on {row['processes']} processes is off by more than {ALLOWED:.0e}"
        for row in rows
        if not all(float(row[what]) < ALLOWED for what in ("outputs", "gradients"))
    ]


def show_traffic(rows: list[Row], lengths: list[int]) -> list[str]:
    """Print the second table; return what is wrong."""
    at = " / ".join(map(str, lengths))
    sys.stdout.write(
        "\n| mixer | processes | what | collectives, forward + backward | bytes a process sends "
        f"forward, T = {at} | backward, T = {at} | grows |\n|---|---|---|---|---|---|---|\n"
    )
    wrong = []
    for mixer, size, part in dict.fromkeys((r["mixer"], r["processes"], r["part"]) for r in rows):
        mine = [r for r in rows if (r["mixer"], r["processes"], r["part"]) == (mixer, size, part)]
        counts, cells, grows = [], [], False
        for way in ("forward", "backward"):
            found = [r for r in mine if r["pass"] == way]
            counts.append(str(found[0]["collectives"]) if found else "0")
            cells.append(" / ".join(f"{r['bytes']:,}" for r in found) or "0")
            grows |= len({(r["bytes"], r["collectives"]) for r in found}) > 1
        sys.stdout.write(
            f"| {mixer} | {size} | {part} | {' + '.join(counts)} | {' | '.join(cells)} "
            f"| {'with T' if grows else 'no'} |\n"
        )
        if grows and part != "keys, values":
            wrong.append(f"what {mixer} sends on {size} processes grows with T: {part}")
    return wrong


def save(rows: list[Row], file: Path) -> None:
    """Write a table as CSV."""
    with file.open("w", newline="") as stream:
        table = csv.DictWriter(stream, [*rows[0]])
        table.writeheader()
        table.writerows(rows)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixers", nargs="+", choices=sorted(MIXERS), default=sorted(MIXERS))
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--out", type=Path, help="folder for equality.csv and traffic.csv")
    given = parser.parse_args()
    for size in given.processes:
        wrong = [n for n in (LENGTH, *given.lengths) if size < 1 or n % size or n < size]
        if wrong:
            parser.error(f"{size} processes cannot have slices of one length of {wrong} tokens")
    return given


def main() -> int:
    """Run the comparison; return 1 where something is not as it should be."""
    given = arguments()
    os.environ["OMP_NUM_THREADS"] = "1"  # one core a process, where there are as many
    equal: list[Row] = []
    bytes_sent: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for size in given.processes:
            mp.start_processes(
                work, (size, folder, given.mixers, given.lengths), size, start_method="spawn"
            )
            rows, more = torch.load(f"{folder}/{size}.pt")
            equal, bytes_sent = equal + rows, bytes_sent + more
    wrong = show_equality(equal) + show_traffic(bytes_sent, given.lengths)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        save(equal, given.out / "equality.csv")
        save(bytes_sent, given.out / "traffic.csv")
    sys.stdout.write("\n" + ("".join(f"{each}.\n" for each in wrong) or "All as it should be.\n"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
