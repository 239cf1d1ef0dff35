"""Texts with labels out of files, and paragraphs of the Python language reference by their part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from statezoo.datamodules.labelled_rows import Row, Rows
from statezoo.datamodules.readers import Embedded
from statezoo.datamodules.tables import TABLES, lines, table_kind

__all__ = ["TextRows", "paragraphs"]

_WORDS = (".conll", ".bio", ".iob")
_TEXT = ("text", "sentence", "content")
_TOKENS = ("tokens", "words", *_TEXT)

_PARTS = {
    "statements": "assert assignment augassign break class continue del for function global if "
    "import nonlocal pass raise return try while with yield",
    "expressions": "atom-identifiers atom-literals attribute-references binary bitwise booleans "
    "calls comparisons conversions exprlists in lambda naming operator-summary power shifting "
    "slicings subscriptions unary",
    "data": "attribute-access bltin-code-objects bltin-ellipsis-object bltin-null-object "
    "bltin-type-objects callable-types context-managers customization numeric-types objects "
    "sequence-types specialattrs specialnames string-methods types typesfunctions typesmapping "
    "typesmethods typesmodules typesseq typesseq-mutable",
}
"""Topics of ``pydoc`` of each part; topics that quote others are left out."""
_SHORTEST = 60
"""Letters of a paragraph that says enough to be told apart."""


@dataclass
class TextRows(Rows):
    """Reads tables, .txt, .conll, folders of these, and datasets."""

    contents = {"class": _TEXT, "classes": _TEXT, "number": _TEXT, "tags": _TOKENS}  # noqa: RUF012
    content_setting = "text_field"
    forms = (
        f"a table ({', '.join(TABLES)}), a .conll file of words with tags, a folder of these or of "
        "a sub-folder for each class, or a dataset on the Hub as org/name"
    )
    what = f"labelled texts: accepted are names ending in {', '.join((*TABLES, '.conll'))}"
    classes_as = "tables, or a folder of .txt files"

    def kind_of(self, path: Path) -> str:
        """The ending by which a file is read, or ``""``."""
        name = path.name.lower().removesuffix(".gz")
        return table_kind(path) or next((x for x in (".txt", *_WORDS) if name.endswith(x)), "")

    def other(self, path: Path, split: str, label: str | None) -> Iterator[Row] | None:
        """The text of a file whose place gives its class; words with tags; or lines to predict."""
        kind = self.kind_of(path)
        if self.kind == "tags" and (kind in _WORDS or (kind == ".txt" and self.labelled)):
            return self._words(path, split)
        if kind == ".txt" and label is not None:
            return self._whole(path, split, label)
        if kind == ".txt" and not self.labelled:
            return self._lines(path)
        return None

    def content(self, value: Any) -> bytes:
        """The text, or words with a blank between them."""
        if isinstance(value, list):
            words = [str(word) for word in value]
            if any(len(word.split()) != 1 for word in words):
                raise ValueError("a word is empty or has a blank in it")
            value = " ".join(words)
        return super().content(value)

    def remedy(self, first: dict[str, Any], usual: str) -> str:
        """Tell words with tags from tables."""
        return (
            f"name a file of words with tags .conll, or {usual}" if self.kind == "tags" else usual
        )

    def _whole(self, path: Path, split: str, label: str) -> Iterator[Row]:
        text = "".join(lines(path)).encode()
        yield Row(str(path), f"{path.parent.name}/{path.name}", text, label, split)

    def _lines(self, path: Path) -> Iterator[Row]:
        for number, line in enumerate(lines(path), start=1):
            if line.strip():
                yield Row(f"{path}, line {number}", str(number), line.strip().encode())

    def _words(self, path: Path, split: str) -> Iterator[Row]:
        """Sentences of a file with a word and its tag on each line."""
        words: list[str] = []
        tags: list[str | None] = []
        first, sentence = 1, 0
        for number, line in enumerate((*lines(path), ""), start=1):
            fields = line.strip().split("\t" if "\t" in line.strip() else None)
            if fields and not (fields[0] == "-DOCSTART-" or (line[0] == "#" and "\t" not in line)):
                if self.labelled and len(fields) < 2:
                    raise ValueError(
                        f"{path}, line {number}: needs a word, a tab and its tag, got "
                        f"{line.strip()[:60]!r}."
                    )
                first = first if words else number
                words.append("".join(fields[0].split()))
                tags.append(fields[-1].strip() if len(fields) > 1 else None)
            elif words and not fields:
                sentence += 1
                text, label = " ".join(words).encode(), tags if self.labelled else None
                yield Row(f"{path}, line {first}", str(sentence), text, label, split)
                words, tags = [], []


def paragraphs() -> Iterator[Row]:
    """Paragraphs of the Python language reference, with the part that each is of.

    A paragraph that occurs twice is kept where it occurs first. An interpreter without the
    reference gives docstrings of its standard library, by module, the three with the most.
    """
    topics = Embedded().topics()
    parts = {part: [name for name in names.split() if name in topics]
             for part, names in _PARTS.items()}  # fmt: skip
    if not all(parts.values()):
        longest = sorted(topics, key=lambda name: (-len(topics[name]), name))[:3]
        parts = {name: [name] for name in longest}
    seen: set[str] = set()
    for part, names in parts.items():
        for name in names:
            for number, paragraph in enumerate(topics[name].split("\n\n"), start=1):
                text = " ".join(paragraph.split())
                if len(text) >= _SHORTEST and text not in seen:
                    seen.add(text)
                    place = f"{name}, paragraph {number}"
                    yield Row(place, f"{name}:{number}", text.encode(), part)
