"""Parity, modular arithmetic and group words against solvers of their own."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from tests.datamodules.test_synthetic import best_constant, solved

from statezoo.datamodules import IGNORE
from statezoo.datamodules.synthetic import make_task
from statezoo.datamodules.synthetic.state_tracking import group_table

ARITHMETIC = [
    {"name": "modular_arithmetic"},
    {"name": "modular_arithmetic", "modulus": 7, "max_length": 9},
    {"name": "modular_brackets"},
    {"name": "modular_brackets", "multiply": True, "min_length": 1},
]


def test_parity_is_that_of_the_ones():
    task = make_task("parity")

    def solve(read):
        assert read.pop() == 2  # the blank
        return read.count(1) & 1

    assert solved(task, solve) == 1
    assert abs(best_constant(task, 17) - task.chance(17)) < 4 * 0.5 / 1000**0.5
    assert task.example(0, "val", 0, 1).tokens.shape == (2,)


@pytest.mark.parametrize("settings", ARITHMETIC)
def test_arithmetic_is_that_of_python(settings):
    task = make_task(settings)

    def solve(read):
        text = task.write(np.array(read))
        assert text.endswith(" = _")
        return eval(text[:-4], {"__builtins__": {}}) % task.modulus

    assert solved(task, solve) == 1
    for length in (5, 12):
        chance = task.chance(length)
        assert abs(best_constant(task, length) - chance) < 4 * (chance / 1000) ** 0.5


def test_lengths_of_expressions_are_those_asked_for():
    for length in range(1, 20):
        plain = make_task("modular_arithmetic").example(0, "val", 0, length).tokens
        assert len(plain) - 2 == length - (length % 2 == 0) or length == 1
        nested = make_task("modular_brackets").example(0, "val", 0, length).tokens
        assert len(nested) - 2 == length


def test_vocabularies_are_the_published_ones():
    sizes = [make_task(n).vocab_size for n in ("parity", "modular_arithmetic", "modular_brackets")]
    assert sizes == [3, 10, 12]


def test_chance_of_arithmetic_is_exact():
    counts = [0] * 5
    for a, b, c in product(range(5), repeat=3):
        for x, y in product("+-*", repeat=2):
            counts[eval(f"{a}{x}{b}{y}{c}") % 5] += 1
    want = Fraction(max(counts), sum(counts))
    assert make_task("modular_arithmetic").chance(5) == pytest.approx(float(want), rel=1e-12)


GROUPS = [("Z7", 7), ("S3", 6), ("S4", 24), ("A5", 60), ("S5", 120), ("A4", 12)]


@pytest.mark.parametrize(("group", "size"), GROUPS)
def test_tables_are_groups(group, size):
    table = group_table(group)
    everything = np.arange(size)
    assert table.shape == (size, size)
    assert (table[0] == everything).all()
    assert (table[:, 0] == everything).all()
    assert (np.sort(table, 0) == everything[:, None]).all()
    assert (np.sort(table, 1) == everything).all()
    a, b, c = np.random.default_rng(0).integers(size, size=(3, 1000))
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()


def walk(task):
    """A solver that moves points about, one permutation after the other, by its name."""
    names = list(task.symbols)

    def solve(read):
        words = [names[i] for i in read[1:] if names[i] != "_"]
        if task.group[0] == "Z":
            return sum(map(int, words)) % int(task.group[1:])
        places = list(range(int(task.group[1:])))
        for word in words:
            places = [places[int(digit)] for digit in word]  # acc(x(i))
        return names.index("".join(map(str, places)))

    return solve


@pytest.mark.parametrize("group", ["Z2", "Z5", "S3", "S4", "A5", "S5"])
def test_products_are_those_of_a_walk(group):
    task = make_task({"name": "group_words", "group": group, "min_length": 12, "max_length": 12})
    assert solved(task, walk(task)) == 1
    chance = task.chance(12)
    assert chance == pytest.approx(1 / len(group_table(group)), rel=1e-9)
    assert abs(best_constant(task, 12) - chance) < 4 * (chance / 12_000) ** 0.5


@pytest.mark.parametrize(
    ("variant", "drawn"),
    [({"elements": "transpositions"}, 10), ({"elements": "three"}, 31), ({"tokens_each": 4}, 120)],
)
def test_variants_of_words(variant, drawn):
    settings = {"name": "group_words", "group": "S5", "min_length": 6, "max_length": 6}
    task = make_task(settings | variant)
    assert len(task.generators()) == drawn
    assert solved(task, walk(task)) == 1
    seen = set()
    for index in range(200):
        tokens, targets, _ = task.example(0, "train", index)
        scored = np.flatnonzero(targets != IGNORE)
        assert scored.tolist() == [task.tokens_each * t for t in range(1, 7)]
        assert len(tokens) == 1 + 6 * task.tokens_each
        seen |= set(tokens[1 :: task.tokens_each].tolist())
    assert seen <= set(task.generators().tolist())
    assert len(seen) > 0.9 * drawn
    chance = task.chance(6)
    assert abs(best_constant(task, 6) - chance) < 5 * (chance / 6000) ** 0.5


def test_identity_is_the_likeliest_product_of_transpositions():
    task = make_task({"name": "group_words", "elements": "transpositions"})
    assert task.chance(1) == pytest.approx(1 / 3)
    assert task.chance(2) == pytest.approx((0 + 1 / 3) / 2)
    assert task.chance(4) == pytest.approx(2 / 3 / 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group": "S7"}, "GroupWords needs group Z2 to Z999, S3 to S6 or A3 to A6, got 'S7'"),
        (
            {"group": "Z4", "elements": "transpositions"},
            "GroupWords needs a group S3 to S6 for elements='transpositions', got 'Z4'",
        ),
        (
            {"elements": "few"},
            "GroupWords needs elements to be 'all' or 'transpositions' or 'three', got 'few'",
        ),
        ({"tokens_each": 0}, "GroupWords needs tokens_each of at least 1, got 0"),
        ({"group": 3}, "GroupWords needs group to be text, got 3"),
    ],
)
def test_groups_that_are_none(settings, message):
    with pytest.raises(ValueError, match=message):
        make_task({"name": "group_words", **settings})


def test_arithmetic_needs_two_numbers():
    for name in ("modular_arithmetic", "modular_brackets"):
        with pytest.raises(ValueError, match="needs modulus of at least 2, got 1"):
            make_task({"name": name, "modulus": 1})
    with pytest.raises(ValueError, match="needs multiply to be true or false, got 1"):
        make_task({"name": "modular_brackets", "multiply": 1})
