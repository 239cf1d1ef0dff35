"""Mamba against transformers' torch path, its initial values and published sizes."""

import pytest
import torch
import torch.nn.functional as F
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from statezoo.zoo import StateZooConfig, StateZooForCausalLM
from statezoo.zoo.mamba import Mamba

FP32 = 1e-5  # relative RMS: float32 sums in another order
D, E, N = 24, 48, 6
CASES = {  # settings here, and transformers' names of them
    "defaults": ({}, {}),
    "biases": ({"bias": True, "conv_bias": False}, {"use_bias": True, "use_conv_bias": False}),
    "sizes": ({"dt_rank": 5, "d_conv": 2}, {"time_step_rank": 5, "conv_kernel": 2}),
}


def shaken(dtype=torch.float32, **settings):
    """A mixer whose parameters are all away from their initial values."""
    torch.manual_seed(0)
    mixer = Mamba(D, d_state=N, **settings).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return mixer


def close(got, want, allowed=FP32):
    error = ((got - want).norm() / want.norm()).item()
    assert error < allowed, f"relative RMS error {error:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_transformers(case):
    ours, theirs = CASES[case]
    mixer = shaken(**ours)
    config = MambaConfig(hidden_size=D, state_size=N, num_hidden_layers=1, **theirs)
    other = MambaMixer(config, 0)
    other.load_state_dict(mixer.state_dict())  # strict: same names, same shapes
    x = torch.randn(2, 37, D)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    got, want = mixer(inputs[0])[0], other.eval()(inputs[1])
    close(got, want)
    weight = torch.randn_like(got)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    close(inputs[0].grad, inputs[1].grad)
    parameters = dict(other.named_parameters())
    for name, parameter in mixer.named_parameters():
        close(parameter.grad, parameters[name].grad)


def loop(mixer, x, flip):
    """The layer a token at a time, in float64."""
    u, z = mixer.in_proj(x).chunk(2, -1)
    u = F.silu(F.conv1d(F.pad(u.mT, (3, 0)), mixer.conv1d.weight, mixer.conv1d.bias, groups=E)).mT
    r, B, C = mixer.x_proj(u).split((2, N, N), -1)
    dt, A = F.softplus(mixer.dt_proj(r)), -mixer.A_log.exp()
    h, out = torch.zeros(x.shape[0], E, N, dtype=x.dtype), []
    for t in range(x.shape[1]):
        a = (dt[:, t, :, None] * A).exp()
        h = (2 * a - 1 if flip else a) * h + (dt * u)[:, t, :, None] * B[:, t, None]
        out.append((h * C[:, t, None]).sum(-1) + mixer.D * u[:, t])
    return mixer.out_proj(torch.stack(out, 1) * F.silu(z))


@pytest.mark.parametrize("flip", [False, True])
def test_is_the_loop_also_with_negative_eigenvalues(flip):
    mixer = shaken(torch.float64, negative_eigenvalues=flip)
    with torch.no_grad():
        mixer.dt_proj.bias.add_(4)  # decays well below one half: the variant's are negative
    x = torch.randn(2, 75, D, dtype=torch.float64, requires_grad=True)
    got, want = mixer(x)[0], loop(mixer, x, flip)
    close(got, want, 1e-10)
    weight, wrt = torch.randn_like(got), [x, *mixer.parameters()]
    pairs = zip(*(torch.autograd.grad((y * weight).sum(), wrt) for y in (got, want)), strict=True)
    for a, b in pairs:
        close(a, b, 1e-10)


@pytest.mark.parametrize("flip", [False, True])
def test_packing_and_states_carry_gradients(flip):
    mixer = shaken(torch.float64, negative_eigenvalues=flip)
    S = torch.randn(3, E, N, dtype=torch.float64, requires_grad=True)
    conv = torch.randn(3, E, 3, dtype=torch.float64, requires_grad=True)
    a, b = (torch.randn(1, n, D, dtype=torch.float64) for n in (20, 2))
    y, state = mixer(torch.cat([a, b], 1), (S, conv), torch.tensor([0, 20, 20, 22]))
    parts = [mixer(x, (S[i : i + 1], conv[i : i + 1])) for i, x in ((0, a), (2, b))]
    torch.testing.assert_close(y, torch.cat([y for y, _ in parts], 1))
    for i, (tensor, start) in enumerate(zip(state, (S, conv), strict=True)):
        want = torch.cat([parts[0][1][i], start[1:2], parts[1][1][i]])  # the empty one hands on
        torch.testing.assert_close(tensor, want)
    weight = torch.randn_like(y)
    got = torch.autograd.grad((y * weight).sum() + state.S.sum(), (S, conv))
    want = sum((p * w).sum() for (p, _), w in zip(parts, weight.split([20, 2], 1), strict=True))
    want = want + sum(s.S.sum() for _, s in parts) + S[1].sum()
    for one, other in zip(got, torch.autograd.grad(want, (S, conv)), strict=True):
        torch.testing.assert_close(one, other)
    assert got[0].abs().amax((1, 2)).min() > 0


def test_counts_modulo_two_by_construction():
    """One channel whose decay is -1 where the token is a 1: its sign is the parity, for ever."""
    mixer = Mamba(2, d_state=1, d_conv=1, expand=0.5, dt_rank=1, negative_eigenvalues=True).double()
    bits = torch.randint(2, (4, 500))
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.zero_()
        mixer.in_proj.weight[0, 0] = 1.0  # u is large at a 1
        mixer.conv1d.weight.fill_(50.0)
        mixer.x_proj.weight[0, 0] = 1.0
        mixer.dt_proj.weight.fill_(1.0)
        mixer.dt_proj.bias.fill_(-30.0)
        mixer.x_proj.weight[2, 0] = 1.0  # read at every 1
        mixer.in_proj.weight[1, 1] = 1.0  # gate open
        mixer.out_proj.weight[0, 0] = 1.0
    x = torch.stack([bits, torch.ones_like(bits)], -1).double()
    y, _ = mixer(x, (torch.ones(4, 1, 1, dtype=torch.float64), torch.zeros(4, 1, 0)))
    ones = bits.bool()
    parity = bits.cumsum(1) % 2
    assert torch.equal((y[..., 0] < 0)[ones], parity[ones] == 1)
    assert y[..., 0][ones].abs().min() > 1  # undamped after 500 tokens


def test_initial_values_survive_the_skeleton():
    net = StateZooForCausalLM(
        StateZooConfig(d_model=256, n_layers=4, mixers=["mamba"], vocab_size=8, channel=None)
    )
    for block in net.model.layers:
        m = block.mixer
        torch.testing.assert_close(m.A_log.exp(), torch.arange(1.0, 17).expand(512, -1))
        assert torch.equal(m.D, torch.ones(512))
        dt = F.softplus(m.dt_proj.bias)
        assert 0.99e-3 < dt.min() < 1.2e-3
        assert 0.08 < dt.max() < 0.101
        assert abs(dt.log().mean() - torch.tensor(1e-2).log()) < 0.2  # log-uniform
        for linear, limit in (
            (m.dt_proj, 16**-0.5),
            (m.in_proj, 256**-0.5),  # torch's default: uniform up to 1 / sqrt(inputs)
            (m.x_proj, 512**-0.5),
            (m.out_proj, 512**-0.5 / 2),  # and divided by the root of 4 layers
        ):
            assert 0.99 * limit < linear.weight.abs().max() <= limit


@pytest.mark.parametrize(
    ("n_layers", "d_model", "parameters"),
    [
        (24, 768, 129_135_360),
        (48, 1024, 371_516_416),
        (48, 1536, 793_204_224),
        (48, 2048, 1_372_178_432),
        (64, 2560, 2_768_345_600),
    ],
)
def test_published_sizes(n_layers, d_model, parameters):
    with torch.device("meta"):
        net = StateZooForCausalLM(
            StateZooConfig(
                vocab_size=50280, d_model=d_model, n_layers=n_layers, mixers=["mamba"],
                channel=None, tie_embeddings=True,
            )
        )  # fmt: skip
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_says_what_does_not_fit():
    with pytest.raises(ValueError, match="d_state=0"):
        Mamba(D, d_state=0)
    with pytest.raises(ValueError, match=r"dt_min=0\.2 <= dt_max=0\.1"):
        Mamba(D, dt_min=0.2)
