"""A tag for every token: packed, padded and alone, both directions, both strands, and in files."""

import pytest
import torch
import torch.nn.functional as F
from tests.zoo.cases import WORDS, make, tokens
from transformers import AutoModelForTokenClassification

import statezoo
from statezoo.zoo import StateZooForTokenClassification, with_head

BOTH = {"bidirectional": True, "tie_directions": False}
CASES = ["gla", "gated_deltanet", "mamba2", "attention"]


def tagger(case="gla", **settings):
    return make(case, kind=StateZooForTokenClassification, **({"num_labels": 3} | settings))


def gradients(net, loss):
    net.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("directions", [{}, BOTH], ids=["forward", "both"])
def test_packed_and_padded_equal_alone_with_gradients(case, directions):
    net = tagger(case, **directions).double()
    ids, tags = tokens(1, 9), torch.randint(3, (1, 9))
    parts = [(0, 4), (4, 9)]
    alone = [net(ids[:, a:b]).logits for a, b in parts]
    said = torch.cat(alone, 1)
    want = F.cross_entropy(said[0], tags[0])
    wanted = gradients(net, want)

    packed = net(ids, labels=tags, cu_seqlens=torch.tensor([0, 4, 9], dtype=torch.int32))
    torch.testing.assert_close(packed.logits, said)
    torch.testing.assert_close(packed.loss, want)
    for name, grad in gradients(net, packed.loss).items():
        torch.testing.assert_close(grad, wanted[name], msg=name)

    rows = torch.zeros(2, 5, dtype=torch.long)
    mask, labels = torch.zeros_like(rows), torch.ones_like(rows)  # tags of padding are not scored
    for row, (a, b) in enumerate(parts):
        rows[row, : b - a], mask[row, : b - a], labels[row, : b - a] = ids[0, a:b], 1, tags[0, a:b]
    padded = net(rows, attention_mask=mask, labels=labels)
    for row, logits in enumerate(alone):
        torch.testing.assert_close(padded.logits[row, : logits.shape[1]], logits[0])
    torch.testing.assert_close(padded.loss, want)
    for name, grad in gradients(net, padded.loss).items():
        torch.testing.assert_close(grad, wanted[name], msg=name)


def test_only_a_net_of_both_directions_sees_the_future():
    ids = tokens(1, 8)
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % WORDS
    for settings, seen in (({}, False), (BOTH, True)):
        net = tagger(**settings)
        change = (net(ids).logits - net(other).logits)[0, 0].abs().max()
        assert (change > 0) == seen


def test_other_strand_has_the_tags_in_reversed_order():
    complement = [0, 2, 1, 4, 3, *range(5, WORDS)]
    net = tagger(complement=complement, bidirectional=True).double()
    ids = tokens(2, 7)
    other = torch.tensor(complement)[ids].flip(1)
    torch.testing.assert_close(net(other).logits, net(ids).logits.flip(1))


def test_it_comes_back_from_a_folder(tmp_path):
    net = tagger(id2label={0: "none", 1: "CDS", 2: "tRNA"}, **BOTH)
    net.save_pretrained(tmp_path / "tags")
    ids = tokens(2, 6)
    for again in (
        statezoo.load(tmp_path / "tags"),
        AutoModelForTokenClassification.from_pretrained(tmp_path / "tags"),
    ):
        assert type(again) is StateZooForTokenClassification
        assert again.config.id2label == {0: "none", 1: "CDS", 2: "tRNA"}
        torch.testing.assert_close(again.eval()(ids).logits, net(ids).logits)


def test_body_of_a_language_model_and_a_new_head():
    source = make("gla")
    net, exchanged = with_head(source, StateZooForTokenClassification, id2label={0: "a", 1: "b"})
    assert exchanged.new == ["score.bias", "score.weight"]
    for name, weight in source.model.state_dict().items():
        assert torch.equal(net.model.state_dict()[name], weight)


def test_wrong_shape_of_tags():
    with pytest.raises(ValueError, match=r"labels of the same shape, got \[2\]"):
        tagger()(tokens(2, 6), labels=torch.tensor([0, 1]))
