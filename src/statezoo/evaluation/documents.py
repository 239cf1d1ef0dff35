"""Files as the documents that a model's tokenizer reads, in parts, so that any length will do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from statezoo.datamodules.dna.fasta import Genome, is_fasta
from statezoo.datamodules.dna.sequence import to_codes
from statezoo.datamodules.dna.tokenizers import LETTERS, DNATokenizer
from statezoo.datamodules.music.base import MusicTokenizer
from statezoo.datamodules.music.readers import SUFFIXES, music_source
from statezoo.datamodules.music.sources import Skipped
from statezoo.datamodules.readers import Files, source_for
from statezoo.datamodules.records import Report
from statezoo.datamodules.streaming import encode_parts
from statezoo.datamodules.tokenizers import Encoded, Tokenizer

__all__ = ["PART", "checked", "cut", "documents", "encode"]

PART = 1 << 15
"""Bytes of a part."""
_NO_BASES = re.compile(r"[^ACGTN\s]", re.IGNORECASE)
_BASES = np.frombuffer(LETTERS.encode(), dtype=np.uint8)


def documents(
    path: str, tokenizer: Tokenizer, report: Report, text_field: str = "text"
) -> Iterator[Iterator[bytes]]:
    """Read the documents of a file or folder, one after the other, each in parts.

    Args:
        path: FASTA, whose records are documents, for a model of DNA; MIDI, MusicXML or ABC, as
            names of tokens, for one of music; else, and for text, what ``--data Text`` reads.
        tokenizer: That of the model.
        report: What is left out, and why, is added here.
        text_field: Field of .jsonl and .parquet that holds the text.

    Yields:
        Parts of UTF-8, cut between characters; a document without a part is none.

    Raises:
        ValueError: If there is nothing that the tokenizer reads.
        FileNotFoundError: If there is no such file.
    """
    place = Path(path).expanduser()
    if isinstance(tokenizer, DNATokenizer) and any(map(is_fasta, [place, *place.glob("*")])):
        yield from _records(place)
    elif isinstance(tokenizer, MusicTokenizer) and _is_music(place):
        yield from _pieces(place, tokenizer, report)
    else:
        source = source_for(path, text_field)
        if isinstance(source, Files):
            yield from source.streams(report)
        else:
            yield from (cut(found.text) for found in source.documents(report))


def encode(tokenizer: Tokenizer, parts: Iterable[bytes]) -> Iterator[Encoded]:
    """Return ids and units of a document, piece by piece; units are None where they are one each.

    Raises:
        ValueError: If it is no DNA, and the model reads DNA.
    """
    small = (piece for part in checked(tokenizer, parts) for piece in cut(part))
    return encode_parts(tokenizer, small)


def checked(tokenizer: Tokenizer, parts: Iterable[bytes]) -> Iterator[bytes]:
    """Pass on the parts of a document.

    Raises:
        ValueError: If it is no DNA, and the model reads DNA.
    """
    seen = 0
    for part in parts:
        if isinstance(tokenizer, DNATokenizer):
            text = part.decode("utf-8", "replace")
            if found := _NO_BASES.search(text):
                raise ValueError(
                    f"the model reads DNA, and the text has {found[0]!r} at character "
                    f"{seen + found.start()}: give it A, C, G, T and N alone (of the shipped "
                    "tasks, statezoo_promoter)."
                )
            seen += len(text)
        yield part


def cut(text: bytes) -> Iterator[bytes]:
    """Cut UTF-8 into parts of at most :data:`PART` bytes, between characters."""
    start = 0
    while len(text) - start > PART:
        end = start + PART
        while text[end] & 0xC0 == 0x80 and end > start + PART - 4:  # within a character
            end -= 1
        yield text[start:end]
        start = end
    if text:
        yield text[start:]


def _records(place: Path) -> Iterator[Iterator[bytes]]:
    """The contigs of a genome; codes that are no base are N."""
    genome = Genome(place)

    def letters(name: str) -> Iterator[bytes]:
        length = genome.length(name)
        for start in range(0, length, PART):
            found = genome.fetch(name, start, min(start + PART, length))
            yield _BASES[to_codes(found)].tobytes()

    yield from map(letters, genome.names)


def _is_music(place: Path) -> bool:
    if place.is_file() and place.name.lower().endswith((".json", ".json.gz")):  # chorales
        return True
    return any(file.suffix.lower() in SUFFIXES for file in [place, *place.rglob("*")])


def _pieces(place: Path, tokenizer: MusicTokenizer, report: Report) -> Iterator[Iterator[bytes]]:
    """Pieces of music as names of tokens."""
    skipped: list[Skipped] = []
    for entry in music_source(place).entries(skipped):
        try:
            ids = tokenizer.encode_piece(entry.piece)
        except ValueError as error:
            skipped.append(Skipped(entry.name, str(error)))
            continue
        yield cut(tokenizer.decode(ids).encode("utf-8"))
    report += [f"{one.name}: {one.reason}" for one in skipped]
