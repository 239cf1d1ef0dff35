"""Text files that grow batch by batch and go on after a kill, plain or block-compressed."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

__all__ = ["Lines", "Settings", "source_of"]

BLOCK = 8192
"""Bytes of text per compressed block: what a kill may cost."""
BLOCK_HEAD = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x06\0BC\x02\0"
"""Header of a gzip member with the extra field of BGZF, whose two bytes of length follow."""
END_BLOCK = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
"""The empty block that ends a BGZF file, SAM specification v1 (2024), section 4.1.2."""


def source_of(path: str | Path) -> str:
    """Return what tells an input file from another: name and bytes.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}.")
    return f"{path.name}, {path.stat().st_size} bytes"


class Settings:
    """What an output was made with, in a small file beside it, ``OUT.run.json``.

    Args:
        path: The output.
        command: Command that writes it.
        settings: Everything that its content depends on, as plain data.

    Attributes:
        finished: Summary of the run that completed the output, or ``None``.

    Raises:
        ValueError: If the output is there and was made with other settings, or not by us.
    """

    def __init__(self, path: str | Path, command: str, settings: Mapping[str, Any]) -> None:
        self.path, self.file = Path(path), Path(f"{path}.run.json")
        self.settings = json.loads(json.dumps({"command": command, **settings}))
        self.finished: dict[str, Any] | None = None
        if not self.path.parent.is_dir():
            raise ValueError(f"cannot write {path}: there is no folder {str(self.path.parent)!r}.")
        there = self.path.exists()
        if not self.file.is_file():
            if there and self.path.stat().st_size:
                raise ValueError(
                    f"{path} is there already and was not written by this command: choose another "
                    "--out, or delete it."
                )
            self._save()
            return
        found = json.loads(self.file.read_text(encoding="utf-8"))
        has = found["settings"]
        other = [k for k in {**has, **self.settings} if has.get(k) != self.settings.get(k)]
        if other and there:
            listed = "; ".join(f"{k} {has.get(k)!r}, now {self.settings.get(k)!r}" for k in other)
            raise ValueError(
                f"{path} was made with other settings ({listed}): choose another --out, or delete "
                "it."
            )
        if there and found["bytes"] == self.path.stat().st_size:
            self.finished = found["summary"]
        elif other:
            self._save()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Note that the output is complete."""
        self.finished = dict(summary)
        self._save()

    def _save(self) -> None:
        size = self.path.stat().st_size if self.finished is not None else None
        content = {"settings": self.settings, "bytes": size, "summary": self.finished}
        draft = self.file.with_name(self.file.name + ".tmp")
        draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(draft, self.file)


class Lines:
    r"""A text file to which batches of lines are added; those there already are passed over.

    The same lines give the same bytes, whether or not the run was interrupted.

    Args:
        path: The output; with the suffix ``.gz`` it is compressed in blocks (BGZF), so that tabix
            can index it.
        command: Command that writes it.
        settings: Everything that its content depends on.
        header: Lines before all others.

    Raises:
        ValueError: As :class:`Settings`.

    Example:
        >>> with Lines("out.tsv", "demo", {"seed": 0}, "a\tb\\n") as out:
        ...     for batch in batches:
        ...         if not out.skip(len(batch)):
        ...             out.write(slow(batch))
        ...     out.finish({"rows": 3})
    """

    def __init__(
        self, path: str | Path, command: str, settings: Mapping[str, Any], header: str = ""
    ) -> None:
        self.run, self.path, self.header = Settings(path, command, settings), Path(path), header
        self.zipped = self.path.suffix == ".gz"
        self._file: IO[bytes] | None = None
        self._pending = b""
        self._at = 0  # lines passed or written after the header
        self._there = 0 if self.finished is not None else self._count()

    @property
    def finished(self) -> dict[str, Any] | None:
        """Summary of the run that completed the file, or ``None``."""
        return self.run.finished

    @property
    def lines(self) -> int:
        """Lines after the header so far."""
        return self._at

    def skip(self, n: int) -> bool:
        """Pass over the next ``n`` lines where all of them are in the file already."""
        if self._file is not None or self._at + n > self._there:
            return False
        self._at += n
        return True

    def write(self, lines: Sequence[str]) -> None:
        """Add lines, each without its line feed, and hand them to the disk."""
        file = self._open()
        self._put(file, "".join(f"{line}\n" for line in lines).encode())
        file.flush()
        self._at += len(lines)

    def close(self) -> None:
        """Complete the file, so that it can be read."""
        file = self._open()
        if file.closed:
            return
        if self.zipped:
            if self._pending:
                file.write(_block(self._pending))
            file.write(END_BLOCK)
        file.close()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Complete the file and note the summary."""
        self.close()
        self.run.finish(summary)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def _count(self) -> int:
        """Count the complete lines after a complete header."""
        head = self.header.encode().splitlines(keepends=True)
        found = self._read()
        if list(islice(found, len(head))) != head:
            return 0
        return sum(1 for _ in found)

    def _read(self) -> Iterator[bytes]:
        """Read the complete lines that are there."""
        if not self.path.is_file():
            return
        if not self.zipped:
            with self.path.open("rb") as file:
                yield from (line for line in file if line.endswith(b"\n"))
            return
        rest = b""
        for text in _blocks(self.path):
            *lines, rest = (rest + text).split(b"\n")
            yield from (line + b"\n" for line in lines)

    def _open(self) -> IO[bytes]:
        """Keep the lines passed over, and be ready to add more."""
        if self._file is None:
            draft = self.path.with_name(self.path.name + ".tmp")
            with draft.open("wb") as file:
                if self._at:
                    for line in islice(self._read(), self.header.count("\n") + self._at):
                        self._put(file, line)
                else:
                    self._put(file, self.header.encode())
            os.replace(draft, self.path)
            self._file = self.path.open("ab")
        return self._file

    def _put(self, file: IO[bytes], text: bytes) -> None:
        if not self.zipped:
            file.write(text)
            return
        self._pending += text
        while len(self._pending) >= BLOCK:
            file.write(_block(self._pending[:BLOCK]))
            self._pending = self._pending[BLOCK:]


def _block(text: bytes) -> bytes:
    """Compress up to 64 KiB of text as one BGZF block."""
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    body = packer.compress(text) + packer.flush()
    size = len(BLOCK_HEAD) + 2 + len(body) + 8
    tail = struct.pack("<II", zlib.crc32(text), len(text))
    return BLOCK_HEAD + struct.pack("<H", size - 1) + body + tail


def _blocks(path: Path) -> Iterator[bytes]:
    """Read the text of the complete blocks of a BGZF file."""
    with path.open("rb") as file:
        while True:
            head = file.read(len(BLOCK_HEAD) + 2)
            if len(head) < len(BLOCK_HEAD) + 2 or head[:-2] != BLOCK_HEAD:
                return
            left = struct.unpack("<H", head[-2:])[0] + 1 - len(head)
            body = file.read(left)
            if len(body) < left:
                return
            yield zlib.decompress(body[:-8], -15)
