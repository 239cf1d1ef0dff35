"""The docstring of an op is its page: complete, and its example runs."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).parents[2] / "kernels"
OPS = sorted(file.parent.name for file in KERNELS.glob("*/__init__.py"))


@pytest.mark.parametrize("op", OPS)
def test_page_is_complete_and_its_example_runs(op):
    names = vars(import_module(f"statezoo.kernels.{op}"))
    page = names[op].__doc__
    for part in (".. math::", "Args:", "Returns:", "Raises:", "Example:", "Source: "):
        assert part in page, f"{op} says nothing under {part}"
    test = doctest.DocTestParser().get_doctest(page, {"torch": torch, **names}, op, None, 0)
    assert test.examples
    doctest.DebugRunner(verbose=False).run(test)
