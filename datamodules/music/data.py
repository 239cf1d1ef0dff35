"""Music as batches of tokens, with a validation split and its baselines."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from statezoo.datamodules.base import SplitData, check_tokenizer, digest
from statezoo.datamodules.music.base import Ids, MusicTokenizer
from statezoo.datamodules.music.baselines import Markov, repeat_bits, unigram_bits
from statezoo.datamodules.music.corpus import (
    MusicTokens,
    Pieces,
    read_all,
    split_pieces,
    tokenize_all,
)
from statezoo.datamodules.music.midi import KINDS
from statezoo.datamodules.music.notes import Piece
from statezoo.datamodules.music.readers import music_source
from statezoo.datamodules.music.satb import VOICES, SatbGrid
from statezoo.datamodules.music.tokenizers import music_tokenizer, music_tokenizer_from_state
from statezoo.datamodules.music.windows import Augmentation, Part, PieceWindows, WholePieces

__all__ = ["Music"]

log = logging.getLogger(__name__)

Split = Literal["train", "val", "test"]


class Music(SplitData):
    """Music for next-token prediction: Bach's chorales by default, or your files.

    Pieces are split first and only those to train on are transposed and the like, each epoch anew.
    Every token of a split is a target exactly once per epoch, the first of a piece after
    ``tokenizer.bos_id``. Files that cannot be used are left out, counted, and listed with their
    reasons in the JSON file ``report``.

    Sub-folders called train, val (valid, validation, dev) and test are these splits; so are the
    rows of a .csv with a column ``split`` (as in MAESTRO), and the parts of the JSB chorales' JSON.
    Otherwise pieces are drawn; the same music in another key stays on one side.

    Args:
        path: A folder with .mid, .midi, .musicxml, .xml, .mxl and .abc files (with sub-folders),
            an .abc book, or the .json or .json.gz of the JSB chorales. Default: Bach's four-part
            chorales from music21's corpus. A model trained on those must not be quoted on the JSB
            test set, which is mostly the same music.
        encoding: ``satb`` (four voices on a grid of sixteenths), ``remi``, ``tsd`` or ``midilike``
            (beat-based MIDI events), ``performance`` (388 events in 10 ms steps), a folder with a
            saved tokenizer, or the .ckpt of an earlier run.
        encoding_settings: Settings of the tokenizer, such as ``{hold: true}`` for satb or
            ``{velocities: 0}`` for remi. ``programs`` is on where a piece has several instruments
            or drums.
        seq_len: Tokens per window; in ``pieces``, the longest part of a piece.
        batch_size: Windows or pieces per batch and process.
        packing: ``stream`` cuts the pieces, one after the other, into windows; ``pieces`` makes
            each piece a sequence: batches then are ``[1, T]`` with ``cu_seqlens``.
        val_fraction: Part of the tokens to validate on, in whole pieces.
        test_fraction: Part of the tokens to test on.
        transpose: Lowest and highest transposition in training, in semitones; drums stay.
        velocity: Velocities change in training by up to so much.
        tempo: Tempo changes in training by up to this part of itself.
        seed: Draws the held-out pieces, the order of training and the augmentation.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.

    Raises:
        ValueError: If a setting is out of range, a package is missing, or ``path`` holds fewer
            than two usable pieces.
        FileNotFoundError: If ``path`` does not exist.
    """

    def __init__(
        self,
        path: str | None = None,
        encoding: str = "satb",
        *,
        encoding_settings: dict[str, Any] | None = None,
        seq_len: int = 512,
        batch_size: int = 16,
        packing: Literal["stream", "pieces"] = "stream",
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        transpose: tuple[int, int] = (-5, 6),
        velocity: int = 0,
        tempo: float = 0.0,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.path, self.encoding = path, encoding
        self.encoding_settings = dict(encoding_settings or {})
        self.seq_len, self.batch_size, self.packing = seq_len, batch_size, packing
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.transpose = (int(transpose[0]), int(transpose[1]))
        self.velocity, self.tempo = velocity, tempo
        self.seed, self.num_workers = seed, num_workers
        self._check_settings()
        self.source = music_source(path)
        self._windows: dict[str, PieceWindows | WholePieces] = {}
        self._parts: dict[str, Part] = {}
        self._tokenizer = None if encoding in KINDS else self._make_tokenizer()
        if encoding in KINDS:
            music_tokenizer(encoding, **self.encoding_settings)  # refuses bad settings now

    @cached_property
    def pieces(self) -> Pieces:
        """All usable pieces, whatever their split."""
        return read_all(self.source)

    @property
    def tokenizer(self) -> MusicTokenizer:
        """The tokenizer; beat-based ones ask the music whether to name instruments."""
        if self._tokenizer is None:
            self._tokenizer = self._make_tokenizer(programs=self.pieces.several_instruments)
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    @property
    def unit(self) -> str:
        """What bits are counted per: ``note``, or ``token`` on the grid of four voices."""
        return self.tokenizer.unit

    @property
    def report(self) -> Path:
        """JSON file that says which files were left out and why."""
        return self._tokens().report

    def prepare_data(self) -> None:
        """Read and tokenise into the cache, once per machine."""
        self._tokens()

    def setup(self, stage: str | None = None) -> None:
        """Cut the splits; say what was left out and why."""
        if self._windows:
            return
        tokens = self._tokens()
        self._tell_skipped(tokens)
        about = [self.pieces.about[number] for number in tokens.pieces.tolist()]
        segments = np.stack([tokens.bounds[:-1], tokens.bounds[1:]], axis=1)
        labels = split_pieces(
            np.diff(tokens.bounds),
            [row["split"] for row in about],
            [row["group"] for row in about],
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            seed=self.seed,
        )
        self._split_hash = digest(tokens.bounds, labels)
        for split in ("train", "val", "test"):
            mine = labels == split
            if mine.any():
                self._parts[split] = Part(
                    tokens.ids, segments[mine], tokens.pieces[mine], tokens.pitches[mine]
                )
        sizes = {name: int(np.diff(part.segments).sum()) for name, part in self._parts.items()}
        if not (sizes.get("train") and sizes.get("val")):
            raise ValueError(
                f"{self.source.name} leaves {int((labels == 'train').sum())} pieces to train on "
                f"and {int((labels == 'val').sum())} to validate on: add files that are other "
                "music, or change val_fraction."
            )
        for split, part in self._parts.items():
            self._windows[split] = self._cut(split, part, sizes["train"])

    def _cut(self, split: str, part: Part, train_size: int) -> PieceWindows | WholePieces:
        change = self._augmentation() if split == "train" else None
        if self.packing == "pieces":
            whole = WholePieces(part, self.seq_len, self.tokenizer, change)
            long = len(np.unique(whole.rows[1:][np.diff(whole.rows) == 0]))
            if long and self.tells():
                log.warning(
                    f"{long} of {len(part.pieces)} pieces ({split}) are longer than seq_len="
                    f"{self.seq_len} and cut into parts that do not see each other; the longest "
                    f"has {int(np.diff(part.segments).max())} tokens."
                )
            return whole
        seq_len = min(self.seq_len, train_size)
        if seq_len < self.seq_len and split == "train" and self.tells():
            log.warning(
                f"{self.source.name} has only {train_size} tokens to train on: windows are "
                f"{seq_len} long instead of seq_len={self.seq_len}; add music for results that "
                "mean something."
            )
        return PieceWindows(part, seq_len, self.tokenizer, change)

    def windows(self, split: str) -> PieceWindows | WholePieces | None:
        """Windows or pieces of a split; those to train on are augmented anew each epoch."""
        self.setup()
        return self._windows.get(split)

    def ids(self, split: Split) -> list[Ids]:
        """Token ids of each piece of a split, without BOS and not augmented."""
        self.setup()
        if split not in self._parts:
            return []
        part = self._parts[split]
        return [part.ids.array[a:b].astype(np.int64) for a, b in part.segments.tolist()]

    def music(self, split: Split) -> list[tuple[str, Piece]]:
        """Name and notes of each piece of a split, as read."""
        self.setup()
        numbers = self._parts[split].pieces.tolist() if split in self._parts else []
        return [(self.pieces.about[n]["name"], self.pieces[n]) for n in numbers]

    def baselines(self, split: Split = "val") -> dict[str, float]:
        """Bits per ``unit`` that simple methods need on a held-out split.

        ``unigram`` knows how often each token is used, ``markov_1`` to ``markov_3`` the tokens
        before; on the grid, ``repeat`` holds every voice or falls back on ``unigram``. All are
        learnt from the training split as it is, without augmentation.
        """
        train, test = self.ids("train"), self.ids(split)
        if not test:
            raise ValueError(f"There is no {split} split: raise {split}_fraction.")
        tokenizer = self.tokenizer
        size, bos = tokenizer.vocab_size, tokenizer.bos_id
        bits = {"unigram": unigram_bits(train, test, size)}
        bits |= {f"markov_{k}": Markov(train, k, size, bos).bits(test) for k in (1, 2, 3)}
        if isinstance(tokenizer, SatbGrid):
            bits["repeat"] = repeat_bits(train, test, size, len(VOICES))
        units = sum(int(tokenizer.counts[ids].sum()) for ids in test)
        return {name: value / units for name, value in bits.items()}

    def identity(self) -> dict[str, Any]:
        """Hashes of the pieces and of their split, and the seed."""
        self.setup()
        return {"content": self.pieces.key, "split": self._split_hash, "seed": self.seed}

    def state_dict(self) -> dict[str, Any]:
        """What makes a checkpoint read and write music, and what music it was made with."""
        return super().state_dict() | {
            "tokenizer": self.tokenizer.state_dict(),
            "path": self.path,
            "transpose": list(self.transpose),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the checkpoint was made with the same tokenizer, a run's with the same music.

        Raises:
            ValueError: If it was not: its ids would mean other music.
        """
        saved = music_tokenizer_from_state(state_dict["tokenizer"])
        check_tokenizer(saved, self.tokenizer, "encoding")
        super().load_state_dict(state_dict)

    def _make_tokenizer(self, **found: Any) -> MusicTokenizer:
        tokenizer = music_tokenizer(self.encoding, **(found | self.encoding_settings))
        low, high = self.transpose
        if (low, high) != (0, 0) and not (tokenizer.pitch_of >= 0).any():
            raise ValueError(
                f"The tokenizer {self.encoding} has merged tokens, which cannot be transposed: set "
                "transpose to [0, 0], velocity and tempo to 0, or use one without merges."
            )
        return tokenizer

    def _augmentation(self) -> Augmentation | None:
        if self.transpose == (0, 0) and not self.velocity and not self.tempo:
            return None
        return Augmentation(
            self.tokenizer,
            transpose=self.transpose,
            velocity=self.velocity,
            tempo=self.tempo,
            seed=self.seed,
        )

    def _check_settings(self) -> None:
        least = {"seq_len": 1, "batch_size": 1, "num_workers": 0, "seed": 0, "velocity": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(
                    f"Music needs {name} of at least {bound}, got {getattr(self, name)}."
                )
        if self.packing not in ("stream", "pieces"):
            raise ValueError(f"Music needs packing 'stream' or 'pieces', got {self.packing!r}.")
        val, test = self.val_fraction, self.test_fraction
        if not (val > 0 and test >= 0 and val + test < 1):
            raise ValueError(
                "Music needs val_fraction above 0, test_fraction at least 0 and some music left to "
                f"train on, got val_fraction={val}, test_fraction={test}."
            )
        low, high = self.transpose
        if not -127 <= low <= 0 <= high <= 127:
            raise ValueError(
                "Music needs transpose as [lowest, highest] semitones around 0, such as [-5, 6], "
                f"got [{low}, {high}]."
            )
        if not 0 <= self.tempo < 1:
            raise ValueError(
                f"Music needs tempo as a part of the tempo, from 0 to below 1, got {self.tempo}."
            )

    def _tokens(self) -> MusicTokens:
        return tokenize_all(self.source.name, self.pieces, self.tokenizer)

    def _tell_skipped(self, tokens: MusicTokens) -> None:
        if not tokens.skipped or self.path is None or not self.tells():
            return  # the same few works of the embedded corpus are no news
        for row in tokens.skipped[:5]:
            log.warning(f"skipped {row.name}: {row.reason}")
        log.warning(
            f"skipped {len(tokens.skipped)} of {len(tokens.skipped) + len(tokens.pieces)} pieces; "
            f"all of them, with reasons, are in {tokens.report}"
        )
