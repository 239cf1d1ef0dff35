"""selective_scan: every backend against the reference, the reference against a closed form."""

import os

import pytest
import torch
import torch.nn.functional as F

from statezoo.kernels.causal_conv1d import causal_conv1d
from statezoo.kernels.selective_scan import _edges, _op, selective_scan

if not torch.cuda.is_available():  # before the first call imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [  # backend, dtype, relative error allowed
    pytest.param("torch", torch.float64, 1e-12),  # same maths, rounding alone
    pytest.param("torch", torch.float32, 1e-5),
    pytest.param("triton", torch.float32, 1e-5),
]
BOUNDS = [0, 0, 1, 3, 20, 21, 21, 39, 39]  # empty ones, single tokens, longer than a chunk
E, N = 3, 2


def inputs(T, S=2, packed=False, dtype=torch.float64, D=True, e=E, n=N):
    torch.manual_seed(0)
    B = 1 if packed else S
    given = [
        torch.randn(B, T, e),
        F.softplus(torch.randn(B, T, e) - 1),
        -torch.rand(e, n) * 2,
        torch.randn(B, T, n),
        torch.randn(B, T, n),
        torch.randn(e) if D else None,
        torch.randn(S, e, n),
    ]
    return [
        None if t is None else t.to(DEVICE, torch.float64).to(dtype).requires_grad_() for t in given
    ]


def outputs_and_gradients(backend, dtype, T, bounds=None, D=True, negative=False):
    S = 2 if bounds is None else len(bounds) - 1
    *given, h0 = inputs(T, S, bounds is not None, dtype, D)
    cu = None if bounds is None else torch.tensor(bounds, device=DEVICE, dtype=torch.int32)
    y, h = selective_scan(
        *given, initial_state=h0, cu_seqlens=cu, backend=backend, negative_eigenvalues=negative
    )
    torch.manual_seed(1)
    dy, dh = (torch.randn(t.shape, dtype=torch.float64).to(t) for t in (y, h))
    wanted = [t for t in (*given, h0) if t is not None]
    loss = (y * dy).sum() + (h * dh).sum()
    grads = torch.autograd.grad(loss, wanted, materialize_grads=True)  # T = 0 reaches no input
    return {"y": y, "h": h} | {f"d{i}": g for i, g in enumerate(grads)}


def assert_close(got, want, allowed):
    for name in want:
        a, b = got[name].detach().double(), want[name].detach().double()
        error = float((a - b).norm() / b.norm().clamp(min=1e-30))
        assert a.shape == b.shape
        assert error <= allowed, f"{name}: relative error {error:.1e}, allowed {allowed:.0e}"


@pytest.mark.parametrize("T", [0, 1, 2, 16, 39])
@pytest.mark.parametrize(("backend", "dtype", "allowed"), CASES)
def test_equals_the_reference(backend, dtype, allowed, T):
    for D, negative in ((True, False), (False, True)):
        case = {"T": T, "D": D, "negative": negative}
        want = outputs_and_gradients("reference", torch.float64, **case)
        assert_close(outputs_and_gradients(backend, dtype, **case), want, allowed)


@pytest.mark.parametrize("bounds", [BOUNDS, [0, 0], [0, 5]])
@pytest.mark.parametrize(("backend", "dtype", "allowed"), CASES)
def test_packed_equals_the_reference(backend, dtype, allowed, bounds):
    for D, negative in ((True, False), (False, True)):
        case = {"T": bounds[-1], "bounds": bounds, "D": D, "negative": negative}
        want = outputs_and_gradients("reference", torch.float64, **case)
        assert_close(outputs_and_gradients(backend, dtype, **case), want, allowed)


@pytest.mark.parametrize("bounds", [BOUNDS, [0, 0], [0, 5]])
def test_bounds_that_python_does_not_read(bounds, monkeypatch):
    """The path of GPUs, where nothing may wait for the values."""
    monkeypatch.setattr(
        "statezoo.kernels.selective_scan.chunked.edges", lambda T, cu: _edges.Flagged(T, cu)
    )
    case = {"T": bounds[-1], "bounds": bounds}
    want = outputs_and_gradients("reference", torch.float64, **case)
    assert_close(outputs_and_gradients("torch", torch.float64, **case), want, 1e-12)


def test_closed_form():
    """``y_t = sum_{s <= t} C_t exp(A sum_{s < r <= t} dt_r) dt_s B_s x_s``, as in the paper."""
    x, dt, A, B, C, D, h0 = inputs(12)
    upto = dt.cumsum(1)
    between = upto[:, :, None] - upto[:, None]  # [B t s E]
    decay = (between[..., None] * A).exp() * torch.ones(12, 12).tril()[..., None, None].to(x)
    want = torch.einsum("btn,btsen,bse,bsn->bte", C, decay, dt * x, B) + D * x
    want = want + torch.einsum("btn,bten,ben->bte", C, (upto[..., None] * A).exp(), h0)
    y, _ = selective_scan(x, dt, A, B, C, D, initial_state=h0, backend="reference")
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)


def test_equals_the_layer_of_transformers():
    """MambaMixer without its kernels, rebuilt from our two ops."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    torch.manual_seed(0)
    layer = MambaMixer(MambaConfig(hidden_size=8, state_size=N, num_hidden_layers=1), 0)
    x = torch.randn(2, 20, 8)
    u, z = layer.in_proj(x).chunk(2, -1)
    conv = layer.conv1d
    u, _ = causal_conv1d(u, conv.weight[:, 0], conv.bias, activation="silu", backend="torch")
    r, B, C = layer.x_proj(u).split([layer.time_step_rank, N, N], -1)
    dt = F.softplus(layer.dt_proj(r))
    y, _ = selective_scan(u, dt, -layer.A_log.exp(), B, C, layer.D, backend="torch")
    got, want = layer.out_proj(y * F.silu(z)), layer(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # float32 rounding


def test_negative_eigenvalues_by_hand():
    """A decay of -1/2 alternates: dt A = log(1/4) gives 2/4 - 1."""
    one = torch.ones(1, 3, 1)
    A = torch.tensor([[0.25]]).log()
    for backend in ("reference", "torch"):
        y, _ = selective_scan(
            torch.tensor([1.0, 0, 0]).view(1, 3, 1), one, A, one, one,
            negative_eigenvalues=True, backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(y.flatten(), torch.tensor([1.0, -0.5, 0.25]))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("cut", [0, 1, 16, 20])
def test_split_equals_whole(backend, cut):
    *given, h0 = inputs(20)
    x, dt, A, B, C, D = given
    y, h = selective_scan(*given, initial_state=h0, backend=backend)
    parts, state = [], h0
    for a, b in ((0, cut), (cut, 20)):
        part, state = selective_scan(
            x[:, a:b], dt[:, a:b], A, B[:, a:b], C[:, a:b], D, initial_state=state, backend=backend
        )
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), y)
    torch.testing.assert_close(state, h)


@pytest.mark.parametrize("rate", [0.0, -20.0, -1e4, -1e30])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_extreme_decays_are_finite(backend, rate):
    x, dt, A, B, C, D, h0 = inputs(18, dtype=torch.float32)
    A = torch.full_like(A, rate).requires_grad_()
    y, h = selective_scan(x, dt, A, B, C, D, initial_state=h0, backend=backend)
    grads = torch.autograd.grad(y.sum() + h.sum(), (x, dt, A, B, C, h0))
    assert all(t.isfinite().all() for t in (y, h, *grads))


def test_bfloat16_accumulates_in_float32():
    *given, h0 = inputs(100, dtype=torch.bfloat16)
    y, h = selective_scan(*given, initial_state=h0, backend="torch")
    want, state = selective_scan(
        *(t.double() for t in given), initial_state=h0.double(), backend="reference"
    )
    assert y.dtype == torch.bfloat16
    assert h.dtype == torch.float32
    torch.testing.assert_close(h.double(), state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y, want.bfloat16(), rtol=2**-7, atol=1e-5)  # one rounding


def test_autocast_leaves_the_states_alone():
    *given, h0 = inputs(20, dtype=torch.float32)
    want = selective_scan(*given, initial_state=h0)
    with torch.autocast("cpu", torch.bfloat16):
        got = selective_scan(*given, initial_state=h0)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_gradcheck():
    for bounds in (None, [0, 0, 1, 3, 9]):
        *given, h0 = inputs(9, 2 if bounds is None else 4, bounds is not None)
        cu = None if bounds is None else torch.tensor(bounds)
        assert torch.autograd.gradcheck(
            lambda *z, cu=cu: selective_scan(
                *z[:-1], initial_state=z[-1], cu_seqlens=cu, backend="torch"
            ),
            (*given, h0),
            fast_mode=True,
        )


def test_opcheck():
    *given, h0 = inputs(20)
    torch.library.opcheck(_op.op, (*given, False, h0, None, "torch"))
    torch.library.opcheck(_op.op, (*given[:-1], None, True, h0, None, "torch"))
    *given, h0 = inputs(20, packed=True)
    torch.library.opcheck(_op.op, (*given, False, h0, torch.tensor([0, 3, 20]), "torch"))


def test_compiles_without_a_break():
    run = torch.compile(selective_scan, fullgraph=True, backend="aot_eager", dynamic=True)
    *given, h0 = inputs(20)
    results = [f(*given, initial_state=h0) for f in (run, selective_scan)]
    grads = [torch.autograd.grad(y.sum() + h.sum(), (*given, h0)) for y, h in results]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*grads)


def test_errors():
    x, dt, A, B, C, D, h0 = inputs(9)
    for bad, message in (
        ((x, dt[:, 1:], A, B, C), "dt"),
        ((x, dt, A.mT, B, C), "A"),
        ((x, dt, A, B[..., 1:], C), "B and C"),
        ((x, dt, A, B, C, D[1:]), "D"),
    ):
        with pytest.raises(ValueError, match=message):
            selective_scan(*bad)
    with pytest.raises(ValueError, match="initial_state"):
        selective_scan(x, dt, A, B, C, initial_state=h0.mT)
    with pytest.raises(ValueError, match="T=9"):
        selective_scan(x[:1], dt[:1], A, B[:1], C[:1], cu_seqlens=torch.tensor([0, 7]))
