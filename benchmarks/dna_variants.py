"""Time of scoring variants with the prefix shared, against whole windows.

    python benchmarks/dna_variants.py --mixers gla --window 8192 --repeats 7

The whole way scores reference and every alternate from the start of the window; the shared way is
that of ``statezoo dna score-variants``. With the variant in the middle the work is 2 windows to 1.5
for one alternate, 4 to 2.5 for three: ratios of 1.33 and 1.6 at best. Prints medians, and
the largest difference of a score.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from statezoo import zoo
from statezoo.datamodules.dna.tokenizers import Nucleotides
from statezoo.dna.scoring import Model, extend, score_ends
from statezoo.dna.variants import Job, shared_ratios


def whole_ratios(model: Model, jobs: list[Job]) -> list[NDArray[np.float64]]:
    """Score every allele in its whole window; the first token is read and not scored."""
    found = []
    first = torch.stack([model.first(job.before) for job in jobs for _ in job.alleles])
    windows = [
        model.ids(np.concatenate([job.left, allele, job.right]))
        for job in jobs
        for allele in job.alleles
    ]
    sums = score_ends(model, extend(model, first), [*range(len(windows))], windows).numpy()
    for job in jobs:
        own, sums = np.split(sums, [len(job.alleles)])
        found.append(own[1:] - own[0])
    return found


def make_jobs(window: int, alternates: int, variants: int, seed: int) -> list[Job]:
    """Random SNVs in the middle of random windows."""
    rng = np.random.default_rng(seed)
    letters = np.frombuffer(b"ACGT", dtype=np.uint8)
    jobs = []
    for _ in range(variants):
        flanks = letters[rng.integers(0, 4, 2 * ((window - 1) // 2) + 2)]
        left, right = np.split(flanks[1:-1], 2)
        alleles = rng.permutation(letters)[: alternates + 1]
        jobs.append(Job(flanks[:1], left, [*alleles[:, None]], right, flanks[-1:]))
    return jobs


def seconds(run, *arguments) -> float:
    """Time one call."""
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


def measure(arguments: argparse.Namespace) -> list[dict]:
    """Compare both ways for one alternate and for three."""
    torch.manual_seed(0)
    config = zoo.StateZooConfig(
        vocab_size=8, d_model=arguments.d_model, n_layers=arguments.n_layers,
        mixers=json.loads(arguments.mixers) if "[" in arguments.mixers else [arguments.mixers],
    )  # fmt: skip
    net = zoo.StateZooForCausalLM(config).eval().to(arguments.device)
    model = Model(net, Nucleotides(), "causal")
    rows = []
    for alternates in (1, 3):
        jobs = make_jobs(arguments.window, alternates, arguments.variants, alternates)
        pairs = zip(shared_ratios(model, jobs), whole_ratios(model, jobs), strict=True)
        error = max(float(np.abs(a - b).max()) for a, b in pairs)
        times = [
            (seconds(shared_ratios, model, jobs), seconds(whole_ratios, model, jobs))
            for _ in range(arguments.repeats)
        ]
        shared, whole = (median(t) for t in zip(*times, strict=True))
        rows.append(
            {
                "alternates": alternates, "shared_s": shared, "whole_s": whole,
                "ratio": whole / shared, "largest_difference": error,
            }
        )  # fmt: skip
    return rows


def main(given: list[str] | None = None) -> None:
    """Print a line for each number of alternates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixers", default="gla", help="name, or JSON list, cycled over layers")
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--n-layers", type=int, default=4)
    parser.add_argument("--window", type=int, default=8192)
    parser.add_argument("--variants", type=int, default=1, help="at once")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    for row in measure(parser.parse_args(given)):
        print(
            f"{row['alternates']} alternate(s): whole {row['whole_s']:.3f} s, shared "
            f"{row['shared_s']:.3f} s, ratio {row['ratio']:.2f}, largest difference "
            f"{row['largest_difference']:.1e} nats"
        )


if __name__ == "__main__":
    main()
