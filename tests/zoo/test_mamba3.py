"""Mamba-3 against its recurrence, a token at a time."""

import pytest
import torch
import torch.nn.functional as F

from statezoo.zoo import StateZooConfig, StateZooForCausalLM
from statezoo.zoo.mamba3 import Mamba3

D, H, G, K, V = 12, 4, 2, 8, 6
ANGLES = 2


def shaken():
    """A mixer whose parameters are all away from their initial values, steps large."""
    torch.manual_seed(0)
    mixer = Mamba3(D, d_state=K, head_dim=V, n_groups=G).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        mixer.dt_bias.add_(3)
    return mixer


def loop(mixer, x):
    """The recurrence with its two writes a token, and rotations as complex numbers."""
    E = H * V
    z, v, B, C, dt, a, trap, omega = mixer.in_proj(x).split(
        [E, E, G * K, G * K, H, H, H, ANGLES], -1
    )
    dt, lam = F.softplus(dt + mixer.dt_bias), trap.sigmoid()
    A = -torch.where(a >= 0, 1 + a, 1 / (1 - a.clamp(max=0))).clamp(min=1e-4)
    v = v.unflatten(-1, (H, V))

    def heads(y, norm, bias):
        y = y.unflatten(-1, (G, K))
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
        return y[:, :, torch.arange(H) // (H // G)] + bias[:, 0]

    def turn(y, angle):
        pairs = torch.complex(y[..., 0 : 2 * ANGLES : 2], y[..., 1 : 2 * ANGLES : 2])
        pairs = pairs * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([torch.view_as_real(pairs).flatten(-2), y[..., 2 * ANGLES :]], -1)

    q, k = heads(C, mixer.C_norm, mixer.C_bias), heads(B, mixer.B_norm, mixer.B_bias)
    S, angle = x.new_zeros(len(x), H, K, V), x.new_zeros(len(x), H, ANGLES)
    write, out = torch.zeros_like(S), []
    for t in range(x.shape[1]):
        step, alpha = dt[:, t, :, None, None], (A * dt)[:, t, :, None, None].exp()
        half = lam[:, t, :, None, None]
        angle = angle + torch.pi * dt[:, t, :, None] * omega[:, t, None].tanh()
        S = alpha * S + (1 - half) * step * alpha * write
        write = turn(k[:, t], angle)[..., None] * v[:, t, :, None]
        S = S + half * step * write
        out.append((turn(q[:, t], angle)[..., None] * S).sum(2) + mixer.D[:, None] * v[:, t])
    return mixer.out_proj(torch.stack(out, 1).flatten(-2) * F.silu(z))


@pytest.mark.parametrize("T", [1, 2, 40])
def test_is_the_recurrence(T):
    mixer = shaken()
    x = torch.randn(2, T, D, dtype=torch.float64, requires_grad=True)
    got, want = mixer(x)[0], loop(mixer, x)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    weight, wrt = torch.randn_like(got), [x, *mixer.parameters()]
    pairs = zip(*(torch.autograd.grad((y * weight).sum(), wrt) for y in (got, want)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_packing_and_states_carry_gradients():
    mixer = shaken()
    shapes = [(3, H, K, V), (3, H, K), (3, H, V), (3, H, ANGLES)]
    start = [torch.rand(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    a, b = (torch.randn(1, n, D, dtype=torch.float64) for n in (9, 2))
    y, state = mixer(torch.cat([a, b], 1), tuple(start), torch.tensor([0, 9, 9, 11]))
    parts = [mixer(x, tuple(s[i : i + 1] for s in start)) for i, x in ((0, a), (2, b))]
    want = torch.cat([y for y, _ in parts], 1)
    torch.testing.assert_close(y, want)
    for i, tensor in enumerate(state):
        rest = torch.cat([parts[0][1][i], start[i][1:2], parts[1][1][i]])  # the empty one hands on
        torch.testing.assert_close(tensor, rest)
    weight = torch.randn_like(y)
    got, want = (torch.autograd.grad((o * weight).sum(), start) for o in (y, want))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)
        assert one[0].any()
        assert one[2].any()


def test_initial_values_survive_the_skeleton():
    net = StateZooForCausalLM(
        StateZooConfig(d_model=256, n_layers=4, mixers=["mamba3"], vocab_size=8, channel=None)
    )
    for block in net.model.layers:
        m = block.mixer
        assert all(torch.equal(p, torch.ones_like(p)) for p in (m.B_bias, m.C_bias, m.D))
        assert 0.9e-3 < F.softplus(m.dt_bias).min() < F.softplus(m.dt_bias).max() < 0.11
        for linear, limit in ((m.in_proj, 256**-0.5), (m.out_proj, 512**-0.5 / 2)):
            assert 0.99 * limit < linear.weight.abs().max() <= limit


def test_says_what_does_not_fit():
    with pytest.raises(ValueError, match="head_dim=64"):
        Mamba3(24)
    with pytest.raises(ValueError, match="rope_fraction=0"):
        Mamba3(32, rope_fraction=0.0)
