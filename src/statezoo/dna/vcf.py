"""Variants from VCF files, and annotated lines back; nothing but the standard library."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

__all__ = ["Record", "read_header", "read_lines", "read_records"]

COLUMNS = ("CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO")


@dataclass(frozen=True)
class Record:
    """One line of a VCF.

    Attributes:
        columns: All columns, as they stand in the file.
        line: Number of the line in its file, from 1.
    """

    columns: list[str]
    line: int

    @property
    def chrom(self) -> str:
        """Name of the contig."""
        return self.columns[0]

    @property
    def pos(self) -> int:
        """Place of the first base of REF, from 1."""
        return int(self.columns[1])

    @property
    def ref(self) -> str:
        """Reference allele in upper case."""
        return self.columns[3].upper()

    @property
    def alts(self) -> list[str]:
        """Alternate alleles as they stand, in upper case where they are bases."""
        return [alt if alt[:1] == "<" else alt.upper() for alt in self.columns[4].split(",")]

    def annotated(self, values: dict[str, str]) -> str:
        """Return the line with entries in INFO, in place of older ones of these names.

        Args:
            values: Entries; an empty value removes the old one alone.
        """
        entries = self.columns[7].split(";")
        kept = [e for e in entries if e not in (".", "") and e.partition("=")[0] not in values]
        kept += [f"{key}={value}" for key, value in values.items() if value]
        return "\t".join([*self.columns[:7], ";".join(kept) or ".", *self.columns[8:]])


def read_header(path: str | Path) -> list[str]:
    """Return the lines up to the one with the names of the columns, that one included.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there is no such line, or the file is cut off.
    """
    lines = []
    for _, line in read_lines(path):
        if not line.startswith("#"):
            break
        lines.append(line)
        if line.startswith("#CHROM"):
            names = line[1:].split("\t")
            if tuple(names[:8]) != COLUMNS:
                raise ValueError(
                    f"{path}: the line #CHROM must name the columns {' '.join(COLUMNS)}, by tabs; "
                    f"it has {' '.join(names[:8])}."
                )
            return lines
    raise ValueError(
        f"{path} has no line #CHROM before its first variant: a VCF begins with ##fileformat lines "
        f"and then #{' '.join(COLUMNS)}, by tabs."
    )


def read_records(path: str | Path) -> Iterator[Record]:
    """Read the variants one by one.

    Raises:
        ValueError: If a line is no variant; names it. Also if the file is cut off.
    """
    for number, line in read_lines(path):
        if line.startswith("#") or not line:
            continue
        columns = line.split("\t")
        if len(columns) < 8:
            raise ValueError(
                f"{path}, line {number}: a VCF has at least 8 columns by tabs, this line "
                f"{len(columns)}."
            )
        if not columns[1].isdigit():
            raise ValueError(
                f"{path}, line {number}: POS must be a whole number from 1, got {columns[1]!r}."
            )
        yield Record(columns, number)


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Number the lines of a plain, gzip or bgzip file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}.")
    try:
        with _open(Path(path)) as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8", "replace").rstrip("\r\n")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is a gzip file that was cut off or damaged ({error}): copy it again."
        ) from error


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if zipped else path.open("rb")  # type: ignore[return-value]
