"""DNA sequences with labels, as batches for classifiers, taggers and regressions."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from statezoo.datamodules.dna.rows import DNARows, synthetic_rows, synthetic_tags
from statezoo.datamodules.dna.sequence import check_letters, composition, reverse_complement
from statezoo.datamodules.dna.tokenizers import DNATokenizer, dna_tokenizer
from statezoo.datamodules.examples import Examples, Unusable
from statezoo.datamodules.labelled import LabelledData
from statezoo.datamodules.labelled_batches import LabelledRows
from statezoo.datamodules.labelled_rows import Row
from statezoo.datamodules.labels import Coded, Kind, Labels, RawLabel, cut

__all__ = ["LabelledDNA", "Sequences"]


class Sequences(LabelledRows):
    """Batches of labelled sequences.

    Args:
        sequences: Letters.
        labels: Their labels.
        tokenizer: Makes tokens of letters.
        augment: Read every other sequence, drawn anew each epoch, on its opposite strand.
        names: Name of each sequence, to be handed on.
    """

    def __init__(
        self,
        sequences: Sequence[bytes],
        labels: Labels,
        tokenizer: DNATokenizer,
        *,
        augment: bool = False,
        names: list[str] | None = None,
    ) -> None:
        parts = [np.frombuffer(letters, dtype=np.uint8) for letters in sequences]
        super().__init__(parts, labels, pad_id=tokenizer.pad_id, blank=tokenizer.n_id, names=names)
        self.tokenizer, self.augment = tokenizer, augment

    def encode(
        self, row: int, epoch: int, part: NDArray[Any], tags: NDArray[np.int16]
    ) -> tuple[NDArray[Any], NDArray[np.int16]]:
        """Ids of a sequence, or of its other strand with the tags in the order of that."""
        if self.augment and np.random.default_rng([epoch, row]).random() < 0.5:
            part, tags = reverse_complement(part), tags[::-1]
        return self.tokenizer.encode_array(part)[0], tags


class LabelledDNA(LabelledData):
    """DNA sequences with labels: yours, or windows of the SYNTHETIC genome.

    Tables have the columns ``sequence`` and ``label``, and may have ``split`` (train, val or
    valid or dev, test) and ``id``. A folder has files called train, val and test, or sub-folders
    of these names with a file or folder for each class, or such files at once. Where there is no
    validation split, a part of the training rows of each class is held out, equal sequences and
    reverse complements together; without a test split, the test is run on the validation split.
    Upper and lower case are alike; letters other than A C G T are read as N and counted.

    Labels are of one ``kind``. ``class``: one of several. ``classes``: any of several; a cell as
    ``a;b`` or ``a,b``, ``-`` for none, a list, or a column of 0 and 1 for each (``label_fields``).
    ``number``: a measurement, or several (``label_fields``). ``tags``: one for each base; a column
    ``tags`` as long as the sequence, a letter each, ``?`` where it is not known, or a list. Or
    the names of features of a genome: ``path`` is a .bed or GFF file, ``genes.gff3:CDS,tRNA``;
    bases in no feature are ``none``, of features that overlap the shortest counts, then the first.
    Such a genome is cut into windows, the last of each contig held out; contigs without a feature
    are left out. Whatever strand is read, the tags keep their bases and their names.

    Args:
        path: Table (.csv, .tsv, .jsonl, .parquet), .fasta with ``labels`` or names
            ``>name|label``, .bed with ``genome`` whose 4th column is the label, packed with gzip
            or not, a folder of these, or a dataset on the Hub, ``org/name`` or
            ``org/name:config``. Default: windows of a SYNTHETIC genome within genes and between
            them, or with the kinds of its features as tags.
        labels: Table with the columns ``id`` and ``label`` for the sequences of a FASTA file.
        genome: FASTA file that a .bed or GFF file refers to.
        predict: Sequences to predict, in any of these formats, without labels; default those of
            the test. With ``path`` left out, nothing else is read.
        kind: What labels are: ``class``, ``classes``, ``number`` or ``tags``.
        window: Bases around the centre: intervals of a .bed file are resized to it, longer
            sequences of other files cropped. Sequences with tags are cut into pieces of it instead;
            a genome by default into pieces of 1,024.
        tokenizer: ``characters``, ``kmer6`` or another ``kmer:K``, the folder of a tokenizer of
            DNA, or the .ckpt of a run. Tags need ``characters``.
        sequence_field: Column with the sequence.
        label_field: Column with the label; default label, class or target; of tags, tags.
        label_fields: Columns of several labels of 0 and 1, or of several numbers, instead.
        val_fraction: Part of the training rows to validate on where no split says it.
        test_fraction: Part of the training rows to test on where no split says it.
        val_contigs: Contigs of a .bed or GFF file to validate on instead.
        batch_size: Sequences per batch and process.
        seed: Draws the held-out rows and the order of training.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.

    Attributes:
        rc_augment: Whether training reads either strand; tasks set it before training.

    Raises:
        ValueError: If a setting is out of range, or a file cannot be used; says what it has.
        FileNotFoundError: If there is no such file.
    """

    unit = "base"
    default = "the SYNTHETIC genome"
    what = "sequence"
    nearly = "counting reverse complements"

    def __init__(
        self,
        path: str | None = None,
        labels: str | None = None,
        genome: str | None = None,
        predict: str | None = None,
        *,
        kind: Kind = "class",
        window: int | None = None,
        tokenizer: str = "characters",
        sequence_field: str = "sequence",
        label_field: str | None = None,
        label_fields: list[str] | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        val_contigs: list[str] | None = None,
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.path, self.labels, self.genome, self.predict = path, labels, genome, predict
        self.kind, self.window, self.sequence_field = kind, window, sequence_field
        self.label_field, self.label_fields = label_field, label_fields or []
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.val_contigs = val_contigs or []
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self.tokenizer: DNATokenizer = dna_tokenizer(tokenizer)
        self.rc_augment = False
        self._cropped = 0
        self.check(("window", 1))
        if path is None and predict is None:
            if labels or genome:
                given = "labels" if labels else "genome"
                raise ValueError(f"{given} needs path: the sequences or intervals it belongs to.")
            if kind not in ("class", "tags"):
                raise ValueError(f"The SYNTHETIC genome has classes and tags, no {kind}: set path.")
        if kind == "tags" and self.tokenizer.bases_per_token > 1:
            raise ValueError(
                f"Tags need a token for each base, tokenizer {tokenizer} has up to "
                f"{self.tokenizer.bases_per_token} in one: set tokenizer: characters."
            )

    @property
    def complement(self) -> list[int] | None:
        """Id of the reverse complement of each token; None where the tokenizer has none."""
        return self.tokenizer.complement

    def source(self, path: str, *, labelled: bool) -> DNARows:
        """What reads ``path``."""
        return DNARows(
            path,
            self.row_kind,
            self.sequence_field,
            self.label_field,
            self.label_fields,
            labelled,
            self.labels,
            self.genome,
            self.window,
            None if self.val_contigs else (self.val_fraction, self.test_fraction),
        )

    def default_rows(self) -> Iterable[Row]:
        """Windows of the SYNTHETIC genome."""
        rows = synthetic_tags if self.kind == "tags" else synthetic_rows
        return rows(*([self.window] if self.window else []))

    def fit(self, row: Row) -> Iterator[Row]:
        """Check the letters; crop what is too long, or cut it into pieces where it has tags."""
        sequence = b"".join((row.content or b"").split())
        try:
            check_letters(sequence, "the sequence")
        except ValueError as error:
            raise Unusable(re.sub(r" at base \d+", "", str(error)).rstrip(".")) from None
        size, window = len(sequence), self.window
        if self.row_kind == "tags":
            tags = _letters(row.label)
            known = len(tags.codes if isinstance(tags, Coded) else tags or ())
            if tags is not None and known != size:
                raise Unusable("the sequence has not as many letters as it has tags")
            for at in range(0, size, window or size):
                end = min(at + (window or size), size)
                name = row.name if size <= (window or size) else f"{row.name}:{at}-{end}"
                yield row._replace(name=name, content=sequence[at:end], label=cut(tags, at, end))
            return
        if window is not None and size > window:
            start = (size - window) // 2
            sequence = sequence[start : start + window]
            self._cropped += 1
        yield row._replace(content=sequence)

    def places(self, content: bytes) -> int:
        """Letters of a sequence."""
        return len(content)

    def keys(self, contents: Sequence[bytes]) -> tuple[list[object], list[bytes]]:
        """Alike for equal sequences; for these and reverse complements, whatever their case."""
        return [hash(sequence.upper()) for sequence in contents], [_key(s) for s in contents]

    def batches(
        self, contents: list[bytes], labels: Labels, *, train: bool, names: list[str] | None
    ) -> Sequences:
        """Batches of some sequences, those to train on from either strand if so asked."""
        augment = self.rc_augment and train
        return Sequences(contents, labels, self.tokenizer, augment=augment, names=names)

    def notes(self, examples: Examples) -> list[str]:
        """How many sequences were cropped."""
        cropped, self._cropped = self._cropped, 0
        return [f"{cropped} sequences cut to the middle {self.window} bases"] if cropped else []

    def about(self, examples: Examples) -> str:
        """Numbers of bases, N and other letters, in words."""
        return str(composition(b"".join(examples.contents)))

    def classical_baselines(self, split: str = "val", limit: int = 20_000) -> dict[str, Any]:
        """Accuracy, MCC and AUC of methods that any network must beat, on a split.

        Args:
            split: ``val`` or ``test``.
            limit: Training rows that are used, from the beginning; more take longer to fit.

        Returns:
            ``{method: Scores}``: majority, length, one-hot (where all lengths are equal), k-mers.

        Raises:
            ValueError: If scikit-learn is not installed, the split is empty, or labels are no
                classes.
        """
        from statezoo.datamodules.dna.classical import classical_baselines

        if self.kind != "class":
            raise ValueError(f"The classical baselines need kind: class, this is {self.kind}.")

        split = self.test_split if split == "test" else split
        return classical_baselines(self.rows("train"), self.rows(split), limit=limit)


def _key(sequence: bytes) -> bytes:
    upper = sequence.upper()
    return hashlib.blake2b(min(upper, reverse_complement(upper)), digest_size=12).digest()


def _letters(label: RawLabel) -> RawLabel:
    """Tags of a sequence as a text of letters or a list, which a cell may hold as JSON."""
    if not (isinstance(label, str) and label.startswith("[")):
        return label
    try:
        return [None if tag is None else str(tag) for tag in json.loads(label)]
    except json.JSONDecodeError:
        raise Unusable("the tags begin like a list but are none") from None
