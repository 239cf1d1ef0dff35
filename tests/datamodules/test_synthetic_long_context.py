"""Passkeys, needles and selective copying against solvers that read their definition."""

import numpy as np
import pytest
from tests.datamodules.test_synthetic import best_constant, solved

from statezoo.datamodules import IGNORE
from statezoo.datamodules.synthetic import make_task

NEEDLES = [("single", 1), ("multi", 4), ("conditional", 3), ("forward", 5), ("backward", 5)]


@pytest.mark.parametrize("length", [11, 128, 1024])
def test_passkeys_stand_behind_the_marker(length):
    task = make_task("passkey")

    def solve(read):
        end = read.index(63)
        return read[read.index(62) + len(read) - end]

    assert solved(task, solve, 1000 if length < 1000 else 100, length) == 1
    tokens, targets, _ = task.example(0, "val", 0, length)
    assert len(tokens) == length
    assert (targets != IGNORE).sum() == 5
    assert ((tokens == 62).sum(), (tokens == 63).sum()) == (1, 1)


def find(task):
    """Answer the question of a store from its names."""
    marker, asks, begins, blank = range(task.n_symbols, task.n_symbols + 4)

    def solve(read):
        store, question = read[: read.index(asks)], read[read.index(asks) + 1 :]
        said = len(question) - question.index(begins) - 1
        asked = question[: question.index(begins)]
        store = [x for x in store if x != blank]
        pairs, marked = [], []
        while store:
            chosen = store[0] == marker
            key, value, *store = store[chosen:]
            pairs.append((key, value))
            marked += [value] if chosen else []
        if task.kind == "conditional":
            return marked[said]
        values = dict(pairs)
        found = values[asked[said]]
        while task.kind in ("forward", "backward") and found in values:
            found = values[found]
        return found

    return solve


@pytest.mark.parametrize(("kind", "n"), NEEDLES)
@pytest.mark.parametrize("length", [20, 65])
def test_needles_are_found(kind, n, length):
    task = make_task({"name": "needle", "kind": kind, "n_needles": n, "n_symbols": 128})
    assert solved(task, find(task), length=length) == 1
    assert len(task.example(0, "val", 3, length).tokens) == length
    assert abs(best_constant(task, length) - 1 / 128) < 4 * (1 / 128 / 1000) ** 0.5
    assert task.chance(length) == 1 / 128


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_threads_go_their_way_to_their_end(kind):
    task = make_task({"name": "needle", "kind": kind, "n_needles": 6})
    for index in range(100):
        tokens, targets, _ = task.example(0, "train", index)
        store = tokens[tokens < task.n_symbols][:-1].reshape(-1, 2).tolist()
        place = {key: i for i, (key, _) in enumerate(store)}
        assert len(place) == len(store)
        key, path = int(tokens[-2]), []
        while key in place:
            path.append(place[key])
            key = store[place[key]][1]
        assert key == targets[-1]
        assert path == sorted(path, reverse=kind == "backward")
        assert len(path) == 6


@pytest.mark.parametrize("length", [16, 300])
def test_copies_are_in_order(length):
    task = make_task({"name": "selective_copying", "min_length": length, "max_length": length})

    def solve(read):
        data = [x for x in read if x < 16]
        assert len(data) == 16
        return data[read.count(17) - 1]

    assert solved(task, solve) == 1
    assert abs(best_constant(task, length) - 1 / 16) < 4 * (1 / 16 / 16_000) ** 0.5
    assert task.chance(length) == 1 / 16
    assert (task.example(0, "val", 0).tokens == 16).sum() == length - 16


def test_chance_of_passkeys():
    task = make_task({"name": "passkey", "n_symbols": 12})
    assert abs(best_constant(task, 40) - 0.1) < 4 * (0.09 / 5000) ** 0.5
    assert task.chance(40) == 0.1


def test_places_of_passkeys_are_uniform():
    task = make_task({"name": "passkey", "min_length": 20, "max_length": 20})
    places = [int((task.example(0, "val", i).tokens == 62).argmax()) for i in range(1000)]
    assert (abs(np.bincount(places, minlength=10) - 100) < 4 * 10).all()
    assert len(np.bincount(places)) == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "passkey", "min_length": 10}, "Passkey needs length of at least 11, got 10"),
        ({"name": "passkey", "n_symbols": 3}, "Passkey needs n_symbols of at least 4, got 3"),
        ({"n_needles": 2}, "Needle needs n_needles=1 for kind='single', got 2: choose multi"),
        ({"n_symbols": 9}, "Needle needs n_symbols of at least 124 for a length of 128, got 9"),
        (
            {"kind": "multi", "n_needles": 40},
            "Needle needs length of at least 161, got 128",
        ),
        ({"kind": "forward", "n_needles": 63}, "Needle needs length of at least 129, got 128"),
        ({"kind": "lost"}, "Needle needs kind to be 'single' or 'multi' or .*, got 'lost'"),
        (
            {"name": "selective_copying", "min_length": 15},
            "SelectiveCopying needs length of at least 16, got 15",
        ),
    ],
)
def test_searches_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        make_task({"name": "needle", **settings})
