"""Algorithms to carry out: recursion over numbers and trees, inverse permutation, products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
from numpy.random import Generator

from statezoo.datamodules.batch import IGNORE
from statezoo.datamodules.synthetic.base import Example, Ids, SyntheticTask, answered, spelled

__all__ = ["BinarySuccessor", "InversePermutation", "Multiplication", "TreeTraversal"]


@dataclass(frozen=True, kw_only=True)
class BinarySuccessor(SyntheticTask):
    """The binary number that follows, lowest bit first: ``X0``, ``X1``, and ``01`` for the top bit.

    ``succ(01) = X0 01``, ``succ(X0 b) = X1 b``, ``succ(X1 b) = X0 succ(b)``. The number of leading
    ``X1``, over which the carry runs, is uniform from 0 to all: the last is the edge case in which
    the number gets longer. The other bits are fair. The answer ends with a token of its own.

    Args:
        min_length: Fewest bits in training.
        max_length: Most bits in training.

    Source: Zhang et al., Transformer-Based Models Are Not Yet Perfect At Learning to Emulate
    Structural Recursion, arXiv:2401.12947, section 3.
    """

    min_length: int = 2
    max_length: int = 16

    measured: ClassVar[str] = "bits"
    longer: ClassVar[tuple[int, ...]] = (16, 32, 64)

    @property
    def symbols(self) -> Sequence[str]:
        """The constructors of numbers, the question, the end."""
        return ("X0", "X1", "01", "=", "end")

    def draw(self, rng: Generator, length: int) -> Example:
        """Draw the carry, then the bits above."""
        carries = int(rng.integers(length))
        bits = rng.integers(2, size=length)
        bits[:carries], bits[carries : carries + 1] = 1, 0
        bits[-1] = 2
        if carries == length - 1:
            after = [0] * length + [2]
        else:
            after = [0] * carries + [1, *bits[carries + 1 :]]
        return answered(np.append(bits, 3), np.array([*after, 4]))

    def chance(self, length: int) -> float:
        """Return the share of the likeliest symbol in the answers, counted over the carries."""
        n = length
        carries = np.arange(n - 1)
        zeros = (carries + (n - 2 - carries) / 2).sum() + n
        ones = (1 + (n - 2 - carries) / 2).sum()
        return float(max(zeros, ones, n) / ((n - 1) * (n + 1) + n + 2))


Tree = tuple[int, "Tree | None", "Tree | None"]


@dataclass(frozen=True, kw_only=True)
class TreeTraversal(SyntheticTask):
    """The labels of a binary tree in some order, from its preorder with a dot for each gap.

    The size of each left subtree is uniform. Labels are uniform, so chance is one over their
    number.

    Args:
        min_length: Fewest nodes in training.
        max_length: Most nodes in training.
        order: Order of the answer; ``preorder`` copies without the dots.
        n_symbols: Labels.

    Source: Zhang et al., arXiv:2401.12947, section 4.
    """

    min_length: int = 1
    max_length: int = 12
    order: Literal["inorder", "postorder", "preorder"] = "inorder"
    n_symbols: int = 26

    measured: ClassVar[str] = "nodes"
    longer: ClassVar[tuple[int, ...]] = (12, 24, 48)

    @property
    def symbols(self) -> Sequence[str]:
        """Labels, the dot, the question."""
        return (*spelled("s", self.n_symbols), ".", "=")

    def check(self) -> None:
        """Refuse labels that are all the same."""
        self.at_least("n_symbols", self.n_symbols, 2)

    def check_length(self, length: int) -> None:
        """Refuse empty trees, and such as may be too deep to walk."""
        super().check_length(length)
        if length > 500:
            raise ValueError(f"TreeTraversal needs a length of at most 500, got {length}.")

    def draw(self, rng: Generator, length: int) -> Example:
        """Draw a tree from its root on."""
        tree = self._tree(rng, length)
        question = [*self._preorder(tree), self.n_symbols + 1]
        return answered(np.array(question), np.array([*self._walk(tree)]))

    def _tree(self, rng: Generator, size: int) -> Tree | None:
        if not size:
            return None
        left, label = int(rng.integers(size)), int(rng.integers(self.n_symbols))
        return label, self._tree(rng, left), self._tree(rng, size - 1 - left)

    def _preorder(self, tree: Tree | None) -> Iterator[int]:
        if tree is None:
            yield self.n_symbols
            return
        yield tree[0]
        yield from self._preorder(tree[1])
        yield from self._preorder(tree[2])

    def _walk(self, tree: Tree | None) -> Iterator[int]:
        if tree is None:
            return
        label, left, right = tree
        if self.order == "preorder":
            yield label
        yield from self._walk(left)
        if self.order == "inorder":
            yield label
        yield from self._walk(right)
        if self.order == "postorder":
            yield label

    def chance(self, length: int) -> float:
        """Return one over the number of labels."""
        return 1 / self.n_symbols


@dataclass(frozen=True, kw_only=True)
class InversePermutation(SyntheticTask):
    """Undo a permutation: read ``p``, then ``y[i] = x[p(i)]``, and say ``x``.

    With ``scratch``, as many blanks follow, of which number ``j`` says ``x[j]``. Without, position
    ``j`` of ``y`` does, and a causal model cannot: it has read ``x[j]`` only where ``p`` has put it
    at ``j`` or before, in ``(n + 1) / 2n`` of the cases, and must guess otherwise, which is the
    ``ceiling``. Symbols of ``x`` are uniform, so chance is one over their number.

    Args:
        min_length: Fewest symbols in training.
        max_length: Most symbols in training.
        scratch: Answer on blanks after all is read.
        n_symbols: Symbols of ``x``.
        max_places: Longest permutation that there are tokens for.

    Source: Alur et al., The Impossibility of Inverse Permutation Learning in Transformer Models,
    arXiv:2509.24125.
    """

    min_length: int = 2
    max_length: int = 16
    scratch: bool = True
    n_symbols: int = 10
    max_places: int = 64

    measured: ClassVar[str] = "symbols"
    longer: ClassVar[tuple[int, ...]] = (16, 32)

    @property
    def symbols(self) -> Sequence[str]:
        """Symbols, places, the blank."""
        return (*spelled("s", self.n_symbols), *spelled("p", self.max_places), "_")

    def check(self) -> None:
        """Refuse symbols that are all the same."""
        self.at_least("n_symbols", self.n_symbols, 2)

    def check_length(self, length: int) -> None:
        """Refuse permutations for which there are too few tokens."""
        super().check_length(length)
        self.at_least(f"max_places for a length of {length}", self.max_places, length)

    def draw(self, rng: Generator, length: int) -> Example:
        """Draw a permutation and symbols."""
        places, x = rng.permutation(length), rng.integers(self.n_symbols, size=length)
        parts = [self.n_symbols + places, x[places]]
        if self.scratch:
            parts.append(np.full(length, self.vocab_size - 1))
        tokens = np.concatenate(parts)
        targets = np.full_like(tokens, IGNORE)
        targets[-length:] = x
        return Example(tokens, targets)

    def chance(self, length: int) -> float:
        """Return one over the number of symbols."""
        return 1 / self.n_symbols

    def ceiling(self, length: int) -> float:
        """Return 1 with scratch tokens, else what can be read in time and what is guessed."""
        known = 1.0 if self.scratch else (length + 1) / (2 * length)
        return known + (1 - known) / self.n_symbols


@dataclass(frozen=True, kw_only=True)
class Multiplication(SyntheticTask):
    """The product of two numbers, lowest digits first, in twice as many digits.

    Factors are uniform among the numbers of so many digits, the highest of which is not 0.

    Args:
        min_length: Fewest digits of a factor in training.
        max_length: Most digits of a factor in training.

    Source: Bai et al., Why Can't Transformers Learn Multiplication?, arXiv:2510.00184, section 3.
    """

    min_length: int = 4
    max_length: int = 4

    measured: ClassVar[str] = "digits of a factor"
    longer: ClassVar[tuple[int, ...]] = (4, 5, 6)

    @property
    def symbols(self) -> Sequence[str]:
        """Digits, the sign of multiplication, that of equality."""
        return (*map(str, range(10)), "*", "=")

    def draw(self, rng: Generator, length: int) -> Example:
        """Draw digits."""
        digits = _factors(rng, 2, length)
        question = np.concatenate([digits[0], [10], digits[1], [11]])
        return answered(question, _products(digits[:1], digits[1:])[0])

    def chance(self, length: int) -> float:
        """Return the share of the likeliest digit in the products.

        Exact up to 2 digits, above from 50,000 products (standard error below 0.001).
        """
        return _likeliest_digit(length)


def _factors(rng: Generator, count: int, length: int) -> Ids:
    digits = rng.integers(10, size=(count, length))
    digits[:, -1] = rng.integers(1, 10, size=count)
    return digits


def _products(a: Ids, b: Ids) -> Ids:
    """Multiply numbers by their digits, as at school: ``[n d] x [n d] -> [n 2d]``."""
    n, d = a.shape
    columns = np.zeros((n, 2 * d), dtype=np.int64)
    for i in range(d):
        columns[:, i : i + d] += a[:, i, None] * b
    for i in range(2 * d - 1):
        columns[:, i + 1] += columns[:, i] // 10
        columns[:, i] %= 10
    return columns


@lru_cache
def _likeliest_digit(length: int) -> float:
    if length <= 2:
        numbers = np.arange(10 ** (length - 1), 10**length)
        digits = numbers[:, None] // 10 ** np.arange(length) % 10
        count = len(numbers)
        found = _products(np.repeat(digits, count, 0), np.tile(digits, (count, 1)))
    else:
        digits = _factors(np.random.default_rng(0), 100_000, length)
        found = _products(digits[::2], digits[1::2])
    return float(np.bincount(found.ravel()).max() / found.size)
