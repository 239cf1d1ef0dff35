"""Piano-roll frames for the task of saying each frame from those before it."""

from __future__ import annotations

import logging
import math
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from statezoo.datamodules.base import SplitData, digest
from statezoo.datamodules.music.corpus import read_all, split_pieces
from statezoo.datamodules.music.frame_baselines import frame_baselines
from statezoo.datamodules.music.readers import music_source
from statezoo.datamodules.music.rolls import KEYS, Roll, roll_of_piece, transposed

__all__ = ["FrameBatch", "PianoFrames", "Rolls"]

log = logging.getLogger(__name__)


class FrameBatch(TypedDict):
    """Pieces of music as frames.

    Attributes:
        frames: ``[B T 88]`` uint8, 1 where a key sounds, 0 after the end of a piece.
        lengths: ``[B]`` int64, the frames of each piece; 0 if nothing of it is scored.
    """

    frames: Tensor
    lengths: Tensor


class Rolls:
    """Pieces, by number, as batches; what ``SeekableLoader`` reads.

    Args:
        pieces: Rolls ``[T 88]``.
        transpose: Most semitones by which a piece is moved up or down, drawn anew each epoch.
        max_frames: Most frames of a piece that are read at once; a longer one is cut, and its parts
            are pieces.
    """

    size = 2**31
    """How many different epochs there are: the loader draws a number below it for each."""

    def __init__(self, pieces: list[Roll], transpose: int = 0, max_frames: int = 1024) -> None:
        parts = [range(0, len(piece), max_frames) for piece in pieces]
        self.pieces = [
            piece[i : i + max_frames]
            for piece, begins in zip(pieces, parts, strict=True)
            for i in begins
        ]
        self.transpose = transpose

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: tuple[int, list[int]]) -> FrameBatch:
        """Return pieces by number, in the epoch's keys; -1 is a piece without scored frames."""
        epoch, numbers = index
        rolls = [self._piece(epoch, number) for number in numbers]
        frames = torch.zeros(len(rolls), max(1, *map(len, rolls)), KEYS, dtype=torch.uint8)
        for row, roll in zip(frames, rolls, strict=True):
            row[: len(roll)] = torch.from_numpy(roll)
        return FrameBatch(frames=frames, lengths=torch.tensor([len(roll) for roll in rolls]))

    def _piece(self, epoch: int, number: int) -> Roll:
        if number < 0:
            return np.zeros((0, KEYS), dtype=np.uint8)
        most = self.transpose
        if not most:
            return self.pieces[number]
        rng = np.random.default_rng([epoch, number])
        return transposed(self.pieces[number], int(rng.integers(-most, most + 1)))


class PianoFrames(SplitData):
    """Pieces as piano-roll frames: the public JSB chorales, your folder, or the embedded default.

    Every frame of a split is said once per epoch, from all frames of its piece before it. Splits
    are by file; transposition is for the training split alone.

    Args:
        path: A public JSON file of the JSB chorales with its own splits, such as
            ``jsb-chorales-quarter.json``, or a file or folder of MIDI, MusicXML or ABC. Default:
            Bach's chorales that come with music21; a model trained on those must not be quoted on
            the JSB test, which is mostly the same music.
        steps_per_quarter: Frames per quarter note.
        batch_size: Pieces per batch and process.
        transpose: Most semitones by which a piece of the training split is moved up or down, drawn
            anew each epoch; a piece that would leave the keyboard stays where it is.
        max_frames: Longer pieces are cut into parts of this many frames.
        val_fraction: Part of the files to validate on, where the data has no splits.
        test_fraction: Part of the files to test on, where the data has no splits.
        seed: Draws held-out files, transpositions and the order of training.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.

    Raises:
        ValueError: If a setting is out of range or ``path`` holds nothing that can be read.
        FileNotFoundError: If ``path`` does not exist.
    """

    unit = "frame"
    objective = "frames"
    vocab_size = KEYS

    def __init__(
        self,
        path: str | None = None,
        *,
        steps_per_quarter: int = 1,
        batch_size: int = 8,
        transpose: int = 5,
        max_frames: int = 1024,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.path, self.steps_per_quarter = path, steps_per_quarter
        self.batch_size, self.transpose, self.max_frames = batch_size, transpose, max_frames
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.seed, self.num_workers = seed, num_workers
        self._check_settings()
        self._splits: dict[str, list[Roll]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read all pieces.

        Raises:
            ValueError: If there are too few.
        """
        if not self._splits:
            self._splits = self._read()

    def rolls(self, split: str) -> list[Roll]:
        """The pieces ``[T 88]`` of ``train``, ``val`` or ``test``, as they were written."""
        self.setup()
        return self._splits[split]

    def windows(self, split: str) -> Rolls | None:
        """The pieces of a split, those to train on in keys of their own each epoch."""
        pieces = self.rolls(split)
        transpose = self.transpose if split == "train" else 0
        return Rolls(pieces, transpose, self.max_frames) if pieces else None

    def baselines(self) -> dict[str, float]:
        """Bits per frame that simple models need on the validation split."""
        found = frame_baselines(self.rolls("train"), self.rolls("val"))
        return {name: nats / math.log(2) for name, nats in found.items()}

    def identity(self) -> dict[str, Any]:
        """Hashes of the frames and of their split, and the seed."""
        self.setup()
        return self._identity

    def state_dict(self) -> dict[str, Any]:
        """Where the pieces came from, so that a benchmark knows what a checkpoint has seen."""
        return super().state_dict() | {
            "path": self.path,
            "steps_per_quarter": self.steps_per_quarter,
            "transpose": self.transpose,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a run goes on with the same music; its weights fit any other.

        Raises:
            ValueError: If it does not.
        """
        super().load_state_dict(state_dict)

    def _check_settings(self) -> None:
        least = {"steps_per_quarter": 1, "batch_size": 1, "transpose": 0, "max_frames": 1}
        for name, value in (least | {"num_workers": 0, "seed": 0}).items():
            if getattr(self, name) < value:
                raise ValueError(
                    f"PianoFrames needs {name} of at least {value}, got {getattr(self, name)}."
                )
        val, test = self.val_fraction, self.test_fraction
        if not (val > 0 and test >= 0 and val + test < 1):
            raise ValueError(
                "PianoFrames needs val_fraction above 0, test_fraction at least 0 and some files "
                f"left to train on, got val_fraction={val}, test_fraction={test}."
            )

    def _read(self) -> dict[str, list[Roll]]:
        pieces = read_all(music_source(self.path))
        rolls = [roll_of_piece(piece, self.steps_per_quarter) for piece in pieces]
        labels = split_pieces(
            np.array([len(roll) for roll in rolls]),
            [row["split"] for row in pieces.about],
            [row["group"] for row in pieces.about],
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            seed=self.seed,
        )
        content = digest(pieces.key, self.steps_per_quarter)
        self._identity = {"content": content, "split": digest(labels), "seed": self.seed}
        if self.tells():
            for row in pieces.skipped[:20]:
                log.warning(f"skipped {row.name}: {row.reason}")
            if len(pieces.skipped) > 20:
                log.warning(f"skipped {len(pieces.skipped) - 20} more")
        splits: dict[str, list[Roll]] = {"train": [], "val": [], "test": []}
        for roll, label in zip(rolls, labels.tolist(), strict=True):
            if len(roll):
                splits[label].append(roll)
        if not (splits["train"] and splits["val"]):
            raise ValueError(
                f"PianoFrames has {len(splits['train'])} pieces to train on and "
                f"{len(splits['val'])} to validate on: add files."
            )
        return splits
