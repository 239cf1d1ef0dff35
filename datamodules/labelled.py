"""What data with labels share: splits, counts, prediction, checkpoints that name classes."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from statezoo.datamodules.base import SplitData, check_tokenizer, digest
from statezoo.datamodules.examples import SPLITS, Examples, assign_splits, collect, overlaps
from statezoo.datamodules.labelled_batches import LabelledRows, LengthLoader
from statezoo.datamodules.labelled_rows import Row, Rows
from statezoo.datamodules.labels import (
    KINDS,
    Given,
    Kind,
    Labels,
    NumberStats,
    RawLabel,
    encode,
    unknown,
)
from statezoo.datamodules.loader import SeekableLoader
from statezoo.datamodules.tokenizers import Tokenizer, tokenizer_from_state

__all__ = ["LabelledData"]

log = logging.getLogger(__name__)


class _Read(NamedTuple):
    """All labelled rows, the split of each ``[n]``, their labels, and a hash of both."""

    examples: Examples
    splits: NDArray[np.str_]
    labels: Labels
    content: str


class LabelledData(SplitData):
    """Base of the data modules whose rows have labels.

    Not for use by itself: subclasses take the settings below and say how rows are read.

    Attributes:
        path: What to read; None for the default.
        predict: What to predict instead of the test split.
        kind: Kind of the labels.
        label_field: Column with the label; None looks for the usual names.
        label_fields: Columns of several labels or numbers, instead of one.
        val_fraction: Part of the training rows to validate on where no split says it.
        test_fraction: Part of the training rows to test on where no split says it.
        val_contigs: Contigs to validate on instead.
        label_kind: Kind of the labels for tasks. Not there where nothing but ``predict`` is read,
            until a checkpoint says it.
    """

    loader = LengthLoader
    path: str | None
    predict: str | None
    kind: Kind
    label_kind: Kind
    label_field: str | None
    label_fields: list[str]
    val_fraction: float
    test_fraction: float
    val_contigs: Sequence[str] = ()
    tokenizer: Tokenizer

    default: str
    """What is read where ``path`` is None, in words."""
    what: str
    """What a row holds, in a word."""
    nearly: str
    """When rows are nearly equal, in words."""
    unit: str

    def check(self, *least: tuple[str, int]) -> None:
        """Check the settings that all have, and that others are at least so large.

        Sets ``label_kind`` where it is known.

        Raises:
            ValueError: If one is out of range.
        """
        name = type(self).__name__
        for setting, low in (("batch_size", 1), ("num_workers", 0), ("seed", 0), *least):
            if (value := getattr(self, setting)) is not None and value < low:
                raise ValueError(f"{name} needs {setting} of at least {low}, got {value}.")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"{name} needs val_fraction between 0 and 1, got {self.val_fraction}.")
        if not 0 <= self.test_fraction < 1 - self.val_fraction:
            raise ValueError(
                f"{name} needs test_fraction of at least 0 and rows left to train on, got "
                f"val_fraction={self.val_fraction}, test_fraction={self.test_fraction}."
            )
        if self.kind not in KINDS:
            raise ValueError(f"{name} needs kind of {', '.join(KINDS)}, got {self.kind!r}.")
        if self.label_fields and self.kind not in ("classes", "number"):
            raise ValueError(
                f"{name} reads one column for kind {self.kind}: set label_field instead of "
                f"label_fields={self.label_fields}, or kind: classes or number."
            )
        if self.label_fields and self.label_field:
            raise ValueError(
                f"{name} takes label_field or label_fields, not both: got {self.label_field!r} "
                f"and {self.label_fields}."
            )
        if not self.only_predicts:
            self.label_kind = self.kind

    # ------------------------------------------------------ what subclasses say

    @abstractmethod
    def source(self, path: str, *, labelled: bool) -> Rows:
        """What reads ``path``."""

    @abstractmethod
    def default_rows(self) -> Iterable[Row]:
        """Rows that are read where ``path`` is None."""

    @abstractmethod
    def fit(self, row: Row) -> Iterator[Row]:
        """Make a row fit for use, or several of one; raises ``Unusable``."""

    @abstractmethod
    def keys(self, contents: Sequence[bytes]) -> tuple[list[object], list[bytes]]:
        """For each row what is alike for equal rows, and for nearly equal ones."""

    @abstractmethod
    def batches(
        self, contents: list[bytes], labels: Labels, *, train: bool, names: list[str] | None
    ) -> LabelledRows:
        """Batches of some rows."""

    def notes(self, examples: Examples) -> list[str]:
        """What there is to say about rows after ``fit`` has seen them."""
        return []

    def about(self, examples: Examples) -> str:
        """What the rows hold, in words."""
        return f"{sum(map(len, examples.contents)):,} {self.unit}s"

    # ------------------------------------------------------------- what all have

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    @property
    def row_kind(self) -> Kind:
        """Kind of the labels of the rows that are read now."""
        return getattr(self, "label_kind", self.kind)

    @property
    def class_names(self) -> list[str]:
        """Classes, tags or outputs in the order of their numbers."""
        return self._known if self.only_predicts else self._data.labels.names

    @property
    def class_counts(self) -> list[int]:
        """Training rows of each class, or with each label or number; of tags their places."""
        return self.labels_of("train").counts()

    @property
    def number_stats(self) -> NumberStats:
        """Mean and standard deviation of each output in the training split, for kind number.

        Raises:
            ValueError: If the labels are of another kind.
        """
        if self.kind != "number":
            raise ValueError(f"number_stats needs kind: number, this data has {self.kind}.")
        return self.labels_of("train").stats()

    @property
    def only_predicts(self) -> bool:
        """Whether nothing but ``predict`` is read."""
        return self.path is None and self.predict is not None

    @property
    def test_split(self) -> str:
        """``test``, or ``val`` where there is no test."""
        return "test" if "test" in self._data.splits else "val"

    def rows(self, split: str) -> tuple[list[bytes], Any]:
        """Contents and labels of a split.

        Labels are ``[n]`` numbers of classes, ``[n C]`` of 0 and 1, ``[n R]`` numbers, or of tags
        a list of arrays, negative where unknown or not due.
        """
        contents = [self._data.examples.contents[i] for i in self._at(split)]
        return contents, self.labels_of(split).values

    def labels_of(self, split: str) -> Labels:
        """Labels of a split."""
        return self._data.labels.take(self._at(split))

    def _at(self, split: str) -> list[int]:
        found: list[int] = np.flatnonzero(self._data.splits == split).tolist()
        return found

    def setup(self, stage: str | None = None) -> None:
        """Read everything that this stage needs; say what was skipped and why."""
        if not self.only_predicts:
            self._data  # noqa: B018  # reads now rather than in the first batch

    def windows(self, split: str, names: list[str] | None = None) -> LabelledRows | None:
        """The rows of a split."""
        if split not in self._data.splits:
            return None
        contents, labels = self.rows(split)[0], self.labels_of(split)
        return self.batches(contents, labels, train=split == "train", names=names)

    def predict_dataloader(self) -> SeekableLoader:
        """The rows of ``predict``, or those of the test, with their names."""
        if self.predict is None:
            examples = self._data.examples
            names = [examples.names[i] for i in self._at(self.test_split)]
            return self.load(self.windows(self.test_split, names))
        rows = self.source(self.predict, labelled=False).rows()
        found = collect(rows, self.predict, self.fit, what=self.what, labelled=False)
        self.tell(self.predict, found)
        sizes = [self.places(content) for content in found.contents]
        labels = unknown(self.row_kind, self.class_names, sizes)
        return self.load(self.batches(found.contents, labels, train=False, names=found.names))

    @abstractmethod
    def places(self, content: bytes) -> int:
        """How many tags a row should have."""

    def identity(self) -> dict[str, Any]:
        """Hashes of the rows with their labels and of their split, and the seed."""
        if self.only_predicts:
            return {}
        data = self._data
        return {"content": data.content, "split": digest(data.splits), "seed": self.seed}

    def state_dict(self) -> dict[str, Any]:
        """Classes and tokenizer, so that a checkpoint alone can name what it predicts."""
        return super().state_dict() | {
            "class_names": self.class_names,
            "label_kind": self.row_kind,
            "tokenizer": self.tokenizer.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the checkpoint was made with the same tokenizer and classes.

        Raises:
            ValueError: If it was not.
        """
        check_tokenizer(tokenizer_from_state(state_dict["tokenizer"]), self.tokenizer)
        names, kind = list(state_dict["class_names"]), state_dict.get("label_kind", "class")
        if not self.only_predicts and kind != self.kind:
            raise ValueError(
                f"The checkpoint predicts labels of kind {kind}, this data has {self.kind}: set "
                f"kind: {kind}, or start a new run from the weights with pretrained."
            )
        if not self.only_predicts and names != self.class_names:
            raise ValueError(
                f"The checkpoint has the classes {', '.join(names)}, this data "
                f"{', '.join(self.class_names)}: give data with the same labels, or start a new "
                "run from the weights with pretrained."
            )
        self._known, self.label_kind = names, kind
        super().load_state_dict(state_dict)

    _known: list[str] = []  # noqa: RUF012  # of a checkpoint; never changed in place

    @cached_property
    def _data(self) -> _Read:
        place = self.path or self.default
        path = self.path
        rows = self.default_rows() if path is None else self.source(path, labelled=True).rows()
        found = collect(rows, place, self.fit, what=self.what)
        field = self.label_field or ("tags" if self.kind == "tags" else "label")
        labels = encode(
            self.kind, Given(found.labels, found.places, place, field, self.label_fields)
        )
        exact, like = self.keys(found.contents)
        splits, told = assign_splits(
            found,
            like,
            labels.strata(),
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            val_contigs=self.val_contigs,
            seed=self.seed,
            whole_strata=self.kind == "class",
        )
        trained = labels.take(np.flatnonzero(splits == "train").tolist()).counts()
        missing = [name for name, n in zip(labels.names, trained, strict=True) if not n]
        told += [f"no training row has the {_said(self.kind)} {name!r}" for name in missing]
        told += [
            f"{equal} rows of {one} are in {other} as well, {near} {self.nearly}: "
            f"the score on {one} is too good"
            for (one, other), (equal, near) in overlaps(splits, exact, like).items()
        ]
        self.tell(place, found, told)
        sizes = ", ".join(f"{int((splits == split).sum()):,} {split}" for split in SPLITS)
        if self.tells():
            listed = f"{_said(self.kind, many=True)} {', '.join(labels.names)}"
            log.info(f"{place}: {sizes}; {listed}; {self.about(found)}")
        content = digest(*found.contents, found.labels)
        found.labels = list[RawLabel]()  # they may be large
        return _Read(found, splits, labels, content)

    def tell(self, place: str, found: Examples, told: Sequence[str] = ()) -> None:
        """Say what was left out or cut, and what else there is to say."""
        lines = [f"skipped {line}" for line in found.skipped[:20]]
        for line in (*lines, *self.notes(found), *told) if self.tells() else ():
            log.warning(f"{place}: {line}")


def _said(kind: Kind, *, many: bool = False) -> str:
    """What a label of a kind is called."""
    one = {"class": "class", "classes": "label", "number": "number", "tags": "tag"}[kind]
    return one if not many else "classes" if kind == "class" else f"{one}s"
