"""Sequences with labels out of the files that people have them in, row by row, nothing dropped."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from statezoo.datamodules.dna.fasta import FASTA_ENDINGS, Genome
from statezoo.datamodules.dna.sequence import reverse_complement
from statezoo.datamodules.dna.synthetic import synthetic_genome
from statezoo.datamodules.dna.tables import (
    BED,
    PLAIN,
    TABLES,
    fasta_records,
    file_kind,
    label_text,
    lines,
    records,
    split_name,
    stem,
)
from statezoo.datamodules.readers import HUB_NAME, SPLIT_NAMES

__all__ = ["Row", "Source", "synthetic_rows"]
NAMES = ("id", "name", "Id", "ID")
"""Columns that name a row, the first that is there."""


class Row(NamedTuple):
    """One sequence as it stands in its source.

    Attributes:
        place: Where it stands, for messages.
        name: Its name, or its number in the file.
        sequence: Letters; None where the field is empty.
        label: Text of its class; None where there is none.
        split: ``train``, ``val``, ``test``, or ``""`` where nothing says it.
        contig: Contig of an interval, else ``""``.
    """

    place: str
    name: str
    sequence: bytes | None
    label: str | None
    split: str = ""
    contig: str = ""


class Source(NamedTuple):
    """What to read, and how.

    Attributes:
        path: File, folder, or name of a dataset.
        labels: Table with the labels of a FASTA file.
        genome: FASTA that a BED file refers to.
        window: Length that intervals of a BED file are resized to, around their centres.
        sequence_field: Column with the sequence.
        label_field: Column with the label.
        labelled: Whether labels are needed.
    """

    path: str
    labels: str | None = None
    genome: str | None = None
    window: int | None = None
    sequence_field: str = "sequence"
    label_field: str = "label"
    labelled: bool = True

    def rows(self) -> Iterator[Row]:
        """All rows in the order of the files.

        Raises:
            FileNotFoundError: If there is nothing at ``path``.
            ValueError: If a file is empty, broken, or lacks a column; the message says which it
                has.
        """
        place = Path(self.path).expanduser()
        if place.is_dir():
            saved = any((place / n).is_file() for n in ("dataset_dict.json", "dataset_info.json"))
            return self._dataset(saved=True) if saved else self._folder(place)
        if place.is_file():
            return self._file(place)
        if HUB_NAME.fullmatch(self.path) and not self.path.startswith(".") and not file_kind(place):
            return self._dataset(saved=False)
        near = next(parent for parent in place.absolute().parents if parent.is_dir())
        raise FileNotFoundError(
            f"No file or folder {self.path!r} ({near} exists): give a table ({', '.join(TABLES)}), "
            "FASTA with a table of labels, BED with a genome, a folder of these, or a dataset on "
            "the Hub as org/name."
        )

    def _file(self, path: Path, split: str = "", label: str | None = None) -> Iterator[Row]:
        """Rows of one file; ``label`` is the class that its place gives to all."""
        kind = file_kind(path)
        if not path.stat().st_size:
            raise ValueError(f"{path} is empty: add rows or remove it.")
        if kind == "fasta":
            return self._fasta(path, split, label)
        if kind in BED:
            return self._bed(path, split)
        if kind in TABLES:
            return self._records(records(path), str(path), split, label)
        if kind in PLAIN and label is not None:
            return self._plain(path, split, label)
        raise ValueError(
            f"{path} is no file of labelled sequences: accepted are names ending in "
            f"{', '.join(TABLES + FASTA_ENDINGS + BED)}, also with .gz."
        )

    def _folder(self, folder: Path) -> Iterator[Row]:
        """Files or folders called train, val, test; without these, one for each class."""
        children = sorted(path for path in folder.iterdir() if path.is_dir() or file_kind(path))
        splits = {path: SPLIT_NAMES.get(stem(path), "") for path in children}
        if not any(splits.values()):
            yield from self._classes(folder, children, "")
        for path, split in splits.items():
            if split and path.is_dir():
                yield from self._classes(path, sorted(path.iterdir()), split)
            elif split:
                yield from self._file(path, split)

    def _classes(self, folder: Path, children: list[Path], split: str) -> Iterator[Row]:
        """Rows of files and sub-folders, each named after its class."""
        if not children:
            raise ValueError(
                f"{folder} has no file that can be read: give tables, FASTA, or a file or folder "
                "for each class."
            )
        for path in children:
            if path.is_file() and file_kind(path):
                yield from self._file(path, split, stem(path))
            elif path.is_dir():
                for file in sorted(path.iterdir()):
                    if file.is_file() and file_kind(file):
                        yield from self._file(file, split, path.name)

    def _records(
        self,
        found: Iterator[dict[str, Any]],
        place: str,
        split: str = "",
        label: str | None = None,
    ) -> Iterator[Row]:
        """Rows of a table; the columns that are needed are looked for in the first of them."""
        first = next(found, None)
        if first is None:
            raise ValueError(f"{place} is empty: it has no rows.")
        self._check_columns(first, place, label)
        name = next((key for key in NAMES if key in first), None)
        for number, record in enumerate(chain([first], found), start=1):
            sequence, said = record.get(self.sequence_field), record.get("split") or split
            yield Row(
                f"{place}, row {number}",
                str(record[name]) if name else str(number),
                None if sequence is None else str(sequence).encode("ascii", "replace"),
                label_text(record[self.label_field]) if self.label_field in record else label,
                split_name(str(said), place) if said else "",
            )

    def _check_columns(self, first: dict[str, Any], place: str, label: str | None) -> None:
        needed = {"sequence_field": self.sequence_field}
        if self.labelled and label is None:
            needed["label_field"] = self.label_field
        for setting, column in needed.items():
            if column not in first:
                bare = any(
                    len(str(name)) > 20 and not set(str(name).upper()) - set("ACGTN")
                    for name in first
                )
                listed = ", ".join(repr(name[:30]) for name in first if name) or "none"
                raise ValueError(
                    f"{place} has no column {column!r}; it has {listed}: "
                    + (
                        "its first line looks like data, add a line with names above it."
                        if bare
                        else f"set {setting} to one of them."
                    )
                )

    def _fasta(self, path: Path, split: str, label: str | None) -> Iterator[Row]:
        """Records of a FASTA file; labels from the table, the place, or names ``...|label``."""
        table: dict[str, Row] = {}
        if self.labels is not None and self.labelled:
            table = self._labels(Path(self.labels).expanduser())
        matched = 0
        for name, sequence in fasta_records(path):
            own, said = label, split
            if table:
                own, said = (table[name].label, table[name].split) if name in table else (None, "")
                matched += name in table
            elif label is None and "|" in name:
                own = label_text(name.rpartition("|")[2])
            elif label is None and self.labelled:
                raise ValueError(
                    f"{path} has no labels: set labels to a table with columns id and "
                    f"{self.label_field}, or write names as >name|label."
                )
            yield Row(f"{path}, {name!r}", name, sequence, own, said or split)
        if table and not matched:
            raise ValueError(
                f"No name of {path} is in {self.labels}, which has {next(iter(table))!r} and "
                f"{len(table) - 1} more; the FASTA has {name!r}: names are compared up to the "
                "first blank."
            )

    def _labels(self, path: Path) -> dict[str, Row]:
        """Rows of the table of labels by their names."""
        if not path.is_file():
            raise FileNotFoundError(f"No table of labels {str(path)!r}.")
        if file_kind(path) not in TABLES:
            raise ValueError(f"{path} is no table: labels needs one of {', '.join(TABLES)}.")
        found: dict[str, Row] = {}
        for number, record in enumerate(records(path), start=1):
            name = next((key for key in NAMES if key in record), None)
            if name is None or self.label_field not in record:
                missing = "id" if name is None else self.label_field
                raise ValueError(
                    f"{path} has no column {missing!r}; it has "
                    f"{', '.join(map(repr, record))}: "
                    + ("rename one to id." if name is None else "set label_field to one of them.")
                )
            said = record.get("split")
            own = label_text(record[self.label_field])
            row = Row(f"{path}, row {number}", str(record[name]), None, own)
            found[row.name] = row._replace(split=split_name(str(said), str(path)) if said else "")
        if not found:
            raise ValueError(f"{path} is empty: it has no rows.")
        return found

    def _bed(self, path: Path, split: str) -> Iterator[Row]:
        """Intervals of a BED file, its 4th column the label, its 6th the strand."""
        if self.genome is None:
            raise ValueError(f"{path} needs the genome that its intervals are of: set genome.")
        genome = Genome(self.genome)
        for number, line in enumerate(lines(path), start=1):
            if not line.strip() or line.startswith(("#", "track", "browser")):
                continue
            fields = line.rstrip("\r\n").split("\t" if "\t" in line else None)
            place = f"{path}, line {number}"
            least = 4 if self.labelled else 3
            if len(fields) < least or not (fields[1].isdigit() and fields[2].isdigit()):
                raise ValueError(
                    f"{place}: needs contig, start, end"
                    f"{' and label' if self.labelled else ''}, got {line.strip()[:80]!r}."
                )
            contig, start, end = genome.resolve(fields[0]), int(fields[1]), int(fields[2])
            size = genome.length(contig)
            if not start < end <= size:
                raise ValueError(
                    f"{place}: {fields[0]}:{start}-{end} is no interval of the contig, which has "
                    f"{size} bases in {self.genome}: is this the same assembly?"
                )
            letters = fetch(genome, contig, start, end, self.window)
            if len(fields) > 5 and fields[5] == "-":
                letters = reverse_complement(letters)
            own = label_text(fields[3]) if len(fields) > 3 else None
            name = f"{contig}:{start}-{end}"
            yield Row(place, name, letters, own, split, contig)

    def _plain(self, path: Path, split: str, label: str) -> Iterator[Row]:
        """A sequence on each line."""
        for number, line in enumerate(lines(path), start=1):
            if line.strip():
                text = line.strip().encode("ascii", "replace")
                yield Row(f"{path}, line {number}", f"{path.stem}:{number}", text, label, split)

    def _dataset(self, *, saved: bool) -> Iterator[Row]:
        """Rows of a dataset of Hugging Face, from disk or from the Hub."""
        try:
            import datasets  # type: ignore[import-untyped]
        except ImportError as error:
            raise ValueError(
                f"Reading the dataset {self.path} needs the package datasets: "
                'pip install "statezoo[data]".'
            ) from error
        name, _, config = self.path.partition(":")
        try:
            data = (
                datasets.load_from_disk(self.path)
                if saved
                else datasets.load_dataset(name, config or None)
            )
        except Exception as error:  # every kind of network error, each from another library
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"{self.path!r} is neither a file or folder here nor a dataset that the Hub would "
                f"give ({type(error).__name__}: {reason})."
            ) from error
        parts = data.items() if isinstance(data, dict) else [("", data)]
        for split, part in parts:
            place = f"{self.path} [{split}]" if split else self.path
            names = getattr(part.features.get(self.label_field), "names", None)
            for row in self._records(iter(part), place, SPLIT_NAMES.get(split, "")):
                if names and row.label is not None:  # stored as numbers, -1 for none
                    number = int(row.label)
                    row = row._replace(label=names[number] if number >= 0 else None)
                yield row


def fetch(genome: Genome, contig: str, start: int, end: int, window: int | None) -> bytes:
    """Letters of an interval, resized to ``window`` around its centre; N beyond the contig."""
    if window is not None:
        start = (start + end) // 2 - window // 2
        end = start + window
    inside = genome.fetch(contig, max(start, 0), min(end, genome.length(contig)))
    before, after = max(-start, 0), max(end - genome.length(contig), 0)
    return b"N" * before + inside.tobytes() + b"N" * after


def synthetic_rows(window: int = 60) -> Iterator[Row]:
    """Windows of 4 Mb of the SYNTHETIC genome within genes and between them, as many of each.

    They do not overlap; those of the last 10 % are the test.
    """
    genome = synthetic_genome(4_000_000, seed=0)
    genes = [(i.start, i.end) for i in genome.intervals if i.kind == "CDS"]
    ends = [0, *(end for _, end in genes)]
    gaps = [(end, start) for end, (start, _) in zip(ends, genes, strict=False)]
    step = window + 1 if window % 3 == 0 else window  # so that all reading frames occur
    starts = {
        kind: np.array([at for a, b in spans for at in range(a, b - window + 1, step)])
        for kind, spans in (("coding", genes), ("noncoding", gaps))
    }
    count = min(map(len, starts.values()))
    if not count:
        raise ValueError(f"The SYNTHETIC genome has no gap of window={window} bases: use less.")
    for kind, places in starts.items():
        for at in places[np.linspace(0, len(places) - 1, count).astype(np.int64)].tolist():
            letters = genome.sequence[at : at + window].tobytes()
            name = f"{genome.name}:{at}-{at + window}"
            split = "test" if at >= 3_600_000 else ""
            yield Row(name, name, letters, kind, split, genome.name)
