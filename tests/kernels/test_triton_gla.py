"""The fused kernels of gated_linear_attention against the recurrence in float64."""

import pytest
import torch
from tests.kernels.fused import BF16, DEVICE, FP32, bfloat16_products, compare
from tests.kernels.harness import Case, bounds, make_additive

from statezoo.kernels.gated_linear_attention import _op, gated_linear_attention

GATES = [None, "head", "channel"]


def case(gate, groups=1, **widths):
    make = make_additive(gate, groups, **{"H": 1, **widths})
    return Case("additive", gated_linear_attention, make, gate="g" if gate else None)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("T", "groups", "K", "V"), [(1, 2, 20, 40), (70, 2, 20, 40), (33, 1, 72, 5)]
)
def test_equals_the_recurrence_in_outputs_state_and_gradients(gate, T, groups, K, V):
    torch.manual_seed(0)
    tested = case(gate, groups, K=K, V=V)
    compare(tested, tested.make(2, T, torch.float32), FP32)


@pytest.mark.parametrize("gate", GATES)
def test_packed_sequences_of_any_length(gate):
    torch.manual_seed(0)
    tested, sizes = case(gate, K=8, V=24), [17, 0, 1, 40, 0, 12]
    inputs = tested.make(1, sum(sizes), torch.float32)
    inputs["initial_state"] = tested.make(len(sizes), 1, torch.float32)["initial_state"]
    compare(tested, inputs, FP32, bounds(sizes))


@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize(("value", "share"), [(0.0, 1.0), (-20.0, 0.3), (-1e4, 0.3), (-1e4, 1.0)])
def test_extreme_gates(gate, value, share):
    torch.manual_seed(0)
    tested = case(gate)
    inputs = tested.make(1, 70, torch.float32)
    inputs["g"][torch.rand_like(inputs["g"]) < share] = value
    # sums of some 20 clamped gates (800) have float32 steps of 6e-5 in the exponent
    compare(tested, inputs, 1e-4)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.usefixtures(bfloat16_products.__name__)
def test_bfloat16_operands(gate):
    torch.manual_seed(0)
    tested = case(gate, K=32, V=16)
    compare(tested, tested.make(1, 70, torch.bfloat16), BF16)


def test_other_dtypes_and_strides():
    torch.manual_seed(0)
    tested = case("head", H=2)
    inputs = tested.make(1, 20, torch.float32)
    inputs |= {"q": inputs["q"].half(), "v": inputs["v"].mT.contiguous().mT}
    compare(tested, inputs, 1e-3)  # the gradient of q is rounded to float16, 2^-11


@pytest.mark.parametrize("packed", [False, True])
def test_registration_passes_opcheck(packed):
    inputs = make_additive("head", 2)(1, 20, torch.float32)
    inputs = {n: x.to(DEVICE).requires_grad_() for n, x in inputs.items()}
    cu = torch.tensor([0, 20], device=DEVICE) if packed else None
    args = [inputs[n] for n in ("q", "k", "v", "g")]
    torch.library.opcheck(_op.op, (*args, 0.5, inputs["initial_state"], cu, "triton"))


def test_nothing_to_do_and_too_wide():
    q = torch.zeros(2, 0, 1, 8, device=DEVICE)
    S0 = torch.randn(2, 1, 8, 8, device=DEVICE)
    o, S = gated_linear_attention(q, q, q, initial_state=S0, backend="triton")
    assert o.shape == q.shape
    assert torch.equal(S, S0)
    q = torch.zeros(1, 2, 1, 257, device=DEVICE)
    with pytest.raises(ValueError, match="up to 256"):
        gated_linear_attention(q, q, q, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("K", "V"), [(64, 64), (128, 128), (256, 256), (100, 200)])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-4), (torch.bfloat16, BF16)])
def test_real_sizes(gate, K, V, dtype, allowed):
    torch.manual_seed(0)
    tested = case(gate, 2, K=K, V=V, H=2)
    compare(tested, tested.make(2, 1000, dtype), allowed)
    sizes = [1, 0, 300, 699]
    inputs = tested.make(1, 1000, dtype)
    inputs["initial_state"] = tested.make(len(sizes), 1, dtype)["initial_state"]
    compare(tested, inputs, allowed, bounds(sizes))
