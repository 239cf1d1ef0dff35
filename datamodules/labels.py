"""Labels of every kind, from how people write them to numbers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from statezoo.datamodules.batch import IGNORE

__all__ = [
    "KINDS",
    "Coded",
    "Kind",
    "Labels",
    "NumberStats",
    "RawLabel",
    "cut",
    "encode",
    "unknown",
]

Kind = Literal["class", "classes", "number", "tags"]
KINDS: tuple[Kind, ...] = get_args(Kind)

UNKNOWN = -1
"""Stored for a tag that is due but not known; where none is due, ``IGNORE`` is stored."""

_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
_MANY = 100  # classes above which labels are looked at twice
_ANSWERS = {"1": 1.0, "0": 0.0, "true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}
NONE = "-"
"""What a cell says that has none of several labels."""


class Coded(NamedTuple):
    """Tags of a long sequence in little memory: ``names[codes[t]]`` is that of place ``t``."""

    names: tuple[str, ...]
    codes: NDArray[np.int16]


RawLabel = str | list[Any] | Coded | None
"""A label as a file has it: a text, or a list of texts, None where it is not known."""


def cut(label: RawLabel, start: int, end: int) -> RawLabel:
    """Tags of some places of a row that has one for each."""
    if isinstance(label, Coded):
        return Coded(label.names, label.codes[start:end])
    return label[start:end] if label is not None else None


class NumberStats(NamedTuple):
    """Mean and standard deviation of each output, over the known values of the training split."""

    mean: list[float]
    std: list[float]


@dataclass
class Labels:
    """Labels of some rows as numbers.

    Attributes:
        kind: ``class``, ``classes``, ``number`` or ``tags``.
        names: Names of the classes, tags or outputs.
        values: ``[n]`` int64 of classes; ``[n C]`` float32 in {0, 1} of several at once;
            ``[n R]`` float32 of numbers; NaN is unknown. Of tags a list of ``[T]`` int16.
    """

    kind: Kind
    names: list[str]
    values: Any

    def __len__(self) -> int:
        return len(self.values)

    def take(self, rows: Sequence[int]) -> Labels:
        """Those of some rows."""
        if self.kind == "tags":
            return Labels(self.kind, self.names, [self.values[row] for row in rows])
        return Labels(self.kind, self.names, self.values[np.asarray(rows, dtype=np.int64)])

    def counts(self) -> list[int]:
        """Rows of each class, rows that have each label, known values, or places of each tag."""
        n = len(self.names)
        if self.kind == "class":
            return [int(c) for c in np.bincount(self.values[self.values >= 0], minlength=n)]
        if self.kind == "classes":
            return [int(c) for c in (self.values == 1).sum(axis=0)]
        if self.kind == "number":
            return [int(c) for c in (~np.isnan(self.values)).sum(axis=0)]
        counts = np.zeros(n, dtype=np.int64)
        for tags in self.values:
            counts += np.bincount(tags[tags >= 0], minlength=n)
        return counts.tolist()

    def strata(self) -> list[str]:
        """Of which group each row is, for splits that are alike: its class, its rarest label."""
        if self.kind == "class":
            return [self.names[value] for value in self.values]
        if self.kind == "classes":
            order = np.argsort(self.counts(), kind="stable")
            return [next((self.names[c] for c in order if row[c] == 1), "") for row in self.values]
        return [""] * len(self)

    def stats(self) -> NumberStats:
        """Mean and standard deviation of each output, 0 and 1 where no value is known.

        The deviation of values that are all alike is 1.
        """
        columns = [column[~np.isnan(column)].astype(np.float64) for column in self.values.T]
        std = [float(c.std()) if len(c) else 1.0 for c in columns]
        return NumberStats(
            [float(c.mean()) if len(c) else 0.0 for c in columns],
            [s if s > 0 else 1.0 for s in std],
        )

    def batch(self, rows: Sequence[int]) -> Tensor:
        """Labels of some rows, not tags; row -1 has none."""
        if self.kind == "class":
            return torch.tensor([int(self.values[row]) if row >= 0 else IGNORE for row in rows])
        nothing = np.full(len(self.names), np.nan, dtype=np.float32)
        return torch.from_numpy(np.stack([self.values[r] if r >= 0 else nothing for r in rows]))

    def tags(self, row: int) -> NDArray[np.int16]:
        """``[T]`` stored tags of a row."""
        return cast("NDArray[np.int16]", self.values[row])


def unknown(kind: Kind, names: list[str], sizes: Sequence[int]) -> Labels:
    """Labels that are not known, of rows with so many places each."""
    if kind == "tags":
        tags = [np.full(size, UNKNOWN, dtype=np.int16) for size in sizes]
        return Labels(kind, names, tags)
    if kind == "class":
        return Labels(kind, names, np.full(len(sizes), IGNORE, dtype=np.int64))
    return Labels(kind, names, np.full((len(sizes), len(names)), np.nan, dtype=np.float32))


class Given(NamedTuple):
    """Raw labels, and where they come from for messages.

    Attributes:
        labels: One per row, none of them None.
        places: Where each row stands.
        source: Name of the source.
        field: Name of the column.
        fields: Names of the columns, where there are several.
    """

    labels: Sequence[RawLabel]
    places: Sequence[str]
    source: str
    field: str
    fields: Sequence[str] = ()

    def refuse(self, wrong: Sequence[int], what: str, remedy: str) -> ValueError:
        """An error that shows some of the wrong rows."""
        shown = "; ".join(f"{_shown(self.labels[row])} ({self.places[row]})" for row in wrong[:3])
        more = ", ..." if len(wrong) > 3 else ""
        return ValueError(
            f"{self.source}: {len(wrong)} of {len(self.labels)} labels {what}: {shown}{more}. "
            f"{remedy}"
        )


def encode(kind: Kind, given: Given) -> Labels:
    """Labels of all rows as numbers; the same labels always get the same numbers.

    Raises:
        ValueError: If labels are of another kind, or there are too few or too many different
            ones; shows rows.
    """
    return {"class": _class, "classes": _classes, "number": _number, "tags": _tags}[kind](given)


def _class(given: Given) -> Labels:
    lists = [row for row, label in enumerate(given.labels) if not isinstance(label, str)]
    if lists:
        raise given.refuse(
            lists, "are lists", "Set kind: classes for several labels at once, tags for one each."
        )
    texts = [str(label) for label in given.labels]
    names = _names(Counter(texts), given)
    numbers = {name: number for number, name in enumerate(names)}
    return Labels("class", names, np.array([numbers[text] for text in texts], dtype=np.int64))


def _classes(given: Given) -> Labels:
    if given.fields:
        return Labels("classes", list(given.fields), _columns(given, _answer, "0 or 1"))
    texts = [label for label in given.labels if isinstance(label, str)]
    comma = ";" if any(";" in text for text in texts) else ","
    sets = []
    for label in given.labels:
        parts = label.split(comma) if isinstance(label, str) else cast("list[Any]", label)
        names = [str(part).strip() for part in parts if part is not None]
        sets.append({name for name in names if name and name != NONE})
    names = _names(Counter(name for each in sets for name in each), given)
    values = [[float(name in each) for name in names] for each in sets]
    return Labels("classes", names, np.array(values, dtype=np.float32))


def _number(given: Given) -> Labels:
    if given.fields:
        return Labels("number", list(given.fields), _columns(given, _float, "numbers"))
    lists = [row for row, label in enumerate(given.labels) if not isinstance(label, str)]
    if lists:
        raise given.refuse(
            lists, "are lists", "Kind number needs one number per row, or label_fields: [a, b]."
        )
    one = given._replace(labels=[[label] for label in given.labels], fields=[given.field])
    return Labels("number", [given.field], _columns(one, _float, "numbers"))


def _columns(given: Given, read: Any, what: str) -> NDArray[np.float32]:
    """``[n C]`` values of several columns, NaN where a cell is empty."""
    if any(not isinstance(label, list) for label in given.labels):
        raise ValueError(f"{given.source}: label_fields needs a table with these columns.")
    values = np.full((len(given.labels), len(given.fields)), np.nan, dtype=np.float32)
    wrong: list[int] = []
    for row, cells in enumerate(cast("Sequence[list[str | None]]", given.labels)):
        for column, cell in enumerate(cells):
            value = None if cell is None else read(cell)
            if value is not None:
                values[row, column] = value
            elif cell is not None and (not wrong or wrong[-1] != row):
                wrong.append(row)
    if wrong:
        kind = "number" if what == "numbers" else "classes"
        raise given.refuse(
            wrong,
            f"in {', '.join(map(repr, given.fields))} are not {what}",
            f"Kind {kind} needs {what}, and an empty cell where it is unknown"
            + ("; for names of classes set kind: class." if kind == "number" else "."),
        )
    return values


def _float(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _answer(text: str) -> float | None:
    return _ANSWERS.get(text.lower())


def _tags(given: Given) -> Labels:
    counts: Counter[str] = Counter()
    for label in given.labels:
        if isinstance(label, Coded):
            sizes = np.bincount(label.codes, minlength=len(label.names)).tolist()
            counts.update({name: n for name, n in zip(label.names, sizes, strict=True) if n})
        else:
            counts.update(tag for tag in label or () if tag not in (None, "?"))
    names = _names(counts, given)
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(names)}
    values = []
    for label in given.labels:
        if isinstance(label, Coded):
            table = np.array([numbers.get(n, UNKNOWN) for n in label.names], dtype=np.int16)
            values.append(table[label.codes])
        else:
            tags = [numbers.get(tag, UNKNOWN) for tag in label or ()]
            values.append(np.array(tags, dtype=np.int16))
    return Labels("tags", names, values)


def _names(counts: Counter[str], given: Given) -> list[str]:
    """Distinct labels: numbers in their order, others in that of the alphabet.

    Raises:
        ValueError: If there is one only, or nearly as many as rows.
    """
    names, rows = list(counts), len(given.labels)
    if len(names) < 2:
        listed = f"one class only, {names[0]!r}" if names else "no class"
        raise ValueError(
            f"{given.source} has {listed} ({rows} rows): a classifier needs two or more. Is the "
            "label in another column? Set label_field."
        )
    numeric = all(_NUMBER.fullmatch(name) for name in names)
    if len(names) > max(_MANY, rows // 20) or (numeric and len(names) > max(5, rows // 2)):
        shown = ", ".join(map(repr, names[:3]))
        raise ValueError(
            f"{given.source} has {len(names)} different labels in {rows} rows ({shown}, ...): "
            f"{given.field!r} holds measurements or names. Set label_field to a column of classes"
            + (", or kind: number to predict measurements." if numeric else ".")
        )
    return ordered(names)


def ordered(names: Iterable[str]) -> list[str]:
    """Numbers in their order, other names in that of the alphabet."""
    names = list(names)
    return sorted(names, key=float) if all(map(_NUMBER.fullmatch, names)) else sorted(names)


def _shown(label: RawLabel) -> str:
    text = repr(label)
    return text if len(text) <= 40 else f"{text[:37]}..."
