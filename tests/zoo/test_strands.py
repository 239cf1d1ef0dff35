"""Equivariance under reverse complement: f(RC x) = RC f(x)."""

import pytest
import torch
import torch.nn.functional as F
from tests.zoo.cases import EACH, KINDS, WORDS, make, tokens

from statezoo.zoo import (
    StateZooConfig,
    StateZooForCausalLM,
    StateZooForMaskedLM,
    StateZooForSequenceClassification,
    StateZooModel,
    pool,
)

COMPLEMENT = [0, 1, 2, 6, 5, 4, 3, 8, 7, 9, 10]
TABLE = torch.tensor(COMPLEMENT)
SIZES = [3, 6, 1]
ONE, TIED = {}, {"bidirectional": True}
UNTIED = TIED | {"tie_directions": False}
NAMES = {str(ONE): "one", str(TIED): "tied", str(UNTIED): "untied"}


def directions(*those):
    return pytest.mark.parametrize("ways", those, ids=lambda ways: NAMES[str(ways)])


def rc(ids):
    """Reverse complement of ``[B T]``, a token at a time."""
    return torch.tensor([[COMPLEMENT[int(i)] for i in reversed(row)] for row in ids])


def padded(sequences, side):
    """Sequences of different lengths as one batch, with its mask."""
    T = max(map(len, sequences))
    ids, mask = tokens(len(sequences), T, seed=99), torch.zeros(len(sequences), T)
    for i, x in enumerate(sequences):
        at = slice(T - len(x), T) if side == "left" else slice(0, len(x))
        ids[i, at], mask[i, at] = x, 1
    return ids, mask


@pytest.mark.parametrize("case", EACH)
@pytest.mark.parametrize(
    ("ways", "dtype", "allowed"),
    [(UNTIED, torch.float32, 1e-5), (ONE, torch.float64, 1e-10)],
    ids=["untied-32", "one-64"],
)
def test_logits_are_equivariant(case, ways, dtype, allowed):
    net = make(case, dtype, kind=StateZooForMaskedLM, complement=COMPLEMENT, **ways)

    def check(got, want):  # [T W]: the other way round in time, letters exchanged
        torch.testing.assert_close(got, want.flip(0)[:, TABLE], atol=allowed, rtol=0)

    ids = tokens(2, 7)
    here, there = net(ids).logits, net(rc(ids)).logits
    assert here.abs().max() > 0.1
    for got, want in zip(there, here, strict=True):
        check(got, want)
    alone = [tokens(1, n, seed=n)[0] for n in SIZES]
    other = [rc(x[None])[0] for x in alone]
    a, mask = padded(alone, "right")
    b, mirrored = padded(other, "left")
    here = net(a, attention_mask=mask).logits
    there = net(b, attention_mask=mirrored).logits
    bounds = torch.tensor([0, *SIZES]).cumsum(0).to(torch.int32)
    one = net(torch.cat(alone)[None], cu_seqlens=bounds).logits[0].split(SIZES)
    two = net(torch.cat(other)[None], cu_seqlens=bounds).logits[0].split(SIZES)
    for i in range(3):
        check(there[i, mirrored[i].bool()], here[i, mask[i].bool()])
        check(two[i], one[i])
        torch.testing.assert_close(one[i], here[i, mask[i].bool()], atol=allowed, rtol=0)


@directions(ONE, TIED)
@pytest.mark.parametrize("case", KINDS)
def test_is_the_mean_of_one_net_on_both_strands(case, ways):
    """The same parameters, strand by strand, without any code for two."""
    net = make(case, kind=StateZooForMaskedLM, complement=COMPLEMENT, **ways)
    plain = make(case, kind=StateZooForMaskedLM, **ways)
    plain.load_state_dict(net.state_dict())
    ids = tokens(2, 6)
    other = plain(rc(ids), output_hidden_states=True)
    this = plain(ids, output_hidden_states=True)
    want = (this.logits + other.logits.flip(1)[..., TABLE]) / 2
    out = net(ids, output_hidden_states=True)
    torch.testing.assert_close(out.logits, want, atol=1e-10, rtol=0)
    assert len(out.hidden_states) == len(this.hidden_states)
    for got, a, b in zip(out.hidden_states, this.hidden_states, other.hidden_states, strict=True):
        torch.testing.assert_close(got, (a + b.flip(1)) / 2, atol=1e-10, rtol=0)


@pytest.mark.parametrize("case", KINDS)
@pytest.mark.parametrize(("pooling", "ways"), [("last", ONE), ("mean", UNTIED), ("profile", ONE)])
def test_classification_is_invariant(case, pooling, ways):
    net = make(
        case,
        kind=StateZooForSequenceClassification,
        complement=COMPLEMENT,
        pooling=pooling,
        num_labels=3,
        **ways,
    )
    alone = [tokens(1, n, seed=n)[0] for n in SIZES]
    other = [rc(x[None])[0] for x in alone]
    want = torch.cat([net(x[None]).logits for x in alone])
    assert (want - want.roll(1, 0)).abs().max() > 1e-3, "all sequences are alike"
    bounds = torch.tensor([0, *SIZES]).cumsum(0)
    for sequences in (alone, other):
        for side in ("left", "right"):
            ids, mask = padded(sequences, side)
            got = net(ids, attention_mask=mask).logits
            torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
        got = net(torch.cat(sequences)[None], cu_seqlens=bounds).logits
        torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


def test_the_bare_model_gives_one_vector_per_token():
    net = make("hybrid", kind=StateZooModel, complement=COMPLEMENT)
    ids = tokens(2, 6)
    here, there = net(ids), net(rc(ids))
    assert here.last_hidden_state.shape == (2, 6, 16)
    assert here.strands.shape == (2, 6, 32)
    torch.testing.assert_close(there.last_hidden_state, here.last_hidden_state.flip(1))
    u, w = here.strands.chunk(2, -1)
    torch.testing.assert_close(there.strands, torch.cat([w, u], -1).flip(1))
    torch.testing.assert_close(pool(there.last_hidden_state), pool(here.last_hidden_state))
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6])
    assert not net(ids, attention_mask=mask).strands[0, 0].any()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_loss_is_that_of_the_logits(mode):
    net, ids = make("mamba", kind=StateZooForMaskedLM, complement=COMPLEMENT), tokens(2, 6)
    labels = ids.masked_fill(torch.arange(6) % 2 == 0, -100)
    want = F.cross_entropy(net(ids).logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(net.train(mode == "train")(ids, labels=labels).loss, want)
    got = torch.autograd.grad(net(ids, labels=labels).loss, net.parameters())
    want = torch.autograd.grad(want, net.parameters())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("case", KINDS)
def test_every_parameter_gets_a_gradient(case):
    net = make(case, torch.float32, kind=StateZooForMaskedLM, complement=COMPLEMENT).train()
    ids = tokens(2, 8)
    net(ids, labels=ids).loss.backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize(
    ("complement", "error", "words"),
    [
        ([0, 1], ValueError, "each of vocab_size=4 tokens, got 2"),
        ([0, 2, 3, 1], ValueError, "it sends token 1 to 2, and 2 to 3.* their own complement"),
        ([0, 1, 1, 3], ValueError, "it sends token 2 to 1, and 1 to 1"),
        ([0, 1, 2, 4], ValueError, "it sends token 3 to 4, and 4 is not one of 4 tokens"),
        ([0, 1, 2, -1], ValueError, "it sends token 3 to -1"),
        ("ACGT", TypeError, "complement: expected"),
        ([0, 1, 2, 3.0], TypeError, "complement: expected"),
    ],
)
def test_the_complement_must_be_one(complement, error, words):
    with pytest.raises(error, match=words):
        StateZooConfig(vocab_size=4, complement=complement)


def test_says_what_it_cannot_do():
    config = StateZooConfig(vocab_size=WORDS, d_model=16, n_layers=1, complement=COMPLEMENT)
    with pytest.raises(ValueError, match=r"cannot have complement: the other direction, or strand"):
        StateZooForCausalLM(config)
    net = StateZooForMaskedLM(config)
    with pytest.raises(ValueError, match="reads both strands needs input_ids"):
        net(inputs_embeds=torch.zeros(1, 3, 16))
    with pytest.raises(ValueError, match="has no state to hand on"):
        net(tokens(1, 3), use_cache=True)
