"""Rates on hand-worked numbers, and which parameters decay."""

import csv
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from statezoo.lightning_modules.network import load_network
from statezoo.lightning_modules.optim import Optim, adamw, decays, rate
from statezoo.lightning_modules.tuning import Adapter, tuned
from statezoo.main import main
from statezoo.zoo import StateZooConfig, StateZooForCausalLM


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


def network(tie=True):
    torch.manual_seed(0)
    shape = {"vocab_size": 7, "d_model": 8, "n_layers": 2, "mixers": ["gla"]}
    return StateZooForCausalLM(StateZooConfig(**shape, tie_embeddings=tie))


def rates_of(optimizer, net):
    names = {id(p): name for name, p in net.named_parameters()}
    return {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}


def test_the_first_pattern_that_fits_sets_the_rate():
    net = network(tie=False)
    rates = {"model.layers.0.*": 0.5, "model.layers.*": 0.25, "lm_head*": 10, "model.embed*": 0}
    optimizer = adamw(net, Optim(lr=0.01, rates=rates, weight_decay=0.2))
    want = {}
    for name, _ in net.named_parameters():
        if name.startswith("model.embed"):
            continue
        by_hand = {"model.layers.0": 0.005, "model.layers.1": 0.0025, "lm_head.weight": 0.1}
        want[name] = next((lr for k, lr in by_hand.items() if name.startswith(k)), 0.01)
    assert rates_of(optimizer, net) == pytest.approx(want)
    decay = {n: g["weight_decay"] for g in optimizer.param_groups for n in rates_of_group(g, net)}
    assert decay["model.layers.0.mixer.q_proj.weight"] == decay["lm_head.weight"] == 0.2
    assert decay["model.layers.0.mixer_norm.weight"] == decay["model.norm.weight"] == 0


def rates_of_group(group, net):
    names = {id(p): name for name, p in net.named_parameters()}
    return [names[id(p)] for p in group["params"]]


def test_rate_zero_freezes_and_leaves_no_state():
    net = network()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = adamw(net, Optim(lr=0.1, rates={"model.layers.0.*": 0}))
    for _ in range(2):
        optimizer.zero_grad()
        ids = torch.tensor([[1, 2, 3, 4]])
        net(ids, labels=ids).loss.backward()
        optimizer.step()
    frozen = {name for name in before if name.startswith("model.layers.0.")}
    assert {n for n, p in net.named_parameters() if torch.equal(p, before[n])} == frozen
    assert {n for n, p in net.named_parameters() if not p.requires_grad} == frozen
    assert {n for n, p in net.named_parameters() if p not in optimizer.state} == frozen


WRONG = {
    "typo": ({"model.layer.0.*": 1}, r"'model\.layer\.0\.\*' fits no .* nearest are model\.layers"),
    "class": ({"score*": 10}, r"'score\*' fits no parameter; the nearest are model\."),
    "tied": ({"lm_head*": 2}, r"lm_head\.weight, which is the same tensor as model\.embeddings\.w"),
    "shadowed": ({"*": 1, "model*": 2}, r"what 'model\*' fits has its rate from the patterns befo"),
    "everything": ({"*": 0}, "freezes every parameter, so there is nothing to train"),
    "negative": ({"*": -1}, r"at least 0, a factor of lr, got -1 for '\*'"),
}


@pytest.mark.parametrize(("rates", "message"), WRONG.values(), ids=WRONG)
def test_patterns_without_use_are_told(rates, message):
    with pytest.raises(ValueError, match=message):
        adamw(network(), Optim(rates=rates))


def test_a_rate_of_what_tune_freezes_is_told():
    net, _ = tuned(network(), "state", Adapter(rank=1))
    with pytest.raises(ValueError, match=r"'model\.embed\*' fits only parameters that are not tra"):
        adamw(net, Optim(rates={"model.embed*": 3}))
    optimizer = adamw(net, Optim(lr=1, rates={"*.layers.0.*": 3, "model.embed*": 0}))
    rates = rates_of(optimizer, net)
    assert {rate for name, rate in rates.items() if ".0." in name} == {3}
    assert {rate for name, rate in rates.items() if ".1." in name} == {1}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Fit a tiny model on a small text, with rates."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STATEZOO_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_text("".join(f"Line {i} says {i * i}.\n\n" for i in range(24)))

    def go(name, rates, *more):
        main(["fit", "--model", "GLA", "--model.d_model", "16", "--model.n_layers", "2",
              "--model.optim.rates", json.dumps(rates), "--data", "Text", "--data.path", "text.txt",
              "--data.seq_len", "16", "--data.batch_size", "2", "--trainer.accelerator", "cpu",
              "--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "1",
              "--trainer.max_steps", "6", "--checkpoints.every_n_steps", "3", "--name", name,
              *more])  # fmt: skip
        with Path("runs", name, "version_0", "metrics.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["train/nll"]]
        return {int(row["step"]): (row["train/nll"], row["train/lr"]) for row in rows}

    return go


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_run_with_rates_logs_its_own_and_goes_on(run, capsys):
    rates = {"model.embed*": 0, "model.layers.1.*": 3}
    first = run("half", rates, "--trainer.max_steps", "3", "--model.optim.total_steps", "6")
    whole = run("whole", rates)
    rest = run("rest", rates, "--ckpt_path", "runs/half/version_0/last.ckpt")
    assert first == {n: whole[n] for n in range(3)}
    assert rest == {n: whole[n] for n in range(3, 6)}
    assert float(whole[0][1]) == pytest.approx(3e-3)  # lr itself, not that of a group with another
    ends = [load_network(f"runs/{name}/version_0/last.ckpt") for name in ("half", "whole")]
    tables = [net.model.embeddings.weight for net in ends]
    assert torch.equal(*tables)
    with pytest.raises(SystemExit):
        run("other", {}, "--ckpt_path", "runs/half/version_0/last.ckpt")
    told = " ".join(capsys.readouterr().err.split())
    assert "was made with optim.rates {'model.embed*': 0" in told
    assert "this run has {}: give the same" in told
