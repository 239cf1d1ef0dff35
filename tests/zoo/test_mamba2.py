"""Mamba-2 against transformers' torch path, its initial values and published sizes."""

import pytest
import torch
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from statezoo.zoo import StateZooConfig, StateZooForCausalLM
from statezoo.zoo.mamba2 import Mamba2

FP32 = 1e-5  # relative RMS: float32 sums in another order
D = 32
CASES = {  # settings here, and transformers' names of them
    "one group": ({}, {}),
    "groups": ({"n_groups": 4}, {"n_groups": 4}),
    "as many groups as heads": ({"n_groups": 8, "d_conv": 3}, {"n_groups": 8, "conv_kernel": 3}),
    "limits": ({"dt_limit": [0.01, 0.05]}, {"time_step_limit": (0.01, 0.05)}),
    "biases": ({"bias": True, "conv_bias": False}, {"use_bias": True, "use_conv_bias": False}),
}


def pair(ours, theirs, dtype=torch.float32):
    """Our mixer and transformers', with the same random weights under the same names."""
    torch.manual_seed(0)
    mixer = Mamba2(D, d_state=12, head_dim=8, norm_eps=1e-5, **ours).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    config = Mamba2Config(
        hidden_size=D, state_size=12, head_dim=8, num_heads=8, chunk_size=16, num_hidden_layers=1,
        layer_norm_epsilon=1e-5, **{"n_groups": 1, **theirs},
    )  # fmt: skip
    other = Mamba2Mixer(config, 0).to(dtype)
    other.load_state_dict(mixer.state_dict())  # strict: same names, same shapes
    return mixer.train(), other.eval()


def close(got, want):
    error = ((got - want).norm() / want.norm()).item()
    assert error < FP32, f"relative RMS error {error:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_transformers(case):
    mixer, other = pair(*CASES[case])
    x = torch.randn(2, 37, D)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    got, want = mixer(inputs[0])[0], other(inputs[1])
    close(got, want)
    weight = torch.randn_like(got)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    close(inputs[0].grad, inputs[1].grad)
    theirs = dict(other.named_parameters())
    for name, parameter in mixer.named_parameters():
        close(parameter.grad, theirs[name].grad)


def test_packing_and_states_carry_gradients():
    mixer, _ = pair({"n_groups": 2}, {"n_groups": 2}, torch.float64)
    S = torch.randn(2, 8, 12, 8, dtype=torch.float64, requires_grad=True)
    conv = torch.randn(2, 64 + 2 * 2 * 12, 3, dtype=torch.float64, requires_grad=True)
    a, b = (torch.randn(1, n, D, dtype=torch.float64) for n in (20, 5))
    y, state = mixer(torch.cat([a, b], 1), (S, conv), torch.tensor([0, 20, 25]))
    parts = [mixer(x, (S[i : i + 1], conv[i : i + 1])) for i, x in enumerate((a, b))]
    want, states = torch.cat([y for y, _ in parts], 1), [s for _, s in parts]
    torch.testing.assert_close(y, want)
    for i, tensor in enumerate(state):
        torch.testing.assert_close(tensor, torch.cat([s[i] for s in states]))
    weight = torch.randn_like(y)
    got = torch.autograd.grad((y * weight).sum() + state.S.sum(), (S, conv))
    want = (want * weight).sum() + sum(s.S.sum() for s in states)
    for one, other in zip(got, torch.autograd.grad(want, (S, conv)), strict=True):
        torch.testing.assert_close(one, other)
        assert one.abs().amax((1, 2) if one.ndim == 3 else (1, 2, 3)).min() > 0


def test_initial_values_survive_the_skeleton():
    net = StateZooForCausalLM(
        StateZooConfig(d_model=256, n_layers=9, mixers=["mamba2"], vocab_size=8, channel=None)
    )
    mixers = [block.mixer for block in net.model.layers]
    A, dt_bias = (torch.stack([getattr(m, n) for m in mixers]) for n in ("A_log", "dt_bias"))
    A, dt = A.exp(), torch.nn.functional.softplus(dt_bias)
    assert 1 <= A.min() < 3
    assert 14 < A.max() <= 16
    assert 0.9e-3 < dt.min() < 3e-3
    assert 0.04 < dt.max() < 0.11
    for m in mixers:
        assert torch.equal(m.D, torch.ones(8))
        limit = (1 / 256) ** 0.5  # torch's default: uniform up to 1 / sqrt(inputs)
        assert 0.99 * limit < m.in_proj.weight.abs().max() <= limit
        limit = (1 / 512) ** 0.5 / 3  # and divided by the root of 9 layers
        assert 0.99 * limit < m.out_proj.weight.abs().max() <= limit


@pytest.mark.parametrize(
    ("n_layers", "d_model", "parameters"),
    [
        (24, 768, 128_989_632),
        (48, 1024, 368_346_624),
        (48, 1536, 780_161_280),
        (48, 2048, 1_343_757_312),
        (64, 2560, 2_702_599_680),
    ],
)
def test_published_sizes(n_layers, d_model, parameters):
    with torch.device("meta"):
        net = StateZooForCausalLM(
            StateZooConfig(
                vocab_size=50288, d_model=d_model, n_layers=n_layers, mixers=["mamba2"],
                channel=None, tie_embeddings=True,
            )
        )  # fmt: skip
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_says_what_does_not_fit():
    with pytest.raises(ValueError, match=r"expand \* d_model = 96 must be a multiple of head_dim"):
        Mamba2(48)
    with pytest.raises(ValueError, match="number of heads 8 of n_groups=3"):
        Mamba2(32, head_dim=8, n_groups=3)
    with pytest.raises(ValueError, match="dt_limit"):
        Mamba2(32, dt_limit=[0.2, 0.1])
