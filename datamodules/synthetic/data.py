"""Synthetic problems as batches."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import torch

from statezoo.datamodules.base import SplitData, digest
from statezoo.datamodules.batch import IGNORE, Batch
from statezoo.datamodules.loader import SeekableLoader
from statezoo.datamodules.synthetic.algorithmic import (
    BinarySuccessor,
    InversePermutation,
    Multiplication,
    TreeTraversal,
)
from statezoo.datamodules.synthetic.base import SyntheticTask
from statezoo.datamodules.synthetic.in_context import ICLL
from statezoo.datamodules.synthetic.long_context import Needle, Passkey, SelectiveCopying
from statezoo.datamodules.synthetic.recall import MQAR, InductionHeads, MQARSetB
from statezoo.datamodules.synthetic.state_tracking import (
    GroupWords,
    ModularArithmetic,
    ModularBrackets,
    Parity,
)

__all__ = ["TASKS", "Problems", "Synthetic", "make_task"]

TASKS: dict[str, type[SyntheticTask]] = {
    "parity": Parity,
    "modular_arithmetic": ModularArithmetic,
    "modular_brackets": ModularBrackets,
    "group_words": GroupWords,
    "mqar": MQAR,
    "mqar_b": MQARSetB,
    "induction_heads": InductionHeads,
    "icll": ICLL,
    "passkey": Passkey,
    "needle": Needle,
    "selective_copying": SelectiveCopying,
    "binary_successor": BinarySuccessor,
    "tree_traversal": TreeTraversal,
    "inverse_permutation": InversePermutation,
    "multiplication": Multiplication,
}
"""The tasks, by name."""

LIMIT = 2**32
"""Seeds and numbers of problems are below it."""


class Problems:
    """Problems of a task, by number, as batches; what ``SeekableLoader`` reads.

    Shorter problems are padded on the right, where nothing is scored: a causal model needs no mask.
    Each problem is made when it is asked for.

    Args:
        task: The task.
        seed: Seed of the data.
        split: str.
        count: Problems of each length.
        lengths: Lengths, read one after the other; default as they come in training.
    """

    size = 1
    """Problems have no bounds that could move."""

    def __init__(
        self,
        task: SyntheticTask,
        seed: int,
        split: str,
        count: int,
        lengths: list[int] | None = None,
    ) -> None:
        self.task, self.seed, self.split, self.count = task, seed, split, count
        self.lengths: list[int | None] = [None] if lengths is None else [*lengths]

    def __len__(self) -> int:
        return self.count * len(self.lengths)

    def __getitem__(self, index: tuple[int, list[int]]) -> Batch:
        """Return problems by number; -1 is one without scored targets."""
        found = []
        for number in index[1]:
            block, n = divmod(max(number, 0), self.count)
            tokens, targets, _ = self.task.example(self.seed, self.split, n, self.lengths[block])
            found.append((tokens, targets if number >= 0 else np.full_like(targets, IGNORE)))
        widths = np.array([len(tokens) for tokens, _ in found])
        batch = Batch(
            tokens=torch.zeros(len(found), int(widths.max()), dtype=torch.int64),
            targets=torch.full((len(found), int(widths.max())), IGNORE),
        )
        for row, (tokens, targets) in enumerate(found):
            batch["tokens"][row, : len(tokens)] = torch.from_numpy(tokens)
            batch["targets"][row, : len(tokens)] = torch.from_numpy(targets)
        batch["n_bytes"] = (batch["targets"] != IGNORE).sum()
        return batch


class Synthetic(SplitData):
    """Problems drawn from a rule: probes of what an architecture can and cannot do.

    Problem ``i`` of a split is a pure function of ``seed``, the split and ``i``. Training and
    validation have the lengths of training, the test those of ``test_lengths``.

    Args:
        task: What is asked, by name, or a mapping of a ``name`` and settings, ``{name: parity,
            max_length: 20}``: ``parity``, ``modular_arithmetic``, ``modular_brackets``,
            ``group_words``, ``mqar``, ``mqar_b``, ``induction_heads``, ``icll``, ``passkey``,
            ``needle``, ``selective_copying``, ``binary_successor``, ``tree_traversal``,
            ``inverse_permutation``, ``multiplication``.
        batch_size: Problems per batch and process.
        train_examples: Problems of an epoch, the same in each.
        val_examples: Problems to validate on.
        test_examples: Problems to test on, of each length.
        test_lengths: Lengths of the test; default those of the publication.
        seed: Draws the problems and the order of training.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.

    Raises:
        ValueError: If a setting is unknown or out of range, or there are no such problems.
    """

    unit = "answer"

    def __init__(
        self,
        task: str | dict[str, Any] = "parity",
        *,
        batch_size: int = 64,
        train_examples: int = 100_000,
        val_examples: int = 1000,
        test_examples: int = 1000,
        test_lengths: list[int] | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self.examples = {"train": train_examples, "val": val_examples, "test": test_examples}
        self._check_settings()
        self.task = make_task(task)
        self.name = task if isinstance(task, str) else str(task["name"])
        self.test_lengths = [*(self.task.longer if test_lengths is None else test_lengths)]
        if not self.test_lengths:
            raise ValueError("Synthetic needs a length in test_lengths at least, got none.")
        for length in self.test_lengths:
            self.task.check_length(length)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.task.vocab_size

    def windows(self, split: str) -> Problems:
        """Problems of a split."""
        lengths = self.test_lengths if split == "test" else None
        return Problems(self.task, self.seed, split, self.examples[split], lengths)

    def loaders_by_length(self, split: str = "val") -> dict[int, SeekableLoader]:
        """Return a loader of ``val`` or ``test`` problems for each of the test's lengths."""
        count = self.examples[split]
        return {
            length: self.load(Problems(self.task, self.seed, split, count, [length]))
            for length in self.test_lengths
        }

    def identity(self) -> dict[str, Any]:
        """Hashes of the settings and of the numbers of problems, and the seed."""
        return {
            "content": digest(self.name, self.task.plain()),
            "split": digest(self.examples["train"]),
            "seed": self.seed,
        }

    @property
    def path(self) -> str:
        """What errors call the data."""
        return f"the task {self.name}"

    def state_dict(self) -> dict[str, Any]:
        """The task, so that a checkpoint says what it was trained on."""
        return super().state_dict() | {"task": {"name": self.name, **self.task.plain()}}

    def _check_settings(self) -> None:
        counts = {f"{split}_examples": count for split, count in self.examples.items()}
        values = {"batch_size": self.batch_size, **counts}
        least = dict.fromkeys(values, 1) | {"num_workers": 0, "seed": 0}
        values |= {"num_workers": self.num_workers, "seed": self.seed}
        for name, value in values.items():
            if not least[name] <= value < LIMIT:
                raise ValueError(
                    f"Synthetic needs {name} of at least {least[name]} and below 2**32, got "
                    f"{value}."
                )


def make_task(task: str | dict[str, Any]) -> SyntheticTask:
    """Return a task by its name, or by a mapping of a ``name`` and settings.

    Raises:
        ValueError: If there is no such task or setting, or a setting is out of range.
    """
    settings = {"name": task} if isinstance(task, str) else dict(task)
    name = settings.pop("name", None)
    if name not in TASKS:
        raise ValueError(f"Synthetic needs a task of {', '.join(TASKS)}; got {name!r}.")
    known = [field.name for field in fields(TASKS[name])]
    for key in settings:
        if key not in known:
            raise ValueError(f"The task {name} has {', '.join(known)}; got {key!r}.")
    return TASKS[name](**settings)
