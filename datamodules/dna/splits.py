"""Which bases are for training, which for validation, which for test."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from statezoo.datamodules.dna.intervals import Parts, Region, intersect, merge, read_intervals
from statezoo.datamodules.dna.source import Sequences

__all__ = ["split_genome"]


def split_genome(
    genome: Sequences,
    intervals: str | None,
    *,
    val_contigs: Sequence[str] | None,
    test_contigs: Sequence[str] | None,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    report: list[str],
) -> Parts:
    """Merged regions of ``train``, ``val`` and ``test``.

    An interval file or dataset that names splits decides. Otherwise contigs that are named are
    held out whole, and of a dataset rows drawn by ``seed``, equal ones on the same side. What is
    still missing is taken from the end of every other contig: of ``L`` bases, those from
    ``int(L * (1 - val_fraction - test_fraction))`` on, the test last.

    Args:
        genome: The contigs.
        intervals: BED or GFF file that limits what is used.
        val_contigs: Contigs to validate on.
        test_contigs: Contigs to test on.
        val_fraction: Part to validate on, unless ``val_contigs`` is given.
        test_fraction: Part to test on, unless ``test_contigs`` is given.
        seed: Draws the rows of a dataset.
        report: Takes a line for what is left out.

    Raises:
        ValueError: If a contig is unknown, or asked for twice.
    """
    wanted = {"": [Region(name, 0, genome.length(name)) for name in genome.names]}
    if intervals is not None:
        wanted = read_intervals(intervals, genome, report)
        if "" not in wanted:
            return wanted
    named = dict(genome.splits)
    for split, contigs in (("val", val_contigs), ("test", test_contigs)):
        for contig in contigs or ():
            name = genome.resolve(contig)
            if named.get(name, split) != split:
                raise ValueError(f"DNA cannot use contig {contig!r} for val and for test.")
            named[name] = split
    given = set(named.values()) - {"train"}
    val, test = (
        0.0 if split in given else fraction
        for split, fraction in (("val", val_fraction), ("test", test_fraction))
    )
    parts: dict[str, list[Region]] = {"train": [], "val": [], "test": []}
    for name in genome.names:
        length = genome.length(name)
        if name in named and (named[name] != "train" or "train" not in genome.splits.values()):
            parts[named[name]].append(Region(name, 0, length))
        elif genome.rows:
            parts[_drawn(genome, name, val, test, seed)].append(Region(name, 0, length))
        else:
            for split, region in _ends(name, length, val, test):
                parts[split].append(region)
    return {split: intersect(merge(part), merge(wanted[""])) for split, part in parts.items()}


def _ends(name: str, length: int, val: float, test: float) -> Iterable[tuple[str, Region]]:
    """The three parts of a contig."""
    cuts = [0, *(int(length * round(1 - held, 12)) for held in (val + test, test)), length]
    for split, start, stop in zip(("train", "val", "test"), cuts, cuts[1:], strict=False):
        yield split, Region(name, start, stop)


def _drawn(genome: Sequences, name: str, val: float, test: float, seed: int) -> str:
    """The split of a row, by a hash of its sequence."""
    letters = genome.fetch(name).tobytes().upper()
    digest = hashlib.blake2b(letters, digest_size=8, key=str(seed).encode()).digest()
    place = int.from_bytes(digest, "little") / 2**64
    return "test" if place < test else "val" if place < test + val else "train"
