"""Sequences of DNA with labels out of the files that people have them in, nothing dropped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from statezoo.datamodules.dna.fasta import FASTA_ENDINGS, Genome
from statezoo.datamodules.dna.features import feature_file, paint, tagged_windows
from statezoo.datamodules.dna.sequence import reverse_complement
from statezoo.datamodules.dna.synthetic import synthetic_genome
from statezoo.datamodules.dna.tables import BED, PLAIN, fasta_records, file_kind
from statezoo.datamodules.labelled_rows import NAMES, Row, Rows
from statezoo.datamodules.labels import KINDS, RawLabel, cut
from statezoo.datamodules.tables import TABLES, label_text, lines, records, split_name

__all__ = ["DNARows", "synthetic_rows", "synthetic_tags"]


@dataclass
class DNARows(Rows):
    """Reads tables, FASTA, BED, GFF, folders of these, and datasets.

    Attributes:
        labels: Table with the labels of a FASTA file.
        genome: FASTA that a BED or GFF file refers to.
        window: Length that intervals of a BED file are resized to, around their centres, and into
            which a genome with tags is cut.
        held: Parts of each contig to validate and to test on, for a genome with tags.
    """

    labels: str | None = None
    genome: str | None = None
    window: int | None = None
    held: tuple[float, float] | None = None

    contents = dict.fromkeys(KINDS, ("sequence",))
    content_setting = "sequence_field"
    what = (
        "labelled sequences: accepted are names ending in "
        f"{', '.join(TABLES + FASTA_ENDINGS + BED)}"
    )
    forms = (
        f"a table ({', '.join(TABLES)}), FASTA with a table of labels, BED with a genome, a folder "
        "of these, or a dataset on the Hub as org/name"
    )
    classes_as = "tables, FASTA, or a file or folder"

    def rows(self) -> Iterator[Row]:
        """All rows in the order of the files; windows of a genome for a file of its features."""
        if self.kind == "tags" and self.labelled and (path := feature_file(self.path)) is not None:
            if self.genome is None:
                raise ValueError(f"{path} needs the genome that its features are of: set genome.")
            return tagged_windows(self.path, Genome(self.genome), self.window, self.held)
        return super().rows()

    def kind_of(self, path: Path) -> str:
        """``fasta``, or the ending by which a file is read, or ``""``."""
        return file_kind(path)

    def other(self, path: Path, split: str, label: str | None) -> Iterator[Row] | None:
        """Rows of FASTA, BED, or of lines."""
        kind = file_kind(path)
        if kind == "fasta":
            return self._fasta(path, split, label)
        if kind in BED:
            return self._bed(path, split)
        if kind in PLAIN and label is not None:
            return self._plain(path, split, label)
        return None

    def content(self, value: Any) -> bytes:
        """Letters; what is none becomes a question mark, which is refused later."""
        return str(value).encode("ascii", "replace")

    def remedy(self, first: dict[str, Any], usual: str) -> str:
        """Tell a file without a line of names from one with other names."""
        bare = any(len(str(n)) > 20 and not set(str(n).upper()) - set("ACGTN") for n in first)
        return "its first line looks like data, add a line with names above it." if bare else usual

    def _fasta(self, path: Path, split: str, label: str | None) -> Iterator[Row]:
        """Records of a FASTA file; labels from the table, the place, or names ``...|label``."""
        table: dict[str, Row] = {}
        if self.labels is not None and self.labelled:
            table = self._labels(Path(self.labels).expanduser())
        matched = 0
        for name, sequence in fasta_records(path):
            own: RawLabel = label
            said = split
            if table:
                found = table.get(name)
                own, said = (found.label, found.split) if found else (None, "")
                matched += found is not None
            elif label is None and "|" in name:
                own = label_text(name.rpartition("|")[2])
            elif label is None and self.labelled:
                raise ValueError(
                    f"{path} has no labels: set labels to a table with columns id and "
                    f"{self.label_field or 'label'}, or write names as >name|label."
                )
            yield Row(f"{path}, {name!r}", name, sequence, own, said or split)
        if table and not matched:
            raise ValueError(
                f"No name of {path} is in {self.labels}, which has {next(iter(table))!r} and "
                f"{len(table) - 1} more; the FASTA has {name!r}: names are compared up to the "
                "first blank."
            )

    def _labels(self, path: Path) -> dict[str, Row]:
        """Rows of the table of labels by their names."""
        if not path.is_file():
            raise FileNotFoundError(f"No table of labels {str(path)!r}.")
        if file_kind(path) not in TABLES:
            raise ValueError(f"{path} is no table: labels needs one of {', '.join(TABLES)}.")
        found: dict[str, Row] = {}
        column: str | None = None
        for number, record in enumerate(records(path), start=1):
            name = next((key for key in NAMES if key in record), None)
            if name is None:
                raise ValueError(
                    f"{path} has no column 'id'; it has {', '.join(map(repr, record))}: rename one "
                    "to id."
                )
            if number == 1:
                column = self.label_column(record, str(path), needed=True)
            said = record.get("split")
            row = Row(f"{path}, row {number}", str(record[name]), None, self.label(record, column))
            found[row.name] = row._replace(split=split_name(str(said), str(path)) if said else "")
        if not found:
            raise ValueError(f"{path} is empty: it has no rows.")
        return found

    def _bed(self, path: Path, split: str) -> Iterator[Row]:
        """Intervals of a BED file, its 4th column the label, its 6th the strand."""
        if self.genome is None:
            raise ValueError(f"{path} needs the genome that its intervals are of: set genome.")
        genome = Genome(self.genome)
        for number, line in enumerate(lines(path), start=1):
            if not line.strip() or line.startswith(("#", "track", "browser")):
                continue
            fields = line.rstrip("\r\n").split("\t" if "\t" in line else None)
            place = f"{path}, line {number}"
            least = 4 if self.labelled else 3
            if len(fields) < least or not (fields[1].isdigit() and fields[2].isdigit()):
                raise ValueError(
                    f"{place}: needs contig, start, end"
                    f"{' and label' if self.labelled else ''}, got {line.strip()[:80]!r}."
                )
            contig, start, end = genome.resolve(fields[0]), int(fields[1]), int(fields[2])
            size = genome.length(contig)
            if not start < end <= size:
                raise ValueError(
                    f"{place}: {fields[0]}:{start}-{end} is no interval of the contig, which has "
                    f"{size} bases in {self.genome}: is this the same assembly?"
                )
            window = None if self.kind == "tags" else self.window
            letters = fetch(genome, contig, start, end, window)
            if len(fields) > 5 and fields[5] == "-":
                letters = reverse_complement(letters)
            own = label_text(fields[3]) if len(fields) > 3 else None
            name = f"{contig}:{start}-{end}"
            yield Row(place, name, letters, own, split, contig)

    def _plain(self, path: Path, split: str, label: str) -> Iterator[Row]:
        """A sequence on each line."""
        for number, line in enumerate(lines(path), start=1):
            if line.strip():
                text = line.strip().encode("ascii", "replace")
                yield Row(f"{path}, line {number}", f"{path.stem}:{number}", text, label, split)


def fetch(genome: Genome, contig: str, start: int, end: int, window: int | None) -> bytes:
    """Letters of an interval, resized to ``window`` around its centre; N beyond the contig."""
    if window is not None:
        start = (start + end) // 2 - window // 2
        end = start + window
    inside = genome.fetch(contig, max(start, 0), min(end, genome.length(contig)))
    before, after = max(-start, 0), max(end - genome.length(contig), 0)
    return b"N" * before + inside.tobytes() + b"N" * after


def synthetic_rows(window: int = 60) -> Iterator[Row]:
    """Windows of 4 Mb of the SYNTHETIC genome within genes and between them, as many of each.

    They do not overlap; those of the last 10 % are the test.
    """
    genome = synthetic_genome(4_000_000, seed=0)
    genes = [(i.start, i.end) for i in genome.intervals if i.kind == "CDS"]
    ends = [0, *(end for _, end in genes)]
    gaps = [(end, start) for end, (start, _) in zip(ends, genes, strict=False)]
    step = window + 1 if window % 3 == 0 else window  # so that all reading frames occur
    starts = {
        kind: np.array([at for a, b in spans for at in range(a, b - window + 1, step)])
        for kind, spans in (("coding", genes), ("noncoding", gaps))
    }
    count = min(map(len, starts.values()))
    if not count:
        raise ValueError(f"The SYNTHETIC genome has no gap of window={window} bases: use less.")
    for kind, places in starts.items():
        for at in places[np.linspace(0, len(places) - 1, count).astype(np.int64)].tolist():
            letters = genome.sequence[at : at + window].tobytes()
            name = f"{genome.name}:{at}-{at + window}"
            split = "test" if at >= 3_600_000 else ""
            yield Row(name, name, letters, kind, split, genome.name)


def synthetic_tags(window: int = 1024) -> Iterator[Row]:
    """Windows of 1 Mb of the SYNTHETIC genome, each base with its kind of feature.

    Those of the last tenth are the test, those of the tenth before them the validation.
    """
    genome, size = synthetic_genome(1_000_000, seed=0), 1_000_000
    tags = paint(size, [(i.start, i.end, i.kind) for i in genome.intervals])
    for at in range(0, size, window):
        end = min(at + window, size)
        split = "train" if end <= 0.8 * size else "val" if end <= 0.9 * size else "test"
        letters = genome.sequence[at:end].tobytes()
        name = f"{genome.name}:{at}-{end}"
        yield Row(name, name, letters, cut(tags, at, end), split, genome.name)
