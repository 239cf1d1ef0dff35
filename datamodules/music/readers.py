"""Where music comes from: files, folders with or without a list of splits, music21's Bach."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from statezoo.datamodules.music.bach import bach_folder, fingerprint, four_parts, related
from statezoo.datamodules.music.musicxml import read_musicxml, unpack
from statezoo.datamodules.music.notes import Piece, quiet, require
from statezoo.datamodules.music.sources import (
    SPLIT_NAMES,
    Chorales,
    Entry,
    MusicSource,
    Skipped,
    check_piece,
    music_group,
)

__all__ = [
    "SUFFIXES",
    "Bach",
    "Chorales",
    "Entry",
    "MusicFiles",
    "MusicSource",
    "Skipped",
    "music_source",
    "read_piece",
    "read_pieces",
]

SAME_WORK, SAME_MUSIC = 0.9, 0.1  # shared windows


def read_piece(path: str | Path) -> Piece:
    """The first piece in a file of one of the endings in ``SUFFIXES``.

    Raises:
        ValueError: If there is no usable one, with the reason.
        FileNotFoundError: If there is no such file.
    """
    skipped: list[Skipped] = []
    found = next((piece for _, piece in read_pieces(Path(path), skipped)), None)
    if found is None:
        reason = skipped[0].reason if skipped else "no piece in it"
        raise ValueError(f"{path} cannot be used: {reason}.")
    return found


def read_pieces(path: Path, skipped: list[Skipped]) -> Iterator[tuple[str, Piece]]:
    """Name and music of each usable piece in a file; adds to ``skipped`` what it leaves out.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        endings = ", ".join(SUFFIXES)
        skipped.append(Skipped(str(path), f"ends in {suffix or 'nothing'}, not in {endings}"))
        return
    try:
        data = path.read_bytes()
        if not data:
            raise ValueError("empty file")
        pieces = SUFFIXES[suffix](data)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        skipped.append(Skipped(str(path), str(error)))
        return
    for number, piece in enumerate(pieces, start=1):
        name = f"{path}#{number}" if len(pieces) > 1 else str(path)
        try:
            if isinstance(piece, ValueError):
                raise piece
            check_piece(piece)
        except ValueError as error:
            skipped.append(Skipped(name, str(error)))
        else:
            yield name, piece


def _midi(data: bytes) -> list[Piece]:
    require("symusic", "Reading MIDI")
    import symusic

    if not data.startswith((b"MThd", b"RIFF")):
        raise ValueError("not a MIDI file: it does not begin with MThd")
    try:
        score: Any = symusic.Score.from_midi(data)
        return [Piece.from_score(score)]
    except RuntimeError as error:
        raise ValueError(f"a damaged MIDI file ({error})") from error


def _xml(data: bytes) -> list[Piece]:
    return [read_musicxml(data)]


def _mxl(data: bytes) -> list[Piece]:
    return [read_musicxml(unpack(data))]


def _abc(data: bytes) -> list[Any]:
    """The tunes of a book; in place of one that cannot be read, the error."""
    require("symusic", "Reading ABC")
    import symusic

    text = data.decode("utf-8", "replace").replace("\r\n", "\n")
    tunes = [tune for tune in re.split(r"(?m)^(?=X:)", text) if tune.startswith("X:")]
    if not tunes:
        raise ValueError("no ABC tune: a tune begins with a line X:")
    found: list[Any] = []
    for tune in tunes:
        try:
            with quiet():
                score: Any = symusic.Score.from_abc(tune.strip() + "\n")
            found.append(Piece.from_score(score))
        except (RuntimeError, ValueError) as error:
            found.append(ValueError(f"not ABC ({error})"))
    return found


SUFFIXES: dict[str, Callable[[bytes], list[Any]]] = {
    ".mid": _midi,
    ".midi": _midi,
    ".musicxml": _xml,
    ".xml": _xml,
    ".mxl": _mxl,
    ".abc": _abc,
}
"""Endings of the files that are read, with the reader of each."""


class MusicFiles:
    """A file, or the music files of a folder and its sub-folders, in the order of their names.

    Sub-folders called train, val (valid, validation, dev) and test are these splits. A .csv in the
    folder with a column ``split`` and one of file names (MAESTRO's ``midi_filename``, else
    ``file``, ``filename``, ``path`` or ``name``) decides instead, and lists all that is read.

    Args:
        path: File or folder.

    Raises:
        ValueError: If no file has one of the endings in ``SUFFIXES``.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        everything = [path] if path.is_file() else _files_in(path)
        self.files = [file for file in everything if file.suffix.lower() in SUFFIXES]
        self.listed = {} if path.is_file() else _listed_splits(path)
        if not self.files:
            ends = sorted({file.suffix or file.name for file in everything})
            raise ValueError(
                f"{path} holds no music that can be read: found "
                f"{', '.join(ends[:8]) or 'no file at all'}, accepted are {', '.join(SUFFIXES)} "
                "and the .json and .json.gz of the JSB chorales."
            )

    def fingerprint(self) -> str:
        """Hash of names, contents and listed splits."""
        digest = hashlib.sha256(repr(sorted(self.listed.items())).encode())
        root = self.path if self.path.is_dir() else self.path.parent
        for file in self.files:
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            digest.update(repr((file.relative_to(root).as_posix(), content)).encode())
        return digest.hexdigest()

    def entries(self, skipped: list[Skipped]) -> Iterator[Entry]:
        """All usable pieces; those of an .abc book one by one."""
        for file in self.files:
            inside = file.relative_to(self.path) if file != self.path else Path(file.name)
            split = self._split(inside)
            if split is None:
                skipped.append(Skipped(str(file), "not in the folder's list of splits"))
                continue
            for name, piece in read_pieces(file, skipped):
                yield Entry(name, piece, split, music_group(piece))

    def _split(self, file: Path) -> str | None:
        """What the list, or the sub-folder, says; None for a file that a list leaves out."""
        if self.listed:
            return self.listed.get(file.as_posix(), self.listed.get(file.name))
        names = (SPLIT_NAMES.get(part.lower(), "") for part in file.parts[:-1])
        return next((name for name in names if name), "")


def _files_in(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.is_file())
    seen = [p for p in found if not any(x.startswith(".") for x in p.relative_to(folder).parts)]
    return sorted(seen, key=lambda path: path.as_posix())


def _listed_splits(folder: Path) -> dict[str, str]:
    """File name to split, from the first .csv of ``folder`` that has both.

    Raises:
        ValueError: If a split there has another name than train, val or test.
    """
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        columns = rows[0].keys() if rows else []
        names = ("midi_filename", "file", "filename", "path", "name")
        column = next((name for name in names if name in columns), None)
        if "split" not in columns or column is None:
            continue
        found = {}
        for number, row in enumerate(rows, start=2):
            split = SPLIT_NAMES.get((row["split"] or "").strip().lower())
            if split is None:
                raise ValueError(
                    f"{path}, line {number}: split {row['split']!r} is not one of train, "
                    "validation and test."
                )
            found[(row[column] or "").strip()] = split
        return found
    return {}


class Bach:
    """The four-part chorales of music21's corpus, each work once; none is kept here.

    Works that share more than a tenth of their windows of 16 quarters (``bach.fingerprint``) are
    one group. 68 of the 77 JSB test chorales are among them: no model trained on these may be
    quoted on that test set.

    Raises:
        ValueError: If music21 is missing.
    """

    name = "the Bach chorales of music21's corpus"

    def __init__(self) -> None:
        self.folder = bach_folder()

    def fingerprint(self) -> str:
        """Hash of the names and sizes of the files, which change with music21's releases."""
        files = sorted((f.name, f.stat().st_size) for f in self.folder.glob("*.mxl"))
        return hashlib.sha256(repr(files).encode()).hexdigest()

    def entries(self, skipped: list[Skipped]) -> Iterator[Entry]:
        """Distinct works in four parts, by name."""
        found = list(four_parts(self.folder))
        prints = [fingerprint(piece) for _, piece in found]
        work, group = related(prints, SAME_WORK), related(prints, SAME_MUSIC)
        for number, (name, piece) in enumerate(found):
            if work[number] != number:
                twin = found[work[number]][0]
                skipped.append(Skipped(name, f"the same music as {twin}"))
                continue
            yield Entry(name, piece, "", found[group[number]][0])


def music_source(path: str | Path | None) -> MusicSource:
    """The reader for ``path``; None is music21's Bach.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If there is nothing in it that can be read.
    """
    if path is None:
        return Bach()
    place = Path(path).expanduser()
    if not place.exists():
        near = next(parent for parent in place.absolute().parents if parent.is_dir())
        raise FileNotFoundError(
            f"No file or folder {str(path)!r} ({near} exists): give a folder with files ending in "
            f"{', '.join(SUFFIXES)}, or the .json of the JSB chorales."
        )
    if place.is_file() and place.name.lower().endswith((".json", ".json.gz")):
        return Chorales(place)
    return MusicFiles(place)
