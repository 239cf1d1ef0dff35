"""Languages in context against a walk over their automata, and forms against all short strings."""

from itertools import product

import numpy as np
import pytest
from tests.datamodules.test_synthetic import best_constant

from statezoo.datamodules import IGNORE
from statezoo.datamodules.synthetic import make_task
from statezoo.datamodules.synthetic.base import SPLITS
from statezoo.datamodules.synthetic.in_context import canonical, random_automaton


def automaton_of(task, seed, split, index):
    """Draw the automaton of a problem again."""
    for attempt in range(1000):
        rng = np.random.default_rng([seed, SPLITS.index(split), index, 0, attempt])
        found = random_automaton(rng, task.max_edges)
        if found.split == split:
            return found
    raise AssertionError


def test_letters_that_come_are_those_of_a_walk():
    task = make_task("icll")
    right, lengths = [], []
    for index in range(1000):
        tokens, targets, laws = task.example(0, "train", index)
        edges = automaton_of(task, 0, "train", index).edges
        state, last = 0, len(tokens) - 1
        assert tokens[-1] == 19
        assert (tokens == 19).sum() == 1
        assert 10 <= (tokens >= 18).sum() <= 20
        assert np.allclose(laws.sum(1), targets != IGNORE)
        for t, token in enumerate(tokens[:last].tolist()):
            state = 0 if token == 18 else edges[state][token]
            due = targets[t]
            assert (due == IGNORE) == (token == 18 or tokens[t + 1] >= 18)
            if due != IGNORE:
                right.append(due in edges[state] and due == tokens[t + 1])
                if index < 100:
                    want = [(a in edges[state]) / len(edges[state]) for a in range(20)]
                    assert np.allclose(laws[t], want)
        ends = np.flatnonzero(tokens >= 18)
        lengths += np.diff(ends, prepend=-1).tolist()
    assert np.mean(right) == 1
    assert (min(lengths) - 1, max(lengths) - 1) == (1, 50)
    assert abs(np.mean(lengths) - 1 - 25.5) < 4 * 14.4 / len(lengths) ** 0.5 + 0.05  # the first


def test_no_automaton_is_in_two_splits():
    task = make_task("icll")
    forms = {split: {str(automaton_of(task, 0, split, i)) for i in range(50)} for split in SPLITS}
    assert not forms["train"] & forms["val"] | forms["train"] & forms["test"]
    assert not forms["val"] & forms["test"]
    shares = [random_automaton(np.random.default_rng(i)).split for i in range(1000)]
    assert abs(shares.count("train") - 800) < 4 * 160**0.5
    assert abs(shares.count("val") - 100) < 4 * 90**0.5


def test_automata_are_as_stated():
    for i in range(300):
        edges = random_automaton(np.random.default_rng(i), 3).edges
        assert len(edges) <= 12
        assert all(1 <= len(edge) <= 3 for edge in edges)
        assert len({a for edge in edges for a in edge}) <= 18


def strings(edges, n):
    """All strings of up to n letters."""
    found, ends = {()}, {((), 0)}
    for _ in range(n):
        ends = {((*word, a), q) for word, state in ends for a, q in edges[state].items()}
        found |= {word for word, _ in ends}
    return found


def test_forms_are_equal_where_languages_are():
    """All machines of two states and two letters: strings of 3 letters tell them apart."""
    choices = [dict(zip("ab", q, strict=True)) for q in product((0, 1, None), repeat=2)]
    choices = [{a: q for a, q in edge.items() if q is not None} for edge in choices]
    machines = [(canonical(pair), pair) for pair in product(choices, repeat=2)]
    by_form, by_language = {}, {}
    for form, pair in machines:
        language = frozenset(strings(pair, 4))
        assert by_form.setdefault(str(form), language) == language
        assert by_language.setdefault(language, str(form)) == str(form)
        assert frozenset(strings(form.edges, 4)) == language


def test_forms_do_not_depend_on_numbers_or_copies():
    edges = [{0: 1, 1: 2}, {0: 0}, {1: 0}]
    renumbered = [{1: 1, 0: 2}, {1: 0}, {0: 0}]
    copied = [{0: 1, 1: 2}, {0: 3}, {1: 3}, {0: 4, 1: 2}, {0: 0}]
    unreachable = [*edges, {5: 1}]
    assert len({str(canonical(x)) for x in (edges, renumbered, copied, unreachable)}) == 1
    assert str(canonical([{0: 1}, {0: 0}])) == str(canonical([{0: 0}]))


def test_chance_is_that_of_a_letter():
    task = make_task("icll")
    drawn = [task.example(0, "train", i).targets for i in range(200)]
    shares = [[(x == a).sum() / (x != IGNORE).sum() for a in range(18)] for x in drawn]
    error = np.std(shares, axis=0) / 200**0.5
    assert (abs(np.mean(shares, axis=0) - task.chance(10)) < 4.5 * error).all()
    assert abs(best_constant(task, None, 100) - task.chance(10)) < 0.04


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_edges": 0}, "ICLL needs max_edges of at least 1, got 0"),
        ({"max_string": 1}, "ICLL needs max_string of at least 2, got 1"),
        ({"min_length": 0}, "ICLL needs length of at least 1, got 0"),
    ],
)
def test_languages_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        make_task({"name": "icll", **settings})
