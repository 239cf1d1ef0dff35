"""A tag for each base of a genome, out of a BED or GFF file of its features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from statezoo.datamodules.dna.fasta import Genome
from statezoo.datamodules.dna.intervals import GFF, read_lines
from statezoo.datamodules.dna.tables import BED
from statezoo.datamodules.labelled_rows import Row
from statezoo.datamodules.labels import Coded, cut

__all__ = ["NOTHING", "feature_file", "paint", "tagged_windows"]

NOTHING = "none"
"""Tag of a base in no feature."""
WINDOW = 1024
"""Bases of a window where none are asked for."""

Feature = tuple[int, int, str]
"""Start, end, name; counted from 0, the end not included."""


def feature_file(path: str) -> Path | None:
    """The file of features that ``path`` names, without kinds after a colon; None if it is none."""
    gff = GFF.fullmatch(path)
    found = Path(gff[1] if gff else path).expanduser()
    name = found.name.lower().removesuffix(".gz")
    return found if found.is_file() and (gff or name.endswith(BED)) else None


def paint(size: int, features: Iterable[Feature]) -> Coded:
    """Tags of ``size`` bases: of features that overlap the shortest, then the first.

    Bases in none are ``none``.
    """
    features = list(features)
    names = [NOTHING, *dict.fromkeys(name for _, _, name in features if name != NOTHING)]
    numbers = {name: number for number, name in enumerate(names)}
    codes = np.zeros(size, dtype=np.int16)
    # the longest first, so that what comes later and is shorter is written over it
    for start, end, name in sorted(reversed(features), key=lambda f: f[0] - f[1]):
        codes[start:end] = numbers[name]
    return Coded(tuple(names), codes)


def tagged_windows(
    source: str, genome: Genome, window: int | None, held: tuple[float, float] | None
) -> Iterator[Row]:
    """Windows end to end over every contig that has a feature, each with a tag per base.

    Args:
        source: BED file, whose 4th column is the name, or GFF or GTF file, its kinds of features
            after a colon, which are the names: ``genes.gff3:CDS,tRNA`` (default ``gene``).
        genome: What the features are of.
        window: Bases of a window; None is 1,024. The last one of a contig may be shorter.
        held: Parts of the windows of every contig, at its end, to validate and to test on; None
            leaves the splits open.

    Raises:
        ValueError: If a line cannot be read, a feature is beyond its contig, or none is of the
            kinds.
    """
    found, others = _read(source, genome)
    for contig, places in others.items():
        reason = "features are on a contig that the genome does not have"
        yield Row(f"{places[0]}, {contig}", contig, None, problem=reason)
    size = window or WINDOW
    counts = {contig: -(-genome.length(contig) // size) for contig in found}
    parts = held or (0.0, 0.0)
    val, test = ({c: int(n * part + 0.5) for c, n in counts.items()} for part in parts)
    apart = sum(val.values()) > 0  # where all contigs are short, rows are drawn instead
    for contig, features in found.items():
        length, n = genome.length(contig), counts[contig]
        tags = paint(length, features)
        letters = genome.fetch(contig, 0, length).tobytes()
        for number, at in enumerate(range(0, length, size)):
            end = min(at + size, length)
            if not letters[at:end].strip(b"Nn"):
                continue
            left = n - number  # windows from here on
            split = "test" if left <= test[contig] else ""
            if not split and apart:
                split = "val" if left <= test[contig] + val[contig] else "train"
            name = f"{contig}:{at}-{end}"
            yield Row(name, name, letters[at:end], cut(tags, at, end), split, contig)


def _read(source: str, genome: Genome) -> tuple[dict[str, list[Feature]], dict[str, list[str]]]:
    """Features by contig of the genome, and places of those on other contigs by their name."""
    gff = GFF.fullmatch(source)
    path = Path(gff[1] if gff else source).expanduser()
    kinds = [kind.strip() for kind in (gff[2] or "gene").split(",")] if gff else []
    found: dict[str, list[Feature]] = {}
    others: dict[str, list[str]] = {}
    seen: dict[str, int] = {}
    for number, columns in read_lines(path):
        place = f"{path}, line {number}"
        contig, (start, end, name) = (_gff if gff else _bed)(columns, place)
        seen[name] = seen.get(name, 0) + 1
        if gff and name not in kinds:
            continue
        if contig not in genome:
            others.setdefault(contig, []).append(place)
            continue
        contig = genome.resolve(contig)
        if not 0 <= start < end <= genome.length(contig):
            raise ValueError(
                f"{place}: {contig}:{start}-{end} is no interval of the contig, which has "
                f"{genome.length(contig)} bases in {genome.path}: is this the same assembly?"
            )
        found.setdefault(contig, []).append((start, end, name))
    lacking = [kind for kind in kinds if kind not in seen]
    if lacking or not seen:
        listed = ", ".join(f"{k} ({n})" for k, n in sorted(seen.items(), key=lambda x: -x[1])[:8])
        ending = f"write the kinds after the file's name, as in {path.name}:CDS,tRNA."
        raise ValueError(
            f"{path} has no feature{''.join(f' {kind!r}' for kind in lacking[:1])}; it has "
            f"{listed or 'none'}: {ending}"
            if gff
            else f"{path} has no feature: add lines of contig, start, end and name."
        )
    if not found:
        genome.resolve(next(iter(others)))  # raises, naming the nearest
    return found, others


def _gff(columns: list[str], place: str) -> tuple[str, Feature]:
    try:
        contig, _, kind, start, end = columns[:5]
        return contig, (int(start) - 1, int(end), kind)
    except ValueError:
        raise ValueError(
            f"{place}, is no GFF: needed are nine columns between tabs, got "
            f"{' '.join(columns)[:60]!r}."
        ) from None


def _bed(columns: list[str], place: str) -> tuple[str, Feature]:
    columns = columns[0].split() if len(columns) == 1 else columns
    try:
        contig, start, end, name = columns[:4]
        return contig, (int(start), int(end), name.strip())
    except ValueError:
        raise ValueError(
            f"{place}: needs contig, start, end and name, got {' '.join(columns)[:80]!r}."
        ) from None
