"""causal_conv1d: every backend against the reference, the reference against torch's convolution."""

import os

import pytest
import torch
import torch.nn.functional as F

from statezoo.kernels.causal_conv1d import _op, causal_conv1d

if not torch.cuda.is_available():  # before the first call imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [  # backend, dtype, relative RMS error allowed
    pytest.param("torch", torch.float64, 1e-12),  # same maths, rounding alone
    pytest.param("torch", torch.float32, 1e-5),
    pytest.param("triton", torch.float32, 1e-5),
]
BOUNDS = [0, 0, 1, 3, 10, 11, 11, 17, 17]  # empty ones, and shorter than the taps
D = 5


def inputs(T, W, N=2, packed=False, dtype=torch.float64, bias=True, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(1 if packed else N, T, D)
    given = [x, torch.randn(D, W), torch.randn(D) if bias else None, torch.randn(N, D, W - 1)]
    return [
        None if t is None else t.to(DEVICE, torch.float64).to(dtype).requires_grad_() for t in given
    ]


def outputs_and_gradients(backend, dtype, T, W, bounds=None, bias=True, activation="silu"):
    N = 2 if bounds is None else len(bounds) - 1
    x, weight, b, S0 = inputs(T, W, N, bounds is not None, dtype, bias)
    cu = None if bounds is None else torch.tensor(bounds, device=DEVICE, dtype=torch.int32)
    y, S = causal_conv1d(
        x, weight, b, activation=activation, initial_state=S0, cu_seqlens=cu, backend=backend
    )
    torch.manual_seed(1)
    dy, dS = (torch.randn(t.shape, dtype=torch.float64).to(t) for t in (y, S))
    wanted = [t for t in (x, weight, b, S0) if t is not None]
    grads = torch.autograd.grad((y * dy).sum() + (S * dS).sum(), wanted)
    return {"y": y, "S": S} | {f"d{i}": g for i, g in enumerate(grads)}


def assert_close(got, want, allowed):
    for name in want:
        a, b = got[name].detach().double(), want[name].detach().double()
        error = float((a - b).norm() / b.norm().clamp(min=1e-30))
        assert a.shape == b.shape
        assert error <= allowed, f"{name}: relative error {error:.1e}, allowed {allowed:.0e}"


@pytest.mark.parametrize(("T", "W"), [(0, 4), (1, 4), (2, 4), (3, 4), (17, 4), (9, 1), (9, 2)])
@pytest.mark.parametrize(("backend", "dtype", "allowed"), CASES)
def test_equals_the_reference(backend, dtype, allowed, T, W):
    for bias, activation in ((True, "silu"), (False, None)):
        case = {"T": T, "W": W, "bias": bias, "activation": activation}
        want = outputs_and_gradients("reference", torch.float64, **case)
        assert_close(outputs_and_gradients(backend, dtype, **case), want, allowed)


@pytest.mark.parametrize(("bounds", "W"), [(BOUNDS, 4), (BOUNDS, 1), ([0, 0], 4), ([0, 5], 3)])
@pytest.mark.parametrize(("backend", "dtype", "allowed"), CASES)
def test_packed_equals_the_reference(backend, dtype, allowed, bounds, W):
    for bias, activation in ((True, "silu"), (False, None)):
        case = {"T": bounds[-1], "W": W, "bounds": bounds, "bias": bias, "activation": activation}
        want = outputs_and_gradients("reference", torch.float64, **case)
        assert_close(outputs_and_gradients(backend, dtype, **case), want, allowed)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_many_spans(backend, monkeypatch):
    monkeypatch.setattr("statezoo.kernels.causal_conv1d.chunked.SPAN", 1)  # 16 tokens
    for bounds in (None, [0, 7, 8, 50, 50, 67]):
        want = outputs_and_gradients("reference", torch.float64, 67, 4, bounds)
        assert_close(outputs_and_gradients(backend, torch.float64, 67, 4, bounds), want, 1e-12)


def test_equals_torch_convolution():
    x, weight, bias, _ = inputs(20, 4)
    padded = F.pad(x.mT, (3, 0))
    want = F.silu(F.conv1d(padded, weight[:, None], bias, groups=D)).mT
    for backend in ("reference", "torch"):
        y, S = causal_conv1d(x, weight, bias, activation="silu", backend=backend)
        torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(S, x[:, -3:].mT)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("cut", [0, 1, 2, 7, 12])
def test_split_equals_whole(backend, cut):
    x, weight, bias, S0 = inputs(12, 4)
    y, S = causal_conv1d(x, weight, bias, initial_state=S0, backend=backend)
    first, state = causal_conv1d(x[:, :cut], weight, bias, initial_state=S0, backend=backend)
    second, state = causal_conv1d(x[:, cut:], weight, bias, initial_state=state, backend=backend)
    torch.testing.assert_close(torch.cat([first, second], 1), y)
    torch.testing.assert_close(state, S)


def test_bfloat16_accumulates_in_float32():
    x, weight, bias, S0 = inputs(40, 4, dtype=torch.bfloat16)
    y, S = causal_conv1d(x, weight, bias, initial_state=S0, backend="torch")
    want, _ = causal_conv1d(
        *(t.double() for t in (x, weight, bias)), initial_state=S0.double(), backend="reference"
    )
    assert y.dtype == torch.bfloat16
    assert S.dtype == torch.float32
    torch.testing.assert_close(y, want.bfloat16(), rtol=2**-7, atol=1e-5)  # one rounding


def test_strided_inputs_and_mixed_dtypes():
    x, weight, bias, _ = inputs(30, 4, dtype=torch.float32)
    wide = torch.cat([x, x], 2).bfloat16()
    y, _ = causal_conv1d(wide[..., :D], weight, bias, backend="torch")
    want, _ = causal_conv1d(wide[..., :D].contiguous(), weight, bias, backend="reference")
    torch.testing.assert_close(y, want)


def test_gradcheck():
    for bounds in (None, [0, 0, 1, 3, 9]):
        x, weight, bias, S0 = inputs(9, 4, 2 if bounds is None else 4, bounds is not None)
        cu = None if bounds is None else torch.tensor(bounds)
        assert torch.autograd.gradcheck(
            lambda x, w, b, S, cu=cu: causal_conv1d(
                x, w, b, activation="silu", initial_state=S, cu_seqlens=cu, backend="torch"
            ),
            (x, weight, bias, S0),
            fast_mode=True,
        )


def test_opcheck():
    x, weight, bias, S0 = inputs(9, 4)
    torch.library.opcheck(_op.op, (x, weight, bias, True, S0, None, "torch"))
    torch.library.opcheck(_op.op, (x, weight, None, False, S0, None, "torch"))
    cu = torch.tensor([0, 3, 9])
    torch.library.opcheck(_op.op, (x[:1].detach(), weight, bias, True, S0, cu, "torch"))


def test_compiles_without_a_break():
    run = torch.compile(causal_conv1d, fullgraph=True, backend="aot_eager", dynamic=True)
    x, weight, bias, S0 = inputs(9, 4)
    for got, want in zip(
        run(x, weight, bias, activation="silu", initial_state=S0),
        causal_conv1d(x, weight, bias, activation="silu", initial_state=S0),
        strict=True,
    ):
        torch.testing.assert_close(got, want)
        for a, b in zip(
            torch.autograd.grad(got.sum(), (x, S0), retain_graph=True),
            torch.autograd.grad(want.sum(), (x, S0), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_errors():
    x, weight, bias, S0 = inputs(9, 4)
    with pytest.raises(ValueError, match="weight"):
        causal_conv1d(x, weight.mT)
    with pytest.raises(ValueError, match="bias"):
        causal_conv1d(x, weight, bias[:2])
    with pytest.raises(ValueError, match="activation"):
        causal_conv1d(x, weight, activation="relu")
    with pytest.raises(ValueError, match="initial_state"):
        causal_conv1d(x, weight, initial_state=S0[:1])
    with pytest.raises(ValueError, match="B = 1"):
        causal_conv1d(x, weight, cu_seqlens=torch.tensor([0, 9]))
