"""linear_cross_entropy against torch's own cross-entropy over all logits."""

import pytest
import torch
import torch.nn.functional as F

from statezoo.kernels.linear_cross_entropy import _op, linear_cross_entropy

M, D, W = 37, 8, 19
REDUCTIONS = ["mean", "sum", "none"]


def inputs(dtype=torch.float64, ignored=5, grad=True):
    torch.manual_seed(0)
    x = torch.randn(M, D, dtype=dtype, requires_grad=grad)
    weight = torch.randn(W, D, dtype=dtype, requires_grad=grad)
    targets = torch.randint(W, (M,))
    targets[torch.randperm(M)[:ignored]] = -100
    return x, weight, targets


def dense(x, weight, targets, reduction):
    wide = torch.promote_types(x.dtype, torch.float32)
    loss = F.cross_entropy((x @ weight.mT).to(wide), targets, reduction="none")
    if reduction == "none":
        return loss
    return loss.sum() / ((targets != -100).sum() if reduction == "mean" else 1)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("chunk", [None, 1, 10, 100])
@pytest.mark.parametrize("ignored", [0, 5, M - 1])
def test_equals_cross_entropy_over_all_logits(reduction, chunk, ignored):
    x, weight, targets = inputs(ignored=ignored)
    want = dense(x, weight, targets, reduction)
    got = linear_cross_entropy(x, weight, targets, reduction=reduction, chunk=chunk)
    scale = torch.randn_like(want)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(got, (x, weight), scale),
        torch.autograd.grad(want, (x, weight), scale),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("which", [0, 1])
def test_one_gradient_alone(reduction, which):
    """A frozen head, or frozen features."""
    pair = inputs()
    targets = pair[2]
    loose = [pair[i] if i == which else pair[i].detach() for i in (0, 1)]
    got = linear_cross_entropy(*loose, targets, reduction=reduction).sum()
    want = dense(*loose, targets, reduction).sum()
    (a,), (b,) = (torch.autograd.grad(loss, pair[which]) for loss in (got, want))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_leading_axes(reduction):
    x, weight, targets = inputs()
    flat = linear_cross_entropy(x[:36], weight, targets[:36], reduction=reduction)
    got = linear_cross_entropy(
        x[:36].view(2, 18, D), weight, targets[:36].view(2, 18), reduction=reduction
    )
    assert got.shape == ((2, 18) if reduction == "none" else ())
    torch.testing.assert_close(got.flatten(), flat.flatten())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_scored(reduction):
    x, weight, _ = inputs()
    loss = linear_cross_entropy(x, weight, torch.full((M,), -100), reduction=reduction)
    loss.sum().backward()
    assert (loss == 0).all()
    assert (x.grad == 0).all()
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_tokens(reduction):
    weight = torch.randn(W, D, requires_grad=True)
    loss = linear_cross_entropy(
        torch.zeros(2, 0, D), weight, torch.zeros(2, 0, dtype=torch.long), reduction=reduction
    )
    loss.sum().backward()
    assert loss.sum() == 0
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bfloat16_sums_in_float32(reduction):
    """Only the products are rounded: 2^-8 relative on each of D of them."""
    x, weight, targets = inputs(torch.bfloat16)
    got = linear_cross_entropy(x, weight, targets, reduction=reduction)
    wide = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    want = dense(*wide, targets, reduction)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=2e-2)
    got.sum().backward()
    want.sum().backward()
    for a, b in zip((x, weight), wide, strict=True):
        assert a.grad.dtype == torch.bfloat16
        assert (a.grad.double() - b.grad).norm() < 1e-2 * b.grad.norm()


def test_autocast_and_mixed_dtypes():
    x, weight, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, targets)
        half = linear_cross_entropy(x.detach().bfloat16(), weight, targets)
    loss.backward()
    assert loss.dtype == half.dtype == torch.float32
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(loss, half)
    torch.testing.assert_close(half, linear_cross_entropy(x.bfloat16(), weight.bfloat16(), targets))


def test_large_logits_are_finite():
    x, weight, targets = inputs(torch.float32)
    loss = linear_cross_entropy(x * 1e4, weight, targets)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("bad", [-1, W])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_target_out_of_range(bad, reduction):
    x, weight, targets = inputs()
    targets[3] = bad
    with pytest.raises(ValueError, match=rf"target {bad} at token 3 .* 0\.\.18"):
        linear_cross_entropy(x, weight, targets, reduction=reduction)


def test_errors():
    x, weight, targets = inputs()
    with pytest.raises(ValueError, match="weight"):
        linear_cross_entropy(x, weight.mT, targets)
    with pytest.raises(ValueError, match="int targets"):
        linear_cross_entropy(x, weight, targets[:-1])
    with pytest.raises(ValueError, match="reduction"):
        linear_cross_entropy(x, weight, targets, reduction="avg")
    with pytest.raises(ValueError, match="chunk"):
        linear_cross_entropy(x, weight, targets, chunk=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction):
    x, weight, targets = inputs()
    assert torch.autograd.gradcheck(
        lambda x, w: linear_cross_entropy(x, w, targets, reduction=reduction, chunk=10),
        (x, weight),
        fast_mode=True,
    )


def test_opcheck():
    x, weight, targets = inputs()
    torch.library.opcheck(_op.total, (x, weight, targets, -100, 10, True, True))
    torch.library.opcheck(_op.total, (x.detach(), weight, targets, -100, 10, False, True))
    torch.library.opcheck(_op.per_token, (x, weight, targets, -100, 10))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiles_without_a_break(reduction):
    x, weight, targets = inputs()
    run = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    got = run(x, weight, targets, reduction=reduction)
    torch.testing.assert_close(got, linear_cross_entropy(x, weight, targets, reduction=reduction))
    for a, b in zip(
        torch.autograd.grad(got.sum(), (x, weight)),
        torch.autograd.grad(dense(x, weight, targets, reduction).sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
