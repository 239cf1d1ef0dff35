"""Liger against a band mask and an explicit loop."""

import pytest
import torch
import torch.nn.functional as F

from statezoo.zoo import StateZooConfig, StateZooForCausalLM
from statezoo.zoo.attention import Attention
from statezoo.zoo.liger import Liger

FP64 = 1e-10  # rounding alone
D, H, WINDOW = 24, 4, 5
K = D // H


def rotary(x, base=10000.0):
    """Positions as complex numbers: channel i is the real part, i + K/2 the imaginary one."""
    T = x.shape[-2]
    rate = base ** (-torch.arange(K // 2, dtype=x.dtype) * 2 / K)
    turn = torch.polar(torch.ones(T, K // 2, dtype=x.dtype), torch.arange(T)[:, None] * rate)
    y = torch.complex(*x.chunk(2, -1)) * turn
    return torch.cat([y.real, y.imag], -1)


def explicit(mixer, x, kv_heads):
    """The layer as printed: torch's attention under a band mask, and a step per token."""
    q, k, v = (
        y.unflatten(-1, (n, K)).transpose(1, 2).repeat_interleave(H // n, 1)
        for y, n in (
            (mixer.q_proj(x), H), (mixer.k_proj(x), kv_heads), (mixer.v_proj(x), kv_heads),
        )
    )  # fmt: skip
    age = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    near = F.scaled_dot_product_attention(
        rotary(q), rotary(k), v, attn_mask=(age >= 0) & (age < WINDOW)
    )
    alpha = k.sigmoid() ** (1 / 16)
    q, k = q.softmax(-1), k.softmax(-1)
    S, far = torch.zeros(x.shape[0], H, K, K, dtype=x.dtype), []
    for t in range(x.shape[1]):
        S = alpha[:, :, t, :, None] * S + k[:, :, t, :, None] * v[:, :, t, None]
        far.append((q[:, :, t, None] @ S)[:, :, 0])
    y = (0.5 * near + 0.5 * torch.stack(far, 2)).transpose(1, 2).flatten(-2)
    return mixer.o_proj(y)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_is_band_attention_and_a_gated_loop(kv_heads):
    torch.manual_seed(0)
    mixer = Liger(D, n_heads=H, n_kv_heads=kv_heads, window=WINDOW).double()
    x = torch.randn(2, 23, D, dtype=torch.float64, requires_grad=True)
    got, want = mixer(x)[0], explicit(mixer, x, kv_heads)
    torch.testing.assert_close(got, want, atol=FP64, rtol=FP64)
    weight, wrt = torch.randn_like(got), [x, *mixer.parameters()]
    pairs = zip(*(torch.autograd.grad((y * weight).sum(), wrt) for y in (got, want)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=FP64, rtol=FP64)


def test_decoding_keeps_the_window():
    torch.manual_seed(0)
    mixer = Liger(D, n_heads=H, window=WINDOW).double()
    x = torch.randn(2, 14, D, dtype=torch.float64)
    want, out, state = explicit(mixer, x, H), [], mixer.initial_state(2, x)
    for token in x.split(1, 1):
        y, state = mixer(token, state)
        out.append(y)
        assert state.window.kv.k.shape[1] == WINDOW - 1
    torch.testing.assert_close(torch.cat(out, 1), want, atol=FP64, rtol=FP64)


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
