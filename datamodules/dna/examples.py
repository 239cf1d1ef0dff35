"""Labelled sequences made fit for use: checked, counted, their classes and splits settled."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from statezoo.datamodules.dna.rows import Row
from statezoo.datamodules.dna.sequence import check_letters, composition, reverse_complement

__all__ = ["Examples", "assign_splits", "class_names", "collect", "overlaps"]

SPLITS = ("train", "val", "test")
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
_SHOWN = 20  # labels in a message
_MANY = 100  # classes above which labels are looked at twice


@dataclass
class Examples:
    """Sequences that can be used, and what was found in the others.

    Attributes:
        names: Name of each, as the file has it.
        sequences: Letters of each, in their own case.
        labels: Class of each; empty texts where none are needed.
        splits: Split of each, ``""`` where nothing says it.
        contigs: Contig of each, ``""`` where it is no interval.
        skipped: How many rows were left out, by reason, with the first of them.
        cropped: How many sequences were cut to ``window``.
    """

    names: list[str] = field(default_factory=list)
    sequences: list[bytes] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    contigs: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    cropped: int = 0

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def letters(self) -> str:
        """Numbers of bases, N and other letters, in words."""
        return str(composition(b"".join(self.sequences)))

    def groups(self) -> list[bytes]:
        """Equal for sequences that are equal, or reverse complements, whatever their case."""
        return [_key(sequence) for sequence in self.sequences]


def _key(sequence: bytes) -> bytes:
    upper = sequence.upper()
    return hashlib.blake2b(min(upper, reverse_complement(upper)), digest_size=12).digest()


def collect(
    rows: Iterable[Row], source: str, *, window: int | None = None, labelled: bool = True
) -> Examples:
    """Keep the rows that can be used; count the others by what is wrong with them.

    Args:
        rows: As they stand in the files.
        source: Name of the source, for messages.
        window: Longest sequence; of a longer one the middle is kept.
        labelled: Whether a row without a label is left out.

    Raises:
        ValueError: If no row can be used; says what was wrong with the first.
    """
    found, wrong = Examples(), dict[str, list[str]]()
    for row in rows:
        reason, sequence = _problem(row, labelled), row.sequence
        if reason or sequence is None:
            wrong.setdefault(reason, []).append(row.place)
            continue
        sequence = b"".join(sequence.split())
        if window is not None and len(sequence) > window:
            start = (len(sequence) - window) // 2
            sequence = sequence[start : start + window]
            found.cropped += 1
        found.names.append(row.name)
        found.sequences.append(sequence)
        found.labels.append(row.label or "")
        found.splits.append(row.split)
        found.contigs.append(row.contig)
    for reason, places in wrong.items():
        count = f"{len(places)} row{'s' if len(places) > 1 else ''}"
        found.skipped.append(f"{count}, the first {places[0]}: {reason}")
    if not len(found):
        reasons = "".join(f"\n  {line}" for line in found.skipped[:5])
        raise ValueError(f"{source} has no sequence that can be used: add some.{reasons}")
    return found


def _problem(row: Row, labelled: bool) -> str:
    """What is wrong with a row, alike for rows with the same fault; "" if nothing."""
    if row.sequence is None or not row.sequence.strip():
        return "empty sequence"
    try:
        check_letters(b"".join(row.sequence.split()), "the sequence")
    except ValueError as error:
        return re.sub(r" at base \d+", "", str(error)).rstrip(".")
    if labelled and row.label is None:
        return "no label"
    return ""


def class_names(labels: Sequence[str], source: str, label_field: str) -> list[str]:
    """Distinct labels: numbers in their order, others in that of the alphabet.

    Raises:
        ValueError: If there is one class only, or nearly as many as rows.
    """
    counts = Counter(labels)
    names = list(counts)
    if len(names) < 2:
        raise ValueError(
            f"{source} has one class only, {names[0]!r} ({len(labels)} rows): a classifier needs "
            "two or more. Is the label in another column? Set label_field."
        )
    if len(names) > max(_MANY, len(labels) // 20):
        shown = ", ".join(map(repr, names[:3]))
        raise ValueError(
            f"{source} has {len(names)} different labels in {len(labels)} rows ({shown}, ...): "
            f"{label_field!r} holds measurements or names. Set label_field to a column of classes."
        )
    if all(_NUMBER.fullmatch(name) for name in names):
        return sorted(names, key=float)
    return sorted(names)


def assign_splits(
    examples: Examples,
    *,
    val_fraction: float,
    val_contigs: Sequence[str] = (),
    seed: int = 0,
) -> tuple[NDArray[np.str_], list[str]]:
    """``[n]`` split of each sequence, and what should be said about it.

    Rows without a split are for training. Where nothing is for validation, ``val_fraction`` of
    each class of the training rows is drawn for it, equal sequences and reverse complements
    together. Test rows are never touched.

    Args:
        examples: The sequences.
        val_fraction: Part of the training rows to validate on.
        val_contigs: Contigs whose intervals are for validation.
        seed: Draws the rows.

    Raises:
        ValueError: If nothing is left to train or validate on, or a contig has no interval.
    """
    splits = np.array([split or "train" for split in examples.splits], dtype="<U5")
    told: list[str] = []
    if val_contigs:
        contigs = np.array(examples.contigs)
        for name in val_contigs:
            alias = name.removeprefix("chr") if name.startswith("chr") else f"chr{name}"
            on = np.isin(contigs, (name, alias))
            if not on.any():
                some = ", ".join(sorted(set(examples.contigs) - {""})[:_SHOWN]) or "none"
                raise ValueError(
                    f"val_contigs names {name!r}, on which no interval is; there are {some}."
                )
            splits[on] = "val"
    if "train" not in splits and "val" in splits and not val_contigs:
        told.append("there is no training split: the validation split is trained on instead")
        splits[splits == "val"] = "train"
    if "val" not in splits:
        drawn = _draw(examples, np.flatnonzero(splits == "train"), val_fraction, seed)
        splits[drawn] = "val"
    sizes = {name: int((splits == name).sum()) for name in SPLITS}
    if not (sizes["train"] and sizes["val"]):
        raise ValueError(
            f"There are {sizes['train']} rows to train on and {sizes['val']} to validate on "
            f"({sizes['test']} are for the test): add rows, or change val_fraction."
        )
    return splits, told


def _draw(
    examples: Examples, free: NDArray[np.int64], fraction: float, seed: int
) -> NDArray[np.int64]:
    """About ``fraction`` of the rows ``free`` of each class, whole groups of equal sequences."""
    rng = np.random.default_rng(seed)
    members: dict[bytes, list[int]] = {}
    for row in free.tolist():
        members.setdefault(_key(examples.sequences[row]), []).append(row)
    by_class: dict[str, list[bytes]] = {}
    for group, rows in members.items():
        by_class.setdefault(examples.labels[rows[0]], []).append(group)
    drawn: list[int] = []
    for label in sorted(by_class):
        groups = by_class[label]
        target = fraction * sum(len(members[group]) for group in groups)
        taken = 0
        for place in rng.permutation(len(groups))[1:].tolist():  # one stays for training
            if taken >= target:
                break
            drawn += members[groups[place]]
            taken += len(members[groups[place]])
    return np.array(sorted(drawn), dtype=np.int64)


def overlaps(
    examples: Examples, splits: NDArray[np.str_]
) -> dict[tuple[str, str], tuple[int, int]]:
    """Rows of a held-out split that also occur in another one: as they are, or on either strand.

    Returns:
        ``{(held out, other): (equal rows, rows equal on either strand)}`` where there are any.
    """
    groups = examples.groups()
    upper = [hash(sequence.upper()) for sequence in examples.sequences]
    found = {}
    for one, other in (("val", "train"), ("test", "train"), ("test", "val")):
        rows = np.flatnonzero(splits == one).tolist()
        there = np.flatnonzero(splits == other).tolist()
        exact = {upper[row] for row in there}
        either = {groups[row] for row in there}
        count = sum(upper[r] in exact for r in rows), sum(groups[r] in either for r in rows)
        if count[1]:
            found[one, other] = count
    return found
