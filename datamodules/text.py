"""Text of any kind as batches of tokens, with a validation split and its baselines."""

from __future__ import annotations

import copy
import logging
from typing import Any, Literal

import numpy as np

from statezoo.datamodules.base import SplitData, check_tokenizer, digest
from statezoo.datamodules.corpus import SPLITS, RawText, Tokens, cut_text, read_text, tokenize
from statezoo.datamodules.decomposition import (
    DECOMPOSITION,
    ONE_LENGTH,
    Decomposition,
    DocumentPieces,
    check_decomposed,
)
from statezoo.datamodules.loader import SeekableLoader
from statezoo.datamodules.ngram import baselines
from statezoo.datamodules.packing import Windows
from statezoo.datamodules.readers import source_for
from statezoo.datamodules.splitting import split_text
from statezoo.datamodules.stages import Warmup
from statezoo.datamodules.tokenizers import (
    Characters,
    Tokenizer,
    load_tokenizer,
    tokenizer_from_state,
)

__all__ = ["Text"]

log = logging.getLogger(__name__)


class Text(SplitData):
    """Text for next-token prediction: the embedded default, your files, or a dataset.

    Every token of a split is a target exactly once per epoch. The first token of a document is
    predicted from ``tokenizer.bos_id``, and batches carry the bytes of their targets, so bits per
    byte is exact and comparable between tokenizers. Split and order depend on ``seed`` alone.

    Files or sub-folders called ``train``, ``val`` (``valid``, ``validation``, ``dev``) and
    ``test`` are taken as these splits, files beginning with ``train_``, ``val_`` or the like too
    where there are some of ``train_``, and so are the splits of a dataset. Without a test split and
    with ``test_fraction=0``, the test is run on the validation split.

    Args:
        path: A .txt, .txt.gz, .jsonl, .jsonl.gz or .parquet file, a folder of these (with
            sub-folders), a folder written by ``Dataset.save_to_disk``, or the name of a Hub
            dataset, ``org/name`` or ``org/name:config``, which is streamed. Default: the Python
            language reference that ships with the interpreter.
        tokenizer: ``bytes``, ``characters`` (those of the text), a ``tokenizer.json``, a folder
            with one, the .ckpt of an earlier run, or a tokenizer on the Hub.
        seq_len: Tokens per window.
        batch_size: Windows per batch and process.
        packing: ``stream`` lets the state run on from one document to the next within a window,
            ``documents`` resets it: batches then are ``[1, batch_size * seq_len]`` with
            ``cu_seqlens``. ``decomposed`` trains on pieces of documents of power-of-two length up
            to ``seq_len``, a batch has as many tokens of one length, and validates as
            ``documents``.
        decomposition: The other lengths of ``decomposed``, and the order.
        carry: Train on ``batch_size`` streams of the text in order, for a state that is carried
            from window to window, so that a model learns from more than ``seq_len`` tokens.
        val_fraction: Part of the text to validate on, whole documents where they allow it.
        test_fraction: Part of the text to test on.
        val_context: Tokens at the beginning of each validation window that repeat the end of the
            one before and are not scored, so that the others are predicted from a warm state.
        text_field: Field of .jsonl, .parquet and datasets that holds the text.
        max_bytes: Stop reading after this much text; default all.
        seed: Draws the held-out documents and the order of training.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.

    Raises:
        ValueError: If a setting is out of range or ``path`` holds nothing that can be read.
        FileNotFoundError: If ``path`` does not exist.
    """

    unit = "byte"

    def __init__(
        self,
        path: str | None = None,
        tokenizer: str = "bytes",
        *,
        seq_len: int = 256,
        batch_size: int = 16,
        packing: Literal["documents", "stream", "decomposed"] = "stream",
        decomposition: Decomposition = DECOMPOSITION,
        carry: bool = False,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        val_context: int = 0,
        text_field: str = "text",
        max_bytes: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.path, self.text_field, self.max_bytes = path, text_field, max_bytes
        self.seq_len, self.batch_size, self.packing = seq_len, batch_size, packing
        self.decomposition, self.carry = Decomposition.of(decomposition), carry
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.val_context, self.seed, self.num_workers = val_context, seed, num_workers
        self._check_settings()
        self.source = source_for(path, text_field)
        self._raw: RawText | None = None
        self._windows: dict[str, Windows | DocumentPieces] = {}
        self.warmup: Warmup | None = None
        """How training windows grow to ``seq_len``; None where they have it from the beginning."""
        self._tokenizer = None if tokenizer == Characters.kind else load_tokenizer(tokenizer)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; that of characters needs to read the text first."""
        if self._tokenizer is None:
            raw = self._read()
            self._tokenizer = Characters.of(cut_text(raw, raw.bounds))
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    def prepare_data(self) -> None:
        """Read and tokenise into the cache, once per machine."""
        self._tokens()

    def setup(self, stage: str | None = None) -> None:
        """Map the tokens and cut the splits; say what was skipped and why."""
        if self._windows:
            return
        raw = self._read()
        if self.tells():
            for line in raw.skipped[:20]:
                log.warning(f"skipped {line}")
            if len(raw.skipped) > 20:
                log.warning(f"skipped {len(raw.skipped) - 20} more")
        tokens, labels = self._tokens()
        self._split_hash = digest(tokens.bounds, labels)
        segments = np.stack([tokens.bounds[:-1], tokens.bounds[1:]], axis=1)
        parts = {name: segments[labels == number] for number, name in enumerate(SPLITS)}
        sizes = {name: int(np.diff(part).sum()) for name, part in parts.items()}
        if not (sizes["train"] and sizes["val"]):
            raise ValueError(
                f"{self.source.name} leaves {sizes['train']} tokens to train on and "
                f"{sizes['val']} to validate on: add text, or change val_fraction."
            )
        seq_len = min(self.seq_len, sizes["train"])
        if seq_len < self.seq_len and self.tells():
            log.warning(
                f"{self.source.name} has only {sizes['train']} tokens to train on: windows are "
                f"{seq_len} long instead of seq_len={self.seq_len}; add text for results that "
                "mean something."
            )
        for name, part in parts.items():
            if sizes[name]:
                self._windows[name] = self._cut(name, tokens, part, seq_len)

    def _cut(self, split: str, tokens: Tokens, part: Any, seq_len: int) -> Windows | DocumentPieces:
        if self.packing == "decomposed" and split == "train":
            return DocumentPieces(
                tokens.ids,
                part,
                seq_len=self.seq_len,
                bos_id=self.tokenizer.bos_id,
                settings=self.decomposition,
                seed=self.seed,
                lengths=tokens.lengths,
            )
        return Windows(
            tokens.ids,
            part,
            seq_len=seq_len,
            bos_id=self.tokenizer.bos_id,
            packed=self.packing != "stream",
            context=0 if split == "train" else min(self.val_context, seq_len - 1),
            lengths=tokens.lengths,
        )

    def windows(self, split: str) -> Windows | DocumentPieces | None:
        """Windows of a split: the training stream's move each epoch, others keep their places."""
        self.setup()
        return self._windows.get(split)

    def staged(self, loader: SeekableLoader) -> SeekableLoader:
        """Go through shorter windows first where ``LengthWarmup`` asks for it."""
        if self.warmup is None:
            return loader
        return self.warmup.loader(loader, self.seq_len, self.at_length)

    def at_length(self, seq_len: int) -> Windows:
        """The training split in windows of another length, after ``setup``.

        Raises:
            ValueError: If it is shorter, or decomposed.
        """
        windows = copy.copy(self._windows["train"])
        if isinstance(windows, DocumentPieces):
            raise ValueError(ONE_LENGTH)
        if windows.size < seq_len:
            raise ValueError(
                f"{self.source.name} has only {windows.size} tokens to train on, windows of "
                f"{seq_len} were asked for: lower seq_len or add text."
            )
        windows.seq_len = seq_len
        return windows

    def raw(self, split: Literal["train", "val", "test"]) -> bytes:
        """The text of a split, its documents end to end, as the model sees it."""
        raw = self._read()
        bounds, labels = self._split(raw)
        pieces = zip(cut_text(raw, bounds), labels, strict=True)
        return b"".join(piece for piece, label in pieces if SPLITS[label] == split)

    def baselines(
        self, split: Literal["val", "test"] = "val", *, limit: int = 2_000_000
    ) -> dict[str, float]:
        """Bits per byte that classical methods need on a held-out split.

        Args:
            split: Which.
            limit: Bytes of each split that are used, from its beginning; a training split that
                is longer makes the baselines weaker than they could be.

        Raises:
            ValueError: If there is no such split.
        """
        held_out = self.raw(split)[:limit]
        if not held_out:
            raise ValueError(f"There is no {split} split: raise {split}_fraction.")
        return baselines(self.raw("train")[:limit], held_out)

    def identity(self) -> dict[str, Any]:
        """Hashes of the text and of its split, and the seed."""
        self.setup()
        return {"content": self._read().key, "split": self._split_hash, "seed": self.seed}

    def state_dict(self) -> dict[str, Any]:
        """The tokenizer, so that a checkpoint alone can read and write text."""
        return super().state_dict() | {"tokenizer": self.tokenizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the checkpoint was made with the same tokenizer, a run's with the same text.

        Raises:
            ValueError: If it was not: its ids would mean other text.
        """
        check_tokenizer(tokenizer_from_state(state_dict["tokenizer"]), self.tokenizer)
        super().load_state_dict(state_dict)

    def _check_settings(self) -> None:
        for name, least in (("seq_len", 1), ("batch_size", 1), ("num_workers", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"Text needs {name} of at least {least}, got {getattr(self, name)}."
                )
        if self.max_bytes is not None and self.max_bytes < 2:
            raise ValueError(f"Text needs max_bytes of at least 2, got {self.max_bytes}.")
        if self.packing not in ("documents", "stream", "decomposed"):
            raise ValueError(
                f"Text needs packing 'documents', 'stream' or 'decomposed', got {self.packing!r}."
            )
        if self.packing == "decomposed":
            check_decomposed(self.decomposition, self.seq_len, self.carry)
        val, test = self.val_fraction, self.test_fraction
        if not (val > 0 and test >= 0 and val + test < 1):
            raise ValueError(
                "Text needs val_fraction above 0, test_fraction at least 0 and some text left to "
                f"train on, got val_fraction={val}, test_fraction={test}."
            )
        if not 0 <= self.val_context < self.seq_len:
            raise ValueError(
                f"Text needs 0 <= val_context < seq_len={self.seq_len}, "
                f"got val_context={self.val_context}."
            )

    def _read(self) -> RawText:
        if self._raw is None:
            self._raw = read_text(self.source, self.max_bytes)
        return self._raw

    def _split(self, raw: RawText) -> tuple[Any, Any]:
        return split_text(
            raw, val_fraction=self.val_fraction, test_fraction=self.test_fraction, seed=self.seed
        )

    def _tokens(self) -> tuple[Tokens, Any]:
        raw = self._read()
        bounds, labels = self._split(raw)
        return tokenize(raw, bounds, self.tokenizer), labels
