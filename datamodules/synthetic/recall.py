"""Recall of what followed what: multi-query associative recall and induction heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.random import Generator

from statezoo.datamodules.batch import IGNORE
from statezoo.datamodules.synthetic.base import Example, SyntheticTask, spelled

__all__ = ["MQAR", "SET_A", "InductionHeads", "MQARSetB"]


@dataclass(frozen=True, kw_only=True)
class MQAR(SyntheticTask):
    """Multi-query associative recall: pairs of a key and a value, then keys whose values are due.

    The value is due where the key is read again. Keys are 1 to ``n_symbols/2 - 1``, values all
    from ``n_symbols/2`` on; none comes twice. Slot ``i = 1, 2, ...`` of two tokens after the pairs
    is asked in with a probability proportional to ``power * i ** (power - 1)``, without
    replacement. All other tokens there are drawn from all symbols.

    Chance is one over the number of values.

    Args:
        min_length: Fewest tokens in training; even.
        max_length: Most tokens in training; even.
        n_pairs: Pairs, all of which are asked for.
        n_symbols: Symbols, more than tokens.
        power: How even the places of the questions are; 1 is uniform, 0.01 early.
        random_filler: Fill the places between with random symbols, otherwise with symbol 0.

    Source: Arora et al., Zoology, arXiv:2312.04927, section 3 and appendix A.
    """

    min_length: int = 64
    max_length: int = 64
    n_pairs: int = 8
    n_symbols: int = 8192
    power: float = 0.01
    random_filler: bool = True

    measured: ClassVar[str] = "tokens"
    longer: ClassVar[tuple[int, ...]] = (64, 128, 256, 512)
    step: ClassVar[int] = 2

    @property
    def symbols(self) -> Sequence[str]:
        """Blank, keys, values."""
        half = self.n_symbols // 2
        return ("_", *spelled("k", half)[1:], *spelled("v", self.n_symbols - half))

    def check(self) -> None:
        """Refuse what makes no pairs."""
        self.at_least("n_pairs", self.n_pairs, 1)
        self.at_least("n_symbols", self.n_symbols, 4)
        if not 0 < self.power <= 1:
            raise ValueError(f"{self.name} needs power above 0 and at most 1, got {self.power}.")
        if self.n_pairs > self.n_symbols // 2 - 1:
            raise ValueError(
                f"{self.name} needs n_pairs of at most n_symbols/2 - 1 = "
                f"{self.n_symbols // 2 - 1} keys, got {self.n_pairs}: raise n_symbols."
            )

    def check_length(self, length: int) -> None:
        """Refuse lengths into which the pairs and their questions do not fit."""
        self.check_shape(length, self.n_pairs)

    def check_shape(self, length: int, n_pairs: int) -> None:
        """Raise ValueError where so many pairs do not fit into a length."""
        self.at_least("length", length, 4 * n_pairs)
        if length % 2:
            raise ValueError(f"{self.name} needs an even length, got {length}.")
        if length >= self.n_symbols:
            raise ValueError(
                f"{self.name} needs a length below n_symbols={self.n_symbols}, got {length}: "
                "raise n_symbols."
            )

    def draw(self, rng: Generator, length: int) -> Example:
        """Draw pairs, then where each is asked for."""
        return self.draw_pairs(rng, length, self.n_pairs)

    def draw_pairs(self, rng: Generator, length: int, n_pairs: int) -> Example:
        """Draw a problem with so many pairs."""
        half, begin = self.n_symbols // 2, 2 * n_pairs
        keys = 1 + rng.choice(half - 1, n_pairs, replace=False)
        values = half + rng.choice(self.n_symbols - half, n_pairs, replace=False)
        slots = (length - begin) // 2
        odds = np.arange(1, slots + 1) ** (self.power - 1.0)
        places = begin + 2 * rng.choice(slots, n_pairs, replace=False, p=odds / odds.sum())
        filler = self.n_symbols if self.random_filler else 1
        tokens = rng.integers(filler, size=length)
        tokens[:begin:2], tokens[1:begin:2], tokens[places] = keys, values, keys
        targets = np.full(length, IGNORE, dtype=np.int64)
        targets[places] = values
        return Example(tokens, targets)

    def chance(self, length: int) -> float:
        """Return one over the number of values."""
        return 1 / (self.n_symbols - self.n_symbols // 2)


def _set_a(length: int, n_pairs: int) -> MQAR:
    return MQAR(min_length=length, max_length=length, n_pairs=n_pairs, random_filler=False)


SET_A = tuple(_set_a(*shape) for shape in ((64, 4), (128, 8), (256, 16), (512, 64)))
"""The four tasks of figure 2 of Zoology, each with a training of its own (100,000 and 3,000
problems)."""


@dataclass(frozen=True, kw_only=True)
class MQARSetB(MQAR):
    """MQAR with several numbers of pairs at once, as Based trains and tests it.

    Training draws the published mixture, 100 : 20 : 20 : 20 : 20, of (tokens, pairs) (64, 4),
    (128, 8), (256, 16), (256, 32), (256, 64). A problem of the test with 64 tokens has 4, 8 or 16
    pairs, one with 128 has 32, one with 256 has 64, one with 512 has 128, one with 1024 has 256.

    Args:
        min_length: Fewest tokens; as published.
        max_length: Most tokens in training; as published.
        n_pairs: Fewest pairs; as published.
        n_symbols: Symbols, more than tokens.
        power: How even the places of the questions are; 1 is uniform, 0.01 early.
        random_filler: Fill the places between with random symbols, otherwise with symbol 0.

    Source: Arora et al., Simple Linear Attention Language Models (Based), arXiv:2402.18668,
    appendix E.
    """

    max_length: int = 256
    n_pairs: int = 4

    longer: ClassVar[tuple[int, ...]] = (64, 128, 256, 512, 1024)
    trained: ClassVar = ((64, 4), (128, 8), (256, 16), (256, 32), (256, 64))
    tested: ClassVar = {64: (4, 8, 16), 128: (32,), 256: (64,), 512: (128,), 1024: (256,)}

    def check(self) -> None:
        """Refuse to change what makes this set."""
        super().check()
        if (self.min_length, self.max_length, self.n_pairs) != (64, 256, 4):
            raise ValueError("MQARSetB has its own lengths and pairs: set those of the task mqar.")
        self.at_least("n_symbols", self.n_symbols, 1026)

    def check_length(self, length: int) -> None:
        """Refuse lengths that are not in the set."""
        if length not in self.tested:
            raise ValueError(
                f"MQARSetB needs length of at least 64 and of {[*self.tested]}, got {length}."
            )

    def draw_any(self, rng: Generator) -> Example:
        """Draw from the mixture of training."""
        number = int(rng.choice(5, p=np.array([5, 1, 1, 1, 1]) / 9))
        return self.draw_pairs(rng, *self.trained[number])

    def draw(self, rng: Generator, length: int) -> Example:
        """Draw a problem of the test."""
        return self.draw_pairs(rng, length, int(rng.choice(self.tested[length])))


@dataclass(frozen=True, kw_only=True)
class InductionHeads(SyntheticTask):
    """What followed the trigger when it came first is due where it comes again, at the end.

    All other symbols are uniform, so chance is one over their number.

    Args:
        min_length: Fewest tokens in training.
        max_length: Most tokens in training.
        n_symbols: Symbols, with the trigger.

    Source: Fu et al., Hungry Hungry Hippos, arXiv:2212.14052, section 3.1; Mamba,
    arXiv:2312.00752, section 4.1.2, trains at 256 and tests to 2**20.
    """

    min_length: int = 30
    max_length: int = 30
    n_symbols: int = 20

    measured: ClassVar[str] = "tokens"
    longer: ClassVar[tuple[int, ...]] = (30, 64, 256, 1024)

    @property
    def symbols(self) -> Sequence[str]:
        """Symbols, the trigger last."""
        return (*spelled("s", self.n_symbols - 1), "trigger")

    def check(self) -> None:
        """Refuse to ask for what can be known before."""
        self.at_least("n_symbols", self.n_symbols, 3)

    def check_length(self, length: int) -> None:
        """Refuse lengths without a symbol between two triggers."""
        self.at_least("length", length, 3)

    def draw(self, rng: Generator, length: int) -> Example:
        """Draw symbols, and where the trigger comes first."""
        trigger = self.n_symbols - 1
        tokens = rng.integers(trigger, size=length)
        first = int(rng.integers(length - 2))
        tokens[[first, -1]] = trigger
        targets = np.full(length, IGNORE, dtype=np.int64)
        targets[-1] = tokens[first + 1]
        return Example(tokens, targets)

    def chance(self, length: int) -> float:
        """Return one over the number of symbols beside the trigger."""
        return 1 / (self.n_symbols - 1)
