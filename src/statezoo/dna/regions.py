"""Parts of genomes by name and place: BED files, ``chr1:100-200``, and whole records."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from statezoo.datamodules.dna.fasta import Genome
from statezoo.datamodules.dna.sequence import reverse_complement
from statezoo.dna.vcf import read_lines

__all__ = ["Region", "batches", "genome_source", "parse_region", "read_bed", "whole"]

Item = TypeVar("Item")


class Region(NamedTuple):
    """A piece of a contig.

    Attributes:
        contig: Name as the genome has it.
        start: First base, from 0.
        stop: One past the last base.
        name: Column 4 of BED, or the contig.
        strand: ``+`` or ``-``.
    """

    contig: str
    start: int
    stop: int
    name: str
    strand: str = "+"

    def fetch(self, genome: Genome) -> NDArray[np.uint8]:
        """Return the ASCII bases, on the region's own strand."""
        bases = genome.fetch(self.contig, self.start, self.stop)
        return reverse_complement(bases) if self.strand == "-" else bases


def whole(genome: Genome) -> list[Region]:
    """Return every contig, from end to end."""
    return [Region(name, 0, genome.length(name), name) for name in genome.names]


def read_bed(path: str | Path, genome: Genome) -> list[Region]:
    """Read a BED file of 3 columns or more: contig, start from 0, end, name, score, strand.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is no region of this genome, or there is none.
    """
    found = [
        _bed_line(line.split("\t"), genome, f"{path}, line {number}")
        for number, line in read_lines(path)
        if line.strip() and not line.startswith(("#", "track", "browser"))
    ]
    if not found:
        raise ValueError(f"{path} has no regions: a BED line is contig, start, end, by tabs.")
    return found


def _bed_line(columns: list[str], genome: Genome, where: str) -> Region:
    if len(columns) < 3 or not (columns[1].isdigit() and columns[2].isdigit()):
        raise ValueError(
            f"{where}: a BED line is contig, start and end, by tabs; got {' '.join(columns[:4])!r}."
        )
    try:
        contig = genome.resolve(columns[0])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    start, stop = int(columns[1]), int(columns[2])
    if not start < stop <= genome.length(contig):
        raise ValueError(
            f"{where}: {start}-{stop} must lie within contig {contig}, 0-{genome.length(contig)}, "
            "and not be empty."
        )
    name = columns[3] if len(columns) > 3 and columns[3] else f"{contig}:{start}-{stop}"
    return Region(contig, start, stop, name, "-" if columns[5:6] == ["-"] else "+")


def parse_region(text: str, genome: Genome) -> Region:
    """Read ``chr1:100-200``, counted from 1 with the last base included, as samtools does.

    Raises:
        ValueError: If it is written otherwise or not within the genome.
    """
    found = re.fullmatch(r"(.+):([\d,]+)-([\d,]+)", text)
    if not found:
        raise ValueError(f"a region is written chr1:100-200, counted from 1; got {text!r}.")
    contig = genome.resolve(found[1])
    start, stop = (int(n.replace(",", "")) for n in found.groups()[1:])
    if not 1 <= start <= stop <= genome.length(contig):
        raise ValueError(
            f"region {text} must lie within contig {contig}, 1-{genome.length(contig)}."
        )
    return Region(contig, start - 1, stop, text)


def genome_source(genome: Genome) -> str:
    """Return what tells a genome from another in an output's settings."""
    return f"{genome.path.name}, {len(genome)} bases, {len(genome.names)} contigs"


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Cut a stream into lists."""
    stream = iter(items)
    while batch := list(islice(stream, size)):
        yield batch
