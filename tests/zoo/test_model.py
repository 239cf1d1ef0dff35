"""The skeleton: initial values, losses, arguments, compilation."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tests.zoo import toy_mixer  # noqa: F401  registers a mixer
from tests.zoo.cases import WORDS, make, tokens
from transformers import AutoModel, AutoModelForCausalLM

from statezoo.zoo import MIXERS, StateZooConfig, StateZooForCausalLM, StateZooModel, init

TOY = {"vocab_size": WORDS, "d_model": 64, "n_layers": 2, "mixers": ["toy_mixer"]}


def test_initial_values_are_general_but_where_a_mixer_has_its_own():
    torch.manual_seed(0)
    net = StateZooForCausalLM(StateZooConfig(**TOY | {"vocab_size": 500}))
    for weight in (net.lm_head.weight, net.model.embeddings.weight):
        assert abs(weight.std() - 0.02) < 0.002
    mixer = net.model.layers[0].mixer
    assert 0 <= mixer.A_log.min() < mixer.A_log.max() <= torch.tensor(16.0).log()
    for bias in (mixer.dt_bias, mixer.dt_proj.bias):
        dt = F.softplus(bias)
        assert 9e-4 < dt.min() < 0.01 < dt.max() < 0.11
    assert mixer.dt_proj.weight.std() > 0.04, "torch's own values, kept"
    assert torch.equal(mixer.out_proj.weight, torch.full((64, 64), 0.5)), "depends on depth"
    assert not mixer.out_proj.bias.any()
    assert torch.equal(mixer.D, torch.ones(64))
    wide = StateZooForCausalLM(StateZooConfig(**TOY, initializer_range=0.5))
    assert wide.lm_head.weight.std() > 0.4


def test_loading_keeps_every_value_to_the_bit(tmp_path):
    net = StateZooForCausalLM(StateZooConfig(**TOY))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter))
    net.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert saved.keys() == again.state_dict().keys()
    for name, value in again.state_dict().items():
        assert torch.equal(value, saved[name]), name


def test_decays_stay_in_float32(tmp_path):
    net = StateZooForCausalLM(StateZooConfig(**TOY))
    net.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    mixer, old = half.model.layers[0].mixer, net.model.layers[0].mixer
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(mixer.A_log, old.A_log)
    assert torch.equal(mixer.dt_bias, old.dt_bias)


def test_initial_values_for_mamba_like_mixers():
    torch.manual_seed(0)
    assert torch.equal(init.A_log_s4d(3, 4).exp().round(), torch.arange(1.0, 5).expand(3, 4))
    decay = (-init.A_log(100_000).exp() * F.softplus(init.dt_bias(100_000))).exp()
    got = decay.quantile(torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99]))
    want = torch.tensor([0.31, 0.59, 0.93, 0.990, 0.997])  # specs/core.md, section 3
    torch.testing.assert_close(got, want, atol=0.01, rtol=0)
    assert init.conv_weight(5, 4).abs().max() <= 0.5


def test_a_short_convolution_keeps_torchs_values():
    net = StateZooForCausalLM(
        StateZooConfig(
            vocab_size=WORDS, d_model=64, mixers=[{"name": "gla", "d_conv": 4}], n_layers=1
        )
    )
    assert 0.2 < net.model.layers[0].mixer.q_conv1d.weight.std() < 0.4


@pytest.mark.parametrize("tie", [False, True])
def test_tied_embeddings(tie, tmp_path):
    net = make("gla", torch.float32, tie_embeddings=tie)
    assert (net.lm_head.weight is net.model.embeddings.weight) is tie
    net.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (again.lm_head.weight is again.model.embeddings.weight) is tie
    assert torch.equal(again(tokens(1, 5)).logits, net(tokens(1, 5)).logits)


def test_the_body_alone_loads_from_the_same_folder(tmp_path):
    net = make("hybrid", torch.float32)
    net.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is StateZooModel
    got = body(tokens(2, 5)).last_hidden_state
    assert torch.equal(net.lm_head(got), net(tokens(2, 5)).logits)


def test_gradient_checkpointing_gives_the_same_gradients():
    net, ids = make("hybrid").train(), tokens(2, 6)
    want = torch.autograd.grad(net(ids, labels=ids).loss, net.parameters())
    old = net.gradient_checkpointing_enable  # its name up to transformers 5.22
    getattr(net, "activation_checkpointing_enable", old)()
    assert net.model.layers[0].gradient_checkpointing
    got = torch.autograd.grad(net(ids, labels=ids).loss, net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def nll(logits, targets, reduction="mean"):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


def test_loss_is_nats_per_scored_token():
    net, ids = make("gla"), tokens(2, 6)
    labels = ids.masked_fill(
        torch.rand(2, 6, generator=torch.Generator().manual_seed(0)) < 0.3, -100
    )
    out = net(ids, labels=labels)
    torch.testing.assert_close(out.loss, nll(out.logits[:, :-1], labels[:, 1:]))
    summed = nll(out.logits[:, :-1], labels[:, 1:], "sum")
    shared = net(ids, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    torch.testing.assert_close(shared, summed / 7)
    train = net.train()(ids, labels=labels)
    assert train.logits is None, "training does not hold logits"
    torch.testing.assert_close(train.loss, out.loss)


def test_loss_scores_no_padding():
    net, ids = make("gla"), tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    out = net(ids, attention_mask=mask, labels=ids)
    scored = [out.logits[0, 2:5], out.logits[1, :2]], [ids[0, 3:], ids[1, 1:3]]
    want = F.cross_entropy(torch.cat(scored[0]), torch.cat(scored[1]))
    torch.testing.assert_close(out.loss, want)


def test_loss_does_not_cross_packed_sequences():
    net, ids = make("gla"), tokens(1, 7)
    out = net(ids, labels=ids, cu_seqlens=torch.tensor([0, 3, 3, 7]))
    pieces = [slice(0, 3), slice(3, 7)]
    want = torch.cat([out.logits[0, s][:-1] for s in pieces])
    torch.testing.assert_close(
        out.loss, F.cross_entropy(want, torch.cat([ids[0, s][1:] for s in pieces]))
    )


def test_outputs():
    net, ids = make("hybrid"), tokens(2, 6)
    out = net(ids, output_hidden_states=True)
    assert out.past_key_values is None
    assert len(out.hidden_states) == 3
    assert torch.equal(net.lm_head(out.hidden_states[-1]), out.logits)
    assert torch.equal(net(ids, logits_to_keep=2).logits, out.logits[:, -2:])
    keep = torch.tensor([1, 4])
    assert torch.equal(net(ids, logits_to_keep=keep).logits, out.logits[:, keep])
    assert torch.equal(net(ids, return_dict=False)[0], out.logits)
    embeds = net.get_input_embeddings()(ids)
    assert torch.equal(net(inputs_embeds=embeds).logits, out.logits)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6])
    padded = net.model(ids, attention_mask=mask, output_hidden_states=True)
    assert all(x.shape == (2, 6, 16) for x in padded.hidden_states)
    assert not padded.last_hidden_state[0, 0].any()


def test_a_model_without_channel_mixer():
    net = make("gla", channel=None)
    assert not any("channel" in name for name, _ in net.named_parameters())
    assert net(tokens(1, 4)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, ValueError, "either input_ids or inputs_embeds"),
        (
            {"input_ids": tokens(2, 4), "attentionmask": 1},
            TypeError,
            "unknown argument 'attentionm",
        ),
        ({"input_ids": tokens(2, 4), "attention_mask": torch.ones(2, 3)}, ValueError, "B=2, T=4"),
        ({"input_ids": tokens(2, 4), "attention_mask": torch.ones(2, 1, 4, 4)}, ValueError, "mask"),
        (
            {
                "input_ids": tokens(1, 4),
                "attention_mask": torch.tensor([[0, 1, 1, 1]]),
                "cu_seqlens": torch.tensor([0, 4]),
            },
            ValueError,
            "either cu_seqlens or an attention_mask",
        ),
        ({"input_ids": tokens(2, 4), "cu_seqlens": torch.tensor([0, 4])}, ValueError, "B = 1"),
    ],
)
def test_says_what_is_wrong(arguments, error, words):
    with pytest.raises(error, match=words):
        make("hybrid")(**arguments)


QUICK = ("gla", "attention", "attention-window", "gated_deltanet", "mamba")  # every op once


@pytest.mark.parametrize(
    "case",
    [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in sorted(MIXERS) if n not in QUICK)],
)
def test_compiles_without_graph_breaks(case):
    torch._dynamo.reset()
    net, ids = make(case, torch.float32, n_layers=1), tokens(2, 20)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids).logits, net(ids).logits)
    net.train()
    loss = compiled(ids, labels=ids).loss
    got = torch.autograd.grad(loss, net.parameters())
    want = torch.autograd.grad(net(ids, labels=ids).loss, net.parameters())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)  # float32 sums in another order
