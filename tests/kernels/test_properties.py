"""What must hold for every op and every backend (DESIGN section 2)."""

import pytest
import torch
from beartype import beartype
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jaxtyping import jaxtyped
from tests.kernels.harness import CASES, Case, assert_close, bounds, separately

FP64 = 1e-10  # the same sums in another order, over up to 150 tokens
ANY = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
lengths = st.integers(1, 150)
packings = st.lists(
    st.sampled_from([0, 1, 2, 3, 15, 16, 17, 40, 65]), min_size=1, max_size=6
).filter(any)


def inputs_of(case: Case, B: int, T: int, seed: int, dtype: torch.dtype = torch.float64):
    torch.manual_seed(seed)
    return case.make(B, T, dtype)


def packed_inputs(case: Case, sizes: list[int], seed: int, dtype: torch.dtype = torch.float64):
    inputs = inputs_of(case, 1, sum(sizes), seed, dtype)
    inputs["initial_state"] = inputs_of(case, len(sizes), 1, seed, dtype)["initial_state"]
    return inputs


@each_case
@ANY
@given(T=lengths, B=st.integers(1, 3), seed=st.integers(0, 99))
def test_equals_the_recurrence_in_outputs_state_and_gradients(case, T, B, seed):
    inputs = inputs_of(case, B, T, seed)
    before = {name: x.clone() for name, x in inputs.items()}
    assert_close(case.all_of(inputs, "torch"), case.all_of(inputs, "reference"), FP64)
    assert all(torch.equal(x, before[name]) for name, x in inputs.items()), "an input was changed"


@each_case
@ANY
@given(sizes=packings, seed=st.integers(0, 99))
def test_packed_equals_separate_in_values_and_gradients(case, sizes, seed):
    inputs = packed_inputs(case, sizes, seed)
    got = case.all_of(inputs, "torch", bounds(sizes))
    want = case.all_of(inputs, "reference", bounds(sizes))
    assert_close(got, want, FP64)
    alone = separately(case, inputs, sizes, "reference")
    assert_close({n: got[n] for n in alone}, alone, FP64)


@each_case
@ANY
@given(T=st.integers(2, 150), part=st.floats(0, 1), seed=st.integers(0, 99))
def test_split_equals_whole(case, T, part, seed):
    inputs = inputs_of(case, 2, T, seed)
    cut = round(part * T)
    everyone = slice(None)
    first, S = case.run(case.at(inputs, slice(cut), everyone, inputs["initial_state"]), "torch")
    second, S = case.run(case.at(inputs, slice(cut, None), everyone, S), "torch")
    o, want = case.run(inputs, "torch")
    assert_close({"o": torch.cat([first, second], 1), "S": S}, {"o": o, "S": want}, FP64)


@each_case
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_is_causal_and_keeps_samples_apart(case, backend):
    inputs, other = inputs_of(case, 2, 90, 0), inputs_of(case, 2, 90, 1)
    edited = {
        name: x if name in case.parameters or name == "initial_state" else x.clone()
        for name, x in inputs.items()
    }
    for name, x in edited.items():
        if name not in case.parameters and name != "initial_state":
            x[1, 37:] = other[name][1, 37:]
    (o, S), (o2, S2) = case.run(inputs, backend), case.run(edited, backend)
    assert torch.equal(o[0], o2[0])
    assert torch.equal(S[0], S2[0])
    assert_close({"before": o2[1, :37]}, {"before": o[1, :37]}, 1e-13)
    assert not torch.allclose(o[1, 37:], o2[1, 37:])


@each_case
def test_fused_backend_equals_the_recurrence(case):
    device = "cuda" if torch.cuda.is_available() else "cpu"  # there in Triton's interpreter
    inputs, cu = packed_inputs(case, [0, 1, 17, 3], 0), bounds([0, 1, 17, 3])
    want = case.all_of(inputs, "reference", cu)
    narrow = {name: x.float().to(device) for name, x in inputs.items()}
    got = case.all_of(narrow, "triton", cu.to(device))
    # float32 products of some 20 steps, of strength to 2
    assert_close({name: x.cpu() for name, x in got.items()}, want, 2e-5)


@pytest.mark.parametrize("gate", [0.0, -20.0, -1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", [c for c in CASES if c.gate], ids=lambda c: c.name)
def test_extreme_gates(case, gate, dtype):
    inputs = inputs_of(case, 1, 70, 0)
    torch.manual_seed(0)
    inputs[case.gate][torch.rand_like(inputs[case.gate]) < 0.3] = gate
    want = case.all_of(inputs, "reference")
    got = case.all_of({n: x.to(dtype) for n, x in inputs.items()}, "torch")
    # float32: roundings of 6e-8, multiplied some 100 times by 70 delta steps of strength to 2
    assert_close(got, want, FP64 if dtype == torch.float64 else 2e-5)


@each_case
def test_gradients_by_finite_differences(case):
    inputs = inputs_of(case, 1, 5, 0)
    leaves = [x.requires_grad_() for x in inputs.values()]

    def run(*values):
        return case.run(dict(zip(inputs, values, strict=True)), "torch")

    assert torch.autograd.gradcheck(run, leaves)


@each_case
def test_bfloat16_inputs_accumulate_in_float32(case):
    inputs = inputs_of(case, 2, 100, 0, torch.bfloat16)
    o, S = case.run(inputs, "torch")
    want, S_want = case.run({n: x.double() for n, x in inputs.items()}, "reference")
    assert o.dtype == torch.bfloat16
    assert S.dtype == torch.float32
    # the inputs are the same numbers, so only the rounding of the output (2^-9) is left
    assert_close({"o": o, "S": S}, {"o": want, "S": S_want}, 4e-3)


@each_case
def test_compiles_without_a_graph_break(case):
    torch._dynamo.reset()
    inputs = {n: x.requires_grad_() for n, x in inputs_of(case, 1, 20, 0).items()}
    compiled = torch.compile(lambda i: case.run(i, "torch"), fullgraph=True, backend="aot_eager")

    def all_of(run):
        o, S = run(inputs)
        return o, S, *torch.autograd.grad(o.square().sum() + S.square().sum(), inputs.values())

    for got, want in zip(all_of(compiled), all_of(lambda i: case.run(i, "torch")), strict=True):
        assert torch.equal(got, want)


@each_case
def test_no_tokens_hand_the_state_on(case):
    inputs = inputs_of(case, 2, 0, 0)
    for backend in ("reference", "torch"):
        o, S = case.run(inputs, backend)
        assert o.shape[1] == 0
        assert torch.equal(S, inputs["initial_state"])


@each_case
def test_shapes_are_those_of_the_signature(case):
    checked = jaxtyped(case.op, typechecker=beartype)
    for cu, inputs in (
        (None, inputs_of(case, 2, 9, 0)),
        (bounds([4, 5]), packed_inputs(case, [4, 5], 0)),
    ):
        checked(**inputs, **dict(case.options), cu_seqlens=cu)


@each_case
def test_mistakes_are_answered_with_what_was_needed(case):
    inputs = inputs_of(case, 2, 9, 0)
    with pytest.raises(ValueError, match="B = 1"):
        case.run(inputs, "torch", bounds([4, 5]))
    with pytest.raises(ValueError, match="backend"):
        case.run(inputs, "cuda")
    with pytest.raises(ValueError, match="initial_state"):
        case.run({**inputs, "initial_state": inputs["initial_state"][:1]}, "torch")
    packed = packed_inputs(case, [4, 5], 0)
    with pytest.raises(ValueError, match="rise from 0 to T"):
        case.run(packed, "torch", torch.tensor([0, 5, 8]))
