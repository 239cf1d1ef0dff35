"""What all data modules share: a loader for each split, and a tokenizer that must not change."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from typing import Any, ClassVar

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info

from statezoo.datamodules.decomposition import PieceLoader
from statezoo.datamodules.loader import SeekableLoader
from statezoo.datamodules.streams import StreamLoader

__all__ = ["SplitData", "check_tokenizer", "digest"]


class SplitData(LightningDataModule):
    """Base of the data modules: resumable loaders over the splits train, val and test.

    Not for use by itself: subclasses set the attributes below and define :meth:`windows`.

    Attributes:
        batch_size: Windows per batch and process.
        seed: Draws the order of training.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.
        loader: Kind of the loaders.
        packing: How windows are cut; ``decomposed`` trains on pieces of power-of-two length.
        carry: Train on windows in order, in parallel streams, for states that are carried.
    """

    batch_size: int
    seed: int
    num_workers: int
    loader: ClassVar[type[SeekableLoader]] = SeekableLoader
    packing: str = "windows"
    carry: bool = False

    @abstractmethod
    def windows(self, split: str) -> Any:
        """Return what the loader of a split reads, set up when first asked for; None without it."""

    def train_dataloader(self) -> SeekableLoader:
        """Return the training split in an order of its own each epoch; resumes in the middle."""
        trainer = self.trainer
        shuffle = trainer is None or not trainer.overfit_batches  # type: ignore[attr-defined]
        epoch = 0 if trainer is None else trainer.current_epoch
        kind = PieceLoader if self.packing == "decomposed" else self.loader
        kind = StreamLoader if self.carry else kind
        loader = self.load(self.windows("train"), shuffle=shuffle, epoch=epoch, kind=kind)
        if isinstance(loader, PieceLoader) and self.tells():
            rank_zero_info(loader.describe())
        if shuffle:
            loader = self.staged(loader)
            if trainer is not None:
                loader.limit(trainer.limit_train_batches)
        return loader

    def staged(self, loader: SeekableLoader) -> SeekableLoader:
        """Return a training loader that goes through stages first, where there are some."""
        return loader

    def val_dataloader(self) -> SeekableLoader:
        """Return the validation split in order, each target scored once."""
        return self.load(self.windows("val"))

    def test_dataloader(self) -> SeekableLoader:
        """Return the test split in order, or the validation split where there is none."""
        test = self.windows("test")
        return self.load(self.windows("val") if test is None else test)

    def predict_dataloader(self) -> SeekableLoader:
        """Return the same as for the test."""
        return self.test_dataloader()

    def load(
        self,
        windows: Any,
        *,
        shuffle: bool = False,
        epoch: int = 0,
        kind: type[SeekableLoader] | None = None,
    ) -> SeekableLoader:
        """Make a loader of this process's part of each batch."""
        trainer = self.trainer
        # The strategy says it, as in some of them processes share their windows.
        part = (None if trainer is None else trainer.distributed_sampler_kwargs) or {}
        return (kind or self.loader)(
            windows,
            self.batch_size,
            shuffle=shuffle,
            seed=self.seed,
            num_workers=self.num_workers,
            rank=part.get("rank", 0),
            world_size=part.get("num_replicas", 1),
            epoch=epoch,
        )

    def identity(self) -> dict[str, Any]:
        """Say what decides the order of what is read beside sizes, as plain data.

        ``seed``, and hashes of the ``content`` of all that is read and of its ``split``.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a run that goes on must find again."""
        return {"identity": self.identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a run goes on with the data that it had.

        Raises:
            ValueError: If the data has changed since; says what has.
        """
        trainer, had = self.trainer, state_dict.get("identity")
        if not had or trainer is None or trainer.state.fn != "fit":
            return
        place, has = getattr(self, "path", None) or "the default data", self.identity()
        changed = next((k for k in ("seed", "content", "split") if had.get(k) != has.get(k)), None)
        if changed == "content":
            raise ValueError(
                f"{place} is not what it was when the checkpoint was made: put it back as it was, "
                "or start a new run from the weights with --model.pretrained."
            )
        if changed is not None:
            values = f"{changed} {had[changed]}", f"{has[changed]}"
            values = values if changed == "seed" else ("another split of " + place, "a new one")
            raise ValueError(
                f"The checkpoint was made with {values[0]}, this data has {values[1]}: set it back "
                "as it was, or start a new run from the weights with --model.pretrained."
            )

    def tells(self) -> bool:
        """Say whether this process speaks for all."""
        return self.trainer is None or bool(self.trainer.is_global_zero)


def digest(*parts: Any) -> str:
    """Return a hash of bytes, arrays, and plain data."""
    found = hashlib.sha256()
    for part in parts:
        part = part.tobytes() if hasattr(part, "tobytes") else part
        part = part if isinstance(part, bytes) else repr(part).encode()
        found.update(b"%d:" % len(part) + part)
    return found.hexdigest()[:32]


def check_tokenizer(saved: Any, has: Any, setting: str = "tokenizer") -> None:
    """Compare the tokenizer of a checkpoint with that of the data.

    Args:
        saved: The checkpoint's.
        has: The data's.
        setting: Name of the setting that chooses the data's.

    Raises:
        ValueError: If they differ: ids would mean something else.
    """
    if saved.fingerprint != has.fingerprint:
        raise ValueError(
            f"The checkpoint was made with another tokenizer ({saved.kind}, {saved.vocab_size} "
            f"ids) than this data has ({has.kind}, {has.vocab_size} ids): set {setting} to the "
            "checkpoint's own file, PATH.ckpt."
        )
