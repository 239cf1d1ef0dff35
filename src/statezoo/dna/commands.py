"""The ``statezoo dna`` commands; they import torch only where they need it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

from statezoo.dna.bench import bench

__all__ = ["COMMANDS"]


def score_variants(
    *,
    model: str,
    vcf: str,
    genome: str,
    out: str,
    window: int = 8192,
    rc: Literal["none", "average"] = "average",
    batch_size: int = 8,
    device: str = "cpu",
) -> None:
    """Write how much likelier a model finds each alternate allele of a VCF than the reference.

    Args:
        model: Checkpoint, folder of a run, exported folder, name on the Hub, or short name.
        vcf: Variants, plain, gzip or bgzip.
        genome: FASTA of the same assembly.
        out: File to write: .vcf, .vcf.gz, .csv or .tsv; the same command again goes on after a
            kill.
        window: Bases around a variant.
        rc: Average takes the mean of both strands.
        batch_size: Variants at once.
        device: Where to run: cpu, cuda, mps.
    """
    from statezoo.dna.variants import SKIPPED
    from statezoo.dna.variants import score_variants as run

    found = run(model, vcf, genome, out, window=window, rc=rc, batch_size=batch_size, device=device)
    _say(
        f"{found['scored']} of {found['alternates']} alternates in {found['records']} records "
        "scored (LLR, nats)"
    )
    if found["renamed"]:
        _say(
            f"  {found['renamed']} records name their contig otherwise than the genome (chr or not)"
        )
    for reason, n in found["skipped"].items():
        _say(f"  {n} {reason}: {SKIPPED[reason]}")
    _say(f"wrote {out}")


def embed(
    *,
    model: str,
    out: str,
    fasta: str | None = None,
    bed: str | None = None,
    genome: str | None = None,
    layer: int = -1,
    pool: Literal["mean", "last", "max"] = "mean",
    rc: Literal["none", "average"] = "none",
    batch_size: int = 16,
    device: str = "cpu",
) -> None:
    """Write one vector per sequence or region as parquet.

    Args:
        model: Checkpoint, folder of a run, exported folder, name on the Hub, or short name.
        out: Parquet file to write; the same command again goes on after a kill.
        fasta: Sequences.
        bed: Regions of the genome, instead of sequences.
        genome: FASTA that the regions are cut from.
        layer: 0 is the embedding, -1 the last layer after the final norm.
        pool: How the places of a sequence become one vector.
        rc: Average takes the mean of both strands.
        batch_size: Sequences at once.
        device: Where to run: cpu, cuda, mps.
    """
    from statezoo.dna.embedding import embed as run

    found = run(
        model, out, fasta=fasta, bed=bed, genome=genome, layer=layer, pool=pool, rc=rc,
        batch_size=batch_size, device=device,
    )  # fmt: skip
    _say(f"wrote {out}: {found['records']} vectors of {found['width']} numbers")


def perplexity(
    *,
    model: str,
    genome: str,
    out: str,
    bed: str | None = None,
    window: int = 131072,
    stride: int = 65536,
    bin: int = 1,
    unit: Literal["nats", "bits"] = "nats",
    png: bool = False,
    batch_size: int = 1,
    device: str = "cpu",
) -> None:
    """Write how surprising every base is as a track for genome browsers.

    Args:
        model: Checkpoint, folder of a run, exported folder, name on the Hub, or short name.
        genome: FASTA.
        out: File to write, .bedGraph or .bedGraph.gz; the same command again goes on after a kill.
        bed: Regions to score, BED or GFF; default everything.
        window: Bases that are read at once.
        stride: Bases of each window that are scored, its last.
        bin: Bases per line of the track.
        unit: Of the values, per base.
        png: Whether to draw the track beside it.
        batch_size: Windows at once.
        device: Where to run: cpu, cuda, mps.
    """
    from statezoo.dna.tracks import perplexity as run

    found = run(
        model, genome, out, bed=bed, window=window, stride=stride, bin=bin, unit=unit, png=png,
        batch_size=batch_size, device=device,
    )  # fmt: skip
    _say(
        f"{found['bits_per_base']:.4f} bits/base over {found['scored']:,} A, C, G and T "
        f"({found['soft_masked']:,} of them soft-masked); not scored: {found['n']:,} N, "
        f"{found['other_codes']:,} other codes"
    )
    _say("\n".join([*found["report"], *(f"wrote {f}" for f in (out, found.get("png")) if f)]))


def generate(
    *,
    model: str,
    out: str,
    prompt: str = "",
    n: int = 1,
    tokens: int = 400,
    temperature: float = 1.0,
    top_k: int = 4,
    seed: int = 0,
    batch_size: int = 64,
    device: str = "cpu",
) -> None:
    """Write new sequences as FASTA; nothing but A, C, G and T is drawn.

    Args:
        model: Checkpoint, folder of a run, exported folder, name on the Hub, or short name.
        out: File to write, .fa or .fa.gz; the same command again goes on after a kill.
        prompt: Bases to go on from.
        n: Sequences.
        tokens: Tokens to draw for each.
        temperature: 0 takes the likeliest token, 1 draws from the model's probabilities.
        top_k: Draw from this many likeliest tokens; 0 from all.
        seed: The same seed gives the same file.
        batch_size: Sequences at once; part of what a seed means.
        device: Where to run: cpu, cuda, mps.
    """
    from statezoo.dna.sampling import generate as run

    found = run(
        model, out, prompt=prompt, n=n, tokens=tokens, temperature=temperature, top_k=top_k,
        seed=seed, batch_size=batch_size, device=device,
    )  # fmt: skip
    _say(f"wrote {out}: {found['sequences']} sequences, {found['tokens']} tokens drawn")


def mutagenesis(
    *,
    model: str,
    out: str,
    fasta: str | None = None,
    region: str | None = None,
    genome: str | None = None,
    flank: int = 0,
    target: str | None = None,
    rc: Literal["none", "average"] = "none",
    batch_size: int = 48,
    device: str = "cpu",
) -> None:
    """Write what every other base in every place would change, as a table and heat maps.

    Args:
        model: Checkpoint, folder of a run, exported folder, name on the Hub, or short name.
        out: CSV to write, pictures beside it; the same command again goes on after a kill.
        fasta: Sequences.
        region: Part of the genome, such as chr1:100-200, instead of sequences.
        genome: FASTA that the region is cut from.
        flank: Bases either side of the region that are read but not mutated.
        target: Class of a classifier, by name or number; default the one that it predicts.
        rc: Average takes the mean of both strands.
        batch_size: Mutants at once.
        device: Where to run: cpu, cuda, mps.
    """
    from statezoo.dna.mutations import mutagenesis as run

    found = run(
        model, out, fasta=fasta, region=region, genome=genome, flank=flank, target=target, rc=rc,
        batch_size=batch_size, device=device,
    )  # fmt: skip
    _say(f"wrote {out}: {found['bases']} bases in {found['sequences']} sequences")
    _say("\n".join(f"wrote {file}" for file in found["pictures"]))


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


COMMANDS: Mapping[str, Callable[..., Any]] = {
    "dna score-variants": score_variants,
    "dna embed": embed,
    "dna perplexity": perplexity,
    "dna generate": generate,
    "dna mutagenesis": mutagenesis,
    "dna bench": bench,
}
