"""Sequences or texts with labels out of the files that people have them in, nothing dropped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from statezoo.datamodules.labels import Kind, RawLabel
from statezoo.datamodules.readers import HUB_NAME, SPLIT_NAMES
from statezoo.datamodules.tables import TABLES, label_text, records, split_name, stem

__all__ = ["NAMES", "Row", "Rows"]

NAMES = ("id", "name", "Id", "ID")
"""Columns that name a row, the first that is there."""

_LABELS: dict[Kind, tuple[str, ...]] = {
    "class": ("label", "class", "target"),
    "classes": ("label", "labels", "classes"),
    "number": ("label", "target", "value"),
    "tags": ("tags", "ner_tags", "labels", "label"),
}
"""Columns that are taken for the label where none is named, the first that is there."""


class Row(NamedTuple):
    """One sequence or text as it stands in its source.

    Attributes:
        place: Where it stands, for messages.
        name: Its name, or its number in the file.
        content: Letters or UTF-8; None where the field is empty.
        label: As the file has it; None where there is none.
        split: ``train``, ``val``, ``test``, or ``""`` where nothing says it.
        contig: Contig of an interval, else ``""``.
        problem: Why it cannot be used, or ``""``.
    """

    place: str
    name: str
    content: bytes | None
    label: RawLabel = None
    split: str = ""
    contig: str = ""
    problem: str = ""


@dataclass
class Rows(ABC):
    """Reads rows of tables, folders and datasets; subclasses add other kinds of files.

    Attributes:
        path: File, folder, or name of a dataset.
        kind: Kind of the labels.
        content_field: Column with the content; None looks for the usual names.
        label_field: Column with the label; None looks for the usual names.
        label_fields: Columns of labels of their own, instead of one.
        labelled: Whether labels are needed.
    """

    path: str
    kind: Kind = "class"
    content_field: str | None = None
    label_field: str | None = None
    label_fields: Sequence[str] = field(default_factory=list)
    labelled: bool = True

    contents: ClassVar[dict[Kind, tuple[str, ...]]]
    """Columns that are taken for the content where none is named."""
    content_setting: ClassVar[str]
    forms: ClassVar[str]
    """What ``path`` may be, in words."""
    what: ClassVar[str]
    """What a file should hold, in words, and the endings that are accepted."""
    classes_as: ClassVar[str]
    """What a folder may hold, in words."""

    @abstractmethod
    def kind_of(self, path: Path) -> str:
        """How a file is read, or ``""`` where it is not."""

    @abstractmethod
    def other(self, path: Path, split: str, label: str | None) -> Iterator[Row] | None:
        """Rows of a file that is no table; None where it cannot be read."""

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
            return self.file(place)
        named = HUB_NAME.fullmatch(self.path) and not self.path.startswith(".")
        if named and not self.kind_of(place):
            return self._dataset(saved=False)
        near = next(parent for parent in place.absolute().parents if parent.is_dir())
        raise FileNotFoundError(
            f"No file or folder {self.path!r} ({near} exists): give {self.forms}."
        )

    def file(self, path: Path, split: str = "", label: str | None = None) -> Iterator[Row]:
        """Rows of one file; ``label`` is the class that its place gives to all."""
        if not path.stat().st_size:
            raise ValueError(f"{path} is empty: add rows or remove it.")
        if self.kind_of(path) in TABLES:
            return self.records(records(path), str(path), split, label)
        found = self.other(path, split, label)
        if found is None:
            raise ValueError(f"{path} is no file of {self.what}, also with .gz.")
        return found

    def _folder(self, folder: Path) -> Iterator[Row]:
        """Files or folders called train, val, test; without these, one for each class."""
        children = sorted(path for path in folder.iterdir() if path.is_dir() or self.kind_of(path))
        splits = {path: SPLIT_NAMES.get(stem(path).lower(), "") for path in children}
        if not any(splits.values()):
            yield from self._classes(folder, children, "")
        for path, split in splits.items():
            if split and path.is_dir():
                yield from self._classes(path, sorted(path.iterdir()), split)
            elif split:
                yield from self.file(path, split)

    def _classes(self, folder: Path, children: list[Path], split: str) -> Iterator[Row]:
        """Rows of files and sub-folders, each named after its class."""
        if not children:
            raise ValueError(
                f"{folder} has no file that can be read: give {self.classes_as} for each class."
            )
        for path in children:
            if path.is_file() and self.kind_of(path):
                yield from self.file(path, split, stem(path))
            elif path.is_dir():
                for file in sorted(path.iterdir()):
                    if file.is_file() and self.kind_of(file):
                        yield from self.file(file, split, path.name)

    def records(
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
        content = self._column(
            first, place, self.content_field, self.contents[self.kind], self.content_setting
        )
        own = self.label_column(first, place, needed=self.labelled and label is None)
        name = next((key for key in NAMES if key in first), None)
        for number, record in enumerate(chain([first], found), start=1):
            where, said = f"{place}, row {number}", record.get("split") or split
            try:
                letters = None if record.get(content) is None else self.content(record[content])
                problem = ""
            except ValueError as error:
                letters, problem = None, str(error)
            yield Row(
                where,
                str(record[name]) if name else str(number),
                letters,
                self.label(record, own) if own or self.label_fields else label,
                split_name(str(said), place) if said else "",
                problem=problem,
            )

    def content(self, value: Any) -> bytes:
        """The content of a row out of its field; ValueError says why it cannot be used."""
        return str(value).encode("utf-8", "replace")

    def label(self, record: dict[str, Any], column: str | None) -> RawLabel:
        """The label of a record, or one for each of ``label_fields``."""
        if self.label_fields:
            return [label_text(record.get(name)) for name in self.label_fields]
        value = record.get(column or "")
        return [label_text(v) for v in value] if isinstance(value, list) else label_text(value)

    def label_column(self, first: dict[str, Any], place: str, *, needed: bool) -> str | None:
        """The column of the label; None where there is none, or ``label_fields`` name several."""
        if self.label_fields:
            for name in self.label_fields if self.labelled else ():
                self._column(first, place, name, (), "label_fields", "the names of columns")
            return None
        if needed:
            return self._column(first, place, self.label_field, _LABELS[self.kind], "label_field")
        return find(first, [self.label_field] if self.label_field else _LABELS[self.kind])

    def _column(
        self,
        first: dict[str, Any],
        place: str,
        asked: str | None,
        usual: Sequence[str],
        setting: str,
        to: str = "one of them",
    ) -> str:
        found = find(first, [asked] if asked else usual)
        if found is not None:
            return found
        listed = ", ".join(repr(str(name)[:30]) for name in first if name) or "none"
        raise ValueError(
            f"{place} has no column {asked or usual[0]!r}; it has {listed}: "
            + self.remedy(first, f"set {setting} to {to}.")
        )

    def remedy(self, first: dict[str, Any], usual: str) -> str:
        """What to do about a column that is not there."""
        return usual

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
            own = self.label_column(part.features, place, needed=False)
            kind = part.features.get(own)
            names = getattr(getattr(kind, "feature", kind), "names", None)
            for row in self.records(iter(part), place, SPLIT_NAMES.get(split, "")):
                yield row._replace(label=_named(row.label, names)) if names else row


def _named(label: RawLabel, names: Sequence[str]) -> RawLabel:
    """A label, or each of several, that is stored as a number; -1 is none."""
    if isinstance(label, str):
        return names[int(label)] if int(label) >= 0 else None
    if isinstance(label, list):
        return [None if x is None or int(x) < 0 else names[int(x)] for x in label]
    return label


def find(first: dict[str, Any], names: Sequence[str]) -> str | None:
    """The first of ``names`` that is a column, in any case of its letters."""
    columns = {str(name).lower(): name for name in reversed(first)}
    return next((n if n in first else columns[n.lower()] for n in names
                 if n in first or n.lower() in columns), None)  # fmt: skip
