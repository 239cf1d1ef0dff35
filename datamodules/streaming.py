"""Token ids of a document of any length, part by part, the same as of the whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from statezoo.datamodules.dna.sequence import to_codes
from statezoo.datamodules.tokenizers import BPE, Bytes, Characters, Encoded, Tokenizer, text_blocks

if TYPE_CHECKING:
    from statezoo.datamodules.dna.tokenizers import KMers

__all__ = ["encode_parts"]

_BLANK = b" \t\r\n\v\f"


def encode_parts(tokenizer: Tokenizer, parts: Iterable[bytes]) -> Iterator[Encoded]:
    """Encode a document that comes in parts; memory does not grow with its length.

    Args:
        tokenizer: Any of ours.
        parts: UTF-8 text, cut between characters.

    Yields:
        Ids and units that each stands for (None: one each), as ``tokenizer.encode_document`` of
        the joined parts gives them, piece by piece; pieces may be empty.

    Raises:
        ValueError: As the tokenizer's ``encode_document``.
    """
    from statezoo.datamodules.dna.tokenizers import DNATokenizer, KMers, Pieces
    from statezoo.datamodules.music.base import MusicTokenizer

    if isinstance(tokenizer, DNATokenizer):
        parts = (part.translate(None, _BLANK) for part in parts)
    if isinstance(tokenizer, KMers):
        parts = _whole_words(parts, tokenizer)
    elif isinstance(tokenizer, BPE | Pieces):
        parts = _long_blocks(parts)
    elif isinstance(tokenizer, MusicTokenizer):
        parts = _whole_names(parts)
    elif not isinstance(tokenizer, Bytes | Characters | DNATokenizer):
        parts = [b"".join(parts)]  # nothing is known of where it may be cut
    return map(tokenizer.encode_document, parts)


def _long_blocks(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The blocks that byte-pair encoding itself cuts long texts into."""
    rest = ""
    for part in parts:
        *done, rest = text_blocks(rest + part.decode("utf-8", "replace"))
        yield from (block.encode("utf-8") for block in done)
    yield rest.encode("utf-8")


def _whole_words(parts: Iterable[bytes], tokenizer: KMers) -> Iterator[bytes]:
    """Letters up to the last whole word of the run of bases at the end of what has come."""
    rest = b""
    for part in parts:
        letters = rest + part
        others = np.flatnonzero(to_codes(letters) == 4)
        run = len(letters) - (int(others[-1]) + 1 if len(others) else 0)
        cut = len(letters) - run % tokenizer.k
        yield letters[:cut]
        rest = letters[cut:]
    yield rest


def _whole_names(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Names of tokens up to the last white space of what has come."""
    rest = b""
    for part in parts:
        text = rest + part
        cut = max(text.rfind(bytes([blank])) for blank in _BLANK) + 1
        yield text[:cut]
        rest = text[cut:]
    yield rest
