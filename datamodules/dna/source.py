"""Where a genome comes from: a FASTA file or folder, a dataset of sequences, or the default."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import numpy as np

from statezoo.datamodules.corpus import cached
from statezoo.datamodules.dna.fasta import FASTA_ENDINGS, Genome, is_fasta
from statezoo.datamodules.readers import HUB_NAME, source_for
from statezoo.datamodules.records import Report

__all__ = ["FIELD", "Sequences", "open_genome"]

log = logging.getLogger(__name__)

FIELD = "sequence"
"""Field of a dataset, .jsonl or .parquet that holds the sequence."""

_TABLES = (".jsonl", ".jsonl.gz", ".parquet")
_FORMAT = 1  # raise it when what is written changes


class Sequences(Genome):
    """A genome, and what is known of it besides.

    Attributes:
        title: What it is called in messages.
        rows: The contigs are independent sequences, held out whole.
        splits: Split that the dataset names, for contigs of which it names one.
        entropy: Bits per base of the generator where the genome is SYNTHETIC.
    """

    title: str
    rows: bool = False
    entropy: float | None = None

    def __init__(self, path: str | Path, title: str = "") -> None:
        super().__init__(path)
        self.title = title or str(path)
        self.splits: dict[str, str] = {}


def open_genome(path: str | None) -> Sequences:
    """The genome at ``path``; None is the SYNTHETIC one.

    Args:
        path: FASTA file or folder; a .jsonl or .parquet file, saved dataset or name of a Hub
            dataset with a field ``sequence``; None.

    Raises:
        FileNotFoundError: If ``path`` does not exist.
        ValueError: If it holds nothing that can be read.
    """
    if path is None:
        return _synthetic()
    place = Path(path).expanduser()
    if place.is_dir():
        if any((place / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
            return _dataset(path)
        names = [file.name.lower() for file in place.rglob("*") if file.is_file()]
        tables = any(name.endswith(_TABLES) for name in names)
        return _dataset(path) if tables and not any(map(is_fasta, place.iterdir())) else (
            Sequences(path)
        )  # fmt: skip
    if place.exists():
        return _dataset(path) if place.name.lower().endswith(_TABLES) else Sequences(path)
    if HUB_NAME.fullmatch(path) and not path.startswith(".") and not is_fasta(place):
        return _dataset(path)
    near = next(parent for parent in place.absolute().parents if parent.is_dir())
    raise FileNotFoundError(
        f"No file or folder {path!r} ({near} exists): give a FASTA file ({', '.join(FASTA_ENDINGS)}"
        ", also .gz), a folder of them, or a dataset on the Hub as org/name."
    )


def _synthetic() -> Sequences:
    """One million bases, SYNTHETIC and named so."""
    from statezoo.datamodules.dna import synthetic

    source = Path(synthetic.__file__).read_bytes()
    key = hashlib.sha256(repr((_FORMAT, np.__version__)).encode() + source).hexdigest()[:32]

    def write(folder: Path) -> None:
        genome = synthetic.synthetic_genome()
        genome.write_fasta(folder / "SYNTHETIC.fa")
        (folder / "entropy.json").write_text(json.dumps(genome.entropy), encoding="utf-8")

    folder = cached("dna", key, write)
    genome = Sequences(folder / "SYNTHETIC.fa", "the SYNTHETIC genome (no natural sequence)")
    genome.entropy = json.loads((folder / "entropy.json").read_text(encoding="utf-8"))
    return genome


def _dataset(path: str) -> Sequences:
    """The rows of a dataset, written once as FASTA into the cache."""
    try:
        source = source_for(path, FIELD)
        key = hashlib.sha256(repr((_FORMAT, source.fingerprint())).encode()).hexdigest()[:32]

        def write(folder: Path) -> None:
            report, splits, number = Report(), {}, 0
            with (folder / "rows.fa").open("wb") as out:
                for number, (text, split) in enumerate(source.documents(report), start=1):
                    name = f"row{number}"
                    out.write(b">%s\n%s\n" % (name.encode(), text.translate(None, b" \t\r\n")))
                    if split:
                        splits[name] = split
            if not number:
                reasons = "".join(f"\n  {line}" for line in report[:10])
                raise ValueError(f"No sequence in {source.name}: add some.{reasons}")
            (folder / "splits.json").write_text(json.dumps([splits, report]), encoding="utf-8")

        folder = cached("dna", key, write)
    except ValueError as error:
        message = str(error).replace(
            "set text_field to one of them", f"name the one with the DNA {FIELD!r}"
        )
        raise ValueError(message) from error
    genome = Sequences(folder / "rows.fa", path)
    genome.rows = True
    genome.splits, skipped = json.loads((folder / "splits.json").read_text(encoding="utf-8"))
    for line in skipped[:20]:
        log.warning(f"skipped {line}")
    return genome
