"""n-gram heads against sets made by loops from the equation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.zoo.cases import make, tokens

from statezoo.datamodules.synthetic import make_task
from statezoo.kernels.ngram_mean import _op, ngram_mean
from statezoo.lightning_modules.flops import count_flops
from statezoo.zoo import StateZooConfig, StateZooForCausalLM, build_mixer
from statezoo.zoo.initial_state import learnt_state

D = 5
FP64 = {"atol": 1e-9, "rtol": 1e-9}  # the same sums in another order


def by_sets(h, ids, n):
    """Means ``[T D]`` of one sequence: M_t = {j+1 : j+1 < t, x_{j-n+1..j} = x_{t-n+1..t}}."""
    means = []
    for t in range(len(ids)):
        last = ids[t - n + 1 : t + 1] if t - n + 1 >= 0 else None
        found = set()
        for j in range(n - 1, t):
            if j + 1 < t and ids[j - n + 1 : j + 1] == last:
                found.add(j + 1)
        rows = [h[s] for s in sorted(found)]
        means.append(torch.stack(rows).mean(0) if rows else torch.zeros_like(h[0]))
    return torch.stack(means)


def in_window(h, ids, n, window):
    """The same where nothing was before the last ``window`` tokens."""
    return torch.stack(
        [
            by_sets(h[max(t + 1 - window, 0) : t + 1], ids[max(t + 1 - window, 0) : t + 1], n)[-1]
            for t in range(len(ids))
        ]
    )


def stream(B, T, words=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(words, (B, T), generator=draw)
    return torch.randn(B, T, D, dtype=torch.float64, generator=draw).requires_grad_(), ids


def assert_values_and_gradients(h, got, want):
    torch.testing.assert_close(got, want, **FP64)
    weight = torch.linspace(-1, 1, got.numel(), dtype=got.dtype).sin().view_as(got)
    a, b = (torch.autograd.grad((y * weight).sum(), h, retain_graph=True)[0] for y in (got, want))
    torch.testing.assert_close(a, b, **FP64)
    assert b.any()


@pytest.mark.parametrize("chunk", [1, 4, 128])
@pytest.mark.parametrize("words", [1, 2, 4, 1000])
@pytest.mark.parametrize("orders", [[1], [2], [3], [1, 2, 3], [3, 1]])
def test_means_are_those_of_the_sets(orders, words, chunk, monkeypatch):
    monkeypatch.setattr(_op, "CHUNK", chunk)
    h, ids = stream(2, 21, words)
    ids[:, 12:18] = ids[:, 2:8]  # at least one long copy
    want = torch.stack(
        [
            torch.cat([by_sets(x, row.tolist(), n) for n in orders], -1)
            for x, row in zip(h, ids, strict=True)
        ]
    )
    assert_values_and_gradients(h, ngram_mean(h, ids, orders=orders), want)


@pytest.mark.parametrize("window", [3, 5, 9, 40])
def test_a_window_hides_all_that_was_before_it(window, monkeypatch):
    monkeypatch.setattr(_op, "CHUNK", 4)
    h, ids = stream(1, 23, 2)
    rows = [in_window(h[0], ids[0].tolist(), n, window) for n in (1, 2, 3)]
    got = ngram_mean(h, ids, orders=[1, 2, 3], window=window)
    assert_values_and_gradients(h, got, torch.cat(rows, -1)[None])


@pytest.mark.parametrize("window", [None, 6])
def test_packed_sequences_are_apart(window):
    sizes = [4, 0, 11, 1, 7]
    h, ids = stream(1, sum(sizes), 2)
    parts = zip(h[0].split(sizes), ids[0].split(sizes), strict=True)
    want = [
        torch.cat([in_window(x, row.tolist(), n, window or 99) for n in (1, 2, 3)], -1)
        for x, row in parts
        if len(row)
    ]
    bounds = torch.tensor([0, *sizes]).cumsum(0)
    got = ngram_mean(h, ids, orders=[1, 2, 3], window=window, cu_seqlens=bounds)
    assert_values_and_gradients(h, got, torch.cat(want)[None])


@pytest.mark.parametrize("window", [4, 6])
def test_a_pack_does_not_match_across_its_bounds_at_high_orders(window):
    """Where both n-grams begin in the sequence before, alike."""
    h, ids = stream(1, 12, 1)
    bounds = torch.tensor([0, 6, 12])
    got = ngram_mean(h, ids, orders=[5], cu_seqlens=bounds)
    want = torch.cat([by_sets(x, [0] * 6, 5) for x in h[0].split(6)])
    torch.testing.assert_close(got[0], want, **FP64)
    assert not got[0, 6:11].any()


def test_a_run_of_one_token_by_hand():
    """x = a a a a, h = 1 2 4 8: M_3 = {1, 2} at order 1, never t itself though x_{t-1} = x_t."""
    h = torch.tensor([1.0, 2.0, 4.0, 8.0])[None, :, None]
    got = ngram_mean(h, torch.zeros(1, 4, dtype=torch.long), orders=[1, 2, 3])
    assert got[0].tolist() == [[0, 0, 0], [0, 0, 0], [2, 0, 0], [3, 4, 0]]


def test_induction_by_hand():
    """x = a b c a b, h = 1 2 4 8 16: after a comes b's 2; after b, and a b, comes c's 4."""
    h = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])[None, :, None]
    got = ngram_mean(h, torch.tensor([[0, 1, 2, 0, 1]]), orders=[1, 2, 3])
    assert got[0].tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 0], [2, 0, 0], [4, 4, 0]]


def test_large_numbers_before_do_not_cost_digits():
    """No difference of sums over all tokens: 1e8 elsewhere would leave float32 no digit here."""
    h = torch.tensor([1e8, 1e8, 0.1, 0.3, 0.2])[None, :, None]
    ids = torch.tensor([[7, 7, 1, 0, 1]])
    assert ngram_mean(h, ids, orders=[1])[0, 4].item() == torch.tensor(0.3).item()
    long = torch.full((1, 3000, 1), 0.1)
    got = ngram_mean(long, torch.zeros(1, 3000, dtype=torch.long), orders=[1])
    torch.testing.assert_close(got[:, 2:], long[:, 2:], atol=0, rtol=2e-5)  # 3000 roundings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_summed_in_long_ones(dtype):
    """In 8 bits a sum of 256 ones stays 256 for ever; beyond 65504, 16-bit floats are infinite."""
    h = torch.full((1, 900, 1), 100.0, dtype=dtype, requires_grad=True)
    got = ngram_mean(h, torch.zeros(1, 900, dtype=torch.long), orders=[1])
    assert got.dtype == dtype
    assert (got[:, 2:] == 100).all()
    (d,) = torch.autograd.grad(got.float().sum(), h)
    want = sum(1 / (t - 1) for t in range(2, 900))  # token 1 is in every set from t = 2 on
    assert d.dtype == dtype
    assert d[0, 1].item() == pytest.approx(want, rel=0.01)


def explicit(mixer, x, ids):
    """The equation of the mixer for one sequence, each order with its own part of the weights."""
    y = x @ mixer.h_proj.weight.T
    for n, W in zip(mixer.orders, mixer.a_proj.weight.chunk(len(mixer.orders), 1), strict=True):
        y = y + in_window(x, ids.tolist(), n, mixer.window or 99) @ W.T
    return y


@pytest.mark.parametrize(
    "settings", [{}, {"orders": [1]}, {"orders": [3, 1]}, {"orders": [2], "window": 7}]
)
def test_the_mixer_is_its_equation(settings):
    torch.manual_seed(0)
    mixer = build_mixer({"name": "ngram_heads", **settings}, D).double()
    h, ids = stream(2, 15, 2)
    want = torch.stack([explicit(mixer, x, row) for x, row in zip(h, ids, strict=True)])
    y, _ = mixer(h, None, None, ids)
    assert_values_and_gradients(h, y, want)
    state = mixer.initial_state(2, h)
    out = []
    for part, row in zip(h.split([6, 1, 8], 1), ids.split([6, 1, 8], 1), strict=True):
        y, state = mixer(part, state, None, row)
        out.append(y)
    assert_values_and_gradients(h, torch.cat(out, 1), want)
    kept = 15 if mixer.window is None else mixer.window - 1
    assert torch.equal(state.ids, ids[:, 15 - kept :])
    assert torch.equal(state.h, h[:, 15 - kept :])
    assert sum(x[0].nbytes for x in state) == mixer.state_size(15)


def test_three_layers_of_one_order_are_three_mixers():
    names = [{"name": "ngram_heads", "orders": [n]} for n in (1, 2, 3)]
    config = StateZooConfig(vocab_size=9, d_model=8, n_layers=3, mixers=names)
    assert [m["orders"] for m in config.mixers] == [[1], [2], [3]]
    assert StateZooConfig(mixers=["ngram_heads"]).mixers == [
        {"name": "ngram_heads", "orders": [1, 2, 3], "window": None}
    ]
    StateZooForCausalLM(config)


def test_recomputed_activations_see_the_same_tokens():
    """The backward pass of one batch runs after the forward pass of another."""
    net, first, other = make("ngram_heads").train(), tokens(2, 9), tokens(2, 9, seed=1)
    want = torch.autograd.grad(net(first, labels=first).loss, net.parameters())
    again = copy.deepcopy(net)
    old = again.gradient_checkpointing_enable  # its name up to transformers 5.22
    getattr(again, "activation_checkpointing_enable", old)()
    loss = again(first, labels=first).loss
    again(other, labels=other)
    for a, b in zip(torch.autograd.grad(loss, again.parameters()), want, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_a_stream_without_tokens_is_refused():
    net, ids = make("hybrid-ngrams"), tokens(1, 4)
    x = net.get_input_embeddings()(ids)
    told = (
        r"^ngram_heads compares tokens, and got none: give the net input_ids, not inputs_embeds, "
        r"or take a net without ngram_heads\.$"
    )
    with pytest.raises(ValueError, match=told):
        net(inputs_embeds=x)
    with pytest.raises(ValueError, match=told):
        net.generate(inputs_embeds=x, max_new_tokens=2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"orders": []}, r"orders must be different, from 1 on; got \[\]"),
        ({"orders": [0, 1]}, r"orders must be different, from 1 on; got \[0, 1\]"),
        ({"orders": [2, 2]}, r"orders must be different, from 1 on; got \[2, 2\]"),
        ({"window": 4}, r"window must be at least 5, for 3 tokens, .* got window=4"),
        ({"orders": [1], "window": 0}, r"window must be at least 3, for 1 tokens?, "),
    ],
)
def test_settings_that_make_no_sense(settings, words):
    with pytest.raises(ValueError, match=words):
        build_mixer({"name": "ngram_heads", **settings}, 8)


def test_the_op_says_what_it_needs():
    h, ids = stream(1, 4)
    for given, words in (
        ((h[0], ids), r"needs h \[B L D\], ids \[B L\]"),
        ((h, ids[:, 1:]), r"got h \(1, 4, 5\), ids \(1, 3\)"),
    ):
        with pytest.raises(ValueError, match=words):
            ngram_mean(*given, orders=[1])
    with pytest.raises(ValueError, match=r"orders >= 1 and window >= 1 or None, got \[0\], None"):
        ngram_mean(h, ids, orders=[0])
    with pytest.raises(ValueError, match="5 queries"):
        ngram_mean(h, ids, orders=[1], queries=5)


def test_the_op_keeps_the_rules_of_torch_library():
    h, ids = stream(2, 7)
    rules = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(_op.means, (h, ids, None, 5, [1, 2], 0), test_utils=rules)
    backward = (torch.randn(2, 5, 6), ids, None, [1, 2], 4)
    torch.library.opcheck(_op.means_backward, backward, test_utils=rules)


def test_flops_are_those_of_the_maps():
    """Sums over matches are no products of the model: their number depends on the text."""
    config = StateZooConfig(
        vocab_size=9, d_model=16, n_layers=1, mixers=["ngram_heads"], channel=None
    )
    assert count_flops(config, 24, head=False).forward == 2 * (16 * 16 + 3 * 16 * 16)


def test_nothing_of_the_past_is_learnt():
    assert learnt_state({"name": "ngram_heads"}, 16, 1) is None


def loss_in_new_languages(mixers, steps=50, rows=16):
    """Train a tiny net on strings of random automata; return its loss on those of others."""
    task = make_task({"name": "icll", "min_length": 6, "max_length": 6, "max_string": 16})

    def loss(split, first, count):
        drawn = [task.example(0, split, i) for i in range(first, first + count)]
        padded = [
            torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in each], True, fill)
            for each, fill in (([e.tokens for e in drawn], 19), ([e.targets for e in drawn], -100))
        ]
        return F.cross_entropy(net(padded[0]).logits.flatten(0, 1), padded[1].flatten())

    torch.manual_seed(0)
    net = StateZooForCausalLM(StateZooConfig(vocab_size=20, d_model=32, n_layers=3, mixers=mixers))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss("train", step * rows, rows).backward()
        optimizer.step()
    with torch.no_grad():
        return loss("val", 0, 64).item()


def test_learns_a_language_in_context_sooner():
    """In nats a letter, 2.89 for any of 18: after 50 steps 2.29 with n-gram heads, 2.77 without."""
    delta = {"name": "gated_deltanet", "n_heads": 2}
    heads = loss_in_new_languages([delta, "ngram_heads", delta])
    assert heads < loss_in_new_languages([delta, delta, delta]) - 0.2
