"""Whole nets on slices of time, every mixer, against the same nets on one process."""

import os
import time
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from tests.zoo.cases import CASES, WORDS, make, tokens

from statezoo.kernels.sequence import Shard, traffic
from statezoo.zoo import (
    MIXERS,
    StateZooForMaskedLM,
    StateZooForSequenceClassification,
    StateZooForTokenClassification,
    with_head,
)
from statezoo.zoo.auxiliary import auxiliary_loss

ALLOWED = 1e-10  # float64, the same sums in another order; of the larger of 1 and the value
T = 24  # tokens on all processes
LAYOUTS = {  # sequences, or bounds of documents: with 2 slices of 12, 4 of 6
    "batch": None,
    "packed": [0, 3, 17, 19, 24],  # one document on two slices, or three
    "at a bound": [0, 5, 12, 12, 13, 24],  # one ends where a slice does, one is empty
}
SHORT = [
    "attention-window", "gla-conv", "liger-deltanet", "mom-gla", "mom-mamba2", "mom-retnet",
    "ngram_heads-window",
]  # fmt: skip
RECOMPUTED = ["gla-conv", "hybrid-mom", "mamba3", "ngram_heads"]
EVERY = [name for name, m in MIXERS.items() if m.__module__.startswith("statezoo.zoo.")]
CI = {"batch": EVERY, "packed": [*EVERY, *SHORT]}
LEARNT = ["gla-conv", "mamba3", "liger", "mom"]


def loss_of(net, ids, targets, cu_seqlens):
    """Logits, and the summed loss as tasks have it: what mixers say beside counts as often."""
    out = net.model(ids, cu_seqlens=cu_seqlens)
    logits = net.lm_head(out.last_hidden_state)
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    beside = auxiliary_loss(out.auxiliary or {})
    return logits, nats if beside is None else nats + beside * targets.numel(), out.auxiliary


def run(net, layout, shard=None):
    """Logits, loss, gradients by name, and what was said beside: of the whole, or of a slice."""
    net.zero_grad()
    bounds = LAYOUTS[layout]
    ids, targets = (tokens(2 if bounds is None else 1, T, seed) for seed in (1, 2))
    cu = None if bounds is None else torch.tensor(bounds)
    if shard is not None:
        ids, targets, cu = shard.take(ids), shard.take(targets), shard.cu_seqlens
    with shard or nullcontext():
        logits, loss, said = loss_of(net, ids, targets, cu)
    loss.backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
             for name, p in net.named_parameters()}  # fmt: skip
    return logits.detach(), loss.detach(), grads, said


def worst(got, want):
    """Largest error, of the larger of 1 and the value; infinite where there is a NaN."""
    error = ((got - want).abs() / want.abs().clamp(min=1)).max().item()
    return error if error == error else float("inf")


def compare(net, layout):
    """Errors by name of all that slices give together; the same on all processes."""
    want_logits, want_loss, want_grads, want_said = run(net, layout)
    bounds = LAYOUTS[layout]
    cu = None if bounds is None else torch.tensor(bounds)
    shard = Shard(None, T // dist.get_world_size(), cu)
    logits, loss, grads, said = run(net, layout, shard)
    errors = {"logits": worst(logits, shard.take(want_logits))}
    dist.all_reduce(loss)
    errors["loss"] = worst(loss, want_loss)
    for name, grad in grads.items():
        dist.all_reduce(grad)
        errors[name] = worst(grad, want_grads[name])
    for layer, values in (said or {}).items():
        for name, value in values.items():
            errors[f"{name}/{layer}"] = worst(value, want_said[layer][name])
    return errors


def cells(names):
    """Nets to compare, by name: of each case, with learnt initial states, recomputed."""
    for layout, cases in names.items():
        for name in cases:
            yield f"{name}, {layout}", make(name), layout
    for name in LEARNT:
        yield f"{name}, learnt", make(name, initial_states=1), "packed"
    for name in RECOMPUTED:
        net = make(name)
        old = net.gradient_checkpointing_enable  # its name up to transformers 5.22
        getattr(net, "activation_checkpointing_enable", old)()
        yield f"{name}, recomputed", net, "batch"


def work(rank, size, folder, names):
    """What each process does."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    found = {name: compare(net.train(), layout) for name, net, layout in cells(names)}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def together(size, folder, names, seconds):
    """Errors on all processes, by cell, then by name."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    processes = mp.start_processes(
        work, (size, str(folder), names), size, join=False, start_method="spawn"
    )
    until = time.monotonic() + seconds
    try:
        while not processes.join(max(until - time.monotonic(), 0.1)):
            assert time.monotonic() < until, f"not done after {seconds} s"
    finally:
        for process in processes.processes:
            process.kill()
    found = [torch.load(folder / f"{rank}.pt") for rank in range(size)]
    return {cell: {n: max(each[cell][n] for each in found) for n in found[0][cell]}
            for cell in found[0]}  # fmt: skip


def assert_equal_to_one_process(found):
    wrong = {
        f"{cell}: {name}": f"{error:.1e}"
        for cell, errors in found.items()
        for name, error in errors.items()
        if not error < ALLOWED
    }
    assert not wrong, wrong


def test_every_mixer_on_two_processes(tmp_path):
    found = together(2, tmp_path, CI, 600)
    assert len(found) == sum(map(len, CI.values())) + len(LEARNT) + len(RECOMPUTED)
    assert_equal_to_one_process(found)
    assert {"logits", "loss", "router_balance/0"} < found["mom, batch"].keys()


@pytest.mark.slow
def test_every_case_on_four_processes(tmp_path):
    cases = [case for case in CASES if not case.startswith("configs/")]
    names = {"batch": EVERY, "packed": cases, "at a bound": cases}
    assert_equal_to_one_process(together(4, tmp_path, names, 1800))


@pytest.fixture
def one(tmp_path):
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_what_needs_whole_sequences_is_refused(one):
    net, ids, mask = make("gla"), tokens(1, 8), torch.ones(1, 8, dtype=torch.long)
    cache = net(ids, use_cache=True).past_key_values
    refused = {
        "attention_mask": "pack the sequences without their padding",
        "use_cache": "carry states on, or generate, on one process",
        "past_key_values": "slices run side by side",
        "labels": "targets that are shifted already with shard.take",
    }
    given = dict(zip(refused, (mask, True, cache, ids), strict=True))
    with Shard(None, 8):
        for name, words in refused.items():
            with pytest.raises(ValueError, match=rf"^{name} needs whole sequences, .*{words}"):
                net(ids, **{name: given[name]})
        for kind in (StateZooForMaskedLM, StateZooForTokenClassification):
            other = kind(net.config).double()
            with pytest.raises(ValueError, match=r"^labels needs whole sequences"):
                other(ids, labels=ids)
            assert other(ids).logits.shape[:2] == ids.shape
        classify = with_head(net, StateZooForSequenceClassification, num_labels=2)[0]
        with pytest.raises(ValueError, match=r"^pooling needs .* classify each sequence on one"):
            classify(ids)
        both = make("gla", kind=StateZooForMaskedLM, bidirectional=True)
        with pytest.raises(ValueError, match=r"^bidirectional needs .* reads both ways on one"):
            both(ids)
        strands = make("gla", kind=StateZooForMaskedLM, complement=[*range(WORDS)][::-1])
        with pytest.raises(ValueError, match=r"^complement needs .* both strands on one process"):
            strands(ids)
    assert net(ids, labels=ids, attention_mask=mask, use_cache=True).loss.isfinite()


def test_another_slice_is_refused(one):
    net, cu = make("gla"), torch.tensor([0, 3, 8])
    with Shard(None, 8):
        with pytest.raises(ValueError, match=r"slices of 8 tokens, unpacked, but .* got 7 tokens"):
            net(tokens(1, 7))
        with pytest.raises(ValueError, match=r"8 tokens, packed: give it shard.take"):
            net(tokens(1, 8), cu_seqlens=cu)
    with Shard(None, 8, cu) as shard:
        with pytest.raises(ValueError, match=r"8 tokens, packed, but the net got 8 tokens, unpack"):
            net(tokens(1, 8))
        with pytest.raises(ValueError, match=r"the slice has 2 documents, but cu_seqlens bounds 1"):
            net(tokens(1, 8), cu_seqlens=cu[[0, 2]])
        assert net(tokens(1, 8), cu_seqlens=shard.cu_seqlens).logits.isfinite().all()


def test_a_mixture_tells_its_traffic(one):
    net = make("mom-retnet", n_layers=1).train()
    with traffic() as sent, Shard(None, 8):
        loss_of(net, tokens(2, 8), tokens(2, 8), None)[1].backward()
    ours = [(x.op, x.direction, x.bytes) for x in sent if x.op in ("router", "positions")]
    memories, each = 3 + 1, 8
    counts = 2 * memories * each  # of two sequences
    sums = (2 * 3 + 1) * each
    assert ours == [
        ("router", "forward", sums), ("positions", "forward", counts), ("router", "backward", sums)
    ]  # fmt: skip
