"""Where text comes from: the embedded default, files and folders, datasets."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from statezoo.datamodules.records import (
    FORMATS,
    Report,
    pick_texts,
    read_file,
    require,
    stream_file,
    suffix_of,
)

__all__ = ["Document", "Embedded", "Files", "HubDataset", "SavedDataset", "Source", "source_for"]

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test",
}  # fmt: skip
SHARD = re.compile(r"-\d+-of-\d+$")  # train-00000-of-00002.parquet
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(?::[\w.-]+)?")


class Document(NamedTuple):
    """One text and the split that its place asks for.

    Attributes:
        text: Valid UTF-8, not empty.
        split: ``"train"``, ``"val"``, ``"test"``, or ``""`` where the place says nothing.
    """

    text: bytes
    split: str = ""


class Source(Protocol):
    """Something that yields documents."""

    name: str

    def fingerprint(self) -> str:
        """Hash of the content and of the settings that decide what is read from it."""

    def documents(self, report: Report) -> Iterator[Document]:
        """Read all documents, in a fixed order; add to ``report`` what is left out."""


class Embedded:
    """The Python language reference that ships with the interpreter.

    Topics quote each other, so a paragraph is kept only where it occurs first. An interpreter
    without ``pydoc_data`` gives the docstrings of its standard library instead.
    """

    name = "the embedded Python language reference"

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


@cache
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


class Files:
    """A file, or all readable files of a folder and its sub-folders, in the order of their names.

    Args:
        path: File or folder.
        text_field: Field of .jsonl and .parquet that holds the text.

    Raises:
        ValueError: If there is no file with one of the endings in ``FORMATS``.
    """

    def __init__(self, path: Path, text_field: str) -> None:
        self.path, self.text_field, self.name = path, text_field, str(path)
        found = _files_in(path) if path.is_dir() else [path]
        self.files = [file for file in found if suffix_of(file)]
        self.others = [file for file in found if not suffix_of(file)]
        if not self.files:
            names = [str(file.relative_to(path)) if file != path else file.name for file in found]
            listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ValueError(
                f"{path} holds no text that can be read: found {listed or 'no file at all'}, "
                f"accepted are files ending in {', '.join(FORMATS)}."
            )
        if any(suffix_of(file) == ".parquet" for file in self.files):
            require("pyarrow", f"Reading .parquet files ({path})")

    def fingerprint(self) -> str:
        """Hash of names and contents."""
        return _hash_files(self.path, self.files, self.text_field)

    def documents(self, report: Report) -> Iterator[Document]:
        """A .txt file is one document, others hold one per line or row."""
        self._tell_others(report)
        starts = any(_first_word(file) == "train" for file in self.files)
        for file in self.files:
            split = "" if file == self.path else _named_split(file.relative_to(self.path))
            if not split and starts and file != self.path:
                split = _first_word(file)
            for text in read_file(file, self.text_field, report):
                yield Document(text, split)

    def streams(self, report: Report) -> Iterator[Iterator[bytes]]:
        """The texts of ``documents``, each in parts; one without a part is none."""
        self._tell_others(report)
        for file in self.files:
            yield from stream_file(file, self.text_field, report)

    def _tell_others(self, report: Report) -> None:
        if self.others:
            ends = sorted({file.suffix or file.name for file in self.others})
            report.append(
                f"{self.path}: {len(self.others)} files of other kinds ({', '.join(ends[:8])}); "
                f"accepted are {', '.join(FORMATS)}"
            )


def _files_in(folder: Path) -> list[Path]:
    """Files of a folder and its sub-folders, hidden ones left out; links lead nowhere twice.

    Raises:
        OSError: If a sub-folder may not be read.
    """

    def stop(error: OSError) -> None:
        raise error

    found, seen = [], {folder.resolve()}
    for place, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        here = Path(place)
        found += [here / name for name in names if not name.startswith(".")]
        subfolders = {name: (here / name).resolve() for name in sorted(folders)}
        new = {real: name for name, real in reversed(subfolders.items()) if real not in seen}
        folders[:] = [name for name in new.values() if not name.startswith(".")]
        seen |= new.keys()
    return sorted((file for file in found if file.is_file()), key=lambda file: file.as_posix())


def _named_split(path: Path) -> str:
    """The split that a folder or the file's own name gives, or ''."""
    stem = SHARD.sub("", path.name.split(".")[0])
    names = (SPLIT_NAMES.get(part.lower(), "") for part in (*path.parts[:-1], stem))
    return next((name for name in names if name), "")


def _first_word(path: Path) -> str:
    """The split that the first of several words in a file's name gives, or ''."""
    first, *others = re.split(r"[-_]", path.name.lower().split(".")[0])
    return SPLIT_NAMES.get(first, "") if others else ""


def _hash_files(root: Path, files: Iterable[Path], *settings: str) -> str:
    digest = hashlib.sha256(repr(settings).encode())
    for file in files:
        with file.open("rb") as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()
        digest.update(repr((file.relative_to(root).as_posix(), content)).encode())
    return digest.hexdigest()


class SavedDataset:
    """A folder written by ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk``."""

    def __init__(self, path: Path, text_field: str) -> None:
        require("datasets", f"Reading the saved dataset {path}")
        self.path, self.text_field, self.name = path, text_field, str(path)

    def fingerprint(self) -> str:
        """Hash of all its files."""
        return _hash_files(self.path, _files_in(self.path), self.text_field)

    def documents(self, report: Report) -> Iterator[Document]:
        """One document per row."""
        from datasets import load_from_disk  # type: ignore[import-untyped]

        yield from _rows(load_from_disk(str(self.path)), self.name, self.text_field, report)


class HubDataset:
    """A dataset of the Hub, streamed: nothing but the token cache is kept on disk.

    Args:
        name: ``org/name`` or ``org/name:config``.
        text_field: Column that holds the text.

    Raises:
        ValueError: If the Hub does not answer or has no such dataset.
    """

    def __init__(self, name: str, text_field: str) -> None:
        from huggingface_hub import HfApi

        self.name, self.text_field = name, text_field
        self.repository, _, self.config = name.partition(":")
        try:
            self.revision = HfApi().dataset_info(self.repository).sha
        except Exception as error:  # every kind of network error, each from another library
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"{name!r} is neither a file or folder here nor a dataset that the Hub would "
                f"give ({type(error).__name__}: {reason})."
            ) from error
        require("datasets", f"Reading the dataset {name}")

    def fingerprint(self) -> str:
        """Hash of the name and of the revision that is read."""
        return hashlib.sha256(
            repr((self.name, self.revision, self.text_field)).encode()
        ).hexdigest()

    def documents(self, report: Report) -> Iterator[Document]:
        """One document per row, as it arrives."""
        from datasets import load_dataset

        data = load_dataset(
            self.repository, self.config or None, revision=self.revision, streaming=True
        )
        yield from _rows(data, self.name, self.text_field, report)


def _rows(data: Any, place: str, text_field: str, report: Report) -> Iterator[Document]:
    """Documents of a dataset, or of the splits in a dict of them."""
    parts = data.items() if isinstance(data, dict) else [("", data)]
    for name, part in parts:
        split = SPLIT_NAMES.get(name, "")
        where = f"{place} [{name}]" if name else place
        for text in pick_texts(enumerate(part), where, text_field, "row", report):
            yield Document(text, split)


def source_for(path: str | Path | None, text_field: str = "text") -> Source:
    """The reader for ``path``; None is the embedded text.

    Raises:
        FileNotFoundError: If there is no such file or folder, and it is no Hub name either.
        ValueError: If there is nothing in it that can be read.
    """
    if path is None:
        return Embedded()
    place = Path(path).expanduser()
    if place.is_dir() and any(
        (place / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")
    ):
        return SavedDataset(place, text_field)
    if place.exists():
        return Files(place, text_field)
    name = str(path)
    if HUB_NAME.fullmatch(name) and not name.startswith(".") and not suffix_of(place):
        return HubDataset(name, text_field)
    near = next(parent for parent in place.absolute().parents if parent.is_dir())
    raise FileNotFoundError(
        f"No file or folder {name!r} ({near} exists): give a file ending in "
        f"{', '.join(FORMATS)}, a folder of them, or a dataset on the Hub as org/name."
    )
