"""gated_linear_attention against numbers worked by hand and against forms written differently."""

import pytest
import torch
from tests.kernels.harness import make_additive
from torch import Tensor

from statezoo.kernels import gated_linear_attention as package
from statezoo.kernels.gated_linear_attention import gated_linear_attention

HALF = -0.6931471805599453  # ln 1/2


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_two_tokens_worked_by_hand(backend):
    # S_1 = k_1 v_1 = 1*3, 2*3; S_2 = half of it + k_2 v_2 = (1.5 + 1*4, 3 + 0*4); o_t = q_t . S_t
    q = torch.tensor([[1.0, 1.0], [2.0, 1.0]]).view(1, 2, 1, 2)
    k = torch.tensor([[1.0, 2.0], [1.0, 0.0]]).view(1, 2, 1, 2)
    v = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    g = torch.tensor([0.0, HALF]).view(1, 2, 1)
    o, S = gated_linear_attention(q, k, v, g, scale=1.0, backend=backend)
    torch.testing.assert_close(o.flatten(), torch.tensor([9.0, 14.0]))
    torch.testing.assert_close(S.flatten(), torch.tensor([5.5, 3.0]))


def quadratic(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Attention without softmax: every pair of tokens, weighed by the decay between them."""
    T, K = q.shape[1], q.shape[-1]
    c = g.cumsum(1)
    decay = (c[:, :, None] - c[:, None, :]).exp() * torch.ones(T, T).tril()[..., None, None]
    return torch.einsum("bihk,bjhk,bijhk,bjhv->bihv", q, k, decay, v) * K**-0.5


def test_equals_decayed_attention_without_softmax():
    torch.manual_seed(0)
    inputs = make_additive("channel", 1)(2, 40, torch.float64)
    want = quadratic(*(inputs[n] for n in "qkv"), inputs["g"].clamp(min=-3))
    got, _ = gated_linear_attention(*(inputs[n] for n in "qkv"), inputs["g"].clamp(min=-3))
    torch.testing.assert_close(got, want)


def test_scalar_gate_is_the_per_channel_gate_with_equal_channels():
    torch.manual_seed(0)
    inputs = make_additive("head", 2)(2, 70, torch.float64)
    want, S_want = gated_linear_attention(**inputs)
    g = inputs["g"][..., None].expand(*inputs["g"].shape, 8)
    got, S = gated_linear_attention(**{**inputs, "g": g})
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(S, S_want)


def test_state_is_float32_and_scale_counts_once():
    q, k, v = torch.randn(3, 1, 5, 2, 4).bfloat16()
    o, S = gated_linear_attention(q, k, v, scale=2.0)
    half, _ = gated_linear_attention(q, k, v, scale=1.0)
    assert (o.dtype, S.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(o, 2 * half)


@pytest.mark.parametrize("gate", [None, "head", "channel"])
@pytest.mark.parametrize("packed", [False, True])
def test_registration_passes_opcheck(gate, packed):
    inputs = make_additive(gate, 2)(1, 20, torch.float64)
    cu = torch.tensor([0, 20]) if packed else None
    values = [inputs[n].requires_grad_() for n in ("q", "k", "v")]
    g = inputs["g"].requires_grad_() if gate else None
    args = (*values, g, 0.5, inputs["initial_state"].requires_grad_(), cu, "torch")
    torch.library.opcheck(package._op.op, args)


def test_shapes_that_disagree_are_named(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, v = torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 3, 8)
    with pytest.raises(ValueError, match=r"multiple of H.*\(1, 4, 2, 8\).*\(1, 4, 3, 8\)"):
        gated_linear_attention(q, q, v)
    with pytest.raises(ValueError, match=r"g \[B T Hv\]"):
        gated_linear_attention(q, q, q, torch.zeros(1, 4, 1))
    with pytest.raises(ValueError, match="needs tensors on an NVIDIA GPU"):
        gated_linear_attention(q.to("meta"), q.to("meta"), q.to("meta"), backend="triton")


def test_environment_overrides_the_automatic_choice(monkeypatch):
    q = torch.zeros(1, 4, 2, 8)
    monkeypatch.setenv("STATEZOO_BACKEND", "nonsense")
    gated_linear_attention(q, q, q, backend="torch")
    with pytest.raises(ValueError, match="nonsense"):
        gated_linear_attention(q, q, q)
