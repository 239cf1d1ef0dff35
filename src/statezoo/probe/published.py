"""What publications say of a model on a task, and whether a measured number agrees."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

from statezoo.probe.models import Model, parse_models

__all__ = ["Expected", "expected"]

NEAR = 0.15
"""A measured value agrees with a published one from which it differs by no more."""
PASS, FAIL = 0.9, 0.5
"""At least, and at most, what agrees with a curve that is said to reach 1, or to fail."""


class Expected(NamedTuple):
    """What is expected of a model.

    Attributes:
        text: As tables say it: a published number, ``pass``, ``fail``, or ``< MODEL``.
        low: Least value that agrees.
        high: Largest value that agrees.
        below: Model whose value must be larger; empty for none.
        source: Where it is from.
    """

    text: str
    low: float
    high: float
    below: str
    source: str

    def agrees(self, value: float, others: Mapping[str, float]) -> bool | None:
        """Say whether a value agrees; None where the model to compare with was not measured."""
        if self.below:
            return value < others[self.below] if self.below in others else None
        return self.low <= value <= self.high


GRAZZI = "Grazzi et al., arXiv:2411.12537, best of 3, scaled"
SIEMS = "Siems et al., arXiv:2502.10297, read off curves or implied by theory"
MERRILL = "Merrill et al., arXiv:2404.08819, by theory"
ZOOLOGY = "Arora et al., arXiv:2312.04927, curves"
WORDS = ("Z2", "Z3", "S3", "S4", "A5", "S5")
SIGNED, UNSIGNED = "negative_eigenvalues=true", "negative_eigenvalues=false"

_NUMBERS: dict[str, dict[str, float]] = {
    "parity": {
        "transformer": 0.022, "mamba": 0.0, f"mamba:{SIGNED}": 1.0,
        "deltanet": 0.017, f"deltanet:{SIGNED}": 1.0,
    },
    "modular_arithmetic": {
        "transformer": 0.031, "mamba": 0.095, f"mamba:{SIGNED}": 0.241,
        "deltanet": 0.314, f"deltanet:{SIGNED}": 0.971,
    },
    "modular_brackets": {
        "transformer": 0.067, "mamba": 0.123, f"mamba:{SIGNED}": 0.116,
        "deltanet": 0.194, f"deltanet:{SIGNED}": 0.260,
    },
}  # fmt: skip

_PASSES: dict[str, tuple[str, ...]] = {
    f"mamba:{SIGNED}": ("Z2",),
    f"deltanet:{SIGNED}": ("Z2",),
    f"gated_deltanet:{SIGNED}": ("Z2",),
    "deltaproduct:n_householder=1": ("Z2",),
    "deltaproduct": ("Z2", "Z3", "S3", "S4", "A5"),
    "deltaproduct:n_householder=3": ("Z2", "Z3", "S3", "S4", "A5"),
    "deltaproduct:n_householder=4": WORDS,
}
"""Words of which groups one layer keeps the product of; of the others it does not."""

_NEVER = (
    "transformer", "gla", "mamba", "mamba2", "deltanet", "gated_deltanet",
    *(f"deltaproduct:n_householder={n}:{UNSIGNED}" for n in (1, 3, 4)), f"deltaproduct:{UNSIGNED}",
)  # fmt: skip


@cache
def _table() -> dict[tuple[str, str], Expected]:
    found: dict[tuple[str, str], Expected] = {}

    def add(probe: str, model: str, text: str, source: str, low: float, high: float) -> None:
        found[probe, _key(parse_models([model])[model])] = Expected(text, low, high, "", source)

    for probe, numbers in _NUMBERS.items():
        for model, value in numbers.items():
            add(probe, model, f"{value:g}", GRAZZI, value - NEAR, value + NEAR)
    for model in (*_PASSES, *_NEVER):
        source = SIEMS if "delta" in model else MERRILL
        for group in WORDS:
            passes = group in _PASSES.get(model, ())
            low, high = (PASS, 1.0) if passes else (-1.0, FAIL)
            add(group, model, "pass" if passes else "fail", source, low, high)
    add("S5_transpositions", "deltaproduct:n_householder=1", "pass", SIEMS, PASS, 1.0)
    for probe in ("mqar_4", "mqar_8", "mqar_16", "mqar_64", "mqar_8_of_8192", "mqar_b"):
        for model in ("transformer", "deltanet"):
            add(probe, model, "pass", ZOOLOGY, PASS, 1.0)
    add("induction_heads", "mamba", "pass", "Gu and Dao, arXiv:2312.00752", PASS, 1.0)
    add("selective_copying", "mamba", "pass", "Gu and Dao, arXiv:2312.00752", PASS, 1.0)
    bare = "no model can answer before it has read, arXiv:2509.24125"
    for model in ("transformer", "hybrid", "gla", "mamba2", "gated_deltanet", "deltaproduct"):
        add("inverse_permutation_bare", model, "fail", bare, -1.0, FAIL)
    for model in ("gla", "retnet", "mamba", "gated_deltanet", "deltanet", "mamba2"):
        key = _key(parse_models([model])[model])
        source = "Akyurek et al., arXiv:2401.12973, the order of bars"
        found["icll", key] = Expected("< transformer", -1.0, 2.0, "transformer", source)
    return found


def _key(model: Model) -> str:
    return json.dumps(model, sort_keys=True)


def expected(probe: str, model: Model) -> Expected | None:
    """Return what is expected of a model, however its name is written; None if nothing is."""
    return _table().get((probe, _key(model)))
