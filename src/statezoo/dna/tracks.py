"""How surprising every base of a genome is, as a track for genome browsers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from math import log
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from statezoo.datamodules.dna.fasta import Genome
from statezoo.datamodules.dna.intervals import Region, merge, read_intervals
from statezoo.datamodules.dna.sequence import composition, to_codes
from statezoo.dna.output import Lines
from statezoo.dna.pictures import save_track
from statezoo.dna.regions import batches, genome_source, whole
from statezoo.dna.scoring import Model, nll, open_model
from statezoo.dna.vcf import read_lines

__all__ = ["perplexity", "read_bedgraph"]


class _Piece(NamedTuple):
    """Bases ``start`` to ``stop`` are scored; those from ``context`` on are read before."""

    contig: str
    context: int
    start: int
    stop: int


def perplexity(
    model: str | Model,
    genome: str | Path,
    out: str | Path,
    *,
    bed: str | Path | None = None,
    window: int = 131072,
    stride: int = 65536,
    bin: int = 1,
    unit: Literal["nats", "bits"] = "nats",
    png: bool = False,
    batch_size: int = 1,
    device: str = "cpu",
) -> dict[str, Any]:
    """Write the negative log-likelihood of every A, C, G and T as a bedGraph.

    Every base is scored once, forward, given at least ``window - stride`` bases before it (fewer at
    the start of its contig, which begins with ``[BOS]``) and at most ``window``. N and other codes
    are read, not scored, and have no line. Lines are sorted by contig name and place, 0-based and
    half-open.

    Args:
        model: Checkpoint, folder of a run, exported folder or Hub id of a causal model; or an
            opened one.
        genome: FASTA.
        out: File to write, ``.bedGraph`` or ``.bedGraph.gz``.
        bed: Regions to score, as BED, or GFF with a kind of feature (``genes.gff:CDS``); those that
            overlap are joined. Default all contigs.
        window: Bases that are read at once.
        stride: Bases that are scored at once, the last ones of each window.
        bin: Bases per line, from the start of each region on; the value is their mean.
        unit: Of the values, per base.
        png: Whether to draw the track, as ``OUT.png``.
        batch_size: Windows at once.
        device: Where to run.

    Returns:
        ``bits_per_base`` over the scored bases, and counts of scored bases, of those among them
        that are soft-masked, of N and of other codes; ``report`` says what was left out.

    Raises:
        ValueError: If an input cannot be used or a number is out of range.
    """
    if not 0 < stride <= window or bin < 1 or stride % bin or batch_size < 1:
        raise ValueError(
            "perplexity needs 0 < stride <= window, stride a multiple of bin, and batch_size of at "
            f"least 1; got window {window}, stride {stride}, bin {bin}, batch_size {batch_size}."
        )
    opened = open_model(model, device, "perplexity", ("causal",))
    bases = Genome(str(genome))
    report: list[str] = []
    if bed is None:
        regions = merge(Region(*region[:3]) for region in whole(bases))
    else:
        regions = merge(chain.from_iterable(read_intervals(str(bed), bases, report).values()))
    settings: dict[str, Any] = {"genome": genome_source(bases), "regions": regions}
    settings |= {"window": window, "stride": stride, "bin": bin, "unit": unit}
    settings["weights"] = opened.fingerprint
    with Lines(out, "perplexity", settings) as lines:
        if lines.finished is None:
            scale = 1.0 if unit == "nats" else 1 / log(2)
            for batch in batches(_pieces(regions, window - stride, stride), batch_size):
                if not lines.skip(sum(_count_lines(bases, piece, bin) for piece in batch)):
                    lines.write(_score(opened, bases, batch, bin, scale))
            lines.close()
            lines.finish(_summary(bases, regions, Path(out), bin, unit))
        summary = {**(lines.finished or {}), "report": report}
    if png:
        summary["png"] = str(save_track(Path(out), unit))
    return summary


def _pieces(regions: Sequence[Region], context: int, stride: int) -> Iterator[_Piece]:
    for contig, start, stop in regions:
        for a in range(start, stop, stride):
            yield _Piece(contig, max(a - context, 0), a, min(a + stride, stop))


def _count_lines(genome: Genome, piece: _Piece, bin: int) -> int:
    """Count the bins of a piece with a scored base."""
    real = to_codes(genome.fetch(piece.contig, piece.start, piece.stop)) < 4
    return int(np.logical_or.reduceat(real, np.arange(0, len(real), bin)).sum())


def _score(model: Model, genome: Genome, pieces: list[_Piece], bin: int, scale: float) -> list[str]:
    bases = [genome.fetch(p.contig, p.context, p.stop) for p in pieces]
    before = [genome.fetch(p.contig, max(p.context - 1, 0), p.context) for p in pieces]
    found = nll(model, bases, before)
    lines = []
    for piece, values in zip(pieces, found, strict=True):
        own = values[piece.start - piece.context :]
        starts = np.arange(0, len(own), bin)
        number = np.add.reduceat(~np.isnan(own), starts, dtype=np.int64)
        sums = np.add.reduceat(np.nan_to_num(own).astype(np.float64), starts) * scale
        for at, n, total in zip(starts.tolist(), number.tolist(), sums.tolist(), strict=True):
            if n:
                a, b = piece.start + at, min(piece.start + at + bin, piece.stop)
                lines.append(f"{piece.contig}\t{a}\t{b}\t{total / n + 0.0:.6f}")
    return lines


def _summary(
    genome: Genome, regions: Sequence[Region], out: Path, bin: int, unit: str
) -> dict[str, Any]:
    """Count bases, and average what is in the finished track."""
    total, scored = 0.0, 0
    masks: dict[str, NDArray[np.bool_]] = {}
    for contig, start, stop, value in read_bedgraph(out):
        n = 1
        if bin > 1:
            if contig not in masks:
                masks = {contig: to_codes(genome.fetch(contig)) < 4}
            n = int(masks[contig][start:stop].sum())
        total, scored = total + value * n, scored + n
    kinds = np.zeros(4, dtype=np.int64)
    for region in regions:
        for a in range(region.start, region.stop, 1 << 22):
            letters = genome.fetch(region.contig, a, min(a + (1 << 22), region.stop))
            kinds += composition(letters.tobytes())
    mean = total / scored if scored else float("nan")
    counts = dict(zip(("scored", "soft_masked", "n", "other_codes"), kinds.tolist(), strict=True))
    bits = mean if unit == "bits" else mean / log(2)
    return {"bits_per_base": round(bits, 6), **counts, "regions": len(regions)}


def read_bedgraph(path: str | Path) -> Iterator[tuple[str, int, int, float]]:
    """Read contig, start, end and value of each line of a bedGraph, plain or compressed."""
    for _, line in read_lines(path):
        contig, start, stop, value = line.split("\t")
        yield contig, int(start), int(stop), float(value)


def points(path: Path, most: int = 2000) -> Iterator[tuple[str, NDArray[Any], NDArray[Any]]]:
    """Thin a track for drawing: place and mean value of at most ``most`` spans of each contig."""
    for contig, lines in groupby(read_bedgraph(path), key=lambda line: line[0]):
        rows = np.array([line[1:] for line in lines])
        cuts = np.linspace(0, len(rows), min(most, len(rows)) + 1).astype(int)[:-1]
        widths = rows[:, 1] - rows[:, 0]
        total = np.add.reduceat(widths, cuts)
        middle = np.add.reduceat((rows[:, 0] + rows[:, 1]) / 2 * widths, cuts) / total
        yield contig, middle, np.add.reduceat(rows[:, 2] * widths, cuts) / total
