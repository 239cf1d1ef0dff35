"""Learnt initial states: what a net has in mind before the first token."""

import json

import pytest
import torch
from tests.zoo.cases import CASES, KINDS, WORDS, has_memory, make, tokens

import statezoo
from statezoo.zoo import StateZooConfig, StateZooForCausalLM, StateZooForMaskedLM
from statezoo.zoo.initial_state import InitialState, learnt_state
from statezoo.zoo.mixer import MIXERS, name_tensors
from statezoo.zoo.tasks import with_head

RANKS = [1, 0]  # outer products, and whole memories
RECURRENT = [case for case in KINDS if any(map(has_memory, CASES[case]))]
CAUSAL = pytest.mark.parametrize("case", RECURRENT)


def assert_same(got, want, allowed):
    torch.testing.assert_close(got, want, atol=allowed, rtol=allowed)


def starts(net):
    return {n: p for n, p in net.named_parameters() if ".initial_state" in n}


@pytest.mark.parametrize("rank", RANKS)
@CAUSAL
def test_is_what_a_cache_could_have_held(case, rank):
    """The same numbers, handed over in a cache that the net without initial states goes on from."""
    net, ids = make(case, initial_states=rank), tokens(2, 6)
    plain = make(case)
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if ".initial_state" not in k})
    with torch.no_grad():
        cache = plain(ids[:, :1], use_cache=True).past_key_values
        for layer, block in zip(cache.layers, net.model.layers, strict=True):
            layer.reset()
            layer.put(block.first_state(2, torch.zeros(2, 1, 16, dtype=torch.float64)), 0)
        want = plain(ids, past_key_values=cache).logits
        assert_same(net(ids).logits, want, 1e-12)
        assert (net(ids).logits - plain(ids).logits).abs().max() > 1e-4


@CAUSAL
def test_batches_packs_padding_and_caches_all_begin_with_it(case):
    net, ids = make(case, initial_states=1), tokens(3, 7)
    with torch.no_grad():
        want = net(ids).logits
        alone = torch.cat([net(row[None]).logits for row in ids])
        packed = net(ids.view(1, 21), cu_seqlens=torch.tensor([0, 7, 14, 21]).int()).logits
        first = net(ids[:, :3], use_cache=True)
        rest = net(ids[:, 3:], past_key_values=first.past_key_values).logits
        mask = torch.ones_like(ids)
        mask[0, :4], mask[1, 5:] = 0, 0
        padded = net(ids, attention_mask=mask).logits
    assert_same(alone, want, 1e-12)
    assert_same(packed.view_as(want), want, 1e-12)
    assert_same(torch.cat([first.logits, rest], 1), want, 1e-12)
    with torch.no_grad():
        assert_same(padded[0, 4:], net(ids[:1, 4:]).logits[0], 1e-12)
    assert_same(padded[1, :5], want[1, :5], 1e-12)


@pytest.mark.parametrize("tie", [True, False])
@CAUSAL
def test_both_directions_begin_with_theirs(case, tie):
    """The backward direction reads the reversal, from its own initial state or the common one."""
    settings = {"kind": StateZooForMaskedLM, "bidirectional": True, "tie_directions": tie}
    net, ids = make(case, initial_states=1, **settings), tokens(2, 5)
    x = net.model.embeddings(ids)
    for block in net.model.layers:
        y = block.mixer_norm(x)
        back = block.mixer if tie else block.mixer_back
        learnt = block.initial_state if tie else block.initial_state_back
        start = block.initial_state and block.initial_state(2)
        ahead, _ = block.mixer.mix(y, start, None, ids)
        behind, _ = back.mix(y.flip(1), learnt and learnt(2), None, ids.flip(1))
        x = x + (ahead + behind.flip(1)) / 2
        x = x + block.channel(block.channel_norm(x))
    want = net.lm_head(net.model.norm(x))
    assert_same(net(ids).logits, want, 1e-12)
    assert tie == (not any("initial_state_back" in name for name in starts(net)))
    packed = net(ids.view(1, 10), cu_seqlens=torch.tensor([0, 5, 10]).int()).logits
    assert_same(packed.view_as(want), want, 1e-12)


@CAUSAL
def test_gradients_are_the_slopes(case):
    net, ids = make(case, initial_states=1), tokens(2, 4)
    net(ids, labels=ids).loss.backward()
    assert starts(net)
    for name, p in starts(net).items():
        at, step = p.grad.abs().argmax(), 1e-5
        found = []
        for sign in (1, -1):
            with torch.no_grad():
                p.view(-1)[at] += sign * step
                found.append(net(ids, labels=ids).loss)
                p.view(-1)[at] -= sign * step
        slope = (found[0] - found[1]) / (2 * step)
        assert p.grad.view(-1)[at] != 0, name
        assert p.grad.view(-1)[at] == pytest.approx(slope.item(), rel=1e-4, abs=1e-9), name


@pytest.mark.parametrize("rank", RANKS)
@CAUSAL
def test_fresh_ones_change_nothing(case, rank):
    """To the last bit, and the step after they do: no factor is stuck where it begins."""
    torch.manual_seed(0)
    config = {"vocab_size": WORDS, "d_model": 16, "n_layers": 2, "mixers": CASES[case]}
    config["n_layers"] = max(2, len(CASES[case]))
    plain = StateZooForCausalLM(StateZooConfig(**config)).eval()
    net = StateZooForCausalLM(StateZooConfig(**config, initial_states=rank)).eval()
    net.load_state_dict(plain.state_dict(), strict=False)
    ids = tokens(2, 5)
    assert torch.equal(net(ids).logits, plain(ids).logits)
    before = {name: p.detach().clone() for name, p in starts(net).items()}
    for step in (0.1, 0.04):
        net.zero_grad()
        net(ids, labels=ids).loss.backward()
        with torch.no_grad():
            for p in starts(net).values():
                p -= step * p.grad.sign()
    assert all(not torch.equal(p, before[name]) for name, p in starts(net).items())


def test_generate_begins_with_it():
    net, ids = make("gla", initial_states=0), tokens(2, 3)
    found = net.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for t in range(3, 7):
        assert torch.equal(net(found[:, :t]).logits[:, -1].argmax(-1), found[:, t])
    beams = net.generate(ids, max_new_tokens=3, num_beams=3, do_sample=False, pad_token_id=0)
    assert beams.shape == (2, 6)


def test_both_strands_begin_with_it():
    complement = [0, 1, 2, 4, 3, 6, 5, 7, 8, 9, 10]
    net = make("gla", kind=StateZooForMaskedLM, complement=complement, initial_states=1)
    ids = tokens(2, 6)
    other = torch.tensor(complement)[ids.flip(1)]
    want = net(ids).logits.flip(1)[..., complement]
    assert_same(net(other).logits, want, 1e-12)


def test_is_saved_with_the_net_and_loaded_strictly(tmp_path):
    net, ids = make("hybrid-mom", initial_states=1).float(), tokens(1, 5)
    net.save_pretrained(tmp_path)
    again = statezoo.load(tmp_path)
    assert torch.equal(again(ids).logits, net(ids).logits)
    half = statezoo.load(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in starts(half).values()} == {torch.float32}
    assert torch.isfinite(half(ids).logits).all()
    config = json.loads((tmp_path / "config.json").read_text())
    config["initial_states"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"left over: model\.layers\.0\.initial_state"):
        statezoo.load(tmp_path)
    del config["initial_states"]  # as folders were before there was such a key
    plain = make("hybrid-mom").float()
    plain.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(statezoo.load(tmp_path)(ids).logits, plain(ids).logits)


def test_a_causal_body_takes_its_own_into_both_directions():
    net = make("gla-conv", initial_states=1)
    both, _ = with_head(net, StateZooForMaskedLM, bidirectional=True, tie_directions=False)
    for name, p in starts(both).items():
        assert torch.equal(p, starts(net)[name.replace("_back", "")])


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_is_of_the_states_of_every_mixer(name):
    """Their matrices and convolutions; pasts of attention, and last keys, are left as they are."""
    case = name if name in CASES else next(c for c in CASES if CASES[c][0]["name"] == name)
    mixer = make(case, dtype=torch.float32).model.layers[0].mixer
    like = torch.zeros(3, 1, 16)
    ids = torch.zeros(3, 1, dtype=torch.long)
    state = mixer.mix(like, mixer.initial_state(3, like), None, ids)[1]
    torch.manual_seed(5)
    state_of_random = torch.get_rng_state()
    learnt = learnt_state(CASES[case][0], 16, 0)
    assert torch.equal(torch.get_rng_state(), state_of_random)  # shapes cost no random numbers
    if not has_memory(CASES[case][0]):
        assert learnt is None
        return
    begun = learnt(3, mixer.initial_state(3, like))
    assert type(begun) is type(state)
    shapes, wanted = (
        {k: x.shape for k, x in name_tensors(s).items() if k.partition(".")[0] in ("S", "conv")}
        for s in (begun, state)
    )
    assert shapes == wanted
    left = {"S", "conv"} - {k.partition(".")[0] for k in shapes}
    assert {k.partition("_")[0] for k, _ in learnt.named_parameters()} == {"S", "conv"} - left


def test_factors_only_where_they_are_smaller():
    class_ = MIXERS["mamba2"]
    state = class_(64, d_state=16, head_dim=32)(torch.zeros(1, 1, 64))[1]  # S [1 4 16 32]
    shapes = {
        rank: {
            k: tuple(p.shape)
            for k, p in InitialState(state, ("S", "conv"), rank).named_parameters()
        }
        for rank in (1, 2, 11)
    }
    assert shapes[1]["S_u"] == (4, 16, 1)
    assert shapes[1]["S_v"] == (4, 1, 32)
    assert shapes[2]["S_v"] == (4, 2, 32)
    assert shapes[11]["S"] == (4, 16, 32)
    assert shapes[2]["conv_v"] == (2, 3)
    assert shapes[11]["conv"] == (160, 3)


def test_a_negative_rank_is_refused():
    with pytest.raises(ValueError, match="initial_states must be at least 0, got -1"):
        StateZooConfig(initial_states=-1)
