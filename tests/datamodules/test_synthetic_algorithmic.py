"""Recursion, permutations and products against Python's own numbers and other algorithms."""

import numpy as np
import pytest
from tests.datamodules.test_synthetic import best_constant, solved

from statezoo.datamodules import IGNORE
from statezoo.datamodules.synthetic import make_task


def successor(read):
    """By integers: the number, one more, and its bits."""
    end = read.index(3)
    bits = [1 if x == 2 else x for x in read[:end]]
    after = bin(sum(bit << i for i, bit in enumerate(bits)) + 1)[:1:-1]
    answer = [*map(int, after[:-1]), 2, 4]
    return answer[len(read) - end - 1]


@pytest.mark.parametrize("length", [None, 1, 2, 16, 64])
def test_successors_are_those_of_integers(length):
    task = make_task("binary_successor")
    assert solved(task, successor, 1000 if length is None else 200, length) == 1


def test_the_carry_is_uniform():
    task = make_task("binary_successor")
    carries = [int((task.example(0, "val", i, 5).tokens != 1).argmax()) for i in range(1000)]
    assert (abs(np.bincount(carries, minlength=5) - 200) < 4 * 160**0.5).all()
    assert len(np.bincount(carries)) == 5
    assert task.example(0, "val", 0, 1).targets.tolist() == [IGNORE, 0, 2, 4]  # succ(1) = 10


@pytest.mark.parametrize("length", [1, 2, 7, 16])
def test_chance_of_successors(length):
    task = make_task("binary_successor")
    chance = task.chance(length)
    # of two constants that are as good, the more frequent by chance may be taken
    assert abs(best_constant(task, length) - chance) < 5 * 0.3 / 1000**0.5


def visit(task):
    """Without recursion: a stack of what is still to be read, and paths that sort the nodes."""

    def solve(read):
        dot, question = task.n_symbols, task.n_symbols + 1
        end = read.index(question)
        stack, nodes = [""], []
        for token in read[:end]:
            path = stack.pop()
            if token != dot:
                nodes.append((path, token))
                stack += [path + "R", path + "L"]
        assert not stack
        last = {"inorder": "LMR", "postorder": "LRM", "preorder": "MLR"}[task.order]
        rank = {side: str(place) for place, side in enumerate(last)}
        nodes.sort(key=lambda node: [rank[side] for side in node[0] + "M"])
        return nodes[len(read) - end - 1][1]

    return solve


@pytest.mark.parametrize("order", ["inorder", "postorder", "preorder"])
def test_traversals_sort_the_paths(order):
    task = make_task({"name": "tree_traversal", "order": order, "n_symbols": 9})
    assert solved(task, visit(task)) == 1
    assert solved(task, visit(task), 20, 48) == 1
    assert task.chance(6) == 1 / 9
    assert abs(best_constant(task, 6) - 1 / 9) < 4 * (1 / 9 / 6000) ** 0.5


def undo(task):
    """Find where the permutation has put a symbol; say the first symbol where it is to come."""
    first_place = task.n_symbols

    def solve(read):
        count = sum(first_place <= x < task.vocab_size - 1 for x in read)
        at = len(read) - (2 if task.scratch else 1) * count - 1
        source = [x - first_place for x in read[:count]].index(at)
        return read[count + source] if count + source < len(read) else 0

    return solve


def test_permutations_are_undone_with_scratch():
    task = make_task("inverse_permutation")
    assert solved(task, undo(task)) == 1
    assert task.ceiling(9) == 1
    assert task.chance(9) == 0.1
    assert abs(best_constant(task, 9) - 0.1) < 4 * (0.09 / 9000) ** 0.5


@pytest.mark.parametrize("length", [1, 2, 16])
def test_without_scratch_the_ceiling_is_reached(length):
    task = make_task({"name": "inverse_permutation", "scratch": False})
    assert len(task.example(0, "val", 0, length).tokens) == 2 * length
    got = solved(task, undo(task), length=length)
    assert abs(got - task.ceiling(length)) <= 4 * (0.25 / (1000 * length)) ** 0.5 * (length > 1)


@pytest.mark.parametrize("length", [1, 4, 12])
def test_products_are_those_of_integers(length):
    task = make_task("multiplication")

    def solve(read):
        text = "".join(task.symbols[x] for x in read)
        a, b = text.split("=")[0][::-1].split("*")
        assert len(a) == len(b) == length
        assert "0" not in a[0] + b[0]
        product = f"{int(a) * int(b):0{2 * length}}"[::-1]
        return int(product[len(text.split("=")[1])])

    assert solved(task, solve, 1000, length) == 1


@pytest.mark.parametrize("length", [1, 2, 4])
def test_chance_of_products(length):
    chance = make_task("multiplication").chance(length)
    if length <= 2:
        numbers = range(10 ** (length - 1), 10**length)
        digits = "".join(f"{a * b:0{2 * length}}" for a in numbers for b in numbers)
        assert chance == max(digits.count(d) for d in "0123456789") / len(digits)
    measured = best_constant(make_task("multiplication"), length)
    assert abs(measured - chance) < 5 * (chance / (2000 * length)) ** 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "tree_traversal", "n_symbols": 1}, "needs n_symbols of at least 2, got 1"),
        ({"name": "tree_traversal", "max_length": 501}, "needs a length of at most 500, got 501"),
        ({"name": "tree_traversal", "order": "level"}, "needs order to be 'inorder' or .*'level'"),
        (
            {"name": "inverse_permutation", "max_length": 65},
            "InversePermutation needs max_places for a length of 65 of at least 65, got 64",
        ),
        ({"name": "multiplication", "min_length": 0}, "needs length of at least 1, got 0"),
    ],
)
def test_algorithms_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        make_task(settings)
