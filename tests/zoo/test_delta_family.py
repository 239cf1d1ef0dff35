"""DeltaNet, Gated DeltaNet, DeltaProduct and KDA against their equations and transformers'."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from tests.zoo.oracle import (
    assert_equals_oracle,
    delta_memory,
    outputs_and_gradients,
    randomize,
    rms,
    short_conv,
    unit,
)

from statezoo.zoo import StateZooConfig, StateZooForCausalLM
from statezoo.zoo.deltanet import DeltaNet
from statezoo.zoo.deltaproduct import DeltaProduct
from statezoo.zoo.gated_deltanet import GatedDeltaNet
from statezoo.zoo.kda import KDA

D, T = 12, 19


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def equation(H, Hv, n=1, reach=1.0, decay=None, gate=F.silu):
    """The layer written out; ``decay(p, x, h)`` makes the factor ``[T K]`` of value head ``h``."""

    def layer(p, x):
        def stream(name):
            y = x @ p[f"{name}_proj.weight"].T
            taps = p.get(f"{name}_conv1d.weight")
            return F.silu(y) if taps is None else short_conv(y, taps)

        q = stream("q").chunk(H, -1)
        k = [write.chunk(H, -1) for write in stream("k").chunk(n, -1)]  # rows are (n h d)
        v = [write.chunk(Hv, -1) for write in stream("v").chunk(n, -1)]
        strength = reach * (x @ p["b_proj.weight"].T).sigmoid()
        out = []
        for h in range(Hv):
            key = h // (Hv // H)  # neighbouring value heads share a key
            f = torch.ones_like(q[key]) if decay is None else decay(p, x, h)
            beta = torch.stack([strength[:, j * Hv + h] for j in range(n)], 1)
            keys = torch.stack([unit(k[j][key]) for j in range(n)], 1)
            values = torch.stack([v[j][h] for j in range(n)], 1)
            out.append(rms(delta_memory(unit(q[key]), keys, values, beta, f), p["o_norm.weight"]))
        o = torch.cat(out, -1)
        if "g_proj.weight" in p:
            o = o * gate(x @ p["g_proj.weight"].T)
        elif "g_proj.1.weight" in p:
            o = o * gate(x @ p["g_proj.0.weight"].T @ p["g_proj.1.weight"].T + p["g_proj.1.bias"])
        return o @ p["o_proj.weight"].T

    return layer


def head_decay(p, x, h):
    """``alpha = exp(-exp(A) softplus(a + b))``, one for all key channels of a head."""
    step = F.softplus(x @ p["a_proj.weight"].T + p["dt_bias"])[:, h]
    return (-p["A_log"][h].exp() * step).exp()[:, None].expand(-1, p["K"])


def given_width(oracle, K):
    return lambda p, x: oracle({**p, "K": K}, x)


@pytest.mark.parametrize(
    "settings", [{}, {"d_conv": 0, "use_gate": True}, {"negative_eigenvalues": True, "d_conv": 2}]
)
def test_deltanet_is_its_equation(settings):
    mixer = randomize(DeltaNet(D, n_heads=2, expand_k=0.5, **settings))
    reach = 2.0 if settings.get("negative_eigenvalues") else 1.0
    assert_equals_oracle(mixer, equation(2, 2, reach=reach), torch.randn(2, T, D))


@pytest.mark.parametrize(
    "settings",
    [{"n_v_heads": 4}, {"use_gate": False, "d_conv": 0, "negative_eigenvalues": True}],
)
def test_gated_deltanet_is_its_equation(settings):
    mixer = randomize(GatedDeltaNet(D, n_heads=2, head_dim=4, expand_v=1.5, **settings))
    reach = 2.0 if settings.get("negative_eigenvalues") else 1.0
    oracle = equation(2, settings.get("n_v_heads", 2), reach=reach, decay=head_decay)
    assert_equals_oracle(mixer, given_width(oracle, 4), torch.randn(2, T, D))


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_deltaproduct_is_its_equation(n, gated):
    mixer = DeltaProduct(
        D, n_heads=2, n_v_heads=4, head_dim=4, n_householder=n, use_forget_gate=gated
    )
    oracle = equation(2, 4, n, reach=2.0, decay=head_decay if gated else None)
    assert_equals_oracle(randomize(mixer), given_width(oracle, 4), torch.randn(2, T, D))


@pytest.mark.parametrize("gate_floor", [None, -5.0])
def test_kda_is_its_equation(gate_floor):
    def channel_decay(p, x, h):
        f = x @ p["f_proj.0.weight"].T @ p["f_proj.1.weight"].T + p["dt_bias"]
        f, A = f.chunk(2, -1)[h], p["A_log"][h].exp()
        g = -A * F.softplus(f) if gate_floor is None else gate_floor * torch.sigmoid(A * f)
        return g.exp()

    mixer = randomize(KDA(D, n_heads=2, head_dim=4, expand_v=1.5, gate_floor=gate_floor))
    oracle = equation(2, 2, decay=channel_decay, gate=torch.sigmoid)
    assert_equals_oracle(mixer, oracle, torch.randn(2, T, D))


def test_both_gates_of_kda_start_alike():
    decays = []
    for floor in (None, -5.0):
        torch.manual_seed(0)
        mixer = KDA(64, gate_floor=floor)
        decays.append(mixer.decay(torch.zeros(1, 1, 64)))
        assert decays[-1].max() < 0
    slow = decays[0] < -0.005 * 1.01  # below one thousandth of the floor the logit is clamped
    torch.testing.assert_close(decays[0][slow], decays[1][slow], rtol=1e-4, atol=0)


def test_gated_deltanet_is_that_of_transformers(monkeypatch):
    """Qwen3-Next's module with our weights; its torch functions, whatever is installed."""
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    for name in ("torch_chunk_gated_delta_rule", "causal_conv1d_fn"):
        monkeypatch.setattr(qwen, name, inspect.unwrap(getattr(qwen, name)))
    H, Hv, K, V = 2, 4, 8, 6
    config = Qwen3NextConfig(
        hidden_size=D,
        linear_num_key_heads=H,
        linear_num_value_heads=Hv,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    theirs = qwen.Qwen3NextGatedDeltaNet(config, 0)
    ours = randomize(GatedDeltaNet(D, n_heads=H, n_v_heads=Hv, head_dim=K, expand_v=V / K))
    by_head = [
        p.weight.view(H, -1, D) for p in (ours.q_proj, ours.k_proj, ours.v_proj, ours.g_proj)
    ]
    mine = {
        "in_proj_qkvz.weight": torch.cat(by_head, 1).flatten(0, 1),
        "in_proj_ba.weight": torch.cat(
            [p.weight.view(H, -1, D) for p in (ours.b_proj, ours.a_proj)], 1
        ).flatten(0, 1),
        "conv1d.weight": torch.cat([getattr(ours, f"{n}_conv1d").weight for n in "qkv"]),
        "norm.weight": ours.o_norm.weight,
        "out_proj.weight": ours.o_proj.weight,
        "A_log": ours.A_log,
        "dt_bias": ours.dt_bias,
    }
    x = torch.randn(2, 70, D)
    want = outputs_and_gradients(
        lambda x, p: torch.func.functional_call(theirs, mine, (x,)), x, ours
    )
    got = outputs_and_gradients(lambda x, p: ours(x)[0], x, ours)
    for name, a in got.items():
        error = ((a - want[name]).norm() / want[name].norm()).item()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


def test_parameters_bear_their_published_names():
    def shapes(mixer):
        return {name: tuple(p.shape) for name, p in mixer.named_parameters()}

    product = DeltaProduct(
        16, n_heads=2, n_v_heads=4, head_dim=4, n_householder=3, use_forget_gate=True
    )
    assert shapes(product) == {
        "A_log": (4,), "dt_bias": (4,), "a_proj.weight": (4, 16), "b_proj.weight": (12, 16),
        "q_proj.weight": (8, 16), "k_proj.weight": (24, 16), "v_proj.weight": (96, 16),
        "q_conv1d.weight": (8, 1, 4), "k_conv1d.weight": (24, 1, 4), "v_conv1d.weight": (96, 1, 4),
        "g_proj.weight": (32, 16), "o_norm.weight": (8,), "o_proj.weight": (16, 32),
    }  # fmt: skip
    assert shapes(KDA(16, n_heads=2, head_dim=4, expand_v=1.5)) == {
        "A_log": (2,), "dt_bias": (8,), "b_proj.weight": (2, 16),
        "q_proj.weight": (8, 16), "k_proj.weight": (8, 16), "v_proj.weight": (12, 16),
        "q_conv1d.weight": (8, 1, 4), "k_conv1d.weight": (8, 1, 4), "v_conv1d.weight": (12, 1, 4),
        "f_proj.0.weight": (6, 16), "f_proj.1.weight": (8, 6),
        "g_proj.0.weight": (6, 16), "g_proj.1.weight": (12, 6), "g_proj.1.bias": (12,),
        "o_norm.weight": (6,), "o_proj.weight": (16, 12),
    }  # fmt: skip
    assert shapes(DeltaNet(16)).keys() == {
        "q_proj.weight", "k_proj.weight", "v_proj.weight", "b_proj.weight", "o_proj.weight",
        "q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight", "o_norm.weight",
    }  # fmt: skip


def test_wrong_sizes_say_what_to_change():
    with pytest.raises(
        ValueError, match="gated_deltanet: n_v_heads=3 must be a multiple of n_heads=2"
    ):
        GatedDeltaNet(16, n_heads=2, n_v_heads=3, head_dim=4)
    with pytest.raises(ValueError, match=r"deltanet: the width 18 \(d_model\)|expand_k \* d_model"):
        DeltaNet(18)
    with pytest.raises(ValueError, match="writes a token at least 1"):
        DeltaProduct(16, n_householder=0)
    with pytest.raises(ValueError, match="gate_floor must be below 0, got 1"):
        KDA(16, gate_floor=1.0)
    with pytest.raises(ValueError, match=r"kda: the width 6\.8 \(expand_v \* head_dim\)"):
        KDA(16, head_dim=4, expand_v=1.7)


@pytest.mark.parametrize(
    ("name", "settings", "d_model", "n_layers", "parameters"),
    [  # untied head over 32000 tokens, specs/core.md 4 and 5.3
        ("deltanet", {"n_heads": 8}, 1024, 24, 374_362_112),
        ("deltanet", {"n_heads": 16}, 2048, 24, 1_365_677_056),
        ("gated_deltanet", {"n_heads": 6, "head_dim": 256}, 2048, 21, 1_387_348_732),
    ],
)
def test_published_sizes(name, settings, d_model, n_layers, parameters):
    mixers = [{"name": name, **settings}]
    config = StateZooConfig(vocab_size=32000, d_model=d_model, n_layers=n_layers, mixers=mixers)
    with torch.device("meta"):
        net = StateZooForCausalLM(config)
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_initial_values_survive_the_skeleton():
    torch.manual_seed(0)
    for name in ("gated_deltanet", "kda"):
        entry = {"name": name, "n_heads": 16}
        net = StateZooForCausalLM(StateZooConfig(d_model=64, n_layers=4, mixers=[entry]))
        for block in net.model.layers:
            A, dt = block.mixer.A_log.exp(), F.softplus(block.mixer.dt_bias)
            assert A.min() > 0
            assert 8 < A.max() < 16
            assert 0.99e-3 < dt.min() < 5e-3
            assert 0.02 < dt.max() < 0.101
