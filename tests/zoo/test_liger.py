"""Liger against a band mask and explicit loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from statezoo.zoo import StateZooConfig, StateZooForCausalLM
from statezoo.zoo.attention import SCALING, Attention, stretch
from statezoo.zoo.liger import Liger

FP64 = 1e-10  # rounding alone
D, H, WINDOW = 24, 4, 5
K = D // H
KINDS = ["gla", "gated_deltanet", "mamba2"]


def rotary(x, base=10000.0):
    """Positions as complex numbers: channel i is the real part, i + K/2 the imaginary one."""
    T = x.shape[-2]
    rate = base ** (-torch.arange(K // 2, dtype=x.dtype) * 2 / K)
    turn = torch.polar(torch.ones(T, K // 2, dtype=x.dtype), torch.arange(T)[:, None] * rate)
    y = torch.complex(*x.chunk(2, -1)) * turn
    return torch.cat([y.real, y.imag], -1)


def recall(kind, q, k, v):
    """The recurrence as printed, a step per token; everything is ``[B H T K]``."""
    gate = k.sigmoid() ** (1 / 16)
    if kind != "gla":
        gate = gate.log().mean(-1, keepdim=True).exp().expand_as(k)
    beta, step = k.sigmoid().mean(-1), F.softplus(-k).mean(-1)
    if kind == "gated_deltanet":
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    else:
        q, k = q.softmax(-1), k.softmax(-1)
    S, out = torch.zeros(*q.shape[:2], K, K, dtype=q.dtype), []
    for t in range(q.shape[2]):
        S = gate[:, :, t, :, None] * S
        key, value = k[:, :, t, :, None], v[:, :, t, None]
        if kind == "gated_deltanet":
            value = beta[:, :, t, None, None] * (value - key.mT @ S)
        if kind == "mamba2":
            value = step[:, :, t, None, None] * value
        S = S + key * value
        out.append((q[:, :, t, None] @ S)[:, :, 0])
    return torch.stack(out, 2)


def explicit(mixer, x, kv_heads, kind="gla", weights=(0.5, 0.5)):
    """The layer as printed: torch's attention under a band mask, and a step per token."""
    q, k, v = (
        y.unflatten(-1, (n, K)).transpose(1, 2).repeat_interleave(H // n, 1)
        for y, n in (
            (mixer.q_proj(x), H), (mixer.k_proj(x), kv_heads), (mixer.v_proj(x), kv_heads),
        )
    )  # fmt: skip
    if not isinstance(mixer.q_norm, torch.nn.Identity):
        q, k = (
            F.normalize(y, dim=-1) * K**0.5 * norm.weight
            for y, norm in ((q, mixer.q_norm), (k, mixer.k_norm))
        )
    age = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    near = F.scaled_dot_product_attention(
        rotary(q), rotary(k), v, attn_mask=(age >= 0) & (age < WINDOW)
    )
    y = weights[0] * near + weights[1] * recall(kind, q, k, v)
    return mixer.o_proj(y.transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("kv_heads", "qk_norm"), [(4, False), (2, True), (1, False)])
def test_is_band_attention_and_a_gated_loop(kind, kv_heads, qk_norm):
    torch.manual_seed(0)
    settings = {"n_kv_heads": kv_heads, "qk_norm": qk_norm, "norm_eps": 0.0}
    mixer = Liger(D, n_heads=H, window=WINDOW, recurrence=kind, **settings).double()
    x = torch.randn(2, 23, D, dtype=torch.float64, requires_grad=True)
    got, want = mixer(x)[0], explicit(mixer, x, kv_heads, kind)
    # l2_norm adds 1e-6 to the squared length, 2: keys and queries differ by 1e-7 of themselves
    allowed = 3e-6 if kind == "gated_deltanet" else FP64
    torch.testing.assert_close(got, want, atol=allowed, rtol=allowed)
    weight, wrt = torch.randn_like(got), [x, *mixer.parameters()]
    pairs = zip(*(torch.autograd.grad((y * weight).sum(), wrt) for y in (got, want)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=100 * allowed, rtol=allowed)


@pytest.mark.parametrize("kind", KINDS)
def test_an_arm_alone_has_weight_one(kind):
    torch.manual_seed(0)
    x = torch.randn(2, 12, D, dtype=torch.float64)
    for arm, weights in (("recurrence", (0, 1)), ("window", (1, 0))):
        mixer = Liger(D, n_heads=H, window=WINDOW, recurrence=kind, arm=arm).double()
        want = explicit(mixer, x, H, kind, weights)
        torch.testing.assert_close(mixer(x)[0], want, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("arm", ["both", "recurrence", "window"])
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_keeps_window_and_memory(kind, arm):
    torch.manual_seed(0)
    mixer = Liger(D, n_heads=H, n_kv_heads=2, window=WINDOW, recurrence=kind, arm=arm).double()
    x = torch.randn(2, 14, D, dtype=torch.float64)
    want, out, state = mixer(x)[0], [], mixer.initial_state(2, x)
    for token in x.split(1, 1):
        y, state = mixer(token, state)
        out.append(y)
        assert (state.window is None) == (arm == "recurrence")
        assert (state.S is None) == (arm == "window")
        assert arm == "recurrence" or state.window.kv.k.shape[1] == WINDOW - 1
    torch.testing.assert_close(torch.cat(out, 1), want, atol=FP64, rtol=FP64)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_and_padded_are_separate(kind):
    torch.manual_seed(0)
    entry = {"name": "liger", "n_heads": H, "n_kv_heads": 2, "window": 3, "recurrence": kind}
    config = StateZooConfig(d_model=D, n_layers=2, vocab_size=9, mixers=[entry])
    net = StateZooForCausalLM(config).double().eval()
    ids = [torch.randint(9, (1, n)) for n in (5, 11)]
    want = [net(part).logits[0] for part in ids]
    packed = net(torch.cat(ids, 1), cu_seqlens=torch.tensor([0, 5, 16])).logits[0]
    torch.testing.assert_close(packed, torch.cat(want), atol=FP64, rtol=FP64)
    both = torch.stack([F.pad(ids[0][0], (6, 0)), ids[1][0]])
    mask = torch.ones_like(both)
    mask[0, :6] = 0
    padded = net(both, attention_mask=mask).logits
    torch.testing.assert_close(padded[0, 6:], want[0], atol=FP64, rtol=FP64)
    torch.testing.assert_close(padded[1], want[1], atol=FP64, rtol=FP64)


def test_positions_are_stretched_as_in_llama():
    rate = torch.tensor([1.0, 2 * math.pi / 40, 2 * math.pi / 1e5])  # waves of 6, 40 and 1e5 tokens
    assert torch.equal(stretch(rate, {"factor": 4.0}), rate / 4)
    scaling = dict(zip(SCALING, (8.0, 1.0, 4.0, 64), strict=True))
    kept = (64 / 40 - 1) / (4 - 1)
    want = rate * torch.tensor([1.0, kept + (1 - kept) / 8, 1 / 8])
    torch.testing.assert_close(stretch(rate, scaling), want)


def test_takes_the_weights_of_attention():
    settings = {"n_heads": H, "n_kv_heads": 2, "qkv_bias": True}
    teacher, student = Attention(D, **settings), Liger(D, **settings)
    student.load_state_dict(teacher.state_dict())
    x = torch.randn(1, 1, D)
    v = student.v_proj(x).unflatten(-1, (2, K)).repeat_interleave(2, 2)
    q, k = (
        p(x).unflatten(-1, (-1, K)).repeat_interleave(n, 2).softmax(-1)
        for p, n in ((student.q_proj, 1), (student.k_proj, 2))
    )
    y = 0.5 * v + 0.5 * (q * k).sum(-1, keepdim=True) * v  # the first token: attention reads v
    torch.testing.assert_close(student(x)[0], student.o_proj(y.flatten(-2)))


def test_a_trained_model_fits():
    sizes = {"d_model": D, "n_layers": 2, "vocab_size": 9}
    teacher, student = (
        StateZooForCausalLM(StateZooConfig(mixers=[name], **sizes))
        for name in ("attention", "liger")
    )
    student.load_state_dict(teacher.state_dict())


def test_says_what_does_not_fit():
    with pytest.raises(ValueError, match="even head width, at least 2; got 3"):
        Liger(D, n_heads=8)
    with pytest.raises(ValueError, match="window=0"):
        Liger(D, window=0)
    with pytest.raises(ValueError, match="rope_scaling needs a factor above 0, alone or with low"):
        Liger(D, rope_scaling={"factor": 2.0, "low_freq_factor": 1.0})
    with pytest.raises(TypeError, match=r"liger.recurrence: expected .*got str 'retnet'"):
        StateZooConfig(mixers=[{"name": "liger", "recurrence": "retnet"}])
