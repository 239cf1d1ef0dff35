"""Labelled rows made fit for use: checked, counted, their splits settled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from statezoo.datamodules.labelled_rows import Row
from statezoo.datamodules.labels import RawLabel

__all__ = ["SPLITS", "Examples", "Unusable", "assign_splits", "collect", "overlaps"]

SPLITS = ("train", "val", "test")
_SHOWN = 20  # contigs in a message


class Unusable(ValueError):
    """A row that cannot be used, and why: in words that are alike for rows of the same fault."""


@dataclass
class Examples:
    """Rows that can be used, and what was found in the others.

    Attributes:
        names: Name of each, as the file has it.
        places: Where each stands, for messages.
        contents: Letters or text of each.
        labels: Label of each as the file has it; None where none is needed.
        splits: Split of each, ``""`` where nothing says it.
        contigs: Contig of each, ``""`` where it is no interval.
        skipped: How many rows were left out, by reason, with the first of them.
    """

    names: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)
    labels: list[RawLabel] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    contigs: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.contents)


def collect(
    rows: Iterable[Row],
    source: str,
    fit: Callable[[Row], Iterable[Row]],
    *,
    what: str,
    labelled: bool = True,
) -> Examples:
    """Keep the rows that can be used; count the others by what is wrong with them.

    Args:
        rows: As they stand in the files.
        source: Name of the source, for messages.
        fit: Makes a row fit for use, or several of one; raises ``Unusable``.
        what: What a row holds, in a word.
        labelled: Whether a row without a label is left out.

    Raises:
        ValueError: If no row can be used; says what was wrong with the first.
    """
    found, wrong = Examples(), dict[str, list[str]]()
    for row in rows:
        try:
            if row.problem:
                raise Unusable(row.problem)
            if row.content is None or not row.content.strip():
                raise Unusable(f"empty {what}")
            usable = list(fit(row))
            if labelled and _none(row.label):
                raise Unusable("no label")
        except Unusable as error:
            wrong.setdefault(str(error), []).append(row.place)
            continue
        for part in usable:
            found.names.append(part.name)
            found.places.append(part.place)
            found.contents.append(part.content or b"")
            found.labels.append(part.label)
            found.splits.append(part.split)
            found.contigs.append(part.contig)
    for reason, places in wrong.items():
        count = f"{len(places)} row{'s' if len(places) > 1 else ''}"
        found.skipped.append(f"{count}, the first {places[0]}: {reason}")
    if not len(found):
        reasons = "".join(f"\n  {line}" for line in found.skipped[:5])
        raise ValueError(f"{source} has no {what} that can be used: add some.{reasons}")
    return found


def _none(label: RawLabel) -> bool:
    """Whether a label says nothing; an empty list says that there is none of several."""
    many = isinstance(label, list)
    return label is None or (many and len(label) > 0 and all(x is None for x in label))


def assign_splits(
    examples: Examples,
    keys: Sequence[bytes],
    strata: Sequence[str],
    *,
    val_fraction: float,
    test_fraction: float = 0.0,
    val_contigs: Sequence[str] = (),
    seed: int = 0,
    whole_strata: bool = True,
) -> tuple[NDArray[np.str_], list[str]]:
    """``[n]`` split of each row, and what should be said about it.

    Rows without a split are for training. Where nothing is for validation, ``val_fraction`` of
    each stratum of the training rows is drawn for it, rows of one key together; likewise for the
    test. Rows that are for the test are never touched.

    Args:
        examples: The rows.
        keys: Alike for rows that must not be on two sides.
        strata: Of which group each row is.
        val_fraction: Part of the training rows to validate on.
        test_fraction: Part of the training rows to test on; 0 for none.
        val_contigs: Contigs whose intervals are for validation.
        seed: Draws the rows.
        whole_strata: Keep a row of every stratum for training, come what may.

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
    for split, fraction, seeds in (("test", test_fraction, [seed, 1]), ("val", val_fraction, seed)):
        if split in splits or not fraction:
            continue
        free, rng = np.flatnonzero(splits == "train"), np.random.default_rng(seeds)
        drawn = _draw(keys, strata, free, fraction, rng)
        if not len(drawn) and not whole_strata:
            drawn = _draw(keys, [""] * len(strata), free, fraction, rng)
        splits[drawn] = split
    sizes = {name: int((splits == name).sum()) for name in SPLITS}
    if not (sizes["train"] and sizes["val"]):
        least = "2 different rows of a class" if whole_strata else "2 different rows"
        raise ValueError(
            f"There are {sizes['train']} rows to train on and {sizes['val']} to validate on "
            f"({sizes['test']} are for the test): validation needs {least}, or rows of its own "
            "in a split val; add some."
        )
    return splits, told


def _draw(
    keys: Sequence[bytes],
    strata: Sequence[str],
    free: NDArray[np.int64],
    fraction: float,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """About ``fraction`` of the rows ``free`` of each stratum, all rows of a key together."""
    members: dict[bytes, list[int]] = {}
    for row in free.tolist():
        members.setdefault(keys[row], []).append(row)
    by_stratum: dict[str, list[bytes]] = {}
    for group, rows in members.items():
        by_stratum.setdefault(strata[rows[0]], []).append(group)
    drawn: list[int] = []
    for stratum in sorted(by_stratum):
        groups = by_stratum[stratum]
        target = fraction * sum(len(members[group]) for group in groups)
        taken = 0
        for place in rng.permutation(len(groups))[1:].tolist():  # one stays for training
            if taken >= target:
                break
            drawn += members[groups[place]]
            taken += len(members[groups[place]])
    return np.array(sorted(drawn), dtype=np.int64)


def overlaps(
    splits: NDArray[np.str_], exact: Sequence[object], like: Sequence[bytes]
) -> dict[tuple[str, str], tuple[int, int]]:
    """Rows of a held-out split that also occur in another one: as they are, or nearly so.

    Args:
        splits: ``[n]`` split of each row.
        exact: Alike for rows that are equal.
        like: Alike for rows that are nearly equal too.

    Returns:
        ``{(held out, other): (equal rows, rows nearly equal)}`` where there are any.
    """
    found = {}
    for one, other in (("val", "train"), ("test", "train"), ("test", "val")):
        rows = np.flatnonzero(splits == one).tolist()
        there = np.flatnonzero(splits == other).tolist()
        equal = {exact[row] for row in there}
        near = {like[row] for row in there}
        count = sum(exact[r] in equal for r in rows), sum(like[r] in near for r in rows)
        if count[1]:
            found[one, other] = count
    return found
