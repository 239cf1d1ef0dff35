"""What all synthetic tasks share: typed settings, and problems that are a function of a number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from statezoo.datamodules.batch import IGNORE

__all__ = ["SPLITS", "Example", "Ids", "SyntheticTask", "answered", "spelled"]

Ids = NDArray[np.int64]

SPLITS = ("train", "val", "test")
"""The splits; the number of each is part of the seed of its problems."""


class Example(NamedTuple):
    """One problem.

    Attributes:
        tokens: ``[T]`` what is read.
        targets: ``[T]`` what each position must say, ``IGNORE`` where nothing is scored.
        laws: ``[T W]`` true probabilities of what comes next where it is scored, 0 elsewhere; None
            where the answer is determined.
    """

    tokens: Ids
    targets: Ids
    laws: NDArray[np.float64] | None = None


@dataclass(frozen=True, kw_only=True)
class SyntheticTask(ABC):
    """Base of the tasks: settings, and problems drawn from a seed.

    A task's fields are its settings. Training lengths are uniform from ``min_length`` to
    ``max_length``; what a length counts differs from task to task.

    Attributes:
        measured: What a length counts.
        longer: Lengths of the published test.
        step: Lengths of training are ``min_length`` plus a multiple of it.

    Raises:
        ValueError: If a setting has the wrong type or there is no problem of some length.
    """

    min_length: int
    max_length: int

    measured: ClassVar[str]
    longer: ClassVar[tuple[int, ...]]
    step: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        hints = get_type_hints(type(self))
        for field in fields(self):
            self._check_type(field.name, hints[field.name])
        if self.min_length > self.max_length:
            raise ValueError(
                f"{self.name} needs min_length of at most max_length={self.max_length}, got "
                f"{self.min_length}."
            )
        self.check()
        for length in (self.min_length, self.max_length):
            self.check_length(length)

    def _check_type(self, name: str, hint: Any) -> None:
        value = getattr(self, name)
        if get_origin(hint) is Literal:
            fits, wanted = value in get_args(hint), " or ".join(map(repr, get_args(hint)))
        else:
            kinds = (int, float) if hint is float else (hint,)
            fits = isinstance(value, kinds) and (hint is bool or not isinstance(value, bool))
            wanted = {int: "a whole number", float: "a number", bool: "true or false"}.get(hint, "")
            wanted = wanted or "text"
        if not fits:
            raise ValueError(f"{self.name} needs {name} to be {wanted}, got {value!r}.")

    @property
    def name(self) -> str:
        """Name of the kind of task, as errors say it."""
        return type(self).__name__

    @property
    @abstractmethod
    def symbols(self) -> Sequence[str]:
        """Names of the ids, in their order."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self.symbols)

    def check(self) -> None:  # noqa: B027  # most tasks have nothing more to check
        """Raise ValueError where settings are out of range or do not go together."""

    def check_length(self, length: int) -> None:
        """Raise ValueError where there is no problem of this length."""
        self.at_least("length", length, 1)

    @abstractmethod
    def draw(self, rng: Generator, length: int) -> Example:
        """Draw a problem of a length."""

    @abstractmethod
    def chance(self, length: int) -> float:
        """Return the accuracy of the best constant answer, over all scored positions."""

    def ceiling(self, length: int) -> float:
        """Return the accuracy of who has solved the task."""
        return 1.0

    def draw_any(self, rng: Generator) -> Example:
        """Draw a problem as they come in training."""
        choices = (self.max_length - self.min_length) // self.step + 1
        return self.draw(rng, self.min_length + self.step * int(rng.integers(choices)))

    def example(self, seed: int, split: str, index: int, length: int | None = None) -> Example:
        """Return a problem: a pure function of the arguments and the settings.

        Args:
            seed: Seed of the data.
            split: str, which has problems of its own.
            index: Number of the problem.
            length: Its length; default as they come in training.
        """
        rng = np.random.default_rng([seed, SPLITS.index(split), index, length or 0])
        return self.draw_any(rng) if length is None else self.draw(rng, length)

    def write(self, tokens: Ids) -> str:
        """Write ids by their names."""
        names = self.symbols
        return " ".join(names[i] for i in tokens)

    def plain(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        return asdict(self)

    def at_least(self, what: str, value: int, least: int) -> None:
        """Raise ValueError where a number is too small."""
        if value < least:
            raise ValueError(f"{self.name} needs {what} of at least {least}, got {value}.")


def answered(question: Ids, answer: Ids) -> Example:
    """Return a problem whose answer is said token by token from the last one of the question on.

    What was said right is read, so the last token of the answer is not.
    """
    tokens = np.concatenate([question, answer[:-1]])
    targets = np.full(len(tokens), IGNORE, dtype=np.int64)
    targets[len(question) - 1 :] = answer
    return Example(tokens, targets)


def spelled(prefix: str, count: int) -> list[str]:
    """Return names of numbered symbols."""
    return [f"{prefix}{i}" for i in range(count)]
