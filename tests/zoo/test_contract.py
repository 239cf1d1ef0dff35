"""What every mixer, hybrid and shipped configuration must do."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.zoo.cases import CASES, WORDS, keeps_its_past, make, reading, tokens
from transformers import AutoConfig, AutoModelForCausalLM

import statezoo
from statezoo.zoo import MIXERS, StateZooConfig, cache_to_tensors

FP64 = 1e-9  # the same sums in another order, through two layers
each_case = pytest.mark.parametrize("case", CASES)


def weights(shape):
    """Fixed output gradients, different everywhere."""
    return torch.linspace(-1, 1, shape.numel(), dtype=torch.float64).sin().view(shape)


def values_and_gradients(net, logits, seeds):
    """Logits of each sequence, and the gradients of a sum over them, by parameter."""
    loss = sum(
        (x * weights(x.shape[-2:])).sum() * (i + 1) for i, x in zip(seeds, logits, strict=True)
    )
    names, parameters = zip(*net.named_parameters(), strict=True)
    return list(logits), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same(got, want, allowed=FP64):
    for a, b in zip(got[0], want[0], strict=True):
        torch.testing.assert_close(a, b, atol=allowed, rtol=allowed)
    for name, a in got[1].items():
        b = want[1][name]
        error = ((a - b).norm() / b.norm().clamp(min=1e-12)).item()
        assert error < allowed, f"gradient of {name}: relative error {error:.1e}"


@each_case
def test_parallel_is_chunked_is_token_by_token(case):
    net, ids = make(case), tokens(2, 9)
    want = values_and_gradients(net, net(ids).logits, [0, 1])
    last = net(ids, use_cache=True)
    for cuts in ([4, 5], [1, 3, 5], [8, 1], [1] * 9):
        out, cache = [], None
        for part in ids.split(cuts, 1):
            step = net(part, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            out.append(step.logits)
        assert cache.get_seq_length() == 9
        assert_same(values_and_gradients(net, torch.cat(out, 1), [0, 1]), want)
        states, whole = cache_to_tensors(cache), cache_to_tensors(last.past_key_values)
        for name, state in states.items():
            torch.testing.assert_close(state, whole[name], atol=FP64, rtol=FP64)


@each_case
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_sequence_does_not_notice_its_batch(case, mode):
    net = make(case).train(mode == "train")
    sizes = [3, 7, 1, 5]
    alone = [tokens(1, n, seed=n) for n in sizes]
    want = values_and_gradients(net, [net(ids).logits[0] for ids in alone], range(4))
    first = values_and_gradients(net, [net(alone[0]).logits[0]], [0])
    T = max(sizes)
    for side in ("left", "right", "middle"):
        ids, mask = tokens(4, T, seed=99), torch.zeros(4, T, dtype=torch.long)
        for i, n in enumerate(sizes):
            at = {"left": range(T - n, T), "right": range(n), "middle": [*range(n - 1), T - 1]}[
                side
            ]
            mask[i, list(at)] = 1
            ids[i, list(at)] = alone[i][0]
        logits = net(ids, attention_mask=mask).logits
        got = [logits[i, mask[i].bool()] for i in range(4)]
        assert_same(values_and_gradients(net, got, range(4)), want)
        one = net(ids[:1], attention_mask=mask[:1]).logits[0, mask[0].bool()]
        assert_same(values_and_gradients(net, [one], [0]), first)
    bounds = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    packed = net(torch.cat(alone, 1), cu_seqlens=bounds).logits[0].split(sizes)
    assert_same(values_and_gradients(net, packed, range(4)), want)


@each_case
def test_padding_between_calls_leaves_the_state_alone(case):
    net, ids = make(case), tokens(2, 8)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1], [0, 0, 0, 0, 1, 1, 1, 1]])
    want = net(ids, attention_mask=mask).logits[mask.bool()]
    for cuts in ([3, 5], [4, 4], [1] * 8):
        out, cache, start = [], None, 0
        for part in ids.split(cuts, 1):
            start += part.shape[1]
            step = net(part, mask[:, :start], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            out.append(step.logits)
        got = torch.cat(out, 1)[mask.bool()]
        torch.testing.assert_close(got, want, atol=FP64, rtol=FP64)


@each_case
def test_packed_sequences_continue(case):
    net, first, then = make(case), [3, 0, 4], [2, 5, 1]
    whole = [tokens(1, a + b, seed=a) for a, b in zip(first, then, strict=True)]
    cache, out = None, [[], [], []]
    for start, sizes in (([0, 0, 0], first), (first, then)):
        ids = [x[:, s : s + n] for x, s, n in zip(whole, start, sizes, strict=True)]
        bounds = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
        step = net(torch.cat(ids, 1), cu_seqlens=bounds, past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        for i, logits in enumerate(step.logits[0].split(sizes)):
            out[i].append(logits)
    for ids, parts in zip(whole, out, strict=True):
        torch.testing.assert_close(torch.cat(parts), net(ids).logits[0], atol=FP64, rtol=FP64)


@each_case
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_causal_and_isolated(case, mode):
    net = make(case).train(mode == "train")
    x = net.get_input_embeddings()(tokens(2, 8)).detach().requires_grad_()
    with reading(net, x) as ids:
        logits = net(ids).logits
    (d,) = torch.autograd.grad(logits[0, 4].sum(), x, retain_graph=True)
    assert not d[1].any(), "another sample is seen"
    assert not d[0, 5:].any(), "the future is seen"
    assert d[0, 4].any()
    assert d[0, 3].any(), "the past is not seen"
    packed = x.detach().flatten(0, 1)[None].requires_grad_()
    with reading(net, packed) as ids:
        logits = net(ids, cu_seqlens=torch.tensor([0, 8, 16])).logits
    (d,) = torch.autograd.grad(logits[0, 12].sum(), packed)
    assert not d[0, :8].any(), "another packed sequence is seen"
    assert not d[0, 13:].any()


@each_case
def test_save_and_load_without_remote_code(case, tmp_path):
    net = make(case, torch.float32)
    net.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    ids = tokens(2, 6)
    for other in (AutoModelForCausalLM.from_pretrained(tmp_path), statezoo.load(tmp_path)):
        assert type(other) is type(net)
        assert torch.equal(other.eval()(ids).logits, net(ids).logits)
        assert other.config.mixers == net.config.mixers
    assert AutoConfig.from_pretrained(tmp_path).to_dict()["mixers"] == net.config.mixers


@each_case
def test_a_checkpoint_must_fit(case, tmp_path):
    net = make(case, torch.float32)
    net.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    good = load_file(file)
    name = next(n for n in good if "mixer." in n)
    faults = {
        "missing": {k: v for k, v in good.items() if k != name},
        "left over": good | {name + "_more": torch.zeros(2)},
        "of another shape": good | {name: torch.zeros(1, 3)},
    }
    for words, tensors in faults.items():
        save_file(tensors, file, metadata={"format": "pt"})
        for loads in (statezoo.load, AutoModelForCausalLM.from_pretrained):
            with pytest.raises(ValueError, match=f"{words}.*{name}"):
                loads(tmp_path)


@each_case
def test_the_configuration_is_strict(case):
    config = make(case).config
    for i, entry in enumerate(config.mixers):
        wrong = copy.deepcopy(config.mixers)
        key = next(k for k in entry if k != "name")
        wrong[i][key + "s"] = wrong[i].pop(key)
        with pytest.raises(ValueError, match=f"no setting '{key}s'.*did you mean '{key}'"):
            StateZooConfig(mixers=wrong, n_layers=len(wrong))
        wrong = copy.deepcopy(config.mixers)
        wrong[i][key] = [object()]
        with pytest.raises(TypeError, match=rf"{entry['name']}\.{key}: expected .*, got list"):
            StateZooConfig(mixers=wrong, n_layers=len(wrong))
    assert StateZooConfig(**config.to_dict()).to_dict() == config.to_dict()


@each_case
def test_state_size_is_what_the_state_takes(case):
    net, B = make(case, torch.float32), 3
    sizes = []
    for T in (1, 6, 12):
        states = cache_to_tensors(net(tokens(B, T), use_cache=True).past_key_values)
        del states["seen"]
        sizes.append(sum(x.nbytes for x in states.values()) / B)
        assert sizes[-1] == sum(block.mixer.state_size(T) for block in net.model.layers)
    if any(map(keeps_its_past, net.config.mixers)):
        assert sizes[2] - sizes[1] == 6 * (sizes[1] - sizes[0]) / 5 > 0, "linear in T"
    else:
        assert sizes[0] == sizes[1] == sizes[2], "constant in T"


@each_case
def test_every_parameter_gets_a_gradient(case):
    net, ids = make(case, torch.float32).train(), tokens(2, 8)
    net(ids, labels=ids).loss.backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@each_case
def test_generates_the_same_with_and_without_cache(case):
    net = make(case)
    ids, mask = tokens(3, 5), torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = net.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(net.generate(ids, attention_mask=mask, **options), want)
    for i, n in enumerate([5, 3, 1]):
        prompt = ids[i : i + 1, -n:]
        alone = net.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert torch.equal(alone[0, n:], want[i, 5:]), "a padded row notices its padding"
        one = net.generate(ids[i : i + 1], attention_mask=mask[i : i + 1], **options)
        assert torch.equal(one[0, 5:], want[i, 5:]), "batch 1 ignores its mask"


@each_case
def test_bfloat16(case):
    net, ids = make(case, torch.float32), tokens(2, 20)
    choices = [(m["top_k"], m["n_memories"]) for m in net.config.mixers if m["name"] == "mom"]
    routed = any(k < n for k, n in choices)  # a near tie may go the other way, for that token
    want = net(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        auto = net(ids, labels=ids)
    half = copy.deepcopy(net).to(torch.bfloat16)
    whole = half(ids, labels=ids)
    step = half(ids[:, 10:], past_key_values=half(ids[:, :10], use_cache=True).past_key_values)
    for logits in (auto.logits, whole.logits, step.logits):
        part = want[:, -logits.shape[1] :]
        assert logits.isfinite().all()
        errors = (logits - part).norm(dim=-1) / part.norm(dim=-1).square().mean().sqrt()
        error = errors.median() if routed else errors.square().mean().sqrt()
        assert error < 0.1, f"{error:.1e}"  # 8 bits through two layers; delta rules amplify
    (auto.loss + whole.loss).backward()
    for one in (net, half):
        assert all(p.grad.isfinite().all() for p in one.parameters())


def test_every_mixer_is_covered():
    names = {entry["name"] for mixers in CASES.values() for entry in mixers}
    assert names == {n for n, m in MIXERS.items() if m.__module__.startswith("statezoo.zoo.")}
    assert WORDS > 2
