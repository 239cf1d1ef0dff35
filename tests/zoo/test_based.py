"""BASED against its quadratic form, written out."""

import pytest
import torch
import torch.nn.functional as F

from statezoo.zoo.base_conv import BaseConv
from statezoo.zoo.based import Based, taylor

FP64 = 1e-10  # rounding alone
D, H, d = 24, 3, 6


def quadratic(mixer, x):
    """Every weight of every pair, without state."""
    q, k, v = (
        y.unflatten(-1, (H, -1)).transpose(1, 2)
        for y in (mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x))
    )
    s = q @ k.mT / d**0.5
    weight = (1 + s + s**2 / 2).tril()
    return mixer.o_proj((weight @ v / weight.sum(-1, keepdim=True)).transpose(1, 2).flatten(-2))


def test_features_make_the_taylor_series():
    q, k = torch.randn(2, 50, 16, dtype=torch.float64)
    s = (q * k).sum(-1) / 4
    assert taylor(q).shape == (50, 153)
    torch.testing.assert_close((taylor(q) * taylor(k)).sum(-1), 1 + s + s**2 / 2)


@pytest.mark.parametrize("T", [1, 16, 75])
def test_is_the_quadratic_form(T):
    torch.manual_seed(0)
    mixer = Based(D, n_heads=H, feature_dim=d).double()
    x = torch.randn(2, T, D, dtype=torch.float64, requires_grad=True)
    got, want = mixer(x)[0], quadratic(mixer, x)
    torch.testing.assert_close(got, want, atol=FP64, rtol=FP64)
    weight, wrt = torch.randn_like(got), [x, *mixer.parameters()]
    pairs = zip(*(torch.autograd.grad((y * weight).sum(), wrt) for y in (got, want)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=FP64, rtol=FP64)


def test_float32_is_close_to_the_quadratic_form():
    torch.manual_seed(0)
    mixer = Based(D, n_heads=H, feature_dim=d)
    x = 4 * torch.randn(2, 300, D)
    want = quadratic(mixer.double(), x.double())
    error = (mixer.float()(x)[0] - want).norm() / want.norm()
    assert error < 1e-5


def test_weights_stay_bounded_over_many_tokens():
    torch.manual_seed(0)
    mixer = Based(D, n_heads=H, feature_dim=d)
    x = torch.randn(1, 1, D).expand(1, 4096, D)
    for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, 5e-3)):  # rounding alone
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16), torch.no_grad():
            y = mixer(x)[0].float()
        assert (y - y[:, :1]).abs().max() < allowed * y.abs().max()  # a mean of equal values


def test_gated_convolution_is_what_its_equation_says():
    mixer = BaseConv(D).double()
    x = torch.randn(2, 9, D, dtype=torch.float64)
    u, z = (x @ mixer.in_proj.weight.T).chunk(2, -1)
    u = F.conv1d(F.pad(u.mT, (2, 0)), mixer.conv.weight, groups=2 * D).mT
    torch.testing.assert_close(mixer(x)[0], (F.silu(u) * z) @ mixer.out_proj.weight.T)
    assert mixer.in_proj.out_features == 4 * D


def test_says_what_does_not_fit():
    with pytest.raises(ValueError, match="multiple of n_heads=5"):
        Based(D, n_heads=5)
    with pytest.raises(ValueError, match="d_conv=0"):
        BaseConv(D, d_conv=0)
