"""The ``.fai`` index of a FASTA file: where each contig begins and how its lines are cut."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

__all__ = ["Contig", "UnevenLines", "build_index", "flatten", "read_index", "write_index"]

_CHUNK = 1 << 22


class Contig(NamedTuple):
    """One line of a ``.fai`` index.

    Attributes:
        length: Bases.
        offset: First byte of the sequence in the unpacked file.
        line_bases: Bases per line.
        line_bytes: Bytes per line, line end included.
    """

    length: int
    offset: int
    line_bases: int
    line_bytes: int

    def place(self, base: int) -> int:
        """Byte of a base in the unpacked file."""
        line, column = divmod(base, self.line_bases)
        return self.offset + line * self.line_bytes + column


class UnevenLines(ValueError):
    """Lines of one contig differ in length, so no index can describe them."""


def read_index(file: Path, fasta: Path) -> dict[str, Contig]:
    """Contigs of an index file.

    Raises:
        ValueError: If it is no index, or has a name twice.
    """
    contigs: dict[str, Contig] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        name, *numbers = line.split("\t")
        try:
            contig = Contig(*map(int, numbers[:4]))
            if contig.line_bases < 1 and contig.length:
                raise ValueError
        except (TypeError, ValueError):
            raise ValueError(f"{file} is no index of a FASTA file: remove it.") from None
        if name in contigs:
            raise ValueError(_twice(fasta, name))
        contigs[name] = contig
    if not any(contig.length for contig in contigs.values()):
        raise ValueError(f"{file} lists no sequence: remove it, or give another FASTA file.")
    return {name: contig for name, contig in contigs.items() if contig.length}


def write_index(contigs: dict[str, Contig], file: Path) -> None:
    """Write an index whole or not at all."""
    handle, draft = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            for name, contig in contigs.items():
                out.write("\t".join([name, *map(str, contig)]) + "\n")
        os.chmod(draft, 0o644)
        os.replace(draft, file)
    except OSError:
        os.unlink(draft)
        raise


def build_index(stream: IO[bytes], path: Path) -> dict[str, Contig]:
    """Index of a FASTA file; contigs without a base are left out.

    Args:
        stream: The unpacked file.
        path: Its name, for messages.

    Raises:
        UnevenLines: If lines within a contig differ in length.
        ValueError: If it is no FASTA file or has a name twice.
    """
    contigs: dict[str, Contig] = {}
    lines: _Lines | None = None
    names: set[str] = set()
    for offset, header, piece in _pieces(stream, path):
        if not header:
            if lines is not None:
                lines.add(piece)
            continue
        if lines is not None and lines.length:
            contigs[lines.name] = lines.contig()
        name = _name(piece, path)
        if name in names:
            raise ValueError(_twice(path, name))
        names.add(name)
        lines = _Lines(name, offset + len(piece), path)
    if lines is not None and lines.length:
        contigs[lines.name] = lines.contig()
    if not contigs:
        count = f"{len(names)} names" if names else "nothing in it"
        raise ValueError(f"{path} has {count} but no sequence: add some.")
    return contigs


def flatten(stream: IO[bytes], out: IO[bytes], path: Path) -> None:
    """Copy a FASTA file with every sequence on one line, without blanks."""
    between = b""
    for _, header, piece in _pieces(stream, path):
        if header:
            out.write(between + piece.strip() + b"\n")
            between = b"\n"
        else:
            out.write(piece.translate(None, b" \t\r\n"))
    out.write(between)


def _pieces(stream: IO[bytes], path: Path) -> Iterator[tuple[int, bool, bytes]]:
    """Header lines, and the lines between them in bounded parts: offset, is header, bytes."""
    offset, line_start, rest = 0, True, b""
    while chunk := stream.read(_CHUNK):
        if offset == 0 and not rest:
            _check_head(chunk, path)
        text, at = rest + chunk, 0
        while at < len(text):
            if line_start and text[at : at + 1] == b">":
                end = text.find(b"\n", at) + 1
                if not end:
                    break  # the rest of the header is in the next chunk
                yield offset + at, True, text[at:end]
            else:
                end = text.find(b"\n>", at) + 1 or len(text)
                yield offset + at, False, text[at:end]
            line_start = text[end - 1] == 10
            at = end
        offset, rest = offset + at, text[at:]
    if rest:
        yield offset, True, rest


def _check_head(head: bytes, path: Path) -> None:
    if head.startswith(b">"):
        return
    first = head[:200].splitlines()[0][:40].decode("latin-1") if head.strip() else ""
    hint = ""
    if head.startswith(b"@"):
        hint = " This looks like FASTQ: convert it, for example with seqtk seq -A."
    elif head.startswith(b"LOCUS"):
        hint = " This is GenBank: export it as FASTA."
    raise ValueError(f"{path} is no FASTA file: it begins with {first!r} instead of '>'.{hint}")


def _name(header: bytes, path: Path) -> str:
    words = header[1:].decode("utf-8", "replace").split()
    if not words:
        raise ValueError(f"{path} has a '>' without a name: give every sequence one.")
    return words[0]


def _twice(path: Path, name: str) -> str:
    return f"{path} has two sequences named {name!r}: rename one of them."


class _Lines:
    """Follows the line ends of one contig: all lines but the last must be equally long."""

    def __init__(self, name: str, offset: int, path: Path) -> None:
        self.name, self.offset, self.path = name, offset, path
        self.bytes = self.length = self.regular = 0
        self.line_bases = self.line_bytes = 0
        self.last = b""
        self.ended = False  # a line of another length was seen: only blank lines may follow

    def add(self, piece: bytes) -> None:
        """Take the next bytes."""
        ends = np.flatnonzero(np.frombuffer(piece, dtype=np.uint8) == 10)
        if len(ends) and not self.line_bytes:
            self.line_bytes = self.bytes + int(ends[0]) + 1
            before = piece[ends[0] - 1 : ends[0]] if ends[0] else self.last
            self.line_bases = self.line_bytes - 1 - (before == b"\r")
        bases = len(piece) - len(ends) - piece.count(b"\r")
        blank = len(piece.translate(None, b" \t")) != len(piece)
        if blank or (self.ended and bases):
            raise self._error()
        places = (self.regular + 1 + np.arange(len(ends))) * self.line_bytes
        odd = np.flatnonzero(self.bytes + ends + 1 != places)
        if len(odd):
            self.ended = True
            if piece[ends[odd[0]] :].strip(b"\r\n"):
                raise self._error()
        self.regular += int(odd[0]) if len(odd) else len(ends)
        self.bytes += len(piece)
        self.length += bases
        self.last = piece[-1:]

    def contig(self) -> Contig:
        """The finished entry."""
        if not self.line_bytes:  # one line, ended by the file
            return Contig(self.length, self.offset, self.length, self.length)
        rest = self.length - self.regular * self.line_bases
        if not (self.line_bases and 0 <= rest <= self.line_bases):
            raise self._error()
        return Contig(self.length, self.offset, self.line_bases, self.line_bytes)

    def _error(self) -> UnevenLines:
        return UnevenLines(f"{self.path}, contig {self.name!r}, has lines of unequal length")
