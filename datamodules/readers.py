"""Where text comes from: documents as UTF-8 bytes, and a report of what was left out and why."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

__all__ = ["Document", "Embedded", "Report", "Source", "source_for"]


class Document(NamedTuple):
    """One text and the split that its place asks for.

    Attributes:
        text: Valid UTF-8.
        split: ``"train"``, ``"val"``, ``"test"``, or ``""`` where the place says nothing.
    """

    text: bytes
    split: str = ""


class Report(list[str]):
    """What was skipped, one line each: place, reason, remedy."""


class Source(Protocol):
    """Something that yields documents."""

    name: str

    def fingerprint(self) -> str | None:
        """Hash of the content; None where it cannot be known without reading everything."""

    def documents(self, report: Report) -> Iterator[Document]:
        """Read all documents, in a fixed order."""


class Embedded:
    """The Python language reference that ships with the interpreter.

    Topics quote each other, so a paragraph is kept only where it occurs first. An interpreter
    without ``pydoc_data`` gives the docstrings of its standard library instead.
    """

    name = "Python language reference (embedded)"

    def topics(self) -> dict[str, str]:
        """Title to text."""
        try:
            from pydoc_data.topics import topics
        except ImportError:
            return _docstrings()
        return dict(topics)

    def fingerprint(self) -> str:
        """Hash of the texts, which change with each release of Python."""
        return hashlib.sha256(repr(sorted(self.topics().items())).encode()).hexdigest()

    def documents(self, report: Report) -> Iterator[Document]:
        """One document per topic, in alphabetical order."""
        seen: set[str] = set()
        for _, text in sorted(self.topics().items()):
            kept = []
            for paragraph in text.split("\n\n"):
                words = " ".join(paragraph.split())
                if words and words not in seen:
                    seen.add(words)
                    kept.append(paragraph.strip("\n"))
            if kept:
                yield Document(("\n\n".join(kept) + "\n").encode())


def _docstrings() -> dict[str, str]:
    """Docstrings of the top-level modules of the standard library, by module."""
    found: dict[str, str] = {}
    named = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(path.read_bytes())
        texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, named))
        joined = "\n\n".join(text for text in texts if text)
        if joined:
            found[path.stem] = joined
    return found


def source_for(path: str | None, text_field: str = "text") -> Source:
    """The reader for ``path``; None is the embedded text."""
    return Embedded()
