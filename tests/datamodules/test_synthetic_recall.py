"""Associative recall and induction heads against look-ups."""

from collections import Counter

import numpy as np
import pytest
from tests.datamodules.test_synthetic import best_constant, solved

from statezoo.datamodules import IGNORE
from statezoo.datamodules.synthetic import make_task
from statezoo.datamodules.synthetic.recall import SET_A


def look_up(read):
    """The value behind a key: keys of the pairs are at even places, and come first there."""
    key = read[-1]
    return next(read[i + 1] for i in range(0, len(read), 2) if read[i] == key)


MQARS = [make_task("mqar"), make_task("mqar_b"), *SET_A]


@pytest.mark.parametrize("task", MQARS, ids=lambda t: f"{t.name}-{t.max_length}-{t.n_pairs}")
def test_values_are_those_of_a_look_up(task):
    assert solved(task, look_up) == 1


@pytest.mark.parametrize("length", [64, 128, 256, 512, 1024])
def test_set_b_is_tested_at_its_lengths(length):
    task = make_task("mqar_b")
    assert solved(task, look_up, 50, length) == 1
    drawn = [task.example(0, "test", i, length).targets for i in range(60)]
    pairs = {int((targets != IGNORE).sum()) for targets in drawn}
    assert pairs == {64: {4, 8, 16}, 128: {32}, 256: {64}, 512: {128}, 1024: {256}}[length]


def test_set_b_trains_on_its_mixture():
    task = make_task("mqar_b")
    drawn = [task.example(0, "train", i).targets for i in range(1800)]
    counts = Counter((len(targets), int((targets != IGNORE).sum())) for targets in drawn)
    want = {(64, 4): 1000, (128, 8): 200, (256, 16): 200, (256, 32): 200, (256, 64): 200}
    assert counts.keys() == want.keys()
    assert all(abs(counts[key] - n) < 4 * n**0.5 for key, n in want.items())


def test_pairs_and_questions_are_as_published():
    task = make_task({"name": "mqar", "n_symbols": 200})
    for index in range(100):
        tokens, targets, _ = task.example(0, "train", index)
        keys, values = tokens[:16:2], tokens[1:16:2]
        assert len(set(keys)) == len(set(values)) == 8
        assert 1 <= keys.min() <= keys.max() <= 99
        assert 100 <= values.min() <= values.max() <= 199
        asked = np.flatnonzero(targets != IGNORE)
        assert sorted(tokens[asked]) == sorted(keys)
        assert not asked.min() < 16
        assert not (asked % 2).any()
    plain = make_task({"name": "mqar", "random_filler": False}).example(0, "train", 0)
    filler = plain.targets == IGNORE
    filler[:16] = False
    assert not plain.tokens[filler].any()


def test_questions_come_early_by_the_power_law():
    task = make_task({"name": "mqar", "n_pairs": 1, "min_length": 18, "max_length": 18})
    slots = [
        int((task.example(0, "train", i).targets[2::2] != IGNORE).argmax()) for i in range(2000)
    ]
    odds = 1 / np.arange(1, 9) ** 0.99  # slots of two tokens after the pair
    want = 2000 * odds / odds.sum()
    assert (abs(np.bincount(slots, minlength=8) - want) < 4 * want**0.5).all()


def test_chance_of_recall():
    task = make_task({"name": "mqar", "n_symbols": 70})
    assert task.chance(64) == 1 / 35
    assert abs(best_constant(task, 64) - 1 / 35) < 4 * (1 / 35 / 8000) ** 0.5
    assert make_task("mqar_b").chance(64) == 1 / 4096
    small = make_task({"name": "induction_heads", "n_symbols": 5})
    assert abs(best_constant(small, 20) - small.chance(20)) < 4 * (0.25 * 0.75 / 1000) ** 0.5
    assert small.chance(20) == 1 / 4


@pytest.mark.parametrize("length", [3, 30, 256])
def test_induction_repeats_what_followed(length):
    def solve(read):
        assert read[-1] == 19
        assert len(read) == length
        assert read.count(19) == 2
        return read[read.index(19) + 1]

    assert solved(make_task("induction_heads"), solve, length=length) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_pairs": 17}, "MQAR needs length of at least 68, got 64"),
        ({"max_length": 67}, "MQAR needs an even length, got 67"),
        ({"n_symbols": 64}, "MQAR needs a length below n_symbols=64, got 64: raise n_symbols"),
        (
            {"n_symbols": 16},
            "MQAR needs n_pairs of at most n_symbols/2 - 1 = 7 keys, got 8: raise n_symbols",
        ),
        ({"power": 0}, "MQAR needs power above 0 and at most 1, got 0"),
        ({"n_pairs": 0}, "MQAR needs n_pairs of at least 1, got 0"),
        ({"name": "mqar_b", "max_length": 512}, "MQARSetB has its own lengths and pairs"),
        (
            {"name": "mqar_b", "n_symbols": 600},
            "MQARSetB needs n_symbols of at least 1026, got 600",
        ),
        ({"name": "induction_heads", "n_symbols": 2}, "needs n_symbols of at least 3, got 2"),
        ({"name": "induction_heads", "min_length": 2}, "needs length of at least 3, got 2"),
    ],
)
def test_recall_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        make_task({"name": "mqar", **settings})


def test_set_b_has_its_own_lengths():
    with pytest.raises(ValueError, match=r"of \[64, 128, 256, 512, 1024\], got 100"):
        make_task("mqar_b").check_length(100)
