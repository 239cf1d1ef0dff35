"""Files of labelled DNA: how each is read, and records of FASTA."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from statezoo.datamodules.dna.fasta import is_fasta
from statezoo.datamodules.tables import lines, table_kind

__all__ = ["BED", "PLAIN", "fasta_records", "file_kind"]

PLAIN = (".txt",)
BED = (".bed",)


def file_kind(path: Path) -> str:
    """``fasta``, an ending of ``TABLES``, ``BED`` or ``PLAIN``, or ``""``: how a file is read."""
    if is_fasta(path):
        return "fasta"
    name = path.name.lower().removesuffix(".gz")
    return table_kind(path) or next((x for x in BED + PLAIN if name.endswith(x)), "")


def fasta_records(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name, up to the first blank, and letters of each record."""
    name, parts = None, list[str]()
    for line in lines(path):
        if line.startswith(">"):
            if name is not None:
                yield name, "".join(parts).encode("ascii", "replace")
            name, parts = (line[1:].split() or [""])[0], []
        elif line.strip():
            if name is None:
                raise ValueError(
                    f"{path} is no FASTA file: it begins with {line.strip()[:20]!r} instead of "
                    "'>' and a name."
                )
            parts.append(line.strip())
    if name is None:
        raise ValueError(f"{path} is empty: a FASTA file begins with '>' and a name.")
    yield name, "".join(parts).encode("ascii", "replace")
