"""Regions of a genome: read from BED and GFF files, joined, cut and taken apart."""

from __future__ import annotations

import gzip
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from statezoo.datamodules.dna.fasta import Genome

__all__ = ["GFF", "Region", "intersect", "merge", "read_intervals", "read_lines", "subtract"]

_SPLITS = {"train": "train", "valid": "val", "val": "val", "test": "test"}
GFF = re.compile(r"(.+\.(?:gff3?|gtf)(?:\.gz)?)(?::([^:/\\]+))?", re.IGNORECASE)


class Region(NamedTuple):
    """Bases ``start`` to ``stop`` of a contig, counted from 0, ``stop`` not included."""

    contig: str
    start: int
    stop: int


Parts = dict[str, list[Region]]


def merge(regions: Iterable[Region]) -> list[Region]:
    """The same bases as sorted regions that neither overlap nor touch."""
    found: list[Region] = []
    for region in sorted(regions):
        last = found[-1] if found else None
        if last and last.contig == region.contig and region.start <= last.stop:
            found[-1] = last._replace(stop=max(last.stop, region.stop))
        elif region.stop > region.start:
            found.append(region)
    return found


def intersect(a: Iterable[Region], b: Iterable[Region]) -> list[Region]:
    """Bases in both of two merged lists."""
    others = _by_contig(b)
    found = []
    for contig, start, stop in a:
        for low, high in others.get(contig, ()):
            if low < stop and start < high:
                found.append(Region(contig, max(start, low), min(stop, high)))
    return found


def subtract(a: Iterable[Region], b: Iterable[Region]) -> list[Region]:
    """Bases of the merged list ``a`` that are not in the merged list ``b``."""
    others = _by_contig(b)
    found = []
    for contig, start, stop in a:
        for low, high in others.get(contig, ()):
            if low >= stop or high <= start:
                continue
            if low > start:
                found.append(Region(contig, start, low))
            start = max(start, high)
        if start < stop:
            found.append(Region(contig, start, stop))
    return found


def _by_contig(regions: Iterable[Region]) -> dict[str, list[tuple[int, int]]]:
    found: dict[str, list[tuple[int, int]]] = {}
    for contig, start, stop in regions:
        found.setdefault(contig, []).append((start, stop))
    return found


def read_intervals(source: str, genome: Genome, report: list[str]) -> Parts:
    """Merged regions by split; all under ``""`` where the file names none.

    Args:
        source: BED file, whose fourth column may say train, valid, val or test; or GFF or GTF
            file, its kind of feature after a colon: ``genes.gff3:CDS`` (default ``gene``).
            Either may be gzipped.
        genome: Where the regions lie.
        report: Takes a line for what is left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line cannot be read or no region is left.
    """
    gff = GFF.fullmatch(source)
    path = Path(gff[1] if gff else source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"No file {str(path)!r}: give intervals as a BED or GFF file.")
    rows = list(_gff(path, gff[2] or "gene") if gff else _bed(path))
    if not rows:
        raise ValueError(f"{path} has no interval: give lines of contig, start and end.")
    named = all(label in _SPLITS for _, label in rows)
    parts: Parts = {}
    unknown: Counter[str] = Counter()
    beyond = 0
    for region, label in rows:
        if region.contig not in genome:
            unknown[region.contig] += 1
            continue
        name = genome.resolve(region.contig)
        stop = min(region.stop, genome.length(name))
        beyond += stop < region.stop
        split = _SPLITS[label] if named else ""
        parts.setdefault(split, []).append(Region(name, region.start, stop))
    if unknown.total() == len(rows):
        genome.resolve(rows[0][0].contig)  # raises, naming the nearest
    if unknown:
        listed = ", ".join(list(unknown)[:3])
        report.append(f"{path}: {unknown.total()} intervals on contigs not in the genome: {listed}")
    if beyond:
        report.append(f"{path}: {beyond} intervals reach beyond the end of their contig: cut there")
    return _apart({split: merge(regions) for split, regions in parts.items()}, path, report)


def _apart(parts: Parts, path: Path, report: list[str]) -> Parts:
    """Take bases that are also held out from those to train on."""
    for split, held in (("train", ("val", "test")), ("val", ("test",))):
        others = merge(region for name in held for region in parts.get(name, ()))
        if split in parts and others:
            before = _size(parts[split])
            parts[split] = subtract(parts[split], others)
            if lost := before - _size(parts[split]):
                report.append(f"{path}: {lost} bases of {split} are also held out: taken from it")
    return parts


def _size(regions: Iterable[Region]) -> int:
    return sum(region.stop - region.start for region in regions)


def read_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Numbered lines in columns, comments and browser lines left out."""
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.startswith("##FASTA"):
                    return
                if line.strip() and not line.startswith(("#", "track", "browser")):
                    yield number, line.rstrip("\r\n").split("\t")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is a damaged or truncated gzip file ({error}).") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file: give intervals as BED or GFF.") from error


def _bed(path: Path) -> Iterator[tuple[Region, str]]:
    """Regions and fourth columns."""
    for number, columns in read_lines(path):
        if len(columns) == 1:
            columns = columns[0].split()
        try:
            region = Region(columns[0], int(columns[1]), int(columns[2]))
        except (IndexError, ValueError):
            if number == 1 and len(columns) > 2:  # names of the columns
                continue
            raise ValueError(
                f"{path}, line {number}, is no BED: needed are contig, start and end, got "
                f"{' '.join(columns)[:60]!r}."
            ) from None
        if not 0 <= region.start < region.stop:
            raise ValueError(
                f"{path}, line {number}: needed is 0 <= start < end, got {region.start} and "
                f"{region.stop}."
            )
        yield region, columns[3].strip().lower() if len(columns) > 3 else ""


def _gff(path: Path, feature: str) -> Iterator[tuple[Region, str]]:
    """Regions of one kind of feature; GFF counts from 1 and includes the end."""
    kinds: Counter[str] = Counter()
    for number, columns in read_lines(path):
        try:
            contig, _, kind, start, stop = columns[:5]
            region = Region(contig, int(start) - 1, int(stop))
        except ValueError:
            raise ValueError(
                f"{path}, line {number}, is no GFF: needed are nine columns between tabs, got "
                f"{' '.join(columns)[:60]!r}."
            ) from None
        kinds[kind] += 1
        if kind == feature:
            yield region, ""
    if feature not in kinds:
        listed = ", ".join(f"{kind} ({n})" for kind, n in kinds.most_common(8))
        raise ValueError(
            f"{path} has no feature {feature!r}; it has {listed or 'none'}: write the kind after "
            f"the file's name, as in {path.name}:CDS."
        )
