"""Genomes in FASTA files, read in pieces: plain, gzip or bgzip.

A fetch reads the bytes it needs and no others, so a genome of any size costs no memory. The index
is the usual ``.fai`` of samtools, beside the file or, where that folder is read-only, in the cache.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import logging
import zlib
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from statezoo.datamodules.corpus import cache_folder, cached
from statezoo.datamodules.dna.index import (
    Contig,
    UnevenLines,
    build_index,
    flatten,
    read_index,
    write_index,
)
from statezoo.datamodules.dna.sequence import check_letters

__all__ = ["FASTA_ENDINGS", "Genome", "is_fasta"]

log = logging.getLogger(__name__)

FASTA_ENDINGS = (".fa", ".fasta", ".fna", ".ffn", ".fas", ".mfa")
_PACKED = ("", ".gz", ".bgz")
_MITOCHONDRION = ("chrM", "MT", "chrMT", "M")
_SAMPLE = 1 << 16  # letters of each file that are checked when it is opened


def is_fasta(path: Path) -> bool:
    """Whether the name of ``path`` ends like that of a FASTA file."""
    return path.name.lower().endswith(tuple(a + b for a in FASTA_ENDINGS for b in _PACKED))


class Genome:
    """Contigs of a FASTA file, or of all FASTA files in a folder, fetched piece by piece.

    Holds no open file, so it pickles, forks and needs no closing.

    Args:
        path: FASTA, plain, gzip or bgzip, or a folder of these. Plain gzip cannot be read in
            pieces and is expanded into the cache once.

    Attributes:
        path: The file or folder.
        names: First words of the header lines, in file order; ``file:name`` where files in a
            folder use the same name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is empty, truncated, no FASTA, no DNA, or has a name twice.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        files = [_File(file) for file in _files(self.path)]
        often = Counter(name for file in files for name in file.contigs)
        self._contigs: dict[str, tuple[_File, Contig]] = {}
        for file in files:
            for name, contig in file.contigs.items():
                full = name if often[name] == 1 else f"{file.path.name.split('.')[0]}:{name}"
                if full in self._contigs:
                    raise ValueError(
                        f"{self.path} has two files {file.path.name.split('.')[0]!r} with a "
                        f"contig {name!r}: rename one of the files."
                    )
                self._contigs[full] = (file, contig)
        self.names: list[str] = list(self._contigs)
        for file in files:
            file.check()

    def __contains__(self, name: str) -> bool:
        return self._alias(name) is not None

    def __len__(self) -> int:
        """Bases of all contigs together."""
        return sum(contig.length for _, contig in self._contigs.values())

    @property
    def identity(self) -> list[Any]:
        """Path, size and time of change of each file: differs where the content may differ."""
        files = dict.fromkeys(file for file, _ in self._contigs.values())
        return [_identity(file.path) for file in files]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the content of all files, each of which is read once from end to end."""
        found = hashlib.sha256()
        for path in sorted({file.path for file, _ in self._contigs.values()}):
            with path.open("rb") as opened:
                found.update(hashlib.file_digest(opened, "sha256").digest())
        return found.hexdigest()[:32]

    def length(self, name: str) -> int:
        """Bases of a contig.

        Raises:
            ValueError: If there is no such contig.
        """
        return self._contigs[self.resolve(name)][1].length

    def resolve(self, name: str) -> str:
        """The name that this file uses: ``chr1`` and ``1``, ``chrM`` and ``MT`` are the same.

        Raises:
            ValueError: If there is no such contig; the message names the nearest.
        """
        found = self._alias(name)
        if found is None:
            raise ValueError(self._unknown(name))
        return found

    def fetch(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """``[stop - start]`` ASCII letters of a contig, in the case of the file.

        Args:
            name: Contig, or an alias of it.
            start: First base, counted from 0.
            stop: One past the last base; default the end of the contig.

        Raises:
            ValueError: If there is no such contig or the range is not within it.
        """
        file, contig = self._contigs[self.resolve(name)]
        stop = contig.length if stop is None else stop
        if not 0 <= start <= stop <= contig.length:
            raise ValueError(
                f"{name}:{start}-{stop} is not within contig {name!r} of {self.path}, which has "
                f"bases 0 to {contig.length}."
            )
        return np.frombuffer(file.letters(contig, start, stop), dtype=np.uint8).copy()

    def _alias(self, name: str) -> str | None:
        others = [name, name.removeprefix("chr") if name.startswith("chr") else f"chr{name}"]
        if name in _MITOCHONDRION:
            others += _MITOCHONDRION
        return next((other for other in others if other in self._contigs), None)

    def _unknown(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.names, n=1, cutoff=0.0)
        listed = ", ".join(self.names[:5]) + (", ..." if len(self.names) > 5 else "")
        message = (
            f"{self.path} has no contig {name!r}; nearest is {near[0]!r} "
            f"({len(self.names)} contigs: {listed})."
        )
        prefixed = sum(other.startswith("chr") for other in self.names)
        if name.startswith("chr") and not prefixed:
            message += " Its names have no chr prefix; with and without were tried."
        elif not name.startswith("chr") and prefixed == len(self.names):
            message += " Its names have a chr prefix; with and without were tried."
        return message


def _files(path: Path) -> list[Path]:
    """The FASTA files at ``path``."""
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.is_file() and is_fasta(file))
        if not found:
            raise ValueError(
                f"{path} holds no FASTA file: accepted are names ending in "
                f"{', '.join(FASTA_ENDINGS)}, also with .gz."
            )
        return found
    if not path.exists():
        near = next(parent for parent in path.absolute().parents if parent.is_dir())
        raise FileNotFoundError(f"No FASTA file {str(path)!r} ({near} exists).")
    return [path]


def _identity(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns


class _File:
    """One FASTA file and its index."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = path  # what is read: the file itself, or its expansion in the cache
        self._blocks: NDArray[np.int64] | None = None
        with path.open("rb") as file:
            head = file.read(18)
        if not head:
            raise ValueError(f"{path} is empty: a FASTA file begins with '>' and a name.")
        if head.startswith(b"\x1f\x8b"):
            if head[12:14] == b"BC":
                self._blocks = _blocks(path)
            else:
                self._expand("plain gzip cannot be read in pieces; bgzip would need no copy")
        try:
            self.contigs = self._index()
        except UnevenLines as error:
            self._blocks = None
            self._expand(str(error))
            self.contigs = self._index()

    def check(self) -> None:
        """Look at the first letters of the first contig."""
        name, contig = next(iter(self.contigs.items()))
        letters = self.letters(contig, 0, min(contig.length, _SAMPLE))
        check_letters(letters, f"{self.path}, contig {name!r},")

    def letters(self, contig: Contig, start: int, stop: int) -> bytes:
        """Letters of a contig, line ends taken out."""
        if stop <= start:
            return b""
        raw = self._read(contig.place(start), contig.place(stop - 1) + 1)
        letters = raw.translate(None, b"\r\n") if contig.line_bytes > contig.line_bases else raw
        if len(letters) != stop - start:
            raise ValueError(
                f"{self.path} does not fit its index: it was changed, or the index is of another "
                f"file. Remove {self.path.name}.fai."
            )
        return letters

    def _read(self, start: int, stop: int) -> bytes:
        """Bytes of the unpacked file, which is opened each time: that costs microseconds."""
        if self._blocks is None:
            return _bytes(self._data, start, stop)
        packed, plain = self._blocks
        first, last = np.searchsorted(plain, [start, stop - 1], side="right") - 1
        raw = _bytes(self._data, int(packed[first]), int(packed[last + 1]))
        parts, at = [], 0
        for block in range(first, last + 1):
            size = int(packed[block + 1] - packed[block])
            skip = 12 + int.from_bytes(raw[at + 10 : at + 12], "little")  # header, extra field
            try:
                parts.append(zlib.decompress(raw[at + skip : at + size - 8], wbits=-15))
            except zlib.error as error:
                raise ValueError(_broken(self.path, error)) from error
            at += size
        begin = start - int(plain[first])
        return b"".join(parts)[begin : begin + stop - start]

    def _expand(self, reason: str) -> None:
        """Write the sequences into the cache, each on one line, and read them from there."""

        def write(folder: Path) -> None:
            rank_zero_info(f"expanding {self.path} into the cache ({reason})")
            try:
                with _unpacked(self.path) as source, (folder / "genome.fa").open("wb") as out:
                    flatten(source, out, self.path)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(_broken(self.path, error)) from error

        key = hashlib.sha256(repr(_identity(self.path)).encode()).hexdigest()[:32]
        self._data = cached("dna", key, write) / "genome.fa"

    def _index(self) -> dict[str, Contig]:
        """Read the index, or make it and say so."""
        beside = Path(f"{self._data}.fai")
        key = hashlib.sha256(repr(_identity(self._data)).encode()).hexdigest()[:32]
        stored = cache_folder() / "dna" / f"{key}.fai"
        changed = self._data.stat().st_mtime_ns
        own = self._data != self.path
        why = "has no index"
        for file in (beside, stored):
            if not file.is_file():
                continue
            if file.stat().st_mtime_ns >= changed:
                return read_index(file, self.path)
            why = f"is newer than its index {file}"
        try:
            with _unpacked(self._data) as stream:
                contigs = build_index(stream, self.path)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(_broken(self.path, error)) from error
        for file in (beside, stored):
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_index(contigs, file)
            except OSError:
                continue
            if not own:
                rank_zero_info(f"{self.path} {why}: wrote {file}")
            return contigs
        log.warning(f"{self.path} {why}, and neither its folder nor the cache can be written")
        return contigs


def _unpacked(path: Path) -> IO[bytes]:
    """The file from its beginning, unpacked if it is packed."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return cast("IO[bytes]", gzip.open(path, "rb")) if packed else path.open("rb")


def _bytes(path: Path, start: int, stop: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        data = file.read(stop - start)
        while len(data) < stop - start and (more := file.read(stop - start - len(data))):
            data += more
    return data


def _broken(path: Path, error: Exception) -> str:
    return f"{path} is a damaged or truncated gzip file ({error}): copy or pack it again."


def _blocks(path: Path) -> NDArray[np.int64]:
    """``[2 n+1]`` where each bgzip block begins, in the file and in the unpacked text.

    Source: SAM/BAM format specification, section 4.1.
    """
    packed, plain, size = [0], [0], path.stat().st_size
    with path.open("rb", buffering=0) as file:
        while packed[-1] < size:
            file.seek(packed[-1])
            head = file.read(18)
            length = int.from_bytes(head[16:18], "little") + 1
            if head[:2] != b"\x1f\x8b" or head[12:14] != b"BC" or packed[-1] + length > size:
                raise ValueError(_broken(path, EOFError("a block is not whole")))
            file.seek(packed[-1] + length - 4)
            plain.append(plain[-1] + int.from_bytes(file.read(4), "little"))
            packed.append(packed[-1] + length)
    if len(plain) > 1 and plain[-1] != plain[-2]:
        raise ValueError(_broken(path, EOFError("the block that marks the end is missing")))
    return np.array([packed, plain], dtype=np.int64)
