"""A language learnt from its strings: in-context language learning from random automata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.random import Generator

from statezoo.datamodules.batch import IGNORE
from statezoo.datamodules.synthetic.base import SPLITS, Example, SyntheticTask, spelled

__all__ = ["ICLL", "Automaton", "canonical", "random_automaton"]

SHARES = (8, 9, 10)
"""Bounds, in tenths of all automata, of those to train on, to validate on and to test on."""

LETTERS = 18


class Automaton(NamedTuple):
    """A deterministic automaton whose states all accept; state 0 is the first.

    Attributes:
        edges: For each state, the next state by letter, in the order of letters.
    """

    edges: tuple[dict[int, int], ...]

    @property
    def split(self) -> str:
        """The one split that has this automaton, by a hash of its form: none is in two."""
        form = repr([sorted(edges.items()) for edges in self.edges])
        tenth = int.from_bytes(sha256(form.encode()).digest()[:8]) % SHARES[-1]
        return next(split for split, end in zip(SPLITS, SHARES, strict=True) if tenth < end)


def canonical(edges: Sequence[dict[int, int]]) -> Automaton:
    """Return the smallest automaton with the same strings, its states numbered as they are met.

    States that cannot be reached go, and those from which the same strings begin are one, as
    Moore's algorithm finds them. Two automata have the same strings if and only if these are equal.
    """
    classes, count = [0] * len(edges), 1
    while True:
        seen: dict[tuple[tuple[int, int], ...], int] = {}
        forms = [tuple(sorted((a, classes[q]) for a, q in edge.items())) for edge in edges]
        refined = [seen.setdefault(form, len(seen)) for form in forms]
        classes = refined
        if len(seen) == count:
            break
        count = len(seen)
    states = {classes[q]: q for q in reversed(range(len(edges)))}
    order, found = {classes[0]: 0}, []
    queue = [classes[0]]
    for state in queue:
        edge = {a: classes[q] for a, q in sorted(edges[states[state]].items())}
        for target in edge.values():
            if target not in order:
                order[target] = len(order)
                queue.append(target)
        found.append(edge)
    return Automaton(tuple({a: order[q] for a, q in edge.items()} for edge in found))


def random_automaton(rng: Generator, max_edges: int = 4) -> Automaton:
    """Draw an automaton in its smallest form.

    States are 4 to 12 and letters 4 to 18 of 18 before that. A state has 1 to ``max_edges`` edges
    with different letters to different states, none to itself. All of it is uniform.
    """
    n = int(rng.integers(4, 13))
    letters = rng.permutation(LETTERS)[: int(rng.integers(4, LETTERS + 1))]
    edges = []
    for state in range(n):
        most = min(max_edges, n - 1, len(letters))
        degree = 1 + int(rng.integers(most))
        targets = rng.permutation(n - 1)[:degree]
        targets = targets + (targets >= state)
        chosen = rng.permutation(letters)[:degree]
        edges.append(dict(zip(chosen.tolist(), targets.tolist(), strict=True)))
    return canonical(edges)


@dataclass(frozen=True, kw_only=True)
class ICLL(SyntheticTask):
    """In-context language learning: strings of a random automaton, each letter due before it.

    A problem has an automaton of its own (:func:`random_automaton`), and no automaton is in two
    splits, whatever the seed. Strings are walks over edges drawn evenly, of uniform length, with a
    separator between and a terminator at the end. Neither of these is scored, as no one can know
    when a string ends, nor is the first letter of a string, which is due at a separator. Letters
    come at random, so an answer is right (accuracy of the automaton) if it may come next: where
    ``Example.laws`` is above 0. Compare probabilities with them by total variation.

    By symmetry every letter is as likely as any other: a constant names the letter that comes with
    a chance of 1/18, which ``chance`` returns, and names one that may come more often.

    Args:
        min_length: Fewest strings in training.
        max_length: Most strings in training; 19 in the published code.
        max_edges: Most edges of a state; 3 in the published code.
        max_string: Most letters of a string; 49 in the published code.

    Source: Akyurek et al., In-Context Language Learning, arXiv:2401.12973, section 3 and
    appendix A.
    """

    min_length: int = 10
    max_length: int = 20
    max_edges: int = 4
    max_string: int = 50

    measured: ClassVar[str] = "strings"
    longer: ClassVar[tuple[int, ...]] = (10, 20)

    @property
    def symbols(self) -> Sequence[str]:
        """Letters, the separator, the terminator."""
        return (*spelled("", LETTERS), "|", "end")

    def check(self) -> None:
        """Refuse automata and strings that ask for nothing."""
        self.at_least("max_edges", self.max_edges, 1)
        self.at_least("max_string", self.max_string, 2)

    def example(self, seed: int, split: str, index: int, length: int | None = None) -> Example:
        """Return a problem: the first one drawn whose automaton is one of the split's."""
        number = SPLITS.index(split)
        for attempt in range(1000):
            rng = np.random.default_rng([seed, number, index, length or 0, attempt])
            automaton = random_automaton(rng, self.max_edges)
            if automaton.split == split:
                break
        size = int(rng.integers(self.min_length, self.max_length + 1)) if length is None else length
        return self._strings(rng, automaton, size)

    def draw(self, rng: Generator, length: int) -> Example:
        """Draw an automaton of any split, and strings."""
        return self._strings(rng, random_automaton(rng, self.max_edges), length)

    def _strings(self, rng: Generator, automaton: Automaton, count: int) -> Example:
        sizes = rng.integers(1, self.max_string + 1, size=count)
        sizes[0] = max(sizes[0], 2)  # one letter is due at least
        picks = iter(rng.random(int(sizes.sum())).tolist())
        moves = [list(edges.items()) for edges in automaton.edges]
        tokens, states = [], []  # the state before each letter, -1 where nothing is scored
        for size in sizes.tolist():
            state = 0
            for step in range(size):
                states.append(state if step else -1)
                letter, state = moves[state][int(next(picks) * len(moves[state]))]
                tokens.append(letter)
            tokens.append(LETTERS)
            states.append(-1)
        tokens[-1] = LETTERS + 1
        law = np.zeros((len(moves) + 1, LETTERS + 2))  # the last one is that of what is not scored
        for state, edges in enumerate(automaton.edges):
            law[state, [*edges]] = 1 / len(edges)
        due = np.array([*states[1:], -1])
        targets = np.where(due >= 0, np.array([*tokens[1:], 0]), IGNORE)
        return Example(np.array(tokens), targets, law[due])

    def chance(self, length: int) -> float:
        """Return one over the number of letters."""
        return 1 / LETTERS
