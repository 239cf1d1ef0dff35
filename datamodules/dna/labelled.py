"""Sequences with a class each, as batches for a classifier."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from statezoo.datamodules.base import SplitData, check_tokenizer
from statezoo.datamodules.batch import IGNORE, Batch
from statezoo.datamodules.dna.examples import (
    SPLITS,
    Examples,
    assign_splits,
    class_names,
    collect,
    overlaps,
)
from statezoo.datamodules.dna.rows import Source, synthetic_rows
from statezoo.datamodules.dna.sequence import reverse_complement
from statezoo.datamodules.dna.tokenizers import DNATokenizer, dna_tokenizer
from statezoo.datamodules.loader import SeekableLoader
from statezoo.datamodules.tokenizers import tokenizer_from_state

__all__ = ["LabelledDNA", "Sequences"]

log = logging.getLogger(__name__)


class Sequences:
    """Batches of some labelled sequences, in the form that ``SeekableLoader`` asks for.

    A batch has ``tokens [B T]`` and ``labels [B]``, ``attention_mask [B T]`` where lengths differ
    (the padding is on the right), and ``ids`` where names are wanted.

    Args:
        sequences: Letters.
        labels: ``[n]`` number of each class; ``IGNORE`` where it is not known.
        tokenizer: Makes tokens of letters.
        augment: Read every other sequence, drawn anew each epoch, on its opposite strand.
        names: Name of each sequence, to be handed on.
    """

    size = 2**31 - 1
    """The loader draws a number below this each epoch: here it seeds the strands."""

    def __init__(
        self,
        sequences: list[bytes],
        labels: NDArray[np.int64],
        tokenizer: DNATokenizer,
        *,
        augment: bool = False,
        names: list[str] | None = None,
    ) -> None:
        # One array, not a list: worker processes would copy a list's pages by counting references.
        self.letters = np.frombuffer(b"".join(sequences), dtype=np.uint8)
        self.bounds = np.cumsum([0, *map(len, sequences)])
        self.labels, self.names = labels, names
        self.tokenizer, self.augment = tokenizer, augment

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """``[n]`` letters of each sequence."""
        return np.diff(self.bounds)

    def __getitem__(self, index: tuple[int, list[int]]) -> Batch:
        """The rows ``index[1]`` in the epoch that is named ``index[0]``; row -1 has no label."""
        epoch, rows = index
        encoded = [self._encode(row, epoch) for row in rows]
        sizes = np.array([len(ids) for ids in encoded])
        inside = np.arange(sizes.max()) < sizes[:, None]  # [B T]
        tokens = np.full(inside.shape, self.tokenizer.pad_id, dtype=np.int64)
        tokens[inside] = np.concatenate(encoded)
        labels = [self.labels[row] if row >= 0 else IGNORE for row in rows]
        batch = Batch(tokens=torch.from_numpy(tokens), labels=torch.tensor(labels))
        if not inside.all():
            batch["attention_mask"] = torch.from_numpy(inside.astype(np.int64))
        if self.names is not None:
            batch["ids"] = [self.names[row] if row >= 0 else "" for row in rows]
        return batch

    def _encode(self, row: int, epoch: int) -> NDArray[Any]:
        """Ids of one sequence."""
        if row < 0:
            return np.array([self.tokenizer.n_id])
        letters = self.letters[self.bounds[row] : self.bounds[row + 1]]
        if self.augment and np.random.default_rng([epoch, row]).random() < 0.5:
            letters = reverse_complement(letters)
        return self.tokenizer.encode_array(letters)[0]


class LengthLoader(SeekableLoader):
    """Puts sequences of like length into a batch: within every ``POOL`` batches they are sorted."""

    POOL = 50

    def _epoch_order(self, epoch: int) -> tuple[int, NDArray[np.int64]]:
        shift, order = super()._epoch_order(epoch)
        lengths = self.windows.lengths  # type: ignore[attr-defined]
        if self.shuffle and len(np.unique(lengths)) > 1:
            size = self.batch_size * self.world_size
            pool = np.arange(len(order)) // (size * self.POOL)
            order = order[np.lexsort((lengths[order], pool))]
            whole = len(order) // size  # the last batch, which may be smaller, stays the last
            batches = np.random.default_rng([self.seed, epoch, 1]).permutation(whole)
            front = order[: whole * size].reshape(whole, size)[batches].reshape(-1)
            order = np.concatenate([front, order[whole * size :]])
        return shift, order


class LabelledDNA(SplitData):
    """DNA sequences with a class each: yours, or windows of the SYNTHETIC genome.

    Tables have the columns ``sequence`` and ``label``, and may have ``split`` (train, val or
    valid or dev, test) and ``id``. A folder has files called train, val and test, or sub-folders
    of these names with a file or folder for each class, or such files at once. Where there is no
    validation split, a part of the training rows of each class is held out, equal sequences and
    reverse complements together; without a test split, the test is run on the validation split.
    Upper and lower case are alike; letters other than A C G T are read as N and counted.

    Args:
        path: Table (.csv, .tsv, .parquet), .fasta with ``labels`` or names ``>name|label``, .bed
            with ``genome`` whose 4th column is the label, packed with gzip or not, a folder of
            these, or a dataset on the Hub, ``org/name`` or ``org/name:config``. Default: windows
            of a SYNTHETIC genome within genes and between them.
        labels: Table with the columns ``id`` and ``label`` for the sequences of a FASTA file.
        genome: FASTA file that a .bed file refers to.
        predict: Sequences to predict, in any of these formats, without labels; default those of
            the test. With ``path`` left out, nothing else is read.
        window: Bases around the centre: intervals of a .bed file are resized to it, longer
            sequences of other files cropped.
        tokenizer: ``characters``, ``kmer6`` or another ``kmer:K``, the folder of a tokenizer of
            DNA, or the .ckpt of a run.
        sequence_field: Column with the sequence.
        label_field: Column with the label.
        val_fraction: Part of the training rows to validate on where no split says it.
        val_contigs: Contigs of a .bed file to validate on instead.
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
    loader = LengthLoader

    def __init__(
        self,
        path: str | None = None,
        labels: str | None = None,
        genome: str | None = None,
        predict: str | None = None,
        *,
        window: int | None = None,
        tokenizer: str = "characters",
        sequence_field: str = "sequence",
        label_field: str = "label",
        val_fraction: float = 0.1,
        val_contigs: list[str] | None = None,
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.path, self.labels, self.genome, self.predict = path, labels, genome, predict
        self.window, self.sequence_field, self.label_field = window, sequence_field, label_field
        self.val_fraction, self.val_contigs = val_fraction, val_contigs or []
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self.tokenizer: DNATokenizer = dna_tokenizer(tokenizer)
        self.rc_augment = False
        self._known: list[str] = []  # classes of a checkpoint
        for name, least in (("batch_size", 1), ("num_workers", 0), ("seed", 0), ("window", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"LabelledDNA needs {name} of at least {least}, got {value}.")
        if not 0 < val_fraction < 1:
            raise ValueError(f"LabelledDNA needs val_fraction between 0 and 1, got {val_fraction}.")
        if path is None and (labels or genome) and predict is None:
            given = "labels" if labels else "genome"
            raise ValueError(f"{given} needs path: the sequences or intervals it belongs to.")

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    @property
    def complement(self) -> list[int] | None:
        """Id of the reverse complement of each token; None where the tokenizer has none."""
        return self.tokenizer.complement

    @property
    def class_names(self) -> list[str]:
        """Classes in the order of their numbers."""
        return self._known if self._only_predicts else self._data[2]

    @property
    def class_counts(self) -> list[int]:
        """Training rows of each class."""
        counts = Counter(self.rows("train")[1].tolist())
        return [counts[number] for number in range(len(self.class_names))]

    def rows(self, split: str) -> tuple[list[bytes], NDArray[np.int64]]:
        """Letters and ``[n]`` numbers of the classes of a split."""
        examples, splits, names = self._data
        at = np.flatnonzero(splits == split).tolist()
        numbers = {name: number for number, name in enumerate(names)}
        labels = np.array([numbers[examples.labels[i]] for i in at], dtype=np.int64)
        return [examples.sequences[i] for i in at], labels

    def setup(self, stage: str | None = None) -> None:
        """Read everything that this stage needs; say what was skipped and why."""
        if not self._only_predicts:
            self._data  # noqa: B018  # reads now rather than in the first batch

    def windows(self, split: str) -> Sequences | None:
        """The sequences of a split, those to train on from either strand if so asked."""
        if split not in self._data[1]:
            return None
        augment = self.rc_augment and split == "train"
        return Sequences(*self.rows(split), self.tokenizer, augment=augment)

    def predict_dataloader(self) -> SeekableLoader:
        """The sequences of ``predict``, or those of the test, with their names."""
        if self.predict is not None:
            rows = self._source(self.predict, labelled=False).rows()
            found = collect(rows, self.predict, window=self.window, labelled=False)
            self._tell(self.predict, found)
            unknown = np.full(len(found), IGNORE, dtype=np.int64)
            return self.load(Sequences(found.sequences, unknown, self.tokenizer, names=found.names))
        examples, splits, _ = self._data
        names = [examples.names[i] for i in np.flatnonzero(splits == self.test_split).tolist()]
        return self.load(Sequences(*self.rows(self.test_split), self.tokenizer, names=names))

    @property
    def test_split(self) -> str:
        """``test``, or ``val`` where there is no test."""
        return "test" if "test" in self._data[1] else "val"

    def classical_baselines(self, split: str = "val", limit: int = 20_000) -> dict[str, Any]:
        """Accuracy, MCC and AUC of methods that any network must beat, on a split.

        Args:
            split: ``val`` or ``test``.
            limit: Training rows that are used, from the beginning; more take longer to fit.

        Returns:
            ``{method: Scores}``: majority, length, one-hot (where all lengths are equal), k-mers.

        Raises:
            ValueError: If scikit-learn is not installed, or the split is empty.
        """
        from statezoo.datamodules.dna.classical import classical_baselines

        split = self.test_split if split == "test" else split
        return classical_baselines(self.rows("train"), self.rows(split), limit=limit)

    def state_dict(self) -> dict[str, Any]:
        """Classes and tokenizer, so that a checkpoint alone can name what it predicts."""
        return {"class_names": self.class_names, "tokenizer": self.tokenizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the checkpoint was made with the same tokenizer and classes.

        Raises:
            ValueError: If it was not.
        """
        check_tokenizer(tokenizer_from_state(state_dict["tokenizer"]), self.tokenizer)
        names = list(state_dict["class_names"])
        if not self._only_predicts and names != self.class_names:
            raise ValueError(
                f"The checkpoint has the classes {', '.join(names)}, this data "
                f"{', '.join(self.class_names)}: give data with the same labels, or start a new "
                "run from the weights with pretrained."
            )
        self._known = names

    @property
    def _only_predicts(self) -> bool:
        return self.path is None and self.predict is not None

    @cached_property
    def _data(self) -> tuple[Examples, NDArray[np.str_], list[str]]:
        """All labelled sequences, the split of each, and the classes."""
        place = self.path or "the SYNTHETIC genome"
        if self.path is None:
            rows = synthetic_rows(*([self.window] if self.window else []))
        else:
            rows = self._source(self.path, labelled=True).rows()
        found = collect(rows, place, window=self.window)
        names = class_names(found.labels, place, self.label_field)
        splits, told = assign_splits(
            found, val_fraction=self.val_fraction, val_contigs=self.val_contigs, seed=self.seed
        )
        trained = {found.labels[i] for i in np.flatnonzero(splits == "train").tolist()}
        told += [f"no training row has the class {n!r}" for n in names if n not in trained]
        told += [
            f"{equal} rows of {one} are in {other} as well, {either} counting reverse complements: "
            f"the score on {one} is too good"
            for (one, other), (equal, either) in overlaps(found, splits).items()
        ]
        self._tell(place, found, told)
        sizes = ", ".join(f"{int((splits == split).sum()):,} {split}" for split in SPLITS)
        if self.tells():
            log.info(f"{place}: {sizes}; classes {', '.join(names)}; {found.letters}")
        return found, splits, names

    def _source(self, path: str, *, labelled: bool) -> Source:
        return Source(
            path,
            self.labels,
            self.genome,
            self.window,
            self.sequence_field,
            self.label_field,
            labelled,
        )

    def _tell(self, place: str, found: Examples, told: Sequence[str] = ()) -> None:
        """Say what was left out or cut, and what else there is to say."""
        lines = [f"skipped {line}" for line in found.skipped[:20]]
        if found.cropped:
            lines.append(f"{found.cropped} sequences cut to the middle {self.window} bases")
        for line in (*lines, *told) if self.tells() else ():
            log.warning(f"{place}: {line}")
