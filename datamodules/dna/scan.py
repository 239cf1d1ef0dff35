"""One look at every letter before training: what there is, what is wrong, where the gaps are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from statezoo.datamodules.corpus import cached
from statezoo.datamodules.dna.fasta import Genome
from statezoo.datamodules.dna.intervals import Region, subtract
from statezoo.datamodules.dna.sequence import Composition, check_letters, composition

__all__ = ["GAP", "Scan", "scan"]

GAP = 1000
"""Runs of so many N are gaps of the assembly: no window is spent on them."""

_CHUNK = 1 << 22


class Scan(NamedTuple):
    """What a list of regions holds.

    Attributes:
        regions: The regions without their gaps.
        composition: Letters of the regions as they were given.
        gaps: How many gaps were taken out.
        gap_bases: N in them.
    """

    regions: list[Region]
    composition: Composition
    gaps: int
    gap_bases: int


def scan(genome: Genome, regions: list[Region]) -> Scan:
    """Count the letters of merged regions and take out long runs of N; cached.

    Raises:
        ValueError: If there is a letter that DNA does not have.
    """
    key = hashlib.sha256(repr((1, GAP, genome.identity, regions)).encode()).hexdigest()[:32]

    def write(folder: Path) -> None:
        total, gaps = Composition(), []
        for region in regions:
            part, found = _read(genome, region)
            total = total.plus(part)
            gaps += found
        (folder / "scan.json").write_text(json.dumps([total, gaps]), encoding="utf-8")

    folder = cached("dna", key, write)
    counts, found = json.loads((folder / "scan.json").read_text(encoding="utf-8"))
    gaps = [Region(*gap) for gap in found]
    bases = sum(gap.stop - gap.start for gap in gaps)
    return Scan(subtract(regions, gaps), Composition(*counts), len(gaps), bases)


def _read(genome: Genome, region: Region) -> tuple[Composition, list[Region]]:
    """Letters and gaps of one region."""
    total, gaps = Composition(), []
    since = None  # first base of the run of N that reaches the end of the last part
    contig, first, last = region
    for start in range(first, last, _CHUNK):
        stop = min(start + _CHUNK, last)
        letters = genome.fetch(contig, start, stop)
        text = letters.tobytes()
        check_letters(text, f"{genome.path}, contig {contig!r},", start)
        part = composition(text)
        total = total.plus(part)
        if not part.n and since is None:
            continue
        n = (letters | 32) == ord("n")
        edges = np.diff(n, prepend=since is not None, append=False)
        places = (start + np.flatnonzero(edges)).tolist()
        if since is not None:
            places.insert(0, since)
        since = None
        runs = list(zip(places[::2], places[1::2], strict=True))
        if runs and runs[-1][1] == stop < last:
            since = runs.pop()[0]
        gaps += [Region(contig, a, b) for a, b in runs if b - a >= GAP]
    return total, gaps
