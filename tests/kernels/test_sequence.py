"""Sequence parallelism: ops on slices of time in several processes equal the op on the whole."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.kernels.harness import CASES, Case, make_conv, randn
from tests.kernels.sharded import Layout, compare, together
from torch.utils.checkpoint import checkpoint

from statezoo.kernels.attention import attention
from statezoo.kernels.causal_conv1d import causal_conv1d
from statezoo.kernels.gated_linear_attention import gated_linear_attention
from statezoo.kernels.sequence import Shard, Slice, current, traffic

FP64 = 1e-10  # the same sums in another order, over some 100 tokens
FP32 = 2e-5  # as for extreme gates in test_properties.py


def attend(q, k, v, cu_seqlens, backend, **options):
    """Attention as an op with a state: the keys kept for the next call."""
    o, present = attention(q, k, v, cu_seqlens=cu_seqlens, **options)
    if present is None:
        return o, o.new_zeros(len(cu_seqlens) - 1, 1)
    return o, present.k


def make_attention(B, T, dtype, H=4, kv=2, K=6, V=5):
    """Inputs of ``attention`` with shared heads."""
    q, k, v = randn(B, T, H, K, dtype=dtype), randn(B, T, kv, K, dtype=dtype), (B, T, kv, V)
    return {"q": q, "k": k, "v": randn(*v, dtype=dtype)}


def mix(x, weight, bias, initial_state, cu_seqlens, backend):
    """A layer: three convolutions side by side, a memory, a convolution behind it."""
    args = {"cu_seqlens": cu_seqlens, "backend": backend}
    convs = [causal_conv1d(x, i * weight, bias, activation="silu", **args)[0] for i in (1, 2, 3)]
    q, k, v = (y[:, :, None] for y in convs)
    o, _ = gated_linear_attention(q, k, v, F.logsigmoid(v[..., 0]), **args)
    return causal_conv1d(o[:, :, 0], weight, initial_state=initial_state, **args)


def attention_case(name, **options):
    """A case of :func:`attend`."""
    return Case(f"attention-{name}", attend, make_attention, options=tuple(options.items()))


EVERY = {case.name: case for case in (
    *CASES,
    attention_case("all"),
    attention_case("window", window=7),
    attention_case("sinks", window=7, sinks=2, scale=0.4),
    attention_case("wide", window=10_000),
    Case("layer", mix, make_conv(), parameters=("weight", "bias")),
)}  # fmt: skip
FEW = [
    "additive-no_gate-2", "additive-head_gate-2", "additive-channel_gate-1",
    "delta-no_gate-1", "delta-head_gate-2", "delta3-channel_gate",
    "scan", "scan-negative", "conv-silu", "attention-all", "attention-sinks", "layer",
]  # fmt: skip
OPS = {
    "additive": "gated_linear_attention", "delta": "gated_delta_rule", "delta3": "gated_delta_rule",
    "scan": "selective_scan", "conv": "causal_conv1d", "attention": "attention",
}  # fmt: skip


def layouts(size, T):
    """Sequences and documents that cross none, one and all of the boundaries between slices."""
    third, total = T // 3, T * size
    return [
        Layout("batch", T),
        Layout("documents-cross_each", T, (third, *[T] * (size - 1), T - third)),
        Layout("documents-end_at_boundaries", T, (third, 0, T - third, *[0, T] * (size - 1), 0)),
        Layout("documents-memories", T, (third, total - third - 2, 2), memories=3),
        Layout("batch-memories", 3, memories=4),
        Layout("documents-tiny", 2, (0, 1, 2 * size - 2, 0, 1)),
        Layout("batch-of_one_token", 1),
        Layout("batch-of_two_tokens", 2),
        Layout("batch-more_memories", T, memories=3),
        Layout("documents-cross_all", T, (third, total - third - 1, 1)),
        Layout("documents-one", T, (total,)),
        Layout("documents-empty", T, (0, third, 0, total - third - 3, 0, 3, 0)),
        Layout("documents-few_tokens_memories", 2, (1, 2 * size - 1), memories=3),
    ]


def fits(case, layout):
    """Attention has no memories; the layer's state has no memories of its own to check."""
    return not (layout.memories and case.op is attend)


def run_all(names, backend, dtype, gate, T, first=None):
    """Compare in this process: errors by case and layout, and collectives that were not one."""
    errors, odd = {}, []
    for name in names:
        case = EVERY[name]
        for i, layout in enumerate(layouts(dist.get_world_size(), T)[:first]):
            if not fits(case, layout):
                continue
            found, log = compare(case, layout, backend, dtype, gate, seed=i)
            errors |= {(name, layout.name, tensor): e for tensor, e in found.items()}
            count = Counter((entry.op, entry.direction) for entry in log)
            want = {(OPS.get(name.split("-")[0]), way): 1 for way in ("forward", "backward")}
            if name == "layer":
                want = {(op, way): n for op, n in (("causal_conv1d", 4), (OPS["additive"], 1))
                        for way in ("forward", "backward")}  # fmt: skip
            if count != want:
                odd.append((name, layout.name, dict(count)))
    return errors, odd


def check(results, allowed):
    """All errors of all processes are within what is allowed, and no collective was in excess."""
    for rank, (errors, odd) in enumerate(results):
        assert not odd
        wrong = {key: e for key, e in errors.items() if not e <= allowed}
        assert errors
        assert not wrong, f"rank {rank}: {wrong}"


def two_processes():
    """What CI runs, all in one pair of processes."""
    exact = [run_all(FEW, "torch", torch.float64, None, 11, 6)]
    exact += [run_all(["delta-head_gate-2", "scan"], "reference", torch.float64, None, 5, 4)]
    gated = [n for n in FEW if EVERY[n].gate]
    exact += [run_all(gated, "torch", torch.float64, gate, 9, 4) for gate in (0.0, -20.0, -1e4)]
    single = run_all(FEW, "torch", torch.float32, None, 5, 2)
    return exact, single, volumes(FEW), mistakes(), recomputed()


def volumes(names):
    """Bytes that each op sends, forward and backward, on slices of 12 and of 48 tokens."""
    of = {}
    for name in names:
        for T in (12, 48):
            layout = Layout("batch", T)
            log = compare(EVERY[name], layout, "torch", torch.float64, None, seed=0)[1]
            of.setdefault(name, []).append(sorted(log))
    return of


def mistakes():
    """Messages of what is refused, by what was wrong."""
    rank, size = dist.get_rank(), dist.get_world_size()
    x = torch.zeros(1, 6, 2, 2)
    cu, packed = torch.tensor([0, 3, 4, 6 * size]), torch.tensor([0, 2, 6])
    found = {}

    def refused(what, run):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            run()
        found[what] = str(error.value)

    refused("lengths", lambda: Shard(None, 6 + rank))
    refused("none", lambda: Shard(None, 0))
    refused("documents", lambda: Shard(None, 6, torch.tensor([0, 1 + rank, 6 * size])))
    refused("bounds", lambda: Shard(None, 6, torch.tensor([0, 6])))
    refused("take", lambda: Shard(None, 6).take(x))
    with Shard(None, 6):
        present = attention(x, x, x)[1]
        refused("past", lambda: attention(x, x, x, past=present))
        refused("packed attention", lambda: attention(x, x, x, cu_seqlens=packed))
        refused("tokens", lambda: causal_conv1d(x[:, :5, 0], torch.ones(2, 3)))
    with Shard(None, 6, cu):
        refused("not packed", lambda: gated_linear_attention(x, x, x))
        if len(current().cu_seqlens) == 4:
            refused("sequences", lambda: gated_linear_attention(x, x, x, cu_seqlens=packed))
    assert current() is None
    return found


def recomputed():
    """Gradients with and without recomputation in the backward pass."""
    torch.manual_seed(0)
    case, T = EVERY["layer"], 9
    inputs = {n: x.requires_grad_() for n, x in case.make(1, T, torch.float64).items()}
    shard = Shard(None, T)

    def run():
        with shard:
            return case.run(inputs, "torch")

    results = []
    for o, S in (run(), checkpoint(run, use_reentrant=False)):
        results.append(torch.autograd.grad((o * o).sum() + S.sum(), list(inputs.values())))
    return results


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What :func:`two_processes` returned in each."""
    return together(two_processes, 2, tmp_path_factory.mktemp("pair") / "run")


def test_slices_equal_the_whole(pair):
    for part in zip(*(exact for exact, *_ in pair), strict=True):
        check(part, FP64)
    check([single for _, single, *_ in pair], FP32)


def test_one_collective_each_way_of_a_size_without_T(pair):
    for _, _, volume, _, _ in pair:
        for name, (short, long) in volume.items():
            if "attention-" in name:
                assert [x.bytes * 4 for x in short] == [x.bytes for x in long]
                assert [x.collective for x in short] == ["reduce_scatter", "all_gather"]
            else:
                assert short == long
                assert {x.collective for x in short} == {"all_gather"}
        (_, forward) = volume["additive-head_gate-2"][0]
        assert forward.bytes == 8 * 2 * (4 * 8 * 6 + 4)  # float64; B=2, 4 heads, K=8, V=6; a decay


def test_mistakes_are_answered_on_every_process(pair):
    for rank, (*_, found, _) in enumerate(pair):
        assert found["lengths"].startswith("Shard needs slices of one length of at least 1")
        assert "T = 6, 7 on ranks 0 to 1" in found["lengths"]
        assert "T = 0, 0" in found["none"]
        assert "alike on all processes" in found["documents"]
        assert "rise from 0 to 2 slices of T=6, 12, got [0, 6]" in found["bounds"]
        assert "2 slices of 6 tokens along axis 1, 12 in all, got (1, 6, 2, 2)" in found["take"]
        assert "leave the Shard, or give no past" in found["past"]
        assert "a Shard of 6 tokens, with no cu_seqlens, got 6 tokens" in found["packed attention"]
        assert found["tokens"] == "causal_conv1d: inside a Shard of T=6 tokens, got 5."
        assert "it needs cu_seqlens" in found["not packed"]
        assert rank or "needs the 3 documents of the Shard's slice" in found["sequences"]


def test_recomputed_activations_give_the_same_gradients(pair):
    for *_, (plain, again) in pair:
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_no_processes_are_refused():
    with pytest.raises(ValueError, match="start with torchrun"):
        Shard(None, 4)


def test_documents_of_slices():
    assert Slice.of(None, 6, 9) == ([0, 3], 6, 1)
    bounds = [0, 0, 4, 12, 12, 15, 15]  # slices of 3: the second document ends inside the second
    assert [Slice.of(bounds, a, a + 3) for a in range(0, 15, 3)] == [
        ([0, 0, 3], 0, 1),
        ([0, 1, 3], 3, 6),
        ([0, 3], 2, 3),
        ([0, 3], 5, 0),
        ([0, 0, 3, 3], 0, 0),
    ]


def test_traffic_is_noted_only_while_open():
    with traffic() as outer, traffic() as inner:
        pass
    assert outer == inner == []


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("T", [17, 40])
def test_every_op_on_any_number_of_processes(tmp_path, size, T):
    args = (list(EVERY), "torch", torch.float64, None, T)
    check(together(run_all, size, tmp_path / "all", *args), FP64)
