"""Documents out of single files: text, JSON lines and parquet, valid UTF-8 or not."""

from __future__ import annotations

import codecs
import gzip
import importlib.util
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "FORMATS",
    "Report",
    "pick_texts",
    "read_file",
    "require",
    "stream_file",
    "suffix_of",
    "text_parts",
]

_BLANK = " \t\n\r\v\f"


class Report(list[str]):
    """What was skipped, one line each: place, reason, remedy."""


class _Records:
    """Counts unusable records of one file by reason, to report each reason once."""

    def __init__(self, place: str, unit: str, report: Report) -> None:
        self.place, self.unit, self.report = place, unit, report
        self.found: dict[str, list[int]] = {}

    def skip(self, number: int, reason: str) -> None:
        self.found.setdefault(reason, []).append(number)

    def close(self) -> None:
        for reason, numbers in self.found.items():
            count = f"{len(numbers)} {self.unit}{'s' if len(numbers) > 1 else ''}"
            self.report.append(f"{self.place}: {count}, the first number {numbers[0]}: {reason}")


def require(module: str, purpose: str) -> None:
    """Raise ValueError, with the command that helps, where an optional package is absent."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(
            f"{purpose} needs the package {module}: pip install 'statezoo[data]', or give "
            ".txt or .jsonl files."
        )


def suffix_of(path: Path) -> str:
    """The ending that decides how a file is read, or '' if it is not read."""
    name = path.name.lower()
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), "")


def read_file(path: Path, text_field: str, report: Report) -> Iterator[bytes]:
    """Documents of one file as UTF-8; adds to ``report`` what it leaves out.

    Raises:
        ValueError: If the file is well-formed but lacks ``text_field``.
    """
    yield from _to_its_end(path, FORMATS[suffix_of(path)](path, text_field, report), report)


def stream_file(path: Path, text_field: str, report: Report) -> Iterator[Iterator[bytes]]:
    """The documents that ``read_file`` gives, each in parts; one without a part is none.

    A .txt of any length comes piece by piece; documents of other files are one part each.
    """
    if suffix_of(path) in (".txt", ".txt.gz"):
        yield _to_its_end(path, text_parts(path, report), report)
    else:
        yield from (iter([text]) for text in read_file(path, text_field, report))


def _to_its_end(path: Path, texts: Iterator[bytes], report: Report) -> Iterator[bytes]:
    try:
        yield from texts
    except (OSError, EOFError, zlib.error) as error:
        report.append(f"{path}: cannot be read to its end ({error}); copy or pack it again")


def pick_texts(
    rows: Iterable[tuple[int, Any]], place: str, text_field: str, unit: str, report: Report
) -> Iterator[bytes]:
    """The text of numbered records: dicts with ``text_field``, or text itself."""
    records = _Records(place, unit, report)
    usable = False
    for number, row in rows:
        if isinstance(row, dict):
            if text_field not in row and not usable:
                raise ValueError(
                    f"{place}: {unit} {number} has no field {text_field!r}; it has "
                    f"{', '.join(map(repr, row)) or 'none'}: set text_field to one of them."
                )
            row = row.get(text_field)
        usable = True
        if not isinstance(row, str):
            records.skip(number, f"no text in field {text_field!r}")
        elif not row:
            records.skip(number, "empty text")
        else:
            try:
                yield row.encode("utf-8")
            except UnicodeEncodeError as error:
                records.skip(number, f"half a character, {row[error.start]!r}: write it in full")
    records.close()


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def text_parts(path: Path, report: Report, size: int = 1 << 16) -> Iterator[bytes]:
    """The document in a .txt or .txt.gz as UTF-8 without byte order mark, part by part.

    The file is read twice: once to see that all of it is text, UTF-8 or, by its mark, UTF-16; if it
    is not, ``report`` says why, and nothing comes. Memory does not grow with the file.

    Args:
        path: File.
        report: What is left out is added here.
        size: Bytes of the file in a part, at least 2; parts end between characters.
    """
    if _holds_text(path, _decoded(path, size), report):
        yield from (part.encode("utf-8") for part in _decoded(path, size))


def _holds_text(path: Path, parts: Iterable[str], report: Report) -> bool:
    """Say whether there is more than white space in all parts of a file, else report why not."""
    try:
        some = sum(bool(part.strip(_BLANK)) for part in parts) > 0
    except UnicodeDecodeError as error:
        report.append(
            f"{path}: {error.reason}; convert the file, for example with iconv -f LATIN1 -t UTF-8"
        )
        return False
    if not some:
        report.append(f"{path}: empty; add text or remove it")
    return some


def _decoded(path: Path, size: int) -> Iterator[str]:
    """The text of a file.

    Raises:
        UnicodeDecodeError: If there is a byte that is none; its reason says which and where.
    """
    with _open(path) as file:
        data: bytes = file.read(size)
        wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        decoder = codecs.getincrementaldecoder("utf-16" if wide else "utf-8-sig")()
        read, more = 0, True
        while more:
            more, read = bool(data), read + len(data)
            try:
                text = decoder.decode(data, final=not more)
            except UnicodeDecodeError as error:
                bad = error.object[error.start :]  # to the end of what was read
                name = "UTF-16" if wide else "UTF-8"
                error.reason = f"byte 0x{bad[0]:02x} at offset {read - len(bad)} is not {name}"
                raise
            if text:
                yield text
            data = file.read(size)


def _read_txt(path: Path, text_field: str, report: Report) -> Iterator[bytes]:
    """The file as one document."""
    parts: list[bytes] = []

    def kept() -> Iterator[str]:
        for part in _decoded(path, 1 << 20):
            parts.append(part.encode("utf-8"))
            yield part

    if _holds_text(path, kept(), report):
        yield b"".join(parts)


def _read_jsonl(path: Path, text_field: str, report: Report) -> Iterator[bytes]:
    """One document per line: an object with ``text_field``, or a string."""
    broken = _Records(str(path), "line", report)
    some = False

    def rows() -> Iterator[tuple[int, Any]]:
        nonlocal some
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if not line.strip():
                    continue
                some = True
                try:
                    yield number, json.loads(line.decode("utf-8"))
                except UnicodeDecodeError as error:
                    broken.skip(number, f"byte 0x{line[error.start]:02x} is not UTF-8; convert it")
                except json.JSONDecodeError as error:
                    broken.skip(number, f"not JSON ({error.msg}); mend it")

    try:
        yield from pick_texts(rows(), str(path), text_field, "line", report)
    finally:
        broken.close()
    if not some:
        report.append(f"{path}: empty; add text or remove it")


def _read_parquet(path: Path, text_field: str, report: Report) -> Iterator[bytes]:
    """One document per row of column ``text_field``."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise ValueError(
                    f"{path} has no column {text_field!r}; it has "
                    f"{', '.join(map(repr, names)) or 'none'}: set text_field to one of them."
                )

            def rows() -> Iterator[tuple[int, Any]]:
                number = 0
                for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                    for value in batch.column(0).to_pylist():
                        number += 1
                        yield number, value

            if not file.metadata.num_rows:
                report.append(f"{path}: empty; add rows or remove it")
            yield from pick_texts(rows(), str(path), text_field, "row", report)
    except pa.ArrowInvalid as error:
        report.append(f"{path}: not a whole parquet file ({error}); copy it again")


Reader = Callable[[Path, str, Report], Iterator[bytes]]

FORMATS: dict[str, Reader] = {
    ".txt": _read_txt,
    ".txt.gz": _read_txt,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".parquet": _read_parquet,
}
