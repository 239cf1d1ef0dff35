"""A genome as batches of bases, with held-out parts and their baselines."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from statezoo.datamodules.base import SplitData, check_tokenizer, digest
from statezoo.datamodules.decomposition import (
    DECOMPOSITION,
    ONE_LENGTH,
    Decomposition,
    check_decomposed,
)
from statezoo.datamodules.dna.baselines import baselines
from statezoo.datamodules.dna.intervals import Region
from statezoo.datamodules.dna.scan import Scan, scan
from statezoo.datamodules.dna.sequence import to_codes
from statezoo.datamodules.dna.source import Sequences, open_genome
from statezoo.datamodules.dna.splits import split_genome
from statezoo.datamodules.dna.tokenizers import DNATokenizer, dna_tokenizer
from statezoo.datamodules.dna.windows import GenomePieces, GenomeWindows, Task
from statezoo.datamodules.loader import SeekableLoader
from statezoo.datamodules.stages import Warmup
from statezoo.datamodules.tokenizers import tokenizer_from_state

__all__ = ["DNA"]

log = logging.getLogger(__name__)

Split = Literal["train", "val", "test"]


class DNA(SplitData):
    """A genome for next-base or masked-base prediction, read from its file window by window.

    Upper and lower case give the same ids. N and other IUPAC codes are read as N and never scored;
    batches carry the number of scored bases, so bits per base is over A, C, G and T alone. Every
    such base is a target exactly once per epoch (if masked: can be one), windows cross neither
    contigs nor intervals, and runs of 1,000 N or more are left out. Split, order, strands and masks
    depend on ``seed`` alone.

    Without a test split, the test is run on the validation split.

    Args:
        path: FASTA, plain, gzip or bgzip, or a folder of these; or sequences in the field
            ``sequence`` of a .jsonl or .parquet file, a folder written by
            ``Dataset.save_to_disk``, or a Hub dataset ``org/name``. Default: a SYNTHETIC genome.
        tokenizer: ``characters``, ``kmer6`` or ``kmer:K``, the folder of a trained one, or the
            .ckpt of an earlier run.
        objective: ``causal`` or ``masked``.
        intervals: BED file, a fourth column of train, valid and test decides the split; or GFF with
            the kind of feature, ``genes.gff3:CDS``. Default: whole contigs.
        val_contigs: Contigs to validate on.
        test_contigs: Contigs to test on.
        val_fraction: Part from the end of every contig to validate on, without ``val_contigs``: of
            ``L`` bases those from ``int(0.9 * L)`` on where it is 0.1.
        test_fraction: The same for the test, after the part for validation.
        seq_len: Tokens per window; bases, with ``characters``.
        batch_size: Windows per batch and process.
        packing: ``windows`` have ``seq_len`` tokens; ``decomposed`` trains on pieces of
            power-of-two length up to it, a batch has as many tokens of one length.
        decomposition: The other lengths of ``decomposed``, and the order.
        carry: Train on ``batch_size`` streams of the genome in order, for a state that is carried
            from window to window of a region.
        val_context: Tokens at the beginning of each validation window that repeat the end of the
            one before and are not scored.
        rc_augment: Read half of the training windows from the other strand.
        soft_mask_weight: Weight in the training loss of bases in lower case (repeats).
        mask_fraction: Part of the bases that a masked model must find.
        seed: Draws the order, strands and masks.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.

    Raises:
        ValueError: If a setting is out of range or a file cannot be used.
        FileNotFoundError: If ``path`` or ``intervals`` does not exist.
    """

    unit = "base"

    def __init__(
        self,
        path: str | None = None,
        tokenizer: str = "characters",
        *,
        objective: Literal["causal", "masked"] = "causal",
        intervals: str | None = None,
        val_contigs: list[str] | None = None,
        test_contigs: list[str] | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        seq_len: int = 1024,
        batch_size: int = 8,
        packing: Literal["windows", "decomposed"] = "windows",
        decomposition: Decomposition = DECOMPOSITION,
        carry: bool = False,
        val_context: int = 0,
        rc_augment: bool = False,
        soft_mask_weight: float = 1.0,
        mask_fraction: float = 0.15,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.path, self.objective, self.intervals = path, objective, intervals
        self.val_contigs, self.test_contigs = val_contigs, test_contigs
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.seq_len, self.batch_size, self.val_context = seq_len, batch_size, val_context
        self.packing, self.carry = packing, carry
        self.decomposition = Decomposition.of(decomposition)
        self.rc_augment, self.soft_mask_weight = rc_augment, soft_mask_weight
        self.mask_fraction, self.seed, self.num_workers = mask_fraction, seed, num_workers
        self._check_settings()
        self.tokenizer: DNATokenizer = dna_tokenizer(tokenizer)
        self._genome: Sequences | None = None
        self.scans: dict[str, Scan] = {}
        """What each split holds, after ``setup``."""
        self._windows: dict[str, GenomeWindows] = {}
        self.warmup: Warmup | None = None
        """How training windows grow to ``seq_len``; None where they have it from the beginning."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    @property
    def complement(self) -> list[int] | None:
        """Id of each token's reverse complement; None where the tokenizer has none."""
        return self.tokenizer.complement

    @property
    def genome(self) -> Sequences:
        """The contigs, opened when first asked for."""
        if self._genome is None:
            self._genome = open_genome(self.path)
        return self._genome

    def prepare_data(self) -> None:
        """Index, look through and, where needed, expand the files, once per machine."""
        self._scan([])

    def setup(self, stage: str | None = None) -> None:
        """Cut the splits; say what they hold and what was left out."""
        if self._windows:
            return
        report: list[str] = []
        scans = self._scan(report)
        sizes = {split: found.composition.bases for split, found in scans.items()}
        if not (sizes["train"] and sizes["val"]):
            raise ValueError(
                f"{self.genome.title} leaves {sizes['train']} bases to train on and "
                f"{sizes['val']} to validate on: change val_fraction, val_contigs or intervals."
            )
        if self.tells():
            self._tell(scans, report)
        self.scans = scans
        for split, found in scans.items():
            if found.regions:
                self._windows[split] = self._cut(split, self.seq_len)

    def windows(self, split: str) -> GenomeWindows | None:
        """Windows of a split: those to train on move each epoch, masks of others never change."""
        self.setup()
        windows = self._windows.get(split)
        if windows is not None:
            windows.rc = self.rc_augment and split == "train"
            windows.masked |= self.carry and split == "train"
        return windows

    def staged(self, loader: SeekableLoader) -> SeekableLoader:
        """Go through shorter windows first where ``LengthWarmup`` asks for it."""
        if self.warmup is None:
            return loader
        return self.warmup.loader(loader, self.seq_len, self.at_length)

    def at_length(self, seq_len: int) -> GenomeWindows:
        """The training split in windows of another length, after ``setup``.

        Raises:
            ValueError: If no region is as long, or they are decomposed.
        """
        if self.packing == "decomposed":
            raise ValueError(ONE_LENGTH)
        windows = self._cut("train", seq_len)
        windows.rc = self.rc_augment
        windows.masked |= self.carry
        if windows.lengths.max() < windows.width:
            raise ValueError(
                f"{self.genome.title}: the longest region to train on has {windows.lengths.max()} "
                f"bases, windows of {windows.width} were asked for: lower seq_len."
            )
        return windows

    def codes(self, split: Split, limit: int | None = None) -> list[NDArray[np.uint8]]:
        """Codes 0 to 3 (A C G T; 4 for N) of the regions of a split.

        Args:
            split: Which.
            limit: Stop after so many bases.
        """
        self.setup()
        found, left = [], limit
        for contig, start, stop in self.scans[split].regions:
            if left is not None:
                stop = min(stop, start + left)
                left -= stop - start
            if stop > start:
                found.append(to_codes(self.genome.fetch(contig, start, stop)))
        return found

    def baselines(
        self, split: Literal["val", "test"] = "val", *, limit: int = 20_000_000
    ) -> dict[str, float]:
        """Bits per base that counting needs on a held-out split: fixed orders and a mixture.

        Of a SYNTHETIC genome also the entropy of its generator, below which nothing can be.

        Args:
            split: Which.
            limit: Bases of each split that are used, from its beginning; a training split that
                is longer makes the baselines weaker than they could be.

        Raises:
            ValueError: If there is no such split.
        """
        held_out = self.codes(split, limit)
        if not held_out:
            raise ValueError(f"There is no {split} split: set {split}_contigs or {split}_fraction.")
        found = baselines(self.codes("train", limit), held_out)
        if self.genome.entropy is None:
            return found
        named = {f"SYNTHETIC {name}": bits for name, bits in found.items()}
        return named | {"SYNTHETIC entropy of the generator": self.genome.entropy}

    def identity(self) -> dict[str, Any]:
        """Hashes of the genome's files and of the regions of each split, and the seed."""
        self.setup()
        regions = {split: found.regions for split, found in self.scans.items()}
        return {"content": self.genome.fingerprint, "split": digest(regions), "seed": self.seed}

    def state_dict(self) -> dict[str, Any]:
        """The tokenizer, so that a checkpoint alone can read and write sequence."""
        return super().state_dict() | {"tokenizer": self.tokenizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the checkpoint was made with the same tokenizer, a run's with the same genome.

        Raises:
            ValueError: If it was not: its ids would mean other bases.
        """
        check_tokenizer(tokenizer_from_state(state_dict["tokenizer"]), self.tokenizer)
        super().load_state_dict(state_dict)

    def _check_settings(self) -> None:
        for name, least in (("seq_len", 1), ("batch_size", 1), ("num_workers", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"DNA needs {name} of at least {least}, got {getattr(self, name)}."
                )
        if self.objective not in ("causal", "masked"):
            raise ValueError(f"DNA needs objective 'causal' or 'masked', got {self.objective!r}.")
        if self.packing not in ("windows", "decomposed"):
            raise ValueError(f"DNA needs packing 'windows' or 'decomposed', got {self.packing!r}.")
        if self.packing == "decomposed":
            check_decomposed(self.decomposition, self.seq_len, self.carry)
        if self.carry and (self.rc_augment or self.objective != "causal"):
            raise ValueError(
                "DNA needs objective 'causal' and no rc_augment to carry a state along the "
                f"sequence, got {self.objective!r} and rc_augment={self.rc_augment}: set carry to "
                "false, or these."
            )
        val, test = self.val_fraction, self.test_fraction
        if not (val >= 0 and test >= 0 and val + test < 1):
            raise ValueError(
                "DNA needs val_fraction and test_fraction of at least 0 that leave something to "
                f"train on, got val_fraction={val}, test_fraction={test}."
            )
        if not 0 <= self.val_context < self.seq_len:
            raise ValueError(
                f"DNA needs 0 <= val_context < seq_len={self.seq_len}, "
                f"got val_context={self.val_context}."
            )
        if not 0 < self.mask_fraction <= 1:
            raise ValueError(f"DNA needs mask_fraction in (0, 1], got {self.mask_fraction}.")
        if not 0 <= self.soft_mask_weight <= 1:
            raise ValueError(f"DNA needs soft_mask_weight in [0, 1], got {self.soft_mask_weight}.")

    def _scan(self, report: list[str]) -> dict[str, Scan]:
        parts = split_genome(
            self.genome,
            self.intervals,
            val_contigs=self.val_contigs,
            test_contigs=self.test_contigs,
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            seed=self.seed,
            report=report,
        )
        return {
            split: scan(self.genome, parts.get(split, [])) for split in ("train", "val", "test")
        }

    def _tell(self, scans: dict[str, Scan], report: Sequence[str]) -> None:
        """One line per split, and one for each thing that was left out."""
        for line in report[:20]:
            log.warning(line)
        rank_zero_info(f"{self.genome.title}: {len(self.genome.names)} contigs")
        for split, found in scans.items():
            if not found.regions:
                continue
            contigs = len({region.contig for region in found.regions})
            gaps = f", {found.gap_bases:,} N in {found.gaps} gaps left out" if found.gaps else ""
            rank_zero_info(
                f"{split}: {len(found.regions)} regions on {contigs} contigs, "
                f"{found.composition}{gaps}"
            )
        longest = max(_length(region) for region in scans["train"].regions)
        width = self.seq_len * self.tokenizer.bases_per_token
        if longest < width:
            log.warning(
                f"{self.genome.title}: the longest region to train on has {longest} bases, windows "
                f"have room for {width}: lower seq_len."
            )

    def _cut(self, split: str, seq_len: int) -> GenomeWindows:
        task = Task(self.objective, self.mask_fraction, self.soft_mask_weight, self.seed)
        what = self.genome, self.scans[split].regions, self.tokenizer, seq_len
        if split == "train" and self.packing == "decomposed":
            return GenomePieces(*what, self.decomposition, task)
        context = 0 if split == "train" else self.val_context
        return GenomeWindows(*what, context=context, movable=split == "train", task=task)


def _length(region: Region) -> int:
    return region.stop - region.start
