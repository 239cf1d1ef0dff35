"""Tables and lists of lines as records, whether packed or not."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from statezoo.datamodules.readers import SHARD, SPLIT_NAMES

__all__ = ["TABLES", "label_text", "lines", "records", "split_name", "stem", "table_kind"]

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")

_MAX_FIELD = 2**31 - 1


def label_text(value: Any) -> str | None:
    """A label as text: ``1``, ``1.0`` and ``True`` are all ``"1"``; None where it is missing."""
    if isinstance(value, str):
        return value.strip() or None
    if value is None or value != value:  # NaN
        return None
    return str(int(value)) if float(value) == int(value) else str(value)


def split_name(text: str, place: str) -> str:
    """One of train, val and test from the names in use.

    Raises:
        ValueError: If it is none of them.
    """
    name = text.strip().lower()
    if name not in SPLIT_NAMES:
        raise ValueError(
            f"{place} has the split {text!r}: use one of {', '.join(SPLIT_NAMES)}, or rename the "
            "column split."
        )
    return SPLIT_NAMES[name]


def table_kind(path: Path) -> str:
    """The ending of ``TABLES`` by which a file is read, or ``""``."""
    name = path.name.lower().removesuffix(".gz")
    return next((ending for ending in TABLES if name.endswith(ending)), "")


def stem(path: Path) -> str:
    """Name without endings and numbers of shards."""
    return SHARD.sub("", path.name if path.is_dir() else path.name.split(".")[0])


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """A text file, packed or not; a broken one is a ValueError."""
    open_: Any = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with open_(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path} is a damaged or truncated gzip file ({error}): copy or pack it again."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error.reason}): convert it.") from error


def lines(path: Path) -> Iterator[str]:
    """Lines of a text file with their ends."""
    with _opened(path) as file:
        yield from file


def records(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a table by the names in its first line."""
    kind = table_kind(path)
    if kind in _OTHERS:
        yield from _OTHERS[kind](path)
        return
    csv.field_size_limit(_MAX_FIELD)  # a text may be long
    with _opened(path) as file:
        head = file.readline()
        if not head.strip():
            raise ValueError(f"{path} is empty: it has no line with the names of its columns.")
        comma = max(",\t;", key=head.count)
        names = next(csv.reader([head], delimiter=comma))
        names = [name.strip() for name in names]
        for fields in csv.reader(file, delimiter=comma):
            if fields:
                yield dict(zip(names, fields, strict=False))


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines(path), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}, is no JSON ({error.msg}): mend it.") from None
        if not isinstance(found, dict):
            raise ValueError(
                f"{path}, line {number}, is no record: needed is an object with a name for each "
                f"column, got {line.strip()[:60]!r}."
            )
        yield found


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError(
            f'{path} needs the package pyarrow: pip install "statezoo[data]".'
        ) from error
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a whole parquet file ({error}): copy it again.") from error


_OTHERS = {".jsonl": _jsonl, ".parquet": _parquet}
