"""Tokenised text on disk: built once, mapped by every process, never stale.

The folder's name is a hash of the content of the source, of the tokenizer and of all settings that
change what is written, so another content is another folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from statezoo.datamodules.packing import TokenFile
from statezoo.datamodules.readers import Source
from statezoo.datamodules.records import Report
from statezoo.datamodules.tokenizers import Tokenizer

__all__ = [
    "SPLITS",
    "RawText",
    "Tokens",
    "cache_folder",
    "cached",
    "cut_text",
    "read_text",
    "tokenize",
]

FORMAT = 1  # part of every key: raise it when the files or the readers change
SPLITS = ("", "train", "val", "test")


class RawText(NamedTuple):
    """All documents of a source.

    Attributes:
        key: Hash that names the content.
        text: The documents, end to end, one number per byte.
        bounds: ``[n+1]`` where each document begins.
        splits: ``[n]`` index into ``SPLITS``.
        hashes: ``[n]`` equal for equal documents.
        skipped: What was left out.
    """

    key: str
    text: TokenFile
    bounds: NDArray[np.int64]
    splits: NDArray[np.uint8]
    hashes: NDArray[np.uint64]
    skipped: list[str]


class Tokens(NamedTuple):
    """Token ids of some pieces of text, end to end.

    Attributes:
        ids: All tokens.
        lengths: Bytes each token stands for; None where it is one.
        bounds: ``[n+1]`` where each piece begins.
    """

    ids: TokenFile
    lengths: TokenFile | None
    bounds: NDArray[np.int64]


def cache_folder() -> Path:
    """``$STATEZOO_CACHE``, else ``statezoo`` in the user's cache folder."""
    chosen = os.environ.get("STATEZOO_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "statezoo"


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()[:32]


def cached(kind: str, key: str, write: Callable[[Path], None]) -> Path:
    """The folder of ``key``, written in full before it takes its name."""
    parent = cache_folder() / kind
    done = parent / key
    if done.is_dir():
        return done
    try:
        parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=parent))
    except OSError as error:
        raise ValueError(
            f"The cache folder {parent} cannot be written ({error.strerror}): set STATEZOO_CACHE "
            "to a folder that can."
        ) from error
    try:
        write(draft)
        try:
            draft.rename(done)
        except OSError:  # another process was faster, with the same content
            if not done.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return done


class _Writer:
    """Appends arrays to one ``.npy`` file without holding them."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.path, self.dtype, self.size = path, np.dtype(dtype), 0
        self.file = path.open("wb")
        self._header()

    def _header(self) -> None:
        fields = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.size,)}
        text = repr(fields).ljust(117).encode() + b"\n"  # 128 bytes with what goes before
        self.file.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)

    def add(self, values: NDArray[Any]) -> None:
        self.file.write(values.astype(self.dtype, copy=False).tobytes())
        self.size += len(values)

    def close(self) -> None:
        self.file.seek(0)
        self._header()
        self.file.close()


def _head(text: bytes, size: int) -> bytes:
    """At most ``size`` bytes of UTF-8 ``text``, whole characters only."""
    while 0 < size < len(text) and text[size] & 0xC0 == 0x80:
        size -= 1
    return text[:size]


def read_text(source: Source, max_bytes: int | None = None) -> RawText:
    """All documents of ``source`` through the cache.

    Args:
        source: What to read.
        max_bytes: Stop after so much text; the last document is cut there.

    Raises:
        ValueError: If nothing could be read, with the reasons.
    """
    key = _hash(source.fingerprint(), max_bytes)

    def write(folder: Path) -> None:
        report, out = Report(), _Writer(folder / "text.npy", np.uint8)
        bounds, splits, hashes = array("q", [0]), array("B"), array("Q")
        for text, split in source.documents(report):
            if max_bytes is not None:
                text = _head(text, max_bytes - out.size)
            if not text:
                break
            out.add(np.frombuffer(text, dtype=np.uint8))
            bounds.append(out.size)
            splits.append(SPLITS.index(split))
            digest = hashlib.blake2b(text, digest_size=8).digest()
            hashes.append(int.from_bytes(digest, "little"))
        out.close()
        if not out.size:
            reasons = "".join(f"\n  {line}" for line in report[:10])
            raise ValueError(f"No text in {source.name}: add some.{reasons}")
        np.save(folder / "bounds.npy", np.array(bounds, dtype=np.int64))
        np.save(folder / "splits.npy", np.array(splits, dtype=np.uint8))
        np.save(folder / "hashes.npy", np.array(hashes, dtype=np.uint64))
        (folder / "skipped.json").write_text(json.dumps(report), encoding="utf-8")

    folder = cached("text", key, write)
    bounds, splits, hashes = (
        np.load(folder / f"{name}.npy") for name in ("bounds", "splits", "hashes")
    )
    skipped = json.loads((folder / "skipped.json").read_text(encoding="utf-8"))
    return RawText(key, TokenFile(folder / "text.npy"), bounds, splits, hashes, skipped)


def cut_text(raw: RawText, bounds: NDArray[np.int64]) -> Iterator[bytes]:
    """The pieces of ``raw`` between ``bounds``."""
    text = raw.text.array
    return (text[start:end].tobytes() for start, end in pairwise(bounds.tolist()))


def tokenize(raw: RawText, bounds: NDArray[np.int64], tokenizer: Tokenizer) -> Tokens:
    """Ids of the pieces of ``raw`` between ``bounds``, through the cache."""
    if tokenizer.kind == "bytes":
        return Tokens(raw.text, None, bounds)

    def write(folder: Path) -> None:
        ids = _Writer(folder / "ids.npy", tokenizer.dtype)
        lengths = _Writer(folder / "lengths.npy", np.uint32)
        starts = array("q", [0])
        for piece in cut_text(raw, bounds):
            values, sizes = tokenizer.encode_document(piece)
            ids.add(values)
            lengths.add(np.ones(len(values), np.uint32) if sizes is None else sizes)
            starts.append(ids.size)
        ids.close()
        lengths.close()
        np.save(folder / "bounds.npy", np.array(starts, dtype=np.int64))

    cut = hashlib.sha256(bounds.tobytes()).hexdigest()
    folder = cached("tokens", _hash(raw.key, tokenizer.fingerprint, cut), write)
    return Tokens(
        TokenFile(folder / "ids.npy"),
        TokenFile(folder / "lengths.npy"),
        np.load(folder / "bounds.npy"),
    )
