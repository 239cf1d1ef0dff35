"""Rates on hand-worked numbers, and which parameters decay."""

from itertools import pairwise

import pytest
from torch import nn

from statezoo.lightning_modules.optim import Optim, adamw, decays, rate


def test_rate_warms_up_and_falls():
    optim = Optim(warmup_steps=2, final_lr=0.1)
    rates = [rate(step, optim, 23) for step in range(23)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert rates[12] == pytest.approx(0.55)  # half-way between steps 2 and 22
    assert rates[22] == pytest.approx(0.1)
    assert rate(100, optim, 23) == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[2:]))


def test_rate_linear_constant_and_without_end():
    assert rate(6, Optim(warmup_steps=0, schedule="linear", final_lr=0), 11) == pytest.approx(0.4)
    assert rate(9, Optim(warmup_steps=0, schedule="constant"), 11) == 1
    assert rate(10**6, Optim(), None) == 1


def test_short_runs_warm_up_for_a_tenth_at_most():
    assert rate(2, Optim(warmup_steps=100), 20) == 1


@pytest.mark.parametrize(
    "name", ["a.norm.weight", "q_norm.weight", "proj.bias", "m.A_log", "m.D", "m.dt_bias", "emb.w"]
)
def test_what_does_not_decay(name):
    assert not decays(name, {"emb.w"})


@pytest.mark.parametrize("name", ["norm_mixer.proj.weight", "conv.weight", "layers.0.DD.weight"])
def test_what_decays(name):
    assert decays(name, set())


def test_groups_hold_every_trainable_parameter_once():
    net = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3), nn.Linear(3, 4, bias=False))
    net[2].weight = net[0].weight  # tied
    net[1].bias.requires_grad_(False)
    decayed, left = adamw(net, Optim(weight_decay=0.5)).param_groups
    assert [p is net[1].weight for p in decayed["params"]] == [True]
    assert [p is net[0].weight for p in left["params"]] == [True]
    assert (decayed["weight_decay"], left["weight_decay"]) == (0.5, 0)


def test_settings_are_copied_and_checked():
    shared = Optim()
    Optim.of(shared).lr = 7
    assert shared.lr == Optim().lr
    assert Optim.of({"betas": [0.5, 0.9]}).betas == (0.5, 0.9)
    with pytest.raises(ValueError, match=r"no setting 'lrr': did you mean lr\?"):
        Optim.of({"lrr": 1})
    for wrong in ({"lr": -1}, {"betas": (1.0, 0.9)}, {"schedule": "step"}, {"total_steps": 0}):
        with pytest.raises(ValueError, match=r"optim"):
            Optim(**wrong)
