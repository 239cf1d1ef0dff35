"""Peak memory and speed of `statezoo score` on one document, against its length.

    python benchmarks/streaming.py --model gla-yeast
    python benchmarks/streaming.py --model transformer-yeast --lengths 4096 8192 16384 32768

Each length runs in a process of its own, which writes a document of seeded random letters (bases
for a model of DNA), or of --data over and over, and scores it as the command does. Prints a
Markdown table: the peak of the resident memory (getrusage), how much of it came after the model was
loaded, tokens per second of the clock and of the CPU, and the score. The state of a recurrent
model has one size, so the peak should not depend on the length; that of attention grows.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

LENGTHS = (100_000, 1_000_000, 10_000_000)
PIECE = 1 << 20
ROW = "| {model} | {tokens:,} | {peak:.1f} | {more:.1f} | {clock:.0f} | {cpu:.0f} | {bits:.4f} |"


def peak_megabytes() -> float:
    """Largest resident memory of this process so far, in MB of 1e6 bytes."""
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found / 1e6 if sys.platform == "darwin" else found * 1024 / 1e6


def letters(symbols: bytes, length: int) -> Iterator[bytes]:
    """Random letters, alike in every run."""
    draw = random.Random(0)
    table = bytes(symbols[i % len(symbols)] for i in range(256))
    for at in range(0, length, PIECE):
        yield draw.randbytes(min(PIECE, length - at)).translate(table)


def repeated(file: Path, length: int) -> Iterator[bytes]:
    """The bytes of a file over and over."""
    while length:
        with file.open("rb") as opened:
            while length and (part := opened.read(min(PIECE, length))):
                length -= len(part)
                yield part


def measure(model: str, length: int, data: str | None, device: str) -> dict[str, float]:
    """Score a document of ``length`` letters in this process."""
    from statezoo.evaluation.score import score
    from statezoo.evaluation.scoring import open_scorer

    unit = open_scorer(model, device).unit
    loaded = peak_megabytes()
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder, "document.txt"), Path(folder, "score.csv")
        symbols = b"ACGT" if unit == "base" else b"etaoin shrdlu\ncmf"
        with file.open("wb") as opened:
            for part in repeated(Path(data), length) if data else letters(symbols, length):
                opened.write(part)
        clock, cpu = time.perf_counter(), time.process_time()
        score(str(file), model=model, out=str(out), device=device)
        clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
        with out.open(encoding="utf-8", newline="") as opened:
            (row,) = csv.DictReader(opened)
    tokens, peak = int(row["tokens"]), peak_megabytes()
    return {
        "tokens": tokens, "peak": peak, "more": peak - loaded, "clock": tokens / clock,
        "cpu": tokens / cpu, "bits": float(row[f"bits_per_{unit}"]),
    }  # fmt: skip


def in_own_process(given: argparse.Namespace, model: str, length: int) -> dict[str, float]:
    """Run this file for one length; this process is small, which counts where it forks."""
    command = [sys.executable, __file__, "--model", model, "--one", str(length)]
    command += ["--device", given.device, *(["--data", given.data] if given.data else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: list[str] | None = None) -> None:
    """Print the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", required=True, help="run, checkpoint, folder or name")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="letters")
    parser.add_argument("--data", help="plain text to repeat, instead of random letters")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        found = measure(given.model[0], given.one, given.data, given.device)
        sys.stdout.write(json.dumps(found) + "\n")
        return
    names = ["model", "tokens", "peak MB", "after loading", "tokens/s", "tokens/CPU s", "bits/unit"]
    sys.stdout.write(f"| {' | '.join(names)} |\n|{'---|' * len(names)}\n")
    for model in given.model:
        for length in given.lengths:
            sys.stdout.write(ROW.format(model=model, **in_own_process(given, model, length)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
