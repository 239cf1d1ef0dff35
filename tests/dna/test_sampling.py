"""Generated sequences: only bases, by the model's own probabilities, the same for a seed."""

import gzip

import pytest
import torch
from tests.dna.conftest import make_model

from statezoo.datamodules.dna.tokenizers import KMers
from statezoo.dna import Model, generate
from statezoo.main import main
from statezoo.zoo import StateZooConfig, StateZooForCausalLM

IDS = dict(zip("ACGTN", range(3, 8), strict=True))


def sequences(path):
    opened = gzip.open(path, "rt") if str(path).endswith("gz") else open(path)  # noqa: SIM115
    with opened as file:
        lines = file.read().splitlines()
    assert all(line.startswith(">generated_") for line in lines[::2])
    return lines[1::2]


@pytest.mark.parametrize("family", ["gla", "hybrid"])
def test_greedy_takes_the_likeliest_base(tmp_path, family):
    model, out = make_model(family=family), tmp_path / "g.fa"
    generate(model, out, prompt="acgTN", n=2, tokens=30, temperature=0)
    first, second = sequences(out)
    assert first == second
    text = "ACGTN"
    for _ in range(30):
        ids = torch.tensor([[1, *(IDS[base] for base in text)]])
        with torch.no_grad():
            text += "ACGT"[model.net(ids).logits[0, -1, 3:7].argmax()]
    assert first == text


def test_only_bases_whatever_the_net_prefers(tmp_path):
    model, out = make_model(), tmp_path / "g.fa"
    with torch.no_grad():
        model.net.lm_head.weight[[0, 1, 2, 7]] *= 50
    generate(model, out, n=20, tokens=50, temperature=2.0)
    found = sequences(out)
    assert [len(x) for x in found] == [50] * 20
    assert set("".join(found)) == set("ACGT")


def test_draws_have_the_probabilities_of_the_model(tmp_path):
    model, out = make_model(), tmp_path / "g.fa"
    generate(model, out, n=4000, tokens=1, temperature=0.7, batch_size=1000, seed=3)
    drawn = "".join(sequences(out))
    with torch.no_grad():
        p = (model.net(torch.tensor([[1]])).logits[0, 0, 3:7] / 0.7).softmax(-1)
    for base, want in zip("ACGT", p.tolist(), strict=True):
        spread = (want * (1 - want) / 4000) ** 0.5
        assert abs(drawn.count(base) / 4000 - want) < 5 * spread  # five standard deviations
    generate(model, tmp_path / "two.fa", n=500, tokens=1, top_k=2)
    assert len(set("".join(sequences(tmp_path / "two.fa")))) == 2


@pytest.mark.parametrize("name", ["g.fa", "g.fa.gz"])
def test_same_seed_same_file_even_if_interrupted(tmp_path, name):
    model, out = make_model(), tmp_path / name
    given = {"prompt": "ACG", "n": 7, "tokens": 40, "batch_size": 3}
    generate(model, out, seed=5, **given)
    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) * 2 // 3])
    generate(model, out, seed=5, **given)
    assert out.read_bytes() == whole
    with pytest.raises(ValueError, match="seed 5, now 6"):
        generate(model, out, seed=6, **given)
    generate(model, tmp_path / "other.fa", seed=6, **given)
    assert sequences(tmp_path / "other.fa") != sequences(out)
    assert len({*sequences(out)}) == 7


def test_words_of_bases(tmp_path):
    torch.manual_seed(0)
    net = StateZooForCausalLM(StateZooConfig(vocab_size=24, d_model=8, n_layers=1)).eval()
    generate(Model(net, KMers(2), "causal"), tmp_path / "g.fa", prompt="ACGT", tokens=30)
    (text,) = sequences(tmp_path / "g.fa")
    assert text.startswith("ACGT")
    assert set(text) <= set("ACGT")
    assert len(text) > 34


def test_command(tmp_path, saved, capsys):
    out = tmp_path / "g.fa"
    command = ["dna", "generate", "--model", saved(), "--prompt", "ACGT", "--n", "3"]
    main([*command, "--tokens=9", "--top-k", "4", "--seed", "1", "--out", str(out)])
    assert capsys.readouterr().out == f"wrote {out}: 3 sequences, 27 tokens drawn\n"
    assert all(len(x) == 13 for x in sequences(out))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "ACGU"}, "a prompt is made of A, C, G, T and N; got U"),
        ({"n": 0}, "needs n, tokens and batch_size of at least 1"),
        ({"temperature": -1.0}, "temperature, top_k and seed of at least 0"),
    ],
)
def test_mistakes(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        generate(make_model(), tmp_path / "g.fa", **changes)
