"""The documents of the tasks that ``statezoo evaluate --tasks statezoo`` runs without a network.

``tasks/`` holds their YAML files, which are ordinary ones of lm-evaluation-harness, and their
documents, of which :func:`recall` and :func:`promoters` make those that are synthetic.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from importlib.resources import files
from string import ascii_lowercase, ascii_uppercase
from typing import Any

__all__ = ["documents", "promoters", "recall"]

PAIRS = 8
UPSTREAM, DOWNSTREAM, BOX = 60, 20, 6


def documents(file: str, **settings: Any) -> dict[str, Any]:
    """Return the documents of a task as a data set; the harness calls it.

    Args:
        file: Name of a file in ``tasks/``.
        **settings: Further ``metadata`` of the task, such as its version.
    """
    from datasets import Dataset  # type: ignore[import-untyped,unused-ignore]

    text = (files("statezoo.evaluation") / "tasks" / file).read_text(encoding="utf-8")
    return {"test": Dataset.from_list([json.loads(line) for line in text.splitlines()])}


def recall(n: int = 200, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Draw SYNTHETIC questions of associative recall: pairs of letters, then one's first letter.

    The answer is the capital that followed it; the choices are all capitals of the question, so
    that chance is 1/8.

    Args:
        n: Questions.
        seed: Seeds all draws.

    Source: Arora et al., Zoology, arXiv:2312.04927, section 3 (multi-query associative recall).
    """
    rng = random.Random(seed)
    for _ in range(n):
        keys, values = rng.sample(ascii_lowercase, PAIRS), rng.sample(ascii_uppercase, PAIRS)
        asked = rng.randrange(PAIRS)
        pairs = [f"{key} {value}" for key, value in zip(keys, values, strict=True)]
        yield {
            "text": " ".join([*pairs, keys[asked]]),
            "choices": sorted(values),
            "label": sorted(values).index(values[asked]),
        }


def promoters(n: int = 120, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Draw promoters of a SYNTHETIC genome, each beside itself with the letters of a box mixed.

    A question is what stands before the promoter; the two choices go on with it and 20 bases more,
    in one of them with the letters of the -35 box and of the -10 box in another order. Both have
    the same bases, so that their number tells nothing; chance is 1/2.

    Args:
        n: Questions.
        seed: Seeds the genome and all draws.

    Source: :func:`statezoo.datamodules.dna.synthetic.synthetic_genome`.
    """
    from statezoo.datamodules.dna.synthetic import synthetic_genome

    rng = random.Random(seed)
    genome = synthetic_genome(8000 * n, seed)
    letters = genome.sequence.tobytes().decode("ascii")
    found = 0
    for start, end, strand, kind in genome.intervals:
        if kind != "promoter" or strand != "+" or start < UPSTREAM or found == n:
            continue
        found += 1
        box, spacer, last = (letters[i:j] for i, j in _parts(start, end))
        tail = letters[end : end + DOWNSTREAM]
        real = box + spacer + last + tail
        other = _mixed(rng, box) + spacer + _mixed(rng, last) + tail
        label = rng.randrange(2)
        yield {
            "text": letters[start - UPSTREAM : start],
            "choices": [other, real] if label else [real, other],
            "label": label,
        }


def _parts(start: int, end: int) -> tuple[tuple[int, int], ...]:
    """Bounds of the -35 box, of what is between, and of the -10 box."""
    return (start, start + BOX), (start + BOX, end - BOX), (end - BOX, end)


def _mixed(rng: random.Random, letters: str) -> str:
    """Return the letters in another order, if there is one."""
    orders = (rng.sample(letters, len(letters)) for _ in range(100))
    return next((x for x in map("".join, orders) if x != letters), letters)
