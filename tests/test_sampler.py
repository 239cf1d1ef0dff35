"""A model draws from the law that it states; a broken sampler is caught at the same size."""

import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from statezoo import shipped
from statezoo.main import main
from statezoo.probe.sampler import TILTS, conclude, law_sums, random_prompts, sampler_test
from statezoo.zoo import StateZooForCausalLM
from statezoo.zoo.attention import AttentionState
from tests.zoo.cases import KINDS, WORDS, make

# Lightning calls names that jsonargparse has deprecated
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

ROWS, TOKENS, PROMPT = 96, 24, 16
"""The same for sound samplers and broken ones; bounds are then about 0.11 nats."""


def sharp(case):
    """A tiny net whose laws are far from uniform and whose attention knows positions."""
    net = make(case)
    with torch.no_grad():
        net.lm_head.weight.mul_(4)
        for part in net.modules():
            if hasattr(part, "q_proj"):
                part.q_proj.weight.mul_(6)
    return net


def measured(net):
    return sampler_test(net, random_prompts(ROWS, 1, WORDS), new_tokens=TOKENS)


# ----------------------------------------------------------------- sound and broken


@pytest.mark.parametrize("case", KINDS)
def test_every_family_draws_from_its_own_law(case):
    found = measured(sharp(case))
    assert found.passed, str(found)
    assert found.tokens == ROWS * TOKENS
    assert -0.15 < found.low < 0 < found.high < 0.15
    assert 0.2 < found.entropy < 0.7 * math.log(WORDS)


def drawn_with(net, **options):
    """Change what ``generate`` is told."""
    plain = net.generate
    net.generate = lambda ids, **given: plain(ids, **(given | options))


def decoded_with(net, change):
    """Change what the model does while it draws; the parallel pass stays as it is."""
    plain, forward = net.generate, net.forward

    def generate(ids, **given):
        net.forward = partial(change, forward)
        try:
            return plain(ids, **given)
        finally:
            net.forward = forward

    net.generate = generate


def lost(forward, *ids, past_key_values=None, **given):
    """A layer begins anew at every step."""
    past_key_values.layers[0].state = None
    return forward(*ids, past_key_values=past_key_values, **given)


def not_handed_over(forward, *ids, past_key_values=None, **given):
    """What the prompt left is lost, once."""
    if past_key_values.get_seq_length() == PROMPT:
        for layer in past_key_values.layers:
            layer.state = None
    return forward(*ids, past_key_values=past_key_values, **given)


def late(forward, *ids, past_key_values=None, once=False, **given):
    """Positions run ahead by one, after the prompt or at every step."""
    if past_key_values.get_seq_length() == PROMPT or not once:
        for layer in past_key_values.layers:
            if isinstance(layer.state, AttentionState):
                layer.state = layer.state._replace(seen=layer.state.seen + 1)
    return forward(*ids, past_key_values=past_key_values, **given)


def padding_read(forward, *ids, attention_mask=None, **given):
    """Padding is read as if it were tokens."""
    return forward(*ids, **given)


def left_in_training(net):
    """Dropout is on, as nobody called ``eval``."""
    drop = lambda module, given, out: F.dropout(out, 0.1, module.training)  # noqa: E731
    net.model.embeddings.register_forward_hook(drop)
    net.train()


BROKEN = {
    "temperature": (partial(drawn_with, temperature=0.8), ["gla", "attention", "mamba2"]),
    "warm": (partial(drawn_with, temperature=1.25), ["gla", "attention"]),
    "top-k": (partial(drawn_with, top_k=2), ["gla", "attention"]),
    "top-p": (partial(drawn_with, top_p=0.8), ["gla"]),
    "lost": (partial(decoded_with, change=lost), ["gla", "mamba", "mamba2", "deltanet", "hybrid"]),
    "not handed over": (
        partial(decoded_with, change=not_handed_over),
        ["gla", "mamba2", "deltaproduct", "attention", "hybrid"],
    ),
    "positions": (partial(decoded_with, change=late), ["attention", "hybrid", "attention-window"]),
    "positions once": (partial(decoded_with, change=partial(late, once=True)), ["attention"]),
    "padding": (
        partial(decoded_with, change=padding_read),
        ["gla", "retnet", "deltanet", "attention"],
    ),
    "dropout": (left_in_training, ["gla", "mamba2", "attention"]),
}


@pytest.mark.parametrize(
    ("how", "case"), [(how, case) for how, (_, cases) in BROKEN.items() for case in cases]
)
def test_a_broken_sampler_is_caught(how, case):
    net = sharp(case)
    BROKEN[how][0](net)
    found = measured(net)
    assert not found.passed, str(found)
    assert "does not draw from the model's law" in str(found)
    too_likely = how in ("temperature", "top-k", "top-p")
    assert (found.mean < found.low) == too_likely
    assert ("likely tokens come too often, as with a temp" in str(found)) == too_likely


def test_it_leaves_the_net_and_the_generator_as_they_were():
    net = make("gla")
    net.train()
    net.model.norm.eval()
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    prompts = random_prompts(5, 1, WORDS)
    one, two = (sampler_test(net, prompts, new_tokens=3, seed=s) for s in (1, 2))
    assert torch.equal(torch.rand(2), want)
    assert net.training
    assert not net.model.norm.training
    assert one != two
    assert one == sampler_test(net, prompts, new_tokens=3, seed=1)


def test_an_end_token_ends_nothing():
    net = sharp("gla")
    want = measured(net)
    net.generation_config.eos_token_id = 3
    assert measured(net) == want


# ------------------------------------------------------------------------ bounds


def by_hand(law, rows):
    """Sums of one law at ``rows`` of it, in a loop."""
    H = -sum(p * math.log(p) for p in law)
    found = [
        sum(-math.log(law[x]) - H for x in rows),
        len(rows) * sum(p * (math.log(p) + H) ** 2 for p in law),
        len(rows) * H,
    ]
    for t in TILTS.tolist():
        tilted = sum(p * math.exp(t * (-math.log(p) - H)) for p in law)
        found.append(len(rows) * math.log(tilted))
    return found


def test_sums_are_those_of_a_loop():
    law, rows = [0.5, 0.3, 0.15, 0.05], [0, 0, 3, 1]
    logits = (torch.tensor(law, dtype=torch.float64).log() + 2.5).expand(4, 4)
    got = law_sums(logits, torch.tensor(rows))
    assert got.tolist() == pytest.approx(by_hand(law, rows), abs=1e-12)


def test_bounds_are_within_those_of_freedman():
    law, n, error = [0.5, 0.3, 0.15, 0.05], 400, 1e-6
    sums = torch.tensor(by_hand(law, [0] * n), dtype=torch.float64)
    found = conclude(sums, n, error)
    V, H = float(sums[1]), -sum(p * math.log(p) for p in law)
    most = {1: -math.log(min(law)) - H, -1: H + math.log(max(law))}  # range of a step, above, below
    tight = math.sqrt(2 * V * math.log(2 / error)) / n  # no bound with this error is far below
    for sign, end in ((1, found.high), (-1, -found.low)):
        b, L = most[sign], math.log(len(TILTS) / error)
        freedman = min(
            (L + V * (math.exp(t * b) - 1 - t * b) / b**2) / t
            for t in (sign * TILTS).tolist()
            if t > 0
        )
        assert 0.9 * tight < end <= freedman / n


def test_laws_without_chance_and_tokens_that_cannot_be():
    logits = torch.tensor([[0.0, -math.inf]]).expand(50, 2)
    sure = conclude(law_sums(logits, torch.zeros(50, dtype=torch.long)), 50, 1e-6)
    assert sure.passed
    assert (sure.mean, sure.z, sure.entropy) == pytest.approx((0, 0, 0), abs=1e-100)
    never = conclude(law_sums(logits, torch.ones(50, dtype=torch.long)), 50, 1e-6)
    assert not never.passed
    assert never.mean == math.inf
    nothing = conclude(law_sums(logits * math.nan, torch.zeros(50, dtype=torch.long)), 50, 1e-6)
    assert not nothing.passed


def chains(temperature, samples=1000, steps=60, words=6):
    """Rows of a random Markov chain, drawn at a temperature: its logits, and what was drawn."""
    generator = torch.Generator().manual_seed(4)
    table = 1.5 * torch.randn(words, words, generator=generator, dtype=torch.float64)
    x, drawn, logits = torch.zeros(samples, dtype=torch.long), [], []
    for _ in range(steps):
        logits.append(table[x])
        law = (table[x] / temperature).softmax(-1)
        x = torch.multinomial(law, 1, generator=generator)[:, 0]
        drawn.append(x)
    return torch.stack(logits, 1), torch.stack(drawn, 1)


def test_the_error_is_as_stated_on_a_thousand_samples():
    logits, drawn = chains(temperature=1.0)
    found = [conclude(law_sums(*sample), 60, 0.05) for sample in zip(logits, drawn, strict=True)]
    assert sum(not one.passed for one in found) <= 50
    scores = torch.tensor([one.z for one in found])
    assert abs(float(scores.mean())) < 4 / math.sqrt(1000)
    assert float(scores.std()) == pytest.approx(1, abs=0.1)  # its own error is 0.02


@pytest.mark.parametrize("temperature", [0.8, 1.25])
def test_a_tampered_temperature_is_detected_on_enough_tokens(temperature):
    logits, drawn = chains(temperature)
    for rows in range(0, 1000, 100):  # 6000 tokens each
        part = slice(rows, rows + 100)
        found = conclude(
            law_sums(logits[part].flatten(0, 1), drawn[part].flatten()), drawn[part].numel(), 1e-6
        )
        assert not found.passed


# ------------------------------------------------------------------------ mistakes


def test_mistakes_are_told_before_any_work():
    with pytest.raises(ValueError, match="needs prompts of at least one token each"):
        sampler_test(None, [[1], []], new_tokens=4)
    with pytest.raises(ValueError, match="needs prompts of at least one token each"):
        sampler_test(None, [], new_tokens=4)
    with pytest.raises(ValueError, match=r"new_tokens of at least 1 and an error in \(0, 1\), got"):
        sampler_test(None, [[1]], new_tokens=0)
    with pytest.raises(ValueError, match=r"an error in \(0, 1\), got 4 and 1\.0\."):
        sampler_test(None, [[1]], new_tokens=4, error=1.0)


# ------------------------------------------------------------------------- command

SHIPPED = shipped.names()
QUICK = ("gla-yeast", "transformer-yeast")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SHIPPED]
)
def test_shipped_models_draw_from_their_own_laws(name, capsys):
    main(["probe", "sampler", "--model", name, "--tokens", "1000", "--seed", "1"])
    shown = capsys.readouterr().out
    assert shown.startswith("1024 tokens: mean of -log p - entropy")  # 128 rows of 8
    assert shown.endswith(": the sampler draws from the model's law\n")


def test_the_command_ends_with_1_for_a_broken_sampler(monkeypatch, capsys):
    plain = StateZooForCausalLM.generate
    monkeypatch.setattr(
        StateZooForCausalLM,
        "generate",
        lambda net, ids, **given: plain(net, ids, **(given | {"top_k": 1})),
    )
    with pytest.raises(SystemExit) as ended:
        main(["probe", "sampler", "--model", "gla-yeast", "--tokens", "1024"])
    assert ended.value.code == 1
    assert "the sampler does not draw from the model's law; likely" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--tokens", "0"], "tokens and batch_size of at least 1 and a seed of at least 0, got 0"),
        (["--seed", "-1"], "a seed of at least 0, got 16384, 128 and -1."),
        (["--device", "nowhere"], "cannot run on device 'nowhere'"),
    ],
)
def test_mistakes_at_the_command_line(given, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["probe", "sampler", "--model", "gla-yeast", *given])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_group_is_light():
    code = (
        "import sys; from statezoo.main import main; main(['probe']); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "statezoo probe sampler  Test that a model draws from its own prob" in done.stdout
