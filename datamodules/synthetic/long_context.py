"""Finding a little in much: passkeys, needles in a store of pairs, selective copying."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.random import Generator

from statezoo.datamodules.batch import IGNORE
from statezoo.datamodules.synthetic.base import Example, SyntheticTask, answered, spelled

__all__ = ["Needle", "Passkey", "SelectiveCopying"]


@dataclass(frozen=True, kw_only=True)
class Passkey(SyntheticTask):
    """A key stands behind a marker somewhere in noise; at the end it is asked for.

    Noise and key are uniform over the same symbols, so chance is one over their number.

    Args:
        min_length: Fewest tokens in training.
        max_length: Most tokens in training.
        n_symbols: Symbols, with the marker and the question.
        n_key: Symbols of the key.

    Source: after Mohtashami and Jaggi, Landmark Attention, arXiv:2305.16300, section 4.2, and
    RULER, arXiv:2404.06654, at the size of a small model.
    """

    min_length: int = 128
    max_length: int = 128
    n_symbols: int = 64
    n_key: int = 5

    measured: ClassVar[str] = "tokens"
    longer: ClassVar[tuple[int, ...]] = (128, 256, 512, 1024)

    @property
    def symbols(self) -> Sequence[str]:
        """Symbols, the marker, the question."""
        return (*spelled("s", self.n_symbols - 2), "marker", "?")

    def check(self) -> None:
        """Refuse keys that are none."""
        self.at_least("n_symbols", self.n_symbols, 4)
        self.at_least("n_key", self.n_key, 1)

    def check_length(self, length: int) -> None:
        """Refuse lengths into which marker, key, question and answer do not fit."""
        self.at_least("length", length, 2 * self.n_key + 1)

    def draw(self, rng: Generator, length: int) -> Example:
        """Draw noise, and the place of the marker."""
        n, free = self.n_key, self.n_symbols - 2
        question = rng.integers(free, size=length - n + 1)
        place = int(rng.integers(length - 2 * n))
        question[place], question[-1] = free, free + 1
        return answered(question, question[place + 1 : place + 1 + n].copy())

    def chance(self, length: int) -> float:
        """Return one over the number of symbols in noise."""
        return 1 / (self.n_symbols - 2)


@dataclass(frozen=True, kw_only=True)
class Needle(SyntheticTask):
    """A store of pairs of a key and a value, then a question.

    Keys and values are symbols of one kind, and come once each in the store, but for threads, where
    a value is the next key. Asked for are the values of one key (``single``), of ``n_needles`` keys
    in the order of the question (``multi``), of the pairs that have a marker before them, in the
    order of the store (``conditional``), or the end of the thread that begins with a key, over
    ``n_needles`` pairs that come later (``forward``) or earlier in the store each (``backward``).

    The store is as long as fits; the token that may be left over is a blank in front. Every symbol
    is as likely as any other, so chance is one over their number.

    Args:
        min_length: Fewest tokens in training.
        max_length: Most tokens in training.
        kind: The question.
        n_needles: Pairs that are to be found; 1 for ``single``.
        n_symbols: Symbols, enough for the store.

    Source: Roberts et al., Needle Threading, arXiv:2411.05000, section 3, with symbols for UUIDs.
    """

    min_length: int = 128
    max_length: int = 128
    kind: Literal["single", "multi", "conditional", "forward", "backward"] = "single"
    n_needles: int = 1
    n_symbols: int = 1024

    measured: ClassVar[str] = "tokens"
    longer: ClassVar[tuple[int, ...]] = (128, 256, 512, 1024)

    @property
    def symbols(self) -> Sequence[str]:
        """Symbols, the marker, the question, the sign that the answer begins, the blank."""
        return (*spelled("s", self.n_symbols), "marker", "?", "=", "_")

    @property
    def threads(self) -> bool:
        """Whether pairs follow from another."""
        return self.kind in ("forward", "backward")

    def check(self) -> None:
        """Refuse needles that are none."""
        self.at_least("n_needles", self.n_needles, 1)
        if self.kind == "single" and self.n_needles != 1:
            raise ValueError(
                f"Needle needs n_needles=1 for kind='single', got {self.n_needles}: choose multi."
            )

    @property
    def beside(self) -> int:
        """Tokens beside the store's pairs: markers, question, what is read of the answer."""
        n = self.n_needles
        named = n if self.kind in ("multi", "conditional") else 1  # by a key or a marker
        return 2 + named + (0 if self.threads else n - 1)

    def check_length(self, length: int) -> None:
        """Refuse lengths that hold fewer pairs than are to be found, or more than can differ."""
        self.at_least("length", length, 2 * self.n_needles + self.beside)
        most = (length - self.beside) // 2 * 2
        if most > self.n_symbols:
            raise ValueError(
                f"Needle needs n_symbols of at least {most} for a length of {length}, got "
                f"{self.n_symbols}."
            )

    def draw(self, rng: Generator, length: int) -> Example:
        """Draw the store, and which of its pairs are asked for."""
        n, count, free = self.n_needles, (length - self.beside) // 2, self.n_symbols
        store = rng.choice(free, 2 * count, replace=False).reshape(count, 2)
        needles = rng.choice(count, n, replace=False)
        if self.kind != "multi":
            needles.sort()
        if self.kind == "backward":
            needles = needles[::-1]
        if self.threads:
            store[needles[:-1], 1] = store[needles[1:], 0]
        marker, asks, begins, blank = range(free, free + 4)
        answer = store[needles[-1:] if self.threads else needles, 1]
        tokens, asked = store.ravel(), store[needles if self.kind == "multi" else needles[:1], 0]
        if self.kind == "conditional":
            tokens, asked = np.insert(tokens, 2 * needles, marker), asked[:0]
        question = np.concatenate([tokens, [asks], asked, [begins]])
        missing = length - len(question) - len(answer) + 1
        return answered(np.append(np.full(missing, blank), question), answer)

    def chance(self, length: int) -> float:
        """Return one over the number of symbols."""
        return 1 / self.n_symbols


@dataclass(frozen=True, kw_only=True)
class SelectiveCopying(SyntheticTask):
    """Symbols at random places in noise are to be said in their order at the end.

    The answer is asked for by as many blanks, each of which says the next symbol. Symbols are
    uniform, so chance is one over their number.

    Args:
        min_length: Fewest tokens before the answer in training.
        max_length: Most tokens before the answer in training.
        n_data: Symbols to remember.
        n_symbols: Different symbols, beside noise and the blank.

    Source: Gu and Dao, Mamba, arXiv:2312.00752, section 4.1.1 and appendix E.1.
    """

    min_length: int = 4096
    max_length: int = 4096
    n_data: int = 16
    n_symbols: int = 16

    measured: ClassVar[str] = "tokens before the answer"
    longer: ClassVar[tuple[int, ...]] = (4096,)

    @property
    def symbols(self) -> Sequence[str]:
        """Symbols, noise, the blank."""
        return (*spelled("s", self.n_symbols), ".", "_")

    def check(self) -> None:
        """Refuse to copy nothing."""
        self.at_least("n_data", self.n_data, 1)
        self.at_least("n_symbols", self.n_symbols, 2)

    def check_length(self, length: int) -> None:
        """Refuse lengths into which the symbols do not fit."""
        self.at_least("length", length, self.n_data)

    def draw(self, rng: Generator, length: int) -> Example:
        """Draw symbols and their places."""
        data = rng.integers(self.n_symbols, size=self.n_data)
        tokens = np.full(length + self.n_data, self.n_symbols, dtype=np.int64)
        tokens[np.sort(rng.choice(length, self.n_data, replace=False))] = data
        tokens[length:] = self.n_symbols + 1
        targets = np.full_like(tokens, IGNORE)
        targets[length:] = data
        return Example(tokens, targets)

    def chance(self, length: int) -> float:
        """Return one over the number of symbols."""
        return 1 / self.n_symbols
