"""What is seen of the mixers' memories is what their weights say, and looking changes nothing."""

import math

import pytest
import torch
import torch.nn.functional as F
from tests.zoo.cases import KINDS, WORDS, make, tokens

from statezoo.zoo import (
    MIXERS,
    Mixer,
    StateZooConfig,
    StateZooForCausalLM,
    StateZooForMaskedLM,
    StateZooForSequenceClassification,
    delta,
)
from statezoo.zoo.observe import lifetime, observe

T = 9


def look(net, ids=None):
    with observe(net) as seen, torch.no_grad():
        net(tokens(1, T) if ids is None else ids)
    return seen


def streams(net, ids):
    """The input of each layer's mixer."""
    with torch.no_grad():
        hidden = net.model(ids, output_hidden_states=True).hidden_states
        return [b.mixer_norm(x) for b, x in zip(net.model.layers, hidden, strict=False)]


@pytest.mark.parametrize("case", KINDS)
def test_every_mixer_shows_what_it_does(case):
    """A new mixer of which nothing is seen must say so: ``observable = False``."""
    net, ids = make(case), tokens(1, T)
    with torch.no_grad():
        want = net(ids).logits
        with observe(net) as seen:
            got = net(ids).logits
        assert torch.equal(net(ids).logits, want)
    assert torch.equal(got, want)
    names = [mixer.name for mixer in net.model.mixers()]
    shown = {s.layer: s for s in seen}
    assert set(shown) == {i for i, name in enumerate(names) if MIXERS[name].observable}
    for s in seen:
        assert s.mixer == names[s.layer]
        assert s.decay is not None or s.attention is not None
        if s.decay is not None:
            assert s.decay.shape == s.write.shape == s.memory.shape == s.longest.shape
            assert s.decay.shape[1] == T
            assert s.decay.shape[0] % s.memories == 0
            assert (s.decay >= 0).all()
            assert (s.decay <= 1).all()
            assert (s.write >= 0).all()
            assert (s.memory > 0).all()
            assert (s.longest >= s.memory).all()
            assert s.write_is in ("beta", "norm")
        if s.attention is not None:
            assert s.attention.shape[1:] == (T, T)
            assert (s.attention.sum(-1) - 1).abs().max() < 1e-6
            assert (s.attention.triu(1) == 0).all()
        if s.router is not None:
            assert torch.allclose(s.router.sum(0), torch.ones(T, dtype=s.router.dtype))


def test_a_new_mixer_that_shows_nothing_is_found():
    class Quiet(Mixer, name="quiet_for_test"):
        def __init__(self, d_model: int) -> None:
            super().__init__()

        def forward(self, x, state=None, cu_seqlens=None):
            return x, None

    try:
        config = StateZooConfig(vocab_size=WORDS, d_model=16, n_layers=1, mixers=["quiet_for_test"])
        assert Quiet.observable
        assert not look(StateZooForCausalLM(config))
    finally:
        del MIXERS["quiet_for_test"]


def test_gla_by_hand():
    net, ids = make("gla"), tokens(1, T)
    seen = look(net, ids)
    for layer, x in enumerate(streams(net, ids)):
        mixer = net.model.layers[layer].mixer
        g = F.logsigmoid(mixer.gk_proj(x[0])) / 16
        k, v = mixer.k_proj(x[0]), mixer.v_proj(x[0])
        decay = g.exp().unflatten(-1, (2, -1)).mean(-1).T
        write = (k.unflatten(-1, (2, -1)).norm(dim=-1) * v.unflatten(-1, (2, -1)).norm(dim=-1)).T
        assert torch.allclose(seen[layer].decay, decay.float(), atol=1e-6)
        assert torch.allclose(seen[layer].write, write.float(), rtol=1e-5)


def test_gated_deltanet_by_hand():
    net, ids = make("gated_deltanet"), tokens(1, T)
    seen = look(net, ids)
    for layer, x in enumerate(streams(net, ids)):
        mixer = net.model.layers[layer].mixer
        g = -mixer.A_log.exp() * F.softplus(mixer.a_proj(x[0]) + mixer.dt_bias)
        assert torch.allclose(seen[layer].decay, g.exp().T.float(), atol=1e-6)
        assert torch.allclose(seen[layer].write, mixer.b_proj(x[0]).sigmoid().T.float(), atol=1e-6)
        assert seen[layer].write_is == "beta"


def test_mamba2_by_hand():
    net, ids = make("mamba2"), tokens(1, T)
    seen = look(net, ids)
    for layer, x in enumerate(streams(net, ids)):
        mixer = net.model.layers[layer].mixer
        dt = F.softplus(mixer.in_proj(x[0])[:, -len(mixer.dt_bias) :] + mixer.dt_bias)
        decay = torch.exp(-dt * mixer.A_log.exp()).T
        assert torch.allclose(seen[layer].decay, decay.float(), atol=1e-6)


def test_mamba_by_hand():
    net, ids = make("mamba-negative", n_layers=1), tokens(1, T)
    (seen,), mixer = look(net, ids), net.model.layers[0].mixer
    with torch.no_grad():
        u, _ = mixer.conv1d(mixer.in_proj(streams(net, ids)[0]).chunk(2, -1)[0])
        r, B, _ = mixer.x_proj(u).split(mixer.widths, -1)
        dt = F.softplus(mixer.dt_proj(r))[0]
        decay = (2 * (-dt[..., None] * mixer.A_log.exp()).exp() - 1).abs()
        write = (dt * u[0]).abs() * B[0].norm(dim=-1, keepdim=True)
    assert torch.allclose(seen.decay, decay.mean(-1).T.float(), atol=1e-6)
    assert torch.allclose(seen.write, write.T.float(), rtol=1e-4)


def test_attention_weights_give_the_output():
    net, ids = make("attention-sinks", dtype=torch.float32, n_layers=1), tokens(1, T)
    (seen,), mixer, x = look(net, ids), net.model.layers[0].mixer, streams(net, ids)[0]
    with torch.no_grad():
        v = mixer.v_proj(x).unflatten(-1, (-1, mixer.width))[0].repeat_interleave(2, 1)
        read = torch.einsum("hts,shv->thv", seen.attention, v)
        want, _ = mixer(x)
        assert torch.allclose(mixer.o_proj(read.flatten(-2)), want[0], atol=1e-5)


def test_mom_keeps_memories_apart():
    """A memory that a token is not sent to neither fades nor is written."""
    net, ids = make("mom", n_layers=1), tokens(1, T)
    (seen,), mixer = look(net, ids), net.model.layers[0].mixer
    x = streams(net, ids)[0][0]
    p = mixer.gate(x).softmax(-1)
    top = p.topk(mixer.top_k).indices
    sent = torch.zeros_like(p).scatter(1, top, 1.0)
    want = p * sent / (p * sent).sum(-1, keepdim=True)
    assert torch.allclose(seen.router, want.T.to(seen.router.dtype), atol=1e-6)
    assert seen.memories == 5
    assert seen.decay.shape[0] == 5 * 2
    gone = sent.T.repeat_interleave(2, 0) == 0
    assert gone.any()
    assert (seen.decay[2:][gone] == 1).all()
    assert (seen.write[2:][gone] == 0).all()
    assert (seen.decay[2:][~gone] < 1).all()
    assert (seen.write[2:][~gone] > 0).all()
    inner = mixer.inner
    weight = inner.a_proj.weight.unflatten(0, (5, -1))  # decays by memory, whatever the route
    g = -inner.A_log.exp() * F.softplus(torch.einsum("td,nhd->tnh", x, weight) + inner.dt_bias)
    decay = g.exp().flatten(1).T.float()
    assert torch.allclose(seen.decay[:2], decay[:2], atol=1e-6)
    assert torch.allclose(seen.decay[2:][~gone], decay[2:][~gone], atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_both_directions(tied):
    """What is read backward is what a net with that mixer sees of the reversed input, turned."""
    net = make("hybrid", kind=StateZooForMaskedLM, bidirectional=True, tie_directions=tied)
    ids = tokens(1, T)
    seen = look(net, ids)
    assert [(s.layer, s.view) for s in seen] == [
        (0, ""), (0, "backward"), (1, ""), (1, "backward"),
    ]  # fmt: skip
    if not tied:
        net.model.layers[0].mixer.load_state_dict(net.model.layers[0].mixer_back.state_dict())
    turned = look(net, ids.flip(1))
    assert torch.allclose(turned[0].decay.flip(1), seen[1].decay, atol=1e-6)
    assert torch.allclose(turned[0].memory.flip(1), seen[1].memory, rtol=1e-5)
    assert (seen[3].attention.tril(-1) == 0).all()
    assert (seen[2].attention.triu(1) == 0).all()


def test_both_strands():
    complement = [*range(WORDS)][::-1]
    net = make("gla", kind=StateZooForSequenceClassification, complement=complement)
    ids = tokens(1, T)
    seen = look(net, ids)
    assert [s.view for s in seen[:2]] == ["", "other strand"]
    other = look(net, WORDS - 1 - ids.flip(1))
    assert torch.allclose(other[0].decay.flip(1), seen[1].decay, atol=1e-6)


def test_liger_shows_both_halves():
    (seen,) = look(make("liger", n_layers=1))
    assert seen.decay.shape == (2, T)
    assert seen.attention.shape == (2, T, T)


def test_lifetime():
    inf = math.inf
    half = torch.full((6, 1), -0.5)
    assert torch.allclose(lifetime(half), torch.full((6, 1), 2.0))  # also past the end
    assert torch.equal(lifetime(torch.zeros(4, 2)), torch.full((4, 2), inf))
    g = torch.tensor([0.0, -0.4, -0.4, -0.8, 0.0])
    want = [2 + 0.2 / 0.8, 1 + 0.6 / 0.8, 1 + 1 + 0.2 / 0.32, 1 + 1 / 0.32, 1 / 0.32]
    assert torch.allclose(lifetime(g[:, None])[:, 0], torch.tensor(want))
    assert lifetime(torch.tensor([[0.0], [-inf]]))[0].item() == pytest.approx(0.01)


def test_everything_is_put_back():
    net = make("mom", n_layers=1)
    mixer, before = net.model.layers[0].mixer, vars(delta).copy()
    with pytest.raises(ValueError, match="observe saw no input"), observe(net):
        assert "choose" in vars(mixer)
    assert "choose" not in vars(mixer)
    assert "recur" not in vars(mixer.inner)
    assert not mixer._forward_hooks
    assert not mixer._forward_pre_hooks
    assert vars(delta) == before


@torch.no_grad()
def test_mistakes():
    net, ids = make("attention"), tokens(1, T)
    with pytest.raises(ValueError, match=r"observe reads one sequence, got 2: call it for each\."):
        look(net, tokens(2, T))
    whole = "one forward pass, without cache, packing and padding"
    for more in ({"use_cache": True}, {"cu_seqlens": torch.tensor([0, 4, T])}):
        with pytest.raises(ValueError, match=whole), observe(net):
            net(ids, **more)
    with observe(net):
        net(ids)
        with pytest.raises(ValueError, match=whole):
            net(ids)
    with (
        pytest.raises(ValueError, match=r"needs a net of statezoo, got Linear"),
        observe(torch.nn.Linear(2, 2)),
    ):
        pass
