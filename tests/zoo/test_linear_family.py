"""Linear attention, RetNet and HGRN2 against their equations written out."""

import pytest
import torch
import torch.nn.functional as F
from tests.zoo.oracle import additive_memory, assert_equals_oracle, randomize, rms

from statezoo.zoo import StateZooConfig, StateZooForCausalLM
from statezoo.zoo.hgrn2 import HGRN2
from statezoo.zoo.linear_attention import LinearAttention
from statezoo.zoo.retnet import RetNet

D, H, T = 12, 2, 19


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def heads(y):
    """One sequence ``[T H*K]`` as one ``[T K]`` per head."""
    return y.chunk(H, -1)


@pytest.mark.parametrize("feature_map", ["elu", "relu", "identity"])
def test_linear_attention_is_its_equation(feature_map):
    phi = {
        "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
        "relu": F.relu,
        "identity": lambda x: x,
    }
    phi = phi[feature_map]

    def oracle(p, x):
        q, k, v = (heads(x @ p[f"{n}_proj.weight"].T) for n in "qkv")
        o = [additive_memory(phi(q[h]), phi(k[h]), v[h], torch.ones_like(q[h])) for h in range(H)]
        return torch.cat([rms(y, p["norm.weight"]) for y in o], -1) @ p["o_proj.weight"].T

    mixer = LinearAttention(D, n_heads=H, expand_v=1.5, feature_map=feature_map)
    assert_equals_oracle(randomize(mixer), oracle, torch.randn(2, T, D))


def test_normalised_linear_attention_is_an_average_of_values():
    def oracle(p, x):
        q, k, v = (heads(x @ p[f"{n}_proj.weight"].T) for n in "qkv")
        out = []
        for h in range(H):
            scores = (F.elu(q[h]) + 1) @ (F.elu(k[h]) + 1).T  # quadratic form, no memory
            scores = scores.tril() / q[h].shape[-1] ** 0.5
            out.append(scores @ v[h] / (scores.sum(-1, keepdim=True) + 1e-6))
        return torch.cat(out, -1) @ p["o_proj.weight"].T

    mixer = randomize(LinearAttention(D, n_heads=H, expand_v=1.5, normalize=True))
    assert_equals_oracle(mixer, oracle, torch.randn(2, T, D))
    with pytest.raises(ValueError, match="positive features"):
        LinearAttention(D, feature_map="identity", normalize=True)


def test_retnet_is_its_quadratic_form():
    def turned(x, sign=1):
        pairs = torch.complex(*x.chunk(2, -1))
        rate = 10000.0 ** (-torch.arange(pairs.shape[-1], dtype=x.dtype) / pairs.shape[-1])
        angle = torch.arange(T)[:, None] * rate
        return pairs * torch.polar(torch.ones_like(angle), sign * angle)

    def oracle(p, x):
        q, k, v = (heads(x @ p[f"{n}_proj.weight"].T) for n in "qkv")
        gates, out = heads(x @ p["g_proj.weight"].T), []
        for h in range(H):
            distance = torch.arange(T)[:, None] - torch.arange(T)
            fade = ((1 - 2.0 ** (-5 - h)) ** distance.to(x)).tril()
            scores = (turned(q[h]) @ turned(k[h]).conj().T).real * fade / q[h].shape[-1] ** 0.5
            out.append(rms(scores @ v[h], p["g_norm.weight"]) * gates[h] * gates[h].sigmoid())
        return torch.cat(out, -1) @ p["o_proj.weight"].T

    assert_equals_oracle(randomize(RetNet(D, n_heads=H)), oracle, torch.randn(2, T, D))


def test_retnet_rotates_by_the_place_in_each_sequence():
    mixer = randomize(RetNet(D, n_heads=H)).double()
    x = torch.randn(1, 9, D, dtype=torch.float64)
    whole, _ = mixer(x)
    _, state = mixer(torch.cat([x[:, :2], x[:, :5]], 1), cu_seqlens=torch.tensor([0, 2, 7]))
    assert state.seen.tolist() == [2, 5]
    rest = torch.cat([x[:, 2:4], x[:, 5:]], 1)
    y, state = mixer(rest, state, torch.tensor([0, 2, 6]))
    assert state.seen.tolist() == [4, 9]
    torch.testing.assert_close(y[0, :2], whole[0, 2:4])
    torch.testing.assert_close(y[0, 2:], whole[0, 5:])


@pytest.mark.parametrize("lower_bound", [0.0, 0.3, None])
def test_hgrn2_is_its_equation(lower_bound):
    def oracle(p, x):
        q, f, i = (x @ p[f"{n}_proj.weight"].T for n in "qfi")
        bound = torch.sigmoid(p["bound_bias"]) if "bound_bias" in p else 0.0
        f = bound + (1 - bound) * f.sigmoid()
        parts = zip(heads(q * q.sigmoid()), heads(1 - f), heads(i), heads(f), strict=True)
        o = torch.cat([additive_memory(*part) for part in parts], -1)
        return rms(o, p["g_norm.weight"]) @ p["o_proj.weight"].T

    mixer = HGRN2(D, n_heads=H, lower_bound=lower_bound)
    if lower_bound:
        assert mixer.bound_bias.sigmoid().tolist() == pytest.approx([lower_bound] * D)
    assert ("bound_bias" in dict(mixer.named_parameters())) == (lower_bound != 0)
    assert_equals_oracle(randomize(mixer), oracle, torch.randn(2, T, D))


def test_hgrn2_bounds_start_by_depth_and_take_any_published_table():
    config = StateZooConfig(d_model=D, n_layers=4, mixers=[{"name": "hgrn2", "n_heads": H}])
    for block in StateZooForCausalLM(config).model.layers:
        start = max(block.mixer.layer / 4, 1e-4)
        assert block.mixer.bound_bias.sigmoid().tolist() == pytest.approx([start] * D)
    table = torch.randn(4, D, dtype=torch.float64)  # the published parameter, shared by all layers
    bounds = table.softmax(0).cumsum(0) - table.softmax(0)[0]
    for i, bound in enumerate(bounds):
        mixer = HGRN2(D, n_heads=H, lower_bound=0.0 if i == 0 else None).double()
        if i:
            mixer.bound_bias.data = torch.logit(bound)
            torch.testing.assert_close(mixer.bound_bias.sigmoid(), bound)
        else:
            assert not bound.any()
            assert mixer.bound_bias is None


def test_wrong_widths_say_what_to_change():
    with pytest.raises(ValueError, match=r"retnet: the width 18 \(expand_v \* d_model\).*4 heads"):
        RetNet(12, expand_v=1.5)
    with pytest.raises(ValueError, match="even head width, got 3"):
        RetNet(12)
    with pytest.raises(ValueError, match=r"linear_attention: .*12\.6"):
        LinearAttention(12, expand_k=1.05)
    with pytest.raises(ValueError, match=r"lower_bound must lie in \[0, 1\), got 1"):
        HGRN2(12, lower_bound=1.0)
