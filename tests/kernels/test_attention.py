"""Attention: every path equals the printed form, in values and gradients."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from statezoo.kernels.attention import KV, attention, empty, reference

FP64 = 1e-12  # the same sums in another order
VISIBLE = [(None, 0), (1, 0), (3, 0), (3, 2), (1, 1), (200, 0), (4, 9)]
visible = pytest.mark.parametrize(("window", "sinks"), VISIBLE)


def inputs(B, T, H=4, Hkv=2, K=6, V=5, dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    shapes = [(B, T, H, K), (B, T, Hkv, K), (B, T, Hkv, V)]
    return [
        torch.randn(s, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()
        for s in shapes
    ]


def grads(o, qkv):
    weight = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape).roll(3, -1)
    return torch.autograd.grad((o * weight).sum(), qkv, retain_graph=True)


def check(got, want, qkv, allowed=FP64):
    for name, a, b in zip(
        ("o", "dq", "dk", "dv"), (got, *grads(got, qkv)), (want, *grads(want, qkv)), strict=True
    ):
        error = (a - b).abs().max().item()
        assert error < allowed, f"{name}: error {error:.1e}, allowed {allowed:.0e}"


def bounds(sizes):
    return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)


def test_hand_worked():
    q = torch.tensor([0.0, math.log(3.0)]).view(1, 2, 1, 1)
    k = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    v = torch.tensor([8.0, 4.0]).view(1, 2, 1, 1)
    want = torch.tensor([8.0, (3 * 8 + 4) / 4]).view(1, 2, 1, 1)  # weights 3 : 1 at the second
    for o in (attention(q, k, v)[0], reference.run(q, k, v)):
        torch.testing.assert_close(o, want)


@visible
@pytest.mark.parametrize("T", [1, 2, 7, 150])
def test_equals_the_reference(window, sinks, T):
    qkv = inputs(2, T)
    o, _ = attention(*qkv, window=window, sinks=sinks)
    check(o, reference.run(*qkv, window=window, sinks=0 if window is None else sinks), qkv)


@visible
def test_blocks_of_a_long_input(window, sinks):
    qkv = inputs(1, 300, H=1, Hkv=1, K=2, V=2)
    o, _ = attention(*qkv, window=window, sinks=sinks, scale=0.3)
    check(o, reference.run(*qkv, 0.3, window, 0 if window is None else sinks), qkv)


@visible
@pytest.mark.parametrize("cuts", [[1] * 11, [4, 7], [0, 1, 5, 0, 5], [2, 9], [10, 1]])
def test_any_split_equals_the_whole(window, sinks, cuts):
    qkv = inputs(2, 11)
    past, out = None, []
    for parts in zip(*(x.split(cuts, 1) for x in qkv), strict=True):
        o, past = attention(*parts, window=window, sinks=sinks, past=past)
        out.append(o)
    check(torch.cat(out, 1), attention(*qkv, window=window, sinks=sinks)[0], qkv)
    most = 11 if window is None else min(11, window - 1 + sinks)
    assert past.length.tolist() == [most] * 2


@visible
@pytest.mark.parametrize("sizes", [[3, 0, 5, 1], [0, 9], [1, 1, 1], [9]])
def test_packed_equals_separate(window, sinks, sizes):
    qkv = inputs(1, sum(sizes))
    o, present = attention(*qkv, window=window, sinks=sinks, cu_seqlens=bounds(sizes))
    assert present is None
    check(o, reference.run(*qkv, None, window, 0 if window is None else sinks, bounds(sizes)), qkv)


@visible
def test_packed_pieces_hand_over_to_each_other_and_to_a_batch(window, sinks):
    first, second, then = [3, 0, 6], [2, 4, 0], 2
    whole = [inputs(1, a + b + then, seed=i) for i, (a, b) in enumerate(zip(first, second))]  # noqa: B905
    past = empty(3, 2, 6, 5, whole[0][0], window=window, sinks=sinks)
    out = [[] for _ in whole]
    start = [0, 0, 0]
    for sizes in (first, second):
        cuts = [slice(s, s + n) for s, n in zip(start, sizes, strict=True)]
        packed = [
            torch.cat([x[i][:, c] for x, c in zip(whole, cuts, strict=True)], 1) for i in range(3)
        ]
        o, past = attention(
            *packed, window=window, sinks=sinks, cu_seqlens=bounds(sizes), past=past
        )
        for i, piece in enumerate(o.split(sizes, 1)):
            out[i].append(piece)
        start = [s + n for s, n in zip(start, sizes, strict=True)]
    last = [torch.cat([x[i][:, -then:] for x in whole]) for i in range(3)]
    o, past = attention(*last, window=window, sinks=sinks, past=past)
    for i, qkv in enumerate(whole):
        want = reference.run(*qkv, window=window, sinks=0 if window is None else sinks)
        check(torch.cat([*out[i], o[i : i + 1]], 1), want, qkv)
    kept = [7, 6, 8] if window is None else [min(n, window - 1 + sinks) for n in (7, 6, 8)]
    assert past.length.tolist() == kept


def test_window_keeps_a_state_of_one_size():
    shapes = set()
    for T in (1, 5, 40):
        _, past = attention(*inputs(2, T), window=4, sinks=2)
        shapes.add(past.k.shape)
    assert shapes == {(2, 5, 2, 6)}


@pytest.mark.parametrize("window", [None, 3])
def test_causal_and_isolated(window):
    q, k, v = inputs(2, 9)
    o, _ = attention(q, k, v, window=window)
    dk, dv = torch.autograd.grad(o[0, 4].sum(), (k, v))
    for d in (dk, dv):
        assert not d[1].any()
        assert not d[0, 5:].any()
        first = 0 if window is None else 4 - window + 1
        assert not d[0, :first].any()
    assert dv[0, first:5].abs().sum(-1).min() > 0


def test_gradcheck_through_the_past():
    qkv = inputs(1, 5, H=2, Hkv=1, K=2, V=3)

    def run(q, k, v):
        _, past = attention(q[:, :3], k[:, :3], v[:, :3], window=3, sinks=1)
        return attention(q[:, 3:], k[:, 3:], v[:, 3:], window=3, sinks=1, past=past)[0]

    assert gradcheck(run, qkv)


@pytest.mark.parametrize("window", [None, 4])
def test_bfloat16(window):
    qkv = inputs(2, 20)
    half = [x.to(torch.bfloat16) for x in qkv]
    o, past = attention(*half, window=window)
    assert o.dtype == past.k.dtype == torch.bfloat16
    want = reference.run(*(x.double() for x in half), window=window)
    assert (o - want).abs().max() < 0.02  # bfloat16 has 8 bits, values up to 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a | {"k": a["k"][:, :3]}, "q \\[B T H K\\]"),
        (lambda a: a | {"q": a["q"][:, :, :3]}, "multiple of Hkv"),
        (lambda a: a | {"window": 0}, "window >= 1"),
        (lambda a: a | {"window": 2, "sinks": -1}, "sinks >= 0"),
        (lambda a: a | {"cu_seqlens": bounds([4])}, "B = 1"),
        (lambda a: a | {"past": empty(2, 2, 6, 5, a["q"]), "window": 3}, "another window"),
        (lambda a: a | {"past": empty(3, 2, 6, 5, a["q"])}, "past needs"),
    ],
)
def test_says_what_is_wrong(change, words):
    q, k, v = inputs(2, 4)
    with pytest.raises(ValueError, match=words):
        attention(**change({"q": q, "k": k, "v": v}))


def test_past_is_left_as_it_was():
    q, k, v = inputs(2, 6)
    _, past = attention(q, k, v, window=4)
    before = KV(*(x.clone() for x in past))
    attention(q, k, v, window=4, past=past)
    assert all(torch.equal(a, b) for a, b in zip(past, before, strict=True))
