"""Both directions of time: what the net computes, and that a sequence is alone in it."""

import pytest
import torch
from tests.zoo.cases import EACH, KINDS, make, reading, tokens
from tests.zoo.test_contract import assert_same, values_and_gradients
from transformers import DynamicCache

from statezoo.zoo import StateZooConfig, StateZooForCausalLM, StateZooForMaskedLM
from statezoo.zoo.attention import rotate
from statezoo.zoo.bidirectional import Reversal
from statezoo.zoo.model import Block

FP64 = 1e-10  # the same sums in another order
TIES = pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])


def both(case, tie=True, **settings):
    return make(case, kind=StateZooForMaskedLM, bidirectional=True, tie_directions=tie, **settings)


def by_hand(net, ids):
    """Logits ``[T W]`` of one sequence: every mixer run forward, and backward, and averaged."""
    x = net.model.embeddings(ids[None])
    for block in net.model.layers:
        y = block.mixer_norm(x)
        ahead, _ = block.mixer.mix(y, None, None, ids[None])
        back, turned = block.mixer_back or block.mixer, torch.stack(y.unbind(1)[::-1], 1)
        behind, _ = back.mix(turned, None, None, torch.stack(ids.unbind()[::-1])[None])
        x = x + 0.5 * ahead + 0.5 * torch.stack(behind.unbind(1)[::-1], 1)
        x = x + block.channel(block.channel_norm(x))
    return net.lm_head(net.model.norm(x))[0]


@TIES
@pytest.mark.parametrize("case", EACH)
def test_runs_every_mixer_both_ways(case, tie):
    net, ids = both(case, tie), tokens(2, 7)
    want = torch.stack([by_hand(net, row) for row in ids])
    torch.testing.assert_close(net(ids).logits, want, atol=FP64, rtol=FP64)
    bounds = torch.tensor([0, 3, 3, 4, 7], dtype=torch.int32)
    want = torch.cat([by_hand(net, part) for part in ids[0].split([3, 1, 3])])
    packed = net(ids[:1], cu_seqlens=bounds).logits[0]
    torch.testing.assert_close(packed, want, atol=FP64, rtol=FP64)


@TIES
@pytest.mark.parametrize("case", KINDS)
def test_a_sequence_does_not_notice_its_batch(case, tie):
    net, sizes = both(case, tie).train(), [3, 6, 1]
    alone = [tokens(1, n, seed=n) for n in sizes]
    want = values_and_gradients(net, [net(ids).logits[0] for ids in alone], range(3))
    ids, mask = tokens(3, 6, seed=99), torch.zeros(3, 6, dtype=torch.long)
    for i, at in enumerate((range(3, 6), range(6), [2])):  # left, not, on both sides padded
        mask[i, list(at)], ids[i, list(at)] = 1, alone[i][0]
    logits = net(ids, attention_mask=mask).logits
    got = [logits[i, mask[i].bool()] for i in range(3)]
    assert_same(values_and_gradients(net, got, range(3)), want)
    right = net(ids[:1].roll(3, 1), attention_mask=mask[:1].roll(3, 1)).logits[0, :3]
    torch.testing.assert_close(right, want[0][0], atol=FP64, rtol=FP64)
    bounds = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    packed = net(torch.cat(alone, 1), cu_seqlens=bounds).logits[0].split(sizes)
    assert_same(values_and_gradients(net, packed, range(3)), want)


@TIES
@pytest.mark.parametrize("case", KINDS)
def test_sees_all_of_its_own_sequence_and_no_other(case, tie):
    net = both(case, tie)
    x = net.get_input_embeddings()(tokens(2, 5)).detach().requires_grad_()
    with reading(net, x) as ids:
        logits = net(ids).logits
    (d,) = torch.autograd.grad(logits[0, 2].sum(), x)
    assert not d[1].any(), "another sample is seen"
    assert d[0, 1].any(), "the past is not seen"
    assert d[0, 3].any(), "the future is not seen"
    packed = x.detach().flatten(0, 1)[None].requires_grad_()
    with reading(net, packed) as ids:
        logits = net(ids, cu_seqlens=torch.tensor([0, 5, 10])).logits
    (d,) = torch.autograd.grad(logits[0, 7].sum(), packed)
    assert not d[0, :5].any(), "another packed sequence is seen"
    assert d[0, 6].any()
    assert d[0, 8].any()


@pytest.mark.parametrize("window", [None, 3])
def test_attention_is_two_softmaxes(window):
    """Closed form: the mean of one softmax over what is not later, and one over not earlier."""
    T, K = 7, 8
    mixer = {"name": "attention", "n_heads": 2, "window": window}
    block = Block(StateZooConfig(d_model=16, mixers=[mixer], bidirectional=True), mixer).double()
    x = torch.randn(1, T, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got, _ = block(x, None, None, Reversal(x, None))
    attention, y = block.mixer, block.mixer_norm(x)
    q, k, v = (
        p(y).unflatten(-1, (2, K)) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    distance = torch.arange(T)[:, None] - torch.arange(T)
    o = torch.zeros(1, T, 2, K, dtype=torch.float64)
    for sign in (1, -1):  # backward, positions count from the end: distances change their sign
        at = (sign * torch.arange(T))[None]
        turned = [rotate(z, at, 10000.0) for z in (q, k)]
        score = torch.einsum("bthk,bshk->bhts", *turned) * K**-0.5
        hidden = sign * distance < 0
        if window:
            hidden = hidden | (sign * distance >= window)
        p = score.masked_fill(hidden, -torch.inf).softmax(-1)
        o = o + 0.5 * torch.einsum("bhts,bshk->bthk", p, v)
    want = x + attention.o_proj(o.flatten(-2))
    want = want + block.channel(block.channel_norm(want))
    torch.testing.assert_close(got, want, atol=FP64, rtol=FP64)


@pytest.mark.parametrize("case", KINDS)
def test_one_token_is_that_of_the_causal_twin(case):
    twin = make(case)
    net = both(case)
    net.load_state_dict(twin.state_dict())
    ids = tokens(4, 1)
    torch.testing.assert_close(net(ids).logits, twin(ids).logits, atol=FP64, rtol=FP64)
    ids = tokens(1, 9)
    assert not torch.allclose(net(ids).logits, twin(ids).logits)


@TIES
@pytest.mark.parametrize("case", KINDS)
def test_every_parameter_gets_a_gradient(case, tie):
    net, ids = both(case, tie, dtype=torch.float32).train(), tokens(2, 8)
    net(ids, labels=ids).loss.backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_auxiliary_losses_of_both_directions_count():
    ids = tokens(2, 6)
    net = both("mom", tie=False).train()
    found = net.model(ids).auxiliary
    assert list(found) == [0, 1, 2, 3]
    assert net.model.mixers() == [
        *(b.mixer for b in net.model.layers),
        *(b.mixer_back for b in net.model.layers),
    ]
    labels = torch.full_like(ids, -100)
    labels[0, 0] = 3
    loss = net(ids, labels=labels).loss
    plain = net.eval()(ids, labels=labels).loss
    mean = torch.stack([x["loss"] for x in found.values()]).mean()
    torch.testing.assert_close(loss - plain, mean)
    assert all(m.auxiliary is None for m in net.model.mixers())

    net = both("mom", tie=True).train()  # one router sees the tokens twice: as ahead, as behind
    block, x = net.model.layers[0], net.model.embeddings(ids)
    said = []
    for y in (block.mixer_norm(x), block.mixer_norm(x).flip(1)):
        block.mixer(y)
        said.append(block.mixer.auxiliary["router_load"])
    found = net.model(ids).auxiliary
    assert list(found) == [0, 1]
    torch.testing.assert_close(found[0]["router_load"], (said[0] + said[1]) / 2)


@TIES
def test_gradient_checkpointing_changes_nothing(tie):
    net, ids = both("hybrid-mom", tie).train(), tokens(2, 6)
    want = torch.autograd.grad(net(ids, labels=ids).loss, net.parameters())
    old = net.gradient_checkpointing_enable  # its name up to transformers 5.22
    getattr(net, "activation_checkpointing_enable", old)()
    got = torch.autograd.grad(net(ids, labels=ids).loss, net.parameters())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_reverses_each_sequence_within_itself():
    x = torch.arange(7)[None]
    turn = Reversal(x, torch.tensor([0, 3, 3, 4, 7], dtype=torch.int32))
    assert turn(x).tolist() == [[2, 1, 0, 3, 6, 5, 4]]
    assert turn.doubled.tolist() == [0, 3, 3, 4, 7, 10, 10, 11, 14]
    assert [part.tolist() for part in turn.split(turn.join(x, turn(x)))] == [
        x.tolist(),
        turn(x).tolist(),
    ]
    assert Reversal(x, None)(x).tolist() == [[6, 5, 4, 3, 2, 1, 0]]
    with pytest.raises(ValueError, match="must rise from 0 to T=7"):
        Reversal(x, torch.tensor([0, 3]))


def test_has_no_state():
    net, ids = both("gla"), tokens(1, 4)
    words = "bidirectional or reads both strands has no state to hand on: call it on whole seq"
    with pytest.raises(ValueError, match=words):
        net(ids, use_cache=True)
    with pytest.raises(ValueError, match=words):
        net.model(ids, past_key_values=DynamicCache(config=net.config))
    assert net(ids, use_cache=False).logits.isfinite().all()
    assert not hasattr(net, "generate")


def test_cannot_be_a_causal_model():
    with pytest.raises(ValueError, match=r"causal language model cannot have bidirectional: true"):
        StateZooForCausalLM(StateZooConfig(bidirectional=True))
    with pytest.raises(ValueError, match=r"tie_directions: false .* needs bidirectional: true"):
        StateZooConfig(tie_directions=False)


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    net, ids = both("attention", n_layers=1, dtype=torch.float32), tokens(2, 20)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids).logits, net(ids).logits)
