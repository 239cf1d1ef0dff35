"""What the tests of the Triton backends share: on a CPU the kernels run in Triton's interpreter."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import numpy as np
import pytest
import triton.language as tl
from tests.kernels.harness import Case, Inputs, assert_close
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# float32: roundings of 6e-8 over 70 tokens, and exponents from differences of sums up to 64 x 40
FP32 = 2e-5
# bfloat16 operands and states (2^-9) give 2e-3 to 6e-3, more where gradients of gates are
# differences of such sums: 1.2e-2
BF16 = 2e-2


def compare(case: Case, inputs: Inputs, allowed: float, cu: Tensor | None = None) -> None:
    """Compare outputs, final state and all gradients with the recurrence in float64."""
    want = case.all_of({n: x.double() for n, x in inputs.items()}, "reference", cu)
    inputs = {n: x.to(DEVICE) for n, x in inputs.items()}
    got = case.all_of(inputs, "triton", None if cu is None else cu.to(DEVICE))
    assert_close({n: x.cpu() for n, x in got.items()}, want, allowed)


@pytest.fixture
def bfloat16_products(monkeypatch):
    """Teach the interpreter to multiply bfloat16, which it keeps as plain integers."""
    if DEVICE == "cuda":
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *rest):
        return plain(self, *(widened(x, TensorHandle) for x in (a, b)), d, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def widened(x, handle):
    """Turn bfloat16 bits into the float32 they stand for."""
    if x.dtype.scalar != tl.bfloat16:
        return x
    return handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
