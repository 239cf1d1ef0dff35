"""What is special to the delta rule; the properties of every op are in test_properties.py."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3_next import modeling_qwen3_next

from statezoo.kernels.gated_delta_rule import _op, chunked, gated_delta_rule, l2_norm

FP64 = 1e-10  # the same sums in another order
FP32 = 1e-5  # roundings of 6e-8, through some 300 steps and inverses with entries up to 2


def inputs(T: int, n: int = 1, gate: str | None = "head", dtype=torch.float64, B: int = 2):
    """Unit keys, write strengths in [0, 2], some of them exactly 0, gates around 0.9."""
    torch.manual_seed(0)
    H, Hv, K, V, steps = 2, 4, 8, 6, (n,) if n > 1 else ()
    double = {"dtype": torch.float64}
    x = {"q": torch.randn(B, T, H, K, **double)}
    x["k"] = F.normalize(torch.randn(B, T, *steps, H, K, **double), dim=-1)
    x["v"] = torch.randn(B, T, *steps, Hv, V, **double)
    x["beta"] = 2 * torch.rand(B, T, *steps, Hv, **double)
    x["beta"][x["beta"] < 0.2] = 0.0
    if gate:
        x["g"] = F.logsigmoid(torch.randn(B, T, Hv, *((K,) if gate == "channel" else ())) + 2)
    x["initial_state"] = torch.randn(B, Hv, K, V, **double)
    return {name: y.to(dtype) for name, y in x.items()}


def results(x: dict[str, Tensor], backend: str, **options) -> dict[str, Tensor]:
    leaves = {name: y.detach().requires_grad_() for name, y in x.items()}
    o, S = gated_delta_rule(**leaves, backend=backend, **options)
    torch.manual_seed(1)
    weights = [torch.randn(y.shape, dtype=torch.float64).to(y) for y in (o, S)]
    loss = (o * weights[0]).sum() + (S * weights[1]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"o": o, "S": S, **{f"d{n}": d for n, d in zip(leaves, grads, strict=True)}}


def assert_near(got: dict[str, Tensor], want: dict[str, Tensor], allowed: float) -> None:
    for name, y in want.items():
        error = ((got[name].double() - y.double()).norm() / y.double().norm()).item()
        assert error <= allowed, f"{name}: relative RMS error {error:.1e}, allowed {allowed:.0e}"


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_hand_worked_numbers(backend):
    # write 4 at half strength to (1, 0): S = (2, 0). Halve: (1, 0), which answers 0.6 to the key
    # (0.6, 0.8); the missing 1.4 is added along it: (1.84, 1.12).
    x = {
        "q": torch.tensor([[1.0, 1.0], [1.0, -1.0]]).view(1, 2, 1, 2),
        "k": torch.tensor([[1.0, 0.0], [0.6, 0.8]]).view(1, 2, 1, 2),
        "v": torch.tensor([4.0, 2.0]).view(1, 2, 1, 1),
        "beta": torch.tensor([0.5, 1.0]).view(1, 2, 1),
        "g": torch.tensor([-3.0, math.log(0.5)]).view(1, 2, 1),
    }
    o, S = gated_delta_rule(**x, scale=10.0, backend=backend)
    torch.testing.assert_close(o.flatten(), torch.tensor([20.0, 7.2]))
    torch.testing.assert_close(S.flatten(), torch.tensor([1.84, 1.12]))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_hand_worked_numbers_of_two_writes_a_token(backend):
    # S = (4, 2) halves once to (2, 1). Reflecting across (1, 0) gives (-2, 1); writing 5 to (0, 1)
    # replaces the 1. Only then is it read: -2 + 5 = 3, by K ** -0.5.
    x = {
        "q": torch.ones(1, 1, 1, 2),
        "k": torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 1, 2, 1, 2),
        "v": torch.tensor([0.0, 5.0]).view(1, 1, 2, 1, 1),
        "beta": torch.tensor([2.0, 1.0]).view(1, 1, 2, 1),
        "g": torch.full((1, 1, 1), math.log(0.5)),
        "initial_state": torch.tensor([4.0, 2.0]).view(1, 1, 2, 1),
    }
    o, S = gated_delta_rule(**x, backend=backend)
    torch.testing.assert_close(o.flatten(), torch.tensor([3 * 2**-0.5]))
    torch.testing.assert_close(S.flatten(), torch.tensor([-2.0, 5.0]))


@pytest.mark.parametrize("T", [2, 31, 33, 100])
@pytest.mark.parametrize(("n", "gate"), list(product([1, 2, 3, 4], [None, "head", "channel"])))
def test_equals_the_recurrence(n, gate, T):
    x = inputs(T, n, gate)
    assert_near(results(x, "torch"), results(x, "reference"), FP64)


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
@pytest.mark.parametrize("n", [1, 5])
def test_chunks_of_every_size(monkeypatch, rows, n):
    monkeypatch.setattr(chunked, "ROWS_CPU", rows)
    monkeypatch.setattr(chunked, "SPAN", 400)
    x = inputs(150, n)
    assert_near(results(x, "torch"), results(x, "reference"), FP64)


@pytest.mark.parametrize("gate", [None, "head", "channel"])
def test_float32_stays_near_the_recurrence_in_float64(gate):
    x = inputs(300, 2, gate, torch.float32)
    want = results({name: y.double() for name, y in x.items()}, "reference")
    assert_near(results(x, "torch"), want, FP32)


def test_memory_that_was_not_written_is_not_read():
    x = inputs(45, 2)
    packed = {name: y[:1] for name, y in x.items()}
    packed["initial_state"] = x["initial_state"].repeat(2, 1, 1, 1)
    cu = torch.tensor([0, 20, 20, 37, 45])
    want = results(x, "torch"), results(packed, "torch", cu_seqlens=cu)
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN
    try:
        got = results(x, "torch"), results(packed, "torch", cu_seqlens=cu)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(got, want, strict=True):
        assert_near(a, b, 0.0)


@pytest.mark.parametrize("groups", [1, 2])
def test_agrees_with_transformers(groups):
    theirs = modeling_qwen3_next.torch_chunk_gated_delta_rule
    theirs = getattr(theirs, "__wrapped__", theirs)  # the wrapper looks for GPU kernels
    x = inputs(100, dtype=torch.float32)
    x = {name: y if name in "qk" else y[..., : 2 * groups, :] for name, y in x.items()} | {
        name: x[name][..., : 2 * groups] for name in ("beta", "g")
    }
    x["initial_state"] = inputs(1, dtype=torch.float32)["initial_state"][:, : 2 * groups]
    want, S_want = theirs(
        x["q"], x["k"], x["v"], x["g"], x["beta"],
        initial_state=x["initial_state"], output_final_state=True,
    )  # fmt: skip
    o, S = gated_delta_rule(**x)
    assert_near({"o": o, "S": S}, {"o": want, "S": S_want}, FP32)


@pytest.mark.parametrize("gate", [None, "head", "channel"])
def test_reflections_at_equal_keys_stay_exact(gate):
    x = inputs(200, 1, gate, torch.float32)
    x["k"] = x["k"][:, :1].expand_as(x["k"]).contiguous()
    x["beta"] = torch.full_like(x["beta"], 2.0)
    want = results({name: y.double() for name, y in x.items()}, "reference")
    # 200 alternating reflections add their roundings where powers of L would reach 1e27
    assert_near(results(x, "torch"), want, 1e-4)


def test_two_reflections_a_token_track_the_rotations_of_the_icosahedron():
    # A5 = <a, b | a^5, b^2, (a b)^3>: a turns by 72 degrees about a vertex, b by 180 about the
    # middle of an edge at it. A turn is the reflections across u1, then u2, half its angle apart.
    vertex = F.normalize(torch.tensor([0.0, 1.0, (1 + 5**0.5) / 2], dtype=torch.float64), dim=0)
    edge = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    across = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)  # perpendicular to both

    def turn(axis: Tensor, degrees: float) -> Tensor:
        half = math.radians(degrees / 2)
        second = math.cos(half) * across + math.sin(half) * torch.linalg.cross(axis, across)
        return torch.stack([across, second])

    keys = torch.stack([turn(vertex, 72), turn(edge, 180)])  # [2 generators, 2 writes, K]
    one = torch.eye(3, dtype=torch.float64)
    H = one - 2 * keys[..., :, None] * keys[..., None, :]
    matrices = H[:, 1] @ H[:, 0]
    a, b = matrices
    for power, identity in ((5, a), (2, b), (3, a @ b)):
        assert torch.allclose(identity.matrix_power(power), one, atol=1e-12)
    word = torch.randint(2, (300,), generator=torch.Generator().manual_seed(0))
    k = keys[word].view(1, 300, 2, 1, 3).float()
    v, beta = torch.zeros_like(k), torch.full((1, 300, 2, 1), 2.0)
    _, S = gated_delta_rule(k[:, :, 0], k, v, beta, initial_state=one.view(1, 1, 3, 3).float())
    want = one
    for letter in word.tolist():
        want = matrices[letter] @ want
    # two elements of the group differ by 0.6 at least; 600 reflections add roundings of 6e-8
    assert torch.allclose(S[0, 0].double(), want, atol=1e-4)


@pytest.mark.parametrize("gate", [None, "head", "channel"])
def test_several_writes_are_one_write_on_a_longer_sequence(gate):
    n, T = 3, 40
    x = inputs(T, n, gate)
    o, S = gated_delta_rule(**x)
    long = {name: x[name].flatten(1, 2) for name in ("k", "v", "beta")}
    last = torch.arange(n) == n - 1
    long["q"] = (x["q"][:, :, None] * last.view(1, 1, n, 1, 1)).flatten(1, 2)
    if gate:
        first = (torch.arange(n) == 0).view(1, 1, n, *[1] * (x["g"].ndim - 2))
        long["g"] = (x["g"][:, :, None] * first).flatten(1, 2)
    o_long, S_long = gated_delta_rule(**long, initial_state=x["initial_state"])
    assert_near({"o": o, "S": S}, {"o": o_long[:, n - 1 :: n], "S": S_long}, FP64)


@pytest.mark.parametrize("gate", [None, "head", "channel"])
def test_one_token_at_a_time_equals_the_whole(gate):
    x = inputs(20, 2, gate)
    o, S_want = gated_delta_rule(**x)
    S = x.pop("initial_state")
    for t in range(20):
        step, S = gated_delta_rule(
            **{name: y[:, t : t + 1] for name, y in x.items()}, initial_state=S
        )
        assert_near({"o": step}, {"o": o[:, t : t + 1]}, FP64)
    assert_near({"S": S}, {"S": S_want}, FP64)


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize(("n", "gate"), [(1, None), (1, "head"), (2, "head"), (2, "channel")])
def test_is_a_well_behaved_operator_of_torch(n, gate, T):
    x = inputs(T, n, gate, B=1)
    k, v, beta = (x[m] if n > 1 else x[m].unsqueeze(2) for m in ("k", "v", "beta"))
    leaves = [x["q"], k, v, beta, x.get("g")]
    cu = torch.tensor([0, 1, 1, T])
    for bounds, N in ((None, 1), (cu, 3)):
        tensors = [y if y is None else y.detach().requires_grad_() for y in leaves]
        S0 = x["initial_state"].repeat(N, 1, 1, 1).requires_grad_()
        torch.library.opcheck(_op.op, (*tensors, 0.5, S0, bounds, "torch"))


@pytest.mark.parametrize(("n", "gate"), [(1, None), (2, "head"), (2, "channel")])
def test_gradients_by_finite_differences(n, gate):
    x = {name: y[..., :2, :] if name in "qk" else y for name, y in inputs(3, n, gate, B=1).items()}
    leaves = [y.requires_grad_() for y in x.values()]

    def run(*values):
        return gated_delta_rule(**dict(zip(x, values, strict=True)), backend="torch")

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_l2_norm():
    torch.testing.assert_close(l2_norm(torch.tensor([3.0, 4.0])), torch.tensor([0.6, 0.8]))
    zero = torch.zeros(3, requires_grad=True)
    (slope,) = torch.autograd.grad(l2_norm(zero).sum(), zero)
    torch.testing.assert_close(slope, torch.full((3,), 1e3))
    assert l2_norm(torch.ones(4, dtype=torch.bfloat16)).dtype == torch.float32
    assert l2_norm(torch.ones(4, dtype=torch.float64)).dtype == torch.float64


def test_mistakes_are_answered_with_what_was_needed():
    x = inputs(5, 2)
    for wrong in (
        {"k": x["k"][:, :, 0]},  # one key, two values a token
        {"beta": x["beta"][..., :1]},
        {"v": x["v"][..., :3, :], "beta": x["beta"][..., :3]},  # three value heads on two
        {name: x[name][:, :, :0] for name in ("k", "v", "beta")},  # no writes
    ):
        with pytest.raises(ValueError, match=r"gated_delta_rule needs q \[B T H K\]"):
            gated_delta_rule(**{**x, **wrong})
    with pytest.raises(ValueError, match="needs g"):
        gated_delta_rule(**{**x, "g": x["g"][..., :1]})
