"""A mixer gives the same whichever implementation of its recurrence runs."""

import importlib.util

import pytest
import torch
from tests.zoo.cases import small

from statezoo.zoo import MIXERS, build_mixer, mixer_settings

D, SIZES = 16, [3, 0, 18]
HAVE = [n for n, m in MIXERS.items() if m.__module__.startswith("statezoo.zoo.")]
WITH_BACKEND = [name for name in HAVE if "backend" in mixer_settings(name)]
WIDE = {"based": {"feature_dim": 16}}  # 153 features: no power of two


def outputs_and_gradients(name, backend, dtype):
    """Outputs of packed sequences, and the gradients of inputs and parameters."""
    torch.manual_seed(0)
    mixer = build_mixer({**small(name), **WIDE.get(name, {}), "backend": backend}, D).to(dtype)
    x = torch.randn(1, sum(SIZES), D, dtype=dtype, requires_grad=True)
    bounds = torch.tensor([0, *SIZES]).cumsum(0).to(torch.int32)
    y, _ = mixer(x, mixer.initial_state(len(SIZES), x), bounds)
    weight = torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    gradients = torch.autograd.grad((y * weight).sum(), [x, *parameters])
    return dict(zip(["y", "x", *names], [y, *gradients], strict=True))


def assert_close(got, want, allowed):
    for name, a in got.items():
        error = ((a - want[name]).norm() / want[name].norm().clamp(min=1e-3)).item()
        assert error < allowed, f"{name}: relative RMS error {error:.1e}, allowed {allowed:.0e}"


@pytest.mark.parametrize("name", WITH_BACKEND)
def test_chunks_are_the_recurrence(name):
    want = outputs_and_gradients(name, "reference", torch.float64)
    assert_close(outputs_and_gradients(name, "torch", torch.float64), want, 1e-9)  # rounding alone


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without")
@pytest.mark.parametrize("name", ["base_conv", "based", "liger", "mamba", "mamba2", "mamba3"])
def test_interpreted_kernels_are_the_recurrence(name):
    want = outputs_and_gradients(name, "reference", torch.float32)
    assert_close(outputs_and_gradients(name, "triton", torch.float32), want, 1e-5)  # float32 sums
