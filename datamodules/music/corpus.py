"""Pieces and their tokens on disk: read and written once, keyed by content and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from statezoo.datamodules.corpus import _hash as key_of
from statezoo.datamodules.corpus import cached
from statezoo.datamodules.music.base import MusicTokenizer
from statezoo.datamodules.music.notes import Piece, TrackInfo
from statezoo.datamodules.music.readers import MusicSource, Skipped
from statezoo.datamodules.packing import TokenFile

__all__ = ["MusicTokens", "Pieces", "read_all", "split_pieces", "tokenize_all"]

FORMAT = 2  # part of every key: raise it when readers or files change


class Pieces:
    """All usable pieces of a source.

    Attributes:
        key: Hash that names the content.
        about: For each piece its name, split, group, tracks, time signatures, length and where
            its notes and tempos are.
        skipped: What was left out.
    """

    def __init__(self, key: str, folder: Path) -> None:
        self.key, self._folder = key, folder
        self._arrays: dict[str, NDArray[Any]] = {}
        content = json.loads((folder / "pieces.json").read_text(encoding="utf-8"))
        self.about: list[dict[str, Any]] = content["pieces"]
        self.skipped = [Skipped(*row) for row in content["skipped"]]

    def __len__(self) -> int:
        return len(self.about)

    def __iter__(self) -> Iterator[Piece]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Piece:
        row = self.about[number]
        start, stop, first, last = row["range"]
        return Piece(
            tuple(TrackInfo(*track) for track in row["tracks"]),
            self._array("notes")[start:stop],
            tuple((int(tick), qpm) for tick, qpm in self._array("tempos")[first:last].tolist()),
            tuple((a, b, c) for a, b, c in row["time_signatures"]),
            row["length"],
        )

    def _array(self, name: str) -> NDArray[Any]:
        """Notes ``[N 5]`` or tempos ``[M 2]`` of all pieces."""
        if name not in self._arrays:
            self._arrays[name] = np.load(self._folder / f"{name}.npy", mmap_mode="r")
        return self._arrays[name]

    @property
    def several_instruments(self) -> bool:
        """Whether some piece has more than one, or drums."""
        players = ({(drum, program) for _, program, drum in row["tracks"]} for row in self.about)
        return any(len(found) > 1 or any(drum for drum, _ in found) for found in players)


def read_all(source: MusicSource) -> Pieces:
    """Every piece of ``source``, through the cache.

    Raises:
        ValueError: If fewer than two pieces are usable, with the reasons.
    """
    key = key_of("music", FORMAT, source.fingerprint())

    def write(folder: Path) -> None:
        skipped: list[Skipped] = []
        entries = list(source.entries(skipped))
        check_enough(source.name, len(entries), skipped)
        tempos = [np.array(entry.piece.tempos).reshape(-1, 2) for entry in entries]
        ends = np.cumsum([0, *(len(entry.piece) for entry in entries)]).tolist()
        changes = np.cumsum([0, *map(len, tempos)]).tolist()
        about = [
            {
                "name": name,
                "split": split,
                "group": group,
                "range": [ends[n], ends[n + 1], changes[n], changes[n + 1]],
                "tracks": piece.tracks,
                "time_signatures": piece.time_signatures,
                "length": piece.length,
            }
            for n, (name, piece, split, group) in enumerate(entries)
        ]
        notes = np.concatenate([entry.piece.notes for entry in entries])
        np.save(folder / "notes.npy", notes.astype(np.int32))
        np.save(folder / "tempos.npy", np.concatenate(tempos).astype(np.float64))
        text = json.dumps({"pieces": about, "skipped": skipped})
        (folder / "pieces.json").write_text(text, encoding="utf-8")

    return Pieces(key, cached("music", key, write))


def check_enough(name: str, count: int, skipped: Sequence[Skipped]) -> None:
    """Raise ValueError, with the reasons, where there is nothing to train and validate on."""
    if count >= 2:
        return
    reasons = "".join(f"\n  {row.name}: {row.reason}" for row in skipped[:10])
    more = f"\n  and {len(skipped) - 10} more" if len(skipped) > 10 else ""
    raise ValueError(
        f"{name} has {count} usable piece{'' if count == 1 else 's'}, and Music needs two, one to "
        f"train and one to validate on: add files.{reasons}{more}"
    )


class MusicTokens(NamedTuple):
    """Token ids of all pieces that the tokenizer can write, end to end.

    Attributes:
        ids: All tokens.
        bounds: ``[n+1]`` where each piece begins.
        pieces: ``[n]`` number of each in ``Pieces``.
        pitches: ``[n 2]`` lowest and highest pitch that transposition moves; 0 and -1 if none.
        report: The JSON file that says what was left out and why.
        skipped: The same.
    """

    ids: TokenFile
    bounds: NDArray[np.int64]
    pieces: NDArray[np.int64]
    pitches: NDArray[np.int64]
    report: Path
    skipped: list[Skipped]


def tokenize_all(name: str, pieces: Pieces, tokenizer: MusicTokenizer) -> MusicTokens:
    """Ids of all pieces, through the cache.

    Raises:
        ValueError: If fewer than two pieces can be written, with the reasons.
    """

    def write(folder: Path) -> None:
        skipped, ids, kept, pitches = list(pieces.skipped), [], [], []
        for number in range(len(pieces)):
            try:
                found = tokenizer.encode_piece(pieces[number])
            except ValueError as error:
                skipped.append(Skipped(pieces.about[number]["name"], str(error)))
                continue
            ids.append(found.astype(tokenizer.dtype))
            kept.append(number)
            pitches.append(tokenizer.pitch_range(found) or (0, -1))
        check_enough(name, len(kept), skipped)
        np.save(folder / "ids.npy", np.concatenate(ids))
        np.save(folder / "bounds.npy", np.cumsum([0, *map(len, ids)]))
        np.save(folder / "pieces.npy", np.array(kept))
        np.save(folder / "pitches.npy", np.array(pitches))
        rows = [{"file": row.name, "reason": row.reason} for row in skipped]
        report = {"source": name, "usable": len(kept), "skipped": rows}
        (folder / "skipped.json").write_text(json.dumps(report, indent=1), encoding="utf-8")

    key = key_of("music", FORMAT, pieces.key, tokenizer.fingerprint)
    folder = cached("music-tokens", key, write)
    bounds, kept, pitches = (np.load(folder / f"{n}.npy") for n in ("bounds", "pieces", "pitches"))
    report = folder / "skipped.json"
    rows = json.loads(report.read_text(encoding="utf-8"))["skipped"]
    skipped = [Skipped(row["file"], row["reason"]) for row in rows]
    return MusicTokens(TokenFile(folder / "ids.npy"), bounds, kept, pitches, report, skipped)


def split_pieces(
    sizes: NDArray[np.int64],
    splits: Sequence[str],
    groups: Sequence[str],
    *,
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> NDArray[np.str_]:
    """``[n]`` split of each piece: ``train``, ``val`` or ``test``.

    Pieces whose place names a split stay there. Of the others, whole groups drawn by ``seed`` make
    up about the wanted fraction of the tokens, at least one group for each split.

    Args:
        sizes: ``[n]`` tokens of each piece.
        splits: What each piece's place says, or "".
        groups: Pieces of one group stay together.
        val_fraction: Part to validate on.
        test_fraction: Part to test on; 0 for none.
        seed: Draws the groups.
    """
    labels = np.array([split or "train" for split in splits], dtype="<U5")
    total = int(sizes[labels == "train"].sum())
    for split, fraction in (("test", test_fraction), ("val", val_fraction)):
        if split in splits or fraction == 0:
            continue
        free: dict[str, list[int]] = {}
        for number in np.flatnonzero(labels == "train").tolist():
            free.setdefault(groups[number], []).append(number)
        names = sorted(free)
        order = [names[n] for n in np.random.default_rng(seed).permutation(len(names))]
        weight = {name: int(sizes[free[name]].sum()) for name in names}
        taken = 0
        chosen: list[str] = []
        for name in order:
            if taken + weight[name] <= 1.25 * fraction * total and len(chosen) + 1 < len(names):
                chosen.append(name)
                taken += weight[name]
            if taken >= 0.9 * fraction * total:
                break
        if not chosen and len(names) > 1:
            chosen = [min(order, key=lambda name: weight[name])]
        for name in chosen:
            labels[free[name]] = split
    return labels
