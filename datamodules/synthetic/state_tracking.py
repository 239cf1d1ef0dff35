"""Tasks whose answer is the state of a finite machine: parity, modular arithmetic, group words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import ClassVar, Literal

import numpy as np
from numpy.random import Generator

from statezoo.datamodules.batch import IGNORE
from statezoo.datamodules.synthetic.base import Example, Ids, SyntheticTask, answered

__all__ = ["GroupWords", "ModularArithmetic", "ModularBrackets", "Parity", "group_table"]

OPERATORS = "+-*"


@dataclass(frozen=True, kw_only=True)
class Parity(SyntheticTask):
    """Is the number of ones odd? Answered once, after the last bit, where a blank is read.

    Chance is 1/2: bits are fair and there is one at least.

    Args:
        min_length: Fewest bits in training.
        max_length: Most bits in training.

    Source: Grazzi et al., Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues,
    arXiv:2411.12537, section 5.1.
    """

    min_length: int = 3
    max_length: int = 40

    measured: ClassVar[str] = "bits"
    longer: ClassVar[tuple[int, ...]] = (40, 64, 128, 256)

    @property
    def symbols(self) -> Sequence[str]:
        """The bits, and the blank."""
        return ("0", "1", "_")

    def draw(self, rng: Generator, length: int) -> Example:
        """Draw fair bits."""
        bits = rng.integers(2, size=length)
        return answered(np.append(bits, 2), bits.sum(keepdims=True) % 2)

    def chance(self, length: int) -> float:
        """Return 1/2."""
        return 0.5


@dataclass(frozen=True, kw_only=True)
class ModularArithmetic(SyntheticTask):
    """The value of a sum of products, multiplication before addition, modulo a number.

    Digits and operators are uniform. An expression has an odd number of tokens: an even length is
    taken as one less. Then come ``=`` and a blank, at which the value is due.

    Args:
        min_length: Fewest tokens of an expression in training.
        max_length: Most tokens of an expression in training.
        modulus: Number of digits.

    Source: Grazzi et al., arXiv:2411.12537, section 5.1.
    """

    min_length: int = 3
    max_length: int = 40
    modulus: int = 5

    measured: ClassVar[str] = "tokens of the expression"
    longer: ClassVar[tuple[int, ...]] = (40, 64, 128, 256)

    def check(self) -> None:
        """Refuse a modulus without arithmetic."""
        self.at_least("modulus", self.modulus, 2)

    @property
    def symbols(self) -> Sequence[str]:
        """Digits, operators, the sign of equality, the blank."""
        return (*map(str, range(self.modulus)), *OPERATORS, "=", "_")

    def draw(self, rng: Generator, length: int) -> Example:
        """Draw digits and operators, and compute from left to right."""
        m, count = self.modulus, (length + 1) // 2
        digits, operators = rng.integers(m, size=count), rng.integers(3, size=count - 1)
        tokens = np.empty(2 * count + 1, dtype=np.int64)
        tokens[:-1:2], tokens[1:-2:2] = digits, m + operators
        tokens[-2:] = m + 3, m + 4
        total, term = 0, int(digits[0])
        for operator, digit in zip(operators.tolist(), digits[1:].tolist(), strict=True):
            if operator == 2:
                term = term * digit % m
            else:
                total, term = total + term, digit if operator == 0 else -digit
        return answered(tokens, np.array([(total + term) % m]))

    def chance(self, length: int) -> float:
        """Return the probability of the likeliest value, by recursion over the expression."""
        m = self.modulus
        a, b = np.indices((m, m))
        joint = np.zeros((m, m))  # of the sum of the terms before, and the term
        joint[0] = 1 / m
        for _ in range((length - 1) // 2):
            product = np.zeros((m, m))
            for digit in range(m):
                np.add.at(product, (a, b * digit % m), joint / m)
            total = np.zeros(m)
            np.add.at(total, (a + b) % m, joint)
            joint = product / 3 + total[:, None] * (2 / 3 / m)  # a signed digit is uniform too
        value = np.zeros(m)
        np.add.at(value, (a + b) % m, joint)
        return float(value.max())


@dataclass(frozen=True, kw_only=True)
class ModularBrackets(SyntheticTask):
    """The value of nested brackets modulo a number, as :class:`ModularArithmetic` asks for it.

    An expression of a length is a digit ``d``, ``-d``, ``(d)``, ``(-d)``, or from 5 tokens on
    ``(left operator right)`` with a uniform operator and a uniform length of ``left``.

    Args:
        min_length: Fewest tokens of an expression in training.
        max_length: Most tokens of an expression in training.
        modulus: Number of digits.
        multiply: Draw ``*`` beside ``+`` and ``-``.

    Source: Grazzi et al., arXiv:2411.12537, section 5.1, with the grammar of Deletang et al.,
    arXiv:2207.02098, appendix A.
    """

    min_length: int = 3
    max_length: int = 40
    modulus: int = 5
    multiply: bool = False

    measured: ClassVar[str] = "tokens of the expression"
    longer: ClassVar[tuple[int, ...]] = (40, 64, 128, 256)

    def check(self) -> None:
        """Refuse a modulus without arithmetic."""
        self.at_least("modulus", self.modulus, 2)

    @property
    def symbols(self) -> Sequence[str]:
        """Digits, operators, brackets, the sign of equality, the blank."""
        return (*map(str, range(self.modulus)), *OPERATORS, "(", ")", "=", "_")

    def draw(self, rng: Generator, length: int) -> Example:
        """Draw brackets from the outside in."""
        tokens, value = self._expression(rng, length)
        question = [*tokens, self.modulus + 5, self.modulus + 6]
        return answered(np.array(question), np.array([value]))

    def _expression(self, rng: Generator, length: int) -> tuple[list[int], int]:
        m = self.modulus
        minus, opens, closes = m + 1, m + 3, m + 4
        if length < 5:
            digit = int(rng.integers(m))
            inner = [digit] if length % 2 else [minus, digit]
            value = digit if length % 2 else -digit % m
            return (inner if length < 3 else [opens, *inner, closes]), value
        size = 1 + int(rng.integers(length - 4))
        left, a = self._expression(rng, size)
        right, b = self._expression(rng, length - 3 - size)
        operator = int(rng.integers(3 if self.multiply else 2))
        value = (a + b, a - b, a * b)[operator] % m
        return [opens, *left, m + operator, *right, closes], value

    def chance(self, length: int) -> float:
        """Return the probability of the likeliest value, by recursion over lengths."""
        m = self.modulus
        if not self.multiply:
            return 1 / m  # a sum with a uniform digit in it
        a, b = np.indices((m, m))
        laws = np.full((max(length, 4) + 1, m), 1 / m)  # [length value]
        for n in range(5, length + 1):
            sizes = np.arange(1, n - 3)
            joint = laws[sizes].T @ laws[n - 3 - sizes] / len(sizes) / 3
            laws[n] = 0
            for value in (a + b, a - b, a * b):
                np.add.at(laws[n], value % m, joint)
        return float(laws[length].max())


@dataclass(frozen=True, kw_only=True)
class GroupWords(SyntheticTask):
    """The product of group elements so far, ``acc[t] = acc[t-1] * x[t]``, at each of them.

    A word begins with a token of its own, at which nothing is scored. Element 0 is the identity;
    permutations are in lexicographic order, and ``(a * b)(i) = a(b(i))``.

    Args:
        min_length: Fewest elements in training.
        max_length: Most elements in training.
        group: ``Z2``, ``Z3``, ...: addition modulo a number; ``S3`` to ``S6``: all permutations of
            so many points; ``A3`` to ``A6``: the even ones.
        elements: Which are drawn, uniformly: ``all``, the ``transpositions``, or those that move
            ``three`` points at most.
        tokens_each: Tokens per element: the element and blanks, at the last of which the product
            is due.

    Source: Merrill et al., The Illusion of State in State-Space Models, arXiv:2404.08819; variants
    of Grazzi et al., arXiv:2411.12537, section 5.2, and Siems et al., DeltaProduct,
    arXiv:2502.10297, section 5.1.
    """

    min_length: int = 128
    max_length: int = 128
    group: str = "S3"
    elements: Literal["all", "transpositions", "three"] = "all"
    tokens_each: int = 1

    measured: ClassVar[str] = "elements"
    longer: ClassVar[tuple[int, ...]] = (128, 256, 512)

    def check(self) -> None:
        """Refuse groups that are not known, or have no such elements."""
        self.at_least("tokens_each", self.tokens_each, 1)
        found = re.fullmatch(r"Z([2-9]|[1-9]\d{1,2})|[SA][3-6]", self.group)
        if not found:
            raise ValueError(
                f"GroupWords needs group Z2 to Z999, S3 to S6 or A3 to A6, got {self.group!r}."
            )
        permuting = self.group[0] == "S" or (self.group[0], self.elements) == ("A", "three")
        if self.elements != "all" and not permuting:
            raise ValueError(
                f"GroupWords needs a group S3 to S6 for elements={self.elements!r}, got "
                f"{self.group!r}."
            )

    @property
    def symbols(self) -> Sequence[str]:
        """Elements, the beginning, the blank."""
        return (*_names(self.group), "BOS", "_")

    def generators(self) -> Ids:
        """Return the elements that are drawn."""
        table = group_table(self.group)
        if self.elements == "all":
            return np.arange(len(table))
        places = np.array(_permutations(self.group))
        moved = (places != np.arange(places.shape[1])).sum(1)
        return np.flatnonzero(moved <= 3 if self.elements == "three" else moved == 2)

    def draw(self, rng: Generator, length: int) -> Example:
        """Draw elements and multiply them from left to right."""
        table, drawn = _rows(self.group), rng.choice(self.generators(), length)
        each, product = self.tokens_each, 0
        tokens = np.full(1 + each * length, self.vocab_size - 1, dtype=np.int64)
        targets = np.full_like(tokens, IGNORE)
        tokens[0], tokens[1::each] = self.vocab_size - 2, drawn
        products = []
        for element in drawn.tolist():
            product = table[product][element]
            products.append(product)
        targets[each::each] = products
        return Example(tokens, targets)

    def chance(self, length: int) -> float:
        """Return the mean probability of the likeliest product, from the law of the walk."""
        table, drawn = group_table(self.group), self.generators()
        law, mean = np.eye(len(table))[0], np.zeros(len(table))
        for _ in range(length):
            new = np.zeros_like(law)
            np.add.at(new, table[:, drawn], law[:, None] / len(drawn))
            law, mean = new, mean + new / length
        return float(mean.max())


@lru_cache
def _permutations(group: str) -> list[tuple[int, ...]]:
    found = list(permutations(range(int(group[1:]))))
    return found if group[0] == "S" else [p for p in found if _even(p)]


def _even(places: Sequence[int]) -> bool:
    return sum(a > b for i, a in enumerate(places) for b in places[i + 1 :]) % 2 == 0


@lru_cache
def _names(group: str) -> list[str]:
    if group[0] == "Z":
        return list(map(str, range(int(group[1:]))))
    return ["".join(map(str, p)) for p in _permutations(group)]


@lru_cache
def group_table(group: str) -> Ids:
    """Return ``[n n]``, the number of the product of two elements of a group."""
    if group[0] == "Z":
        m = int(group[1:])
        return np.add.outer(np.arange(m), np.arange(m)) % m
    places = np.array(_permutations(group))
    powers = places.shape[1] ** np.arange(places.shape[1])
    codes = places @ powers
    order = np.argsort(codes)
    composed = places[:, places] @ powers  # [a b]: a(b(i)) for every i
    found: Ids = order[np.searchsorted(codes, composed, sorter=order)]
    return found


@lru_cache
def _rows(group: str) -> list[list[int]]:
    return [list(map(int, row)) for row in group_table(group)]
