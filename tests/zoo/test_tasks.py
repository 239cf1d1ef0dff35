"""Masked tokens, one answer per sequence, and the change from one head to another."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tests.zoo.cases import KINDS, WORDS, make, tokens
from tests.zoo.test_contract import assert_same, values_and_gradients
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)
from transformers.loss.loss_utils import ForSequenceClassificationLoss

import statezoo
from statezoo.zoo import (
    StateZooConfig,
    StateZooForCausalLM,
    StateZooForMaskedLM,
    StateZooForSequenceClassification,
    StateZooModel,
    pool,
    with_head,
)

BOTH = {"bidirectional": True, "tie_directions": False}
SINGLE, MULTI = "single_label_classification", "multi_label_classification"


def masked(case="gla", **settings):
    return make(case, kind=StateZooForMaskedLM, **settings)


def classifier(case="gla", **settings):
    settings = {"num_labels": 3} | settings
    return make(case, kind=StateZooForSequenceClassification, **settings)


# ------------------------------------------------------------------ masked tokens


def test_labels_are_not_shifted():
    net, ids = masked(**BOTH), tokens(2, 6)
    labels = torch.full_like(ids, -100)
    labels[0, 1], labels[1, 5] = 4, 7
    out = net(ids, labels=labels)
    want = -(out.logits[0, 1].log_softmax(-1)[4] + out.logits[1, 5].log_softmax(-1)[7]) / 2
    torch.testing.assert_close(out.loss, want)
    trained = net.train()(ids, labels=labels)
    torch.testing.assert_close(trained.loss, want)
    assert trained.logits is None, "logits were held in memory"
    n = torch.tensor(8)
    torch.testing.assert_close(net(ids, labels=labels, num_items_in_batch=n).loss, want * 2 / 8)


def test_padding_is_not_scored():
    net, ids = masked(**BOTH), tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    out = net(ids, attention_mask=mask, labels=ids)
    real = mask.bool()
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[real], ids[real]))


@pytest.mark.parametrize("kind", [StateZooForMaskedLM, StateZooForSequenceClassification])
def test_auxiliary_losses_count(kind):
    net, ids = make("mom", kind=kind), tokens(2, 6)
    labels = ids if kind is StateZooForMaskedLM else torch.tensor([0, 1])
    n = labels.numel()
    plain = net(ids, labels=labels).loss
    beside = net.train().model(ids).auxiliary
    mean = torch.stack([found["loss"] for found in beside.values()]).mean()
    torch.testing.assert_close(net(ids, labels=labels).loss, plain + mean)
    got = net(ids, labels=labels, num_items_in_batch=4 * n).loss
    torch.testing.assert_close(got, (plain + mean) / 4)


# ------------------------------------------------------------- one answer per sequence


@pytest.mark.parametrize("pooling", ["mean", "last", "profile"])
@pytest.mark.parametrize("case", KINDS)
def test_a_sequence_does_not_notice_its_batch(case, pooling):
    two = {} if pooling == "last" else {"bidirectional": True}
    net, sizes = classifier(case, pooling=pooling, **two), [3, 6, 1]
    alone = [tokens(1, n, seed=n) for n in sizes]
    scores = torch.cat([net(ids).logits for ids in alone])
    want = values_and_gradients(net, [scores], [0])
    ids, mask = tokens(3, 6, seed=99), torch.zeros(3, 6, dtype=torch.long)
    for i, at in enumerate((range(3, 6), range(6), [2])):  # left, not, on both sides padded
        mask[i, list(at)], ids[i, list(at)] = 1, alone[i][0]
    assert_same(values_and_gradients(net, [net(ids, attention_mask=mask).logits], [0]), want)
    right = net(ids[:1].roll(3, 1), attention_mask=mask[:1].roll(3, 1)).logits
    torch.testing.assert_close(right, scores[:1])
    bounds = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    packed = net(torch.cat(alone, 1), cu_seqlens=bounds).logits
    assert_same(values_and_gradients(net, [packed], [0]), want)


@pytest.mark.parametrize("length", [1, 5, 64, 70])
def test_a_profile_is_the_cosine_transform(length):
    from scipy.fft import dct

    x = torch.randn(1, length, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = torch.zeros(64, 3, dtype=torch.float64)
    found = torch.from_numpy(dct(x[0].numpy(), type=2, norm="ortho", axis=0))[:64]
    want[: len(found)] = found
    got = pool(x, how="profile").view(64, 3)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


def test_pools_real_tokens_alone():
    x = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]])
    rows = {"mean": (x[0, 1] + x[0, 2]) / 2, "last": x[0, 2], "first": x[0, 1]}
    for how, row in rows.items():
        want = torch.stack([row, torch.zeros_like(row)])  # nothing to sum up: zero
        torch.testing.assert_close(pool(x, mask, how=how), want)
        bounds = torch.tensor([0, 0, 2, 2, 4])
        flat = x.flatten(0, 1)[None]
        empty = torch.zeros_like(row)
        pairs = {
            "mean": (flat[0, :2].mean(0), flat[0, 2:4].mean(0)),
            "last": (flat[0, 1], flat[0, 3]),
            "first": (flat[0, 0], flat[0, 2]),
        }[how]
        want = torch.stack([empty, pairs[0], empty, pairs[1]])
        torch.testing.assert_close(pool(flat[:, :4], cu_seqlens=bounds, how=how), want)
    torch.testing.assert_close(pool(x), x.mean(1))
    torch.testing.assert_close(pool(x, torch.ones(2, 4), how="last"), x[:, -1])


def test_the_mean_is_taken_in_float32():
    x = torch.ones(1, 1000, 1, dtype=torch.bfloat16)  # a bfloat16 sum stops at 256
    assert pool(x).item() == 1.0
    assert pool(x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("said", "n", "labels"),
    [
        (None, 3, torch.tensor([2, 0, 1])),
        (SINGLE, 3, torch.tensor([2, -100, 1])),
        (None, 3, torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0]])),
        (MULTI, 3, torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]])),
        (None, 1, torch.tensor([0.5, -2.0, 3.0])),
        (None, 1, torch.tensor([[1], [2], [3]])),
        ("regression", 3, torch.randn(3, 3)),
    ],
)
def test_losses_are_those_of_transformers(said, n, labels):
    net, ids = classifier(problem_type=said, num_labels=n), tokens(3, 5)
    out = net(ids, labels=labels)
    config = StateZooConfig(num_labels=n, problem_type=said)
    if said == MULTI or labels.dtype != torch.long or n == 1:
        labels = labels.double()
    want = ForSequenceClassificationLoss(labels, out.logits, config)
    torch.testing.assert_close(out.loss, want)
    assert net.config.problem_type == said, "a batch has changed the configuration"
    scored = int((labels != -100).sum())
    got = net(ids, labels=labels, num_items_in_batch=10).loss
    torch.testing.assert_close(got, want * scored / 10)


@pytest.mark.parametrize(
    ("settings", "labels", "words"),
    [
        ({}, torch.zeros(3, 3, dtype=torch.long), r"classification with 3 labels of 2 .* \[2\]"),
        (
            {},
            torch.zeros(2),
            r"multi_label_classification with 3 labels of 2 .*\[2, 3\], got \[2\]",
        ),
        (
            {"num_labels": 1},
            torch.zeros(3),
            r"regression with 1 labels of 2 seq.*\[2, 1\], got \[3",
        ),
    ],
)
def test_labels_must_fit(settings, labels, words):
    with pytest.raises(ValueError, match=words):
        classifier(**settings)(tokens(2, 4), labels=labels)


@pytest.mark.parametrize("net", [masked(), classifier()], ids=["masked", "classifier"])
def test_arguments_are_checked(net):
    with pytest.raises(TypeError, match="unknown argument 'attentionmask'"):
        net(tokens(1, 4), attentionmask=torch.ones(1, 4))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        net()
    with pytest.raises(ValueError, match="either cu_seqlens or an attention_mask"):
        net(tokens(1, 4), torch.tensor([[0, 1, 1, 1]]), cu_seqlens=torch.tensor([0, 4]))
    ids = tokens(2, 4)
    assert torch.equal(net(ids, return_dict=False)[0], net(ids).logits)
    assert len(net(ids, output_hidden_states=True).hidden_states) == 3


# ------------------------------------------------------------------------- labels


def test_labels_survive():
    names = {0: "intron", 1: "exon", 2: "neither"}
    config = StateZooConfig(id2label=names, problem_type=SINGLE, pooling="last")
    assert config.num_labels == 3
    assert config.label2id == {"intron": 0, "exon": 1, "neither": 2}
    again = StateZooConfig(**json.loads(config.to_json_string()))
    for one in (
        again,
        StateZooConfig(**config.to_dict()),
        StateZooConfig.from_dict(config.to_dict()),
    ):
        assert one.to_dict() == config.to_dict()
        assert one.id2label == names
    assert StateZooConfig().num_labels == 2
    assert StateZooConfig(num_labels=4).id2label[3] == "LABEL_3"


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"num_labels": 0}, ValueError, "num_labels must be at least 1, got 0"),
        ({"num_labels": "2"}, TypeError, "num_labels: expected int, got str"),
        ({"num_labels": 3, "id2label": {0: "a", 1: "b"}}, ValueError, "id2label names 2 labels"),
        ({"id2label": {1: "a", 2: "b"}}, ValueError, r"0, 1, ... in turn, got \[1, 2\]"),
        ({"id2label": {0: "a", 1: "a"}}, ValueError, "inverse of id2label"),
        ({"id2label": {0: "a"}, "label2id": {"b": 0}}, ValueError, "inverse of id2label"),
        ({"num_label": 3}, ValueError, "no key 'num_label' .did you mean 'num_labels'"),
        ({"pooling": "max"}, TypeError, "pooling: expected"),
        ({"bidirectional": 1}, TypeError, "bidirectional: expected bool"),
    ],
)
def test_says_what_is_wrong(settings, error, words):
    with pytest.raises(error, match=words):
        StateZooConfig(**settings)


# ---------------------------------------------------------------------- save and load

HEADS = {
    "masked": (StateZooForMaskedLM, AutoModelForMaskedLM, "lm_head.weight"),
    "classifier": (
        StateZooForSequenceClassification,
        AutoModelForSequenceClassification,
        "score.weight",
    ),
}


@pytest.mark.parametrize(
    ("case", "head"), [*((case, "masked") for case in KINDS), ("hybrid-mom", "classifier")]
)
def test_save_and_load(case, head, tmp_path):
    kind, auto, _ = HEADS[head]
    named = {"id2label": {0: "a", 1: "b", 2: "c"}, "complement": [1, 0, *range(2, WORDS)]}
    net = make(case, torch.float32, kind=kind, tie_embeddings=True, **BOTH, **named)
    net.save_pretrained(tmp_path)
    ids = tokens(2, 6)
    for other in (auto.from_pretrained(tmp_path), statezoo.load(tmp_path)):
        assert type(other) is kind
        assert torch.equal(other.eval()(ids).logits, net(ids).logits)
    config = AutoConfig.from_pretrained(tmp_path)
    for key in ("bidirectional", "tie_directions", "complement", "id2label", "label2id", "mixers"):
        assert getattr(config, key) == getattr(net.config, key)
    bare = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(bare.eval()(ids)[0], net.model(ids)[0])


@pytest.mark.parametrize("head", HEADS)
def test_a_checkpoint_must_fit(head, tmp_path):
    kind, auto, name = HEADS[head]
    make("gla", torch.float32, kind=kind, **BOTH).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    good = load_file(file)
    back = "model.layers.1.mixer_back.q_proj.weight"
    for words, tensors in {
        f"missing: .*{name}": {k: v for k, v in good.items() if k != name},
        f"missing: {back}": {k: v for k, v in good.items() if k != back},
        f"of another shape: .*{name}": good | {name: torch.zeros(1, 3)},
        "left over: more": good | {"more": torch.zeros(1)},
    }.items():
        save_file(tensors, file, metadata={"format": "pt"})
        for loads in (statezoo.load, auto.from_pretrained):
            with pytest.raises(ValueError, match=words):
                loads(tmp_path)


def test_the_folder_names_the_class(tmp_path):
    net = make("gla", torch.float32, kind=StateZooModel)
    net.save_pretrained(tmp_path)
    assert type(statezoo.load(tmp_path)) is StateZooModel
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Other"]}))
    with pytest.raises(ValueError, match=r"names the architectures \['Other'\]; there are StateZ"):
        statezoo.load(tmp_path)


def test_what_was_saved_before_loads(tmp_path):
    """Configurations without the keys of bidirectional nets and of labels."""
    net = make("gla", torch.float32)
    net.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    new = ("bidirectional", "tie_directions", "complement", "pooling", "architectures")
    old = {key: value for key, value in config.items() if key not in new}
    assert not {"id2label", "label2id", "num_labels"} & old.keys()
    (tmp_path / "config.json").write_text(json.dumps(old))
    again = statezoo.load(tmp_path)
    assert type(again) is StateZooForCausalLM
    assert torch.equal(again(tokens(1, 4)).logits, net(tokens(1, 4)).logits)


def test_create_model():
    net = statezoo.create_model("gla", task="masked", d_model=32, vocab_size=9, bidirectional=True)
    assert type(net) is StateZooForMaskedLM
    net = statezoo.create_model("hybrid", "classification", mixers=["gla"], d_model=32)
    assert net.score.out_features == 2
    net = statezoo.create_model("gla", "classification", d_model=32, id2label={0: "a"})
    assert net.score.out_features == 1
    with pytest.raises(
        ValueError, match=r"no task named 'mask' .did you mean 'masked'.*; there are c"
    ):
        statezoo.create_model("gla", task="mask")
    with pytest.raises(ValueError, match=r"cannot have bidirectional: true"):
        statezoo.create_model("gla", d_model=32, bidirectional=True)


# ---------------------------------------------------------------------- change of head


@pytest.mark.parametrize("case", KINDS)
def test_a_causal_body_gets_another_head(case):
    net, ids = make(case).train(), tokens(2, 5)
    new, exchanged = with_head(net, StateZooForSequenceClassification, num_labels=4)
    assert exchanged.dropped == ["lm_head.weight"]
    assert exchanged.new == ["score.bias", "score.weight"]
    assert new.training
    assert new.dtype == torch.float64
    assert new(ids).logits.shape == (2, 4)
    want = net.eval().model(ids)[0]
    assert torch.equal(new.eval().model(ids)[0], want)
    with torch.no_grad():
        new.model.embeddings.weight.zero_()
    assert torch.equal(net.model(ids)[0], want), "the old net was changed"


def test_what_fits_stays():
    net, ids = make("hybrid", tie_embeddings=True), tokens(2, 5)
    new, exchanged = with_head(net, StateZooForMaskedLM, bidirectional=True)
    assert (exchanged.dropped, exchanged.new) == ([], [])
    assert new.lm_head.weight is new.model.embeddings.weight
    torch.testing.assert_close(new(ids[:, :1]).logits, net(ids[:, :1]).logits)
    twice, exchanged = with_head(net, StateZooForMaskedLM, **BOTH)
    assert exchanged.new == []
    torch.testing.assert_close(twice(ids).logits, new(ids).logits)
    ahead, behind = twice.model.layers[0].mixer, twice.model.layers[0].mixer_back
    assert all(a is not b for a, b in zip(ahead.parameters(), behind.parameters(), strict=True))
    first, _ = with_head(new, StateZooForSequenceClassification, id2label={0: "a", 1: "b", 2: "c"})
    other, exchanged = with_head(first, StateZooForSequenceClassification, num_labels=5)
    assert exchanged.dropped == exchanged.new == ["score.bias", "score.weight"]
    same, exchanged = with_head(first, StateZooForSequenceClassification, pooling="last")
    assert (exchanged.dropped, exchanged.new) == ([], [])
    assert same.config.id2label == first.config.id2label
    assert torch.equal(same.score.weight, first.score.weight)
    bare, exchanged = with_head(other.model, StateZooForMaskedLM)
    assert exchanged.new == ["lm_head.weight"] or bare.config.tie_embeddings
    assert torch.equal(bare.model(ids)[0], other.model(ids)[0])


def test_the_new_net_has_the_precision_of_the_old():
    net = make("mamba", torch.float32).to(torch.bfloat16)
    for name, parameter in net.named_parameters():
        if name.endswith("A_log"):
            parameter.data = parameter.data.float()
    new, _ = with_head(net, StateZooForSequenceClassification)
    kinds = {name: p.dtype for name, p in new.named_parameters()}
    assert {d for n, d in kinds.items() if n.endswith("A_log")} == {torch.float32}
    assert {d for n, d in kinds.items() if not n.endswith("A_log")} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"vocab_size": 12},
            r"leaves the body as it is, .*vocab_size.* changes .*embeddings.weight",
        ),
        ({"n_layers": 3}, r"changes the tensors model\.layers\.2\."),
        ({"d_modell": 3}, r"no key 'd_modell'"),
    ],
)
def test_the_body_must_stay(changes, words):
    with pytest.raises(ValueError, match=words):
        with_head(make("gla"), StateZooForSequenceClassification, **changes)
