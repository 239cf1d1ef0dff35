"""generate() and the recurrent cache: of every kind of state, or of a few hybrids."""

import io

import pytest
import torch
from tests.zoo.cases import CASES, KINDS, make, tokens
from transformers import DynamicCache, StaticCache

from statezoo.zoo import MIXERS, cache_from_tensors, cache_to_tensors, detach, fork

each_net = pytest.mark.parametrize("case", ["gla-conv", "hybrid", "hybrid-window"])
each_kind = pytest.mark.parametrize("case", KINDS)
OPTIONS = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def prompt(B=2, T=6):
    ids = tokens(B, T).clamp(min=1)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


@each_net
def test_sampling_repeats_with_its_seed(case):
    net, options = make(case), OPTIONS | {"do_sample": True, "top_k": 0, "max_new_tokens": 12}
    runs = []
    for seed, cached in ((1, True), (1, True), (1, False), (2, True)):
        torch.manual_seed(seed)
        runs.append(net.generate(**prompt(), use_cache=cached, **options))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], runs[3])


@each_net
@pytest.mark.parametrize(
    "more",
    [
        {"num_beams": 3},
        {"num_beams": 2, "length_penalty": 0.1},
        {"repetition_penalty": 1.3},
        {"min_new_tokens": 3},
    ],
)
def test_every_way_is_the_same_without_cache(case, more):
    net = make(case)
    want = net.generate(**prompt(), use_cache=False, **OPTIONS | more)
    assert torch.equal(net.generate(**prompt(), **OPTIONS | more), want)


@each_kind
def test_beams_are_the_same_without_cache(case):
    net, options = make(case), OPTIONS | {"num_beams": 3, "num_return_sequences": 2}
    want = net.generate(**prompt(), use_cache=False, **options)
    assert torch.equal(net.generate(**prompt(), **options), want)


@each_net
def test_prefill_in_pieces(case):
    net = make(case)
    want = net.generate(**prompt(), **OPTIONS)
    for size in (1, 4, 6):
        cache = DynamicCache(config=net.config)
        got = net.generate(**prompt(), **OPTIONS, prefill_chunk_size=size, past_key_values=cache)
        assert torch.equal(got, want)


@each_net
def test_from_embeddings(case):
    net, given = make(case), prompt()
    embeds = net.get_input_embeddings()(given.pop("input_ids"))
    got = net.generate(inputs_embeds=embeds, **given, **OPTIONS)
    assert torch.equal(got, net.generate(**prompt(), **OPTIONS)[:, 6:])


@each_kind
def test_continues_from_a_returned_cache(case):
    net = make(case)
    first = net.generate(**prompt(), **OPTIONS, return_dict_in_generate=True)
    more = torch.cat([first.sequences, tokens(2, 3, seed=5).clamp(min=1)], 1)
    mask = torch.cat([prompt()["attention_mask"], torch.ones(2, 8, dtype=torch.long)], 1)
    want = net.generate(more, attention_mask=mask, **OPTIONS)
    for ids in (more, more[:, first.past_key_values.get_seq_length() :]):
        cache = fork(first.past_key_values)
        got = net.generate(ids, attention_mask=mask, past_key_values=cache, **OPTIONS)
        assert torch.equal(got[:, -5:], want[:, -5:])


@each_net
def test_static_cache_request(case):
    net = make(case)
    got = net.generate(**prompt(), **OPTIONS, cache_implementation="static")
    assert torch.equal(got, net.generate(**prompt(), **OPTIONS))
    StaticCache(config=net.config, max_cache_len=4)


def test_default_batch_without_mask_and_end_token():
    net = make("gla", eos_token_id=3, pad_token_id=0)
    out = net.generate(tokens(3, 4).clamp(min=1), do_sample=False, max_new_tokens=30)
    for row in out[:, 4:].tolist():
        if 3 in row:
            assert set(row[row.index(3) + 1 :]) <= {0}


def filled(net, B=3, T=5):
    return net(tokens(B, T), use_cache=True).past_key_values


def logits(net, cache, ids):
    return net(ids, past_key_values=cache).logits


@each_kind
def test_states_can_be_selected_and_repeated(case):
    net, ids = make(case), tokens(3, 4, seed=7)
    want = logits(net, filled(net), ids)
    cache, order = filled(net), torch.tensor([2, 0])
    cache.batch_select_indices(order)
    torch.testing.assert_close(logits(net, cache, ids[order]), want[order], atol=1e-9, rtol=0)
    cache = filled(net)
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 6
    twice = ids.repeat_interleave(2, 0)
    got = logits(net, cache, twice)
    torch.testing.assert_close(got, want.repeat_interleave(2, 0), atol=1e-9, rtol=0)


@each_kind
def test_a_fork_goes_its_own_way(case):
    net, a, b = make(case), tokens(3, 4, seed=7), tokens(3, 2, seed=8)
    cache = filled(net)
    twin = fork(cache)
    first = logits(net, cache, a)
    assert (cache.get_seq_length(), twin.get_seq_length()) == (9, 5)
    torch.testing.assert_close(logits(net, twin, b), logits(net, filled(net), b), atol=0, rtol=0)
    torch.testing.assert_close(logits(net, filled(net), a), first, atol=0, rtol=0)


@each_net
def test_gradients_flow_through_a_cache_until_detached(case):
    net, ids = make(case), tokens(1, 4, seed=7)
    x = net.get_input_embeddings()(tokens(1, 5)).detach().requires_grad_()
    cache = net(inputs_embeds=x, use_cache=True).past_key_values
    (d,) = torch.autograd.grad(logits(net, fork(cache), ids).sum(), x, retain_graph=True)
    assert d.any()
    loss = logits(net, detach(cache), ids).sum()
    assert torch.autograd.grad(loss, x, allow_unused=True)[0] is None


@each_net
def test_states_travel_as_tensors_and_as_pickles(case):
    net, ids = make(case), tokens(3, 4, seed=7)
    want, cache = logits(net, filled(net), ids), filled(net)
    tensors = cache_to_tensors(cache)
    again = cache_from_tensors(net, tensors)
    assert again.get_seq_length() == 5
    assert torch.equal(logits(net, again, ids), want)
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    assert torch.equal(logits(net, torch.load(file, weights_only=False), ids), want)
    del tensors["seen"]
    with pytest.raises(ValueError, match="missing \\['seen'\\]"):
        cache_from_tensors(net, tensors)


def test_caches_that_do_not_fit():
    net = make("hybrid")
    with pytest.raises(TypeError, match=r"DynamicCache\(config=net\.config"):
        net(tokens(1, 3), past_key_values=DynamicCache(config=_llama()))
    with pytest.raises(ValueError, match="0 layers, the model 2"):
        net(tokens(1, 3), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="cannot be cropped"):
        filled(net).crop(1)
    cache = filled(net)
    cache.reset()
    assert cache.get_seq_length() == 0
    got = net(tokens(3, 5), past_key_values=cache).logits
    torch.testing.assert_close(got, net(tokens(3, 5)).logits)


def _llama():
    from transformers import LlamaConfig

    return LlamaConfig(num_hidden_layers=2)


def test_every_mixer_and_enough_hybrids_are_covered():
    mixers = {case: {entry["name"] for entry in CASES[case]} for case in KINDS}
    alone = {name for names in mixers.values() if len(names) == 1 for name in names}
    assert alone == {n for n, m in MIXERS.items() if m.__module__.startswith("statezoo.zoo.")}
    assert sum(len(names) > 1 for names in mixers.values()) >= 6
