"""The fused kernels of gated_delta_rule against the recurrence in float64."""

import pytest
import torch
import torch.nn.functional as F
from tests.kernels.fused import BF16, DEVICE, FP32, bfloat16_products, compare
from tests.kernels.harness import Case, bounds, make_delta

from statezoo.kernels.gated_delta_rule import _op, gated_delta_rule

GATES = [None, "head", "channel"]


def case(gate, groups=1, **widths):
    make = make_delta(gate, groups, **{"H": 1, **widths})
    return Case("delta", gated_delta_rule, make, gate="g" if gate else None)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("T", "groups", "n", "K", "V"),
    [(1, 2, 1, 8, 6), (1, 1, 2, 20, 40), (70, 1, 1, 8, 24), (36, 2, 1, 72, 5), (11, 1, 3, 8, 6)],
)
def test_equals_the_recurrence_in_outputs_state_and_gradients(gate, T, groups, n, K, V):
    torch.manual_seed(0)
    tested = case(gate, groups, n=n, K=K, V=V)
    compare(tested, tested.make(2 if T < 20 else 1, T, torch.float32), FP32)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("n", [1, 2])
def test_packed_sequences_of_any_length(gate, n):
    torch.manual_seed(0)
    tested, sizes = case(gate, n=n), [17, 0, 1, 12, 0]
    inputs = tested.make(1, sum(sizes), torch.float32)
    inputs["initial_state"] = tested.make(len(sizes), 1, torch.float32)["initial_state"]
    compare(tested, inputs, FP32, bounds(sizes))


@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize("value", [-20.0, -1e4])
def test_extreme_gates(gate, value):
    torch.manual_seed(0)
    tested = case(gate)
    inputs = tested.make(1, 70, torch.float32)
    inputs["g"][torch.rand_like(inputs["g"]) < 0.3] = value
    # sums of some 20 clamped gates (800) have float32 steps of 6e-5 in the exponent
    compare(tested, inputs, 1e-4)


@pytest.mark.parametrize("gate", [None, "head"])
def test_equal_keys_at_full_strength(gate):
    # powers of L reach 1e28 here, its inverse 2
    torch.manual_seed(0)
    tested = case(gate)
    inputs = tested.make(1, 64, torch.float32)
    inputs["k"] = inputs["k"][:, :1].expand(1, 64, 1, 8).contiguous()
    inputs["beta"] = torch.full_like(inputs["beta"], 2.0)
    compare(tested, inputs, FP32)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.usefixtures(bfloat16_products.__name__)
def test_bfloat16_operands(gate):
    torch.manual_seed(0)
    tested = case(gate, K=32, V=16)
    compare(tested, tested.make(1, 70, torch.bfloat16), 2 * BF16)  # keys are rounded twice


@pytest.mark.usefixtures(bfloat16_products.__name__)
def test_unit_keys_in_float32_stay_unit_with_bfloat16_values():
    # one key, written to 300 times at beta = 2: of length 1.003 as bfloat16, 1.003^600 = 6
    torch.manual_seed(0)
    tested = case(None, groups=2, K=4, V=4)
    inputs = tested.make(1, 300, torch.bfloat16)
    key = F.normalize(torch.tensor([-0.2448, -0.5805, 0.5334, 0.5645]), dim=0)
    inputs["k"] = key.expand(1, 300, 1, 4).contiguous()
    inputs["beta"] = torch.full((1, 300, 2), 2.0)
    # 300 undamped reflections gather bfloat16's roundings: 3e-2 with keys exact in it, 6e-2
    # with this one; 8 and more if its length were off
    compare(tested, inputs, 0.1)


@pytest.mark.parametrize("packed", [False, True])
def test_registration_passes_opcheck(packed):
    inputs = make_delta("head", 1)(1, 18, torch.float32)
    inputs = {n: x.to(DEVICE).requires_grad_() for n, x in inputs.items()}
    cu = torch.tensor([0, 18], device=DEVICE) if packed else None
    k, v, beta = (inputs[n].detach().unsqueeze(2).requires_grad_() for n in ("k", "v", "beta"))
    args = (inputs["q"], k, v, beta, inputs["g"], 0.5, inputs["initial_state"], cu, "triton")
    torch.library.opcheck(_op.op, args)


def test_nothing_to_do():
    q = torch.zeros(2, 0, 1, 8, device=DEVICE)
    S0 = torch.randn(2, 1, 8, 8, device=DEVICE)
    o, S = gated_delta_rule(q, q, q, q[..., 0], initial_state=S0, backend="triton")
    assert o.shape == q.shape
    assert torch.equal(S, S0)


@pytest.mark.gpu
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(("K", "V"), [(64, 64), (128, 128), (256, 256), (100, 200)])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-4), (torch.bfloat16, 2 * BF16)])
def test_real_sizes(gate, n, K, V, dtype, allowed):
    torch.manual_seed(0)
    tested = case(gate, 2, n=n, K=K, V=V, H=2)
    compare(tested, tested.make(2, 500, dtype), allowed)
    sizes = [1, 0, 200, 299]
    inputs = tested.make(1, 500, dtype)
    inputs["initial_state"] = tested.make(len(sizes), 1, dtype)["initial_state"]
    compare(tested, inputs, allowed, bounds(sizes))
