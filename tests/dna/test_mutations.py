"""Saturation mutagenesis against every mutant scored on its own."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.dna.conftest import FAMILIES, make_model, write_fasta

from statezoo.datamodules.dna.sequence import reverse_complement
from statezoo.dna import mutagenesis
from statezoo.main import main

IDS = dict(zip("ACGTN", range(3, 8), strict=True))
TEXT = "ACGTTGCANGATTACAGG"


def ids_of(text):
    return [IDS.get(base, 7) for base in text.upper()]


def log_likelihood(net, text, before=""):
    ids = ids_of(text)
    with torch.no_grad():
        log_probs = net(torch.tensor([[*(ids_of(before) or [1]), *ids]])).logits[0].double()
    log_probs = log_probs.log_softmax(-1)
    return sum(log_probs[i, t].item() for i, t in enumerate(ids) if t < 7)


def table(path):
    with path.open(newline="") as file:
        return [*csv.DictReader(file)]


def mutants(text, start=0, stop=None):
    """Each place, base and mutated text."""
    for i in range(start, len(text) if stop is None else stop):
        if text[i].upper() in "ACGT":
            yield from ((i, base, text[:i] + base + text[i + 1 :]) for base in "ACGT")


@pytest.fixture
def fasta(tmp_path):
    return write_fasta(tmp_path / "s.fa", {"one": TEXT, "two/x": TEXT[::-1].lower()[:12]})


@pytest.mark.parametrize(
    ("family", "rc"), [("gla", "none"), *((family, "average") for family in FAMILIES)]
)
def test_causal_cells_are_ratios_of_whole_sequences(tmp_path, fasta, family, rc):
    model, out = make_model(family=family), tmp_path / "ism.csv"
    found = mutagenesis(model, out, fasta=fasta, rc=rc, batch_size=21)
    assert found["bases"] == len(TEXT) + 12
    rows = table(out)
    assert [int(row["position"]) for row in rows[:18]] == [*range(1, 19)]
    assert [row["ref"] for row in rows[:18]] == list(TEXT)
    assert all(rows[8][base] == "" for base in "ACGT"), "N has no reference"
    strands = [lambda x: x, reverse_complement] if rc == "average" else [lambda x: x]
    for i, base, text in mutants(TEXT):
        want = [
            log_likelihood(model.net, f(text)) - log_likelihood(model.net, f(TEXT)) for f in strands
        ]
        assert float(rows[i][base]) == pytest.approx(np.mean(want), abs=1e-4), (i, base)
        if base == TEXT[i]:
            assert rows[i][base] == "0.00000"


def test_region_reads_its_flanks(tmp_path, genome):
    model, (fasta, contigs), out = make_model(), genome, tmp_path / "ism.csv"
    mutagenesis(model, out, region="1:1001-1010", genome=fasta, flank=50)
    rows = table(out)
    assert [int(row["position"]) for row in rows] == [*range(1001, 1011)]
    window, before = contigs["chr1"][950:1060], contigs["chr1"][949]
    ref = log_likelihood(model.net, window, before)
    for i, base, text in mutants(window, 50, 60):
        want = log_likelihood(model.net, text, before) - ref
        assert float(rows[i - 50][base]) == pytest.approx(want, abs=1e-4)


def test_masked_cells_compare_bases_in_the_hidden_place(tmp_path, fasta):
    model, out = make_model("masked", bidirectional=True), tmp_path / "ism.csv"
    mutagenesis(model, out, fasta=fasta, batch_size=9)
    rows = table(out)
    for i, base, _ in mutants(TEXT):
        ids = torch.tensor([ids_of(TEXT)])
        ids[0, i] = 2
        with torch.no_grad():
            p = model.net(ids).logits[0, i].double().log_softmax(-1)
        want = (p[IDS[base]] - p[IDS[TEXT[i]]]).item()
        assert float(rows[i][base]) == pytest.approx(want, abs=1e-4)


def test_classifier_cells_are_changes_of_log_odds(tmp_path, fasta):
    names = {0: "no", 1: "maybe", 2: "yes"}
    model, out = make_model("classifier", id2label=names), tmp_path / "ism.csv"
    mutagenesis(model, out, fasta=fasta, target="yes")

    def log_odds(text):
        with torch.no_grad():
            p = model.net(torch.tensor([ids_of(text)])).logits[0].double().softmax(-1)[2]
        return (p / (1 - p)).log().item()

    rows = table(out)
    for i, base, text in mutants(TEXT):
        want = log_odds(text) - log_odds(TEXT)
        assert float(rows[i][base]) == pytest.approx(want, abs=1e-4)
    with pytest.raises(ValueError, match="the model has no class 'perhaps'; it has no, maybe, yes"):
        mutagenesis(model, tmp_path / "x.csv", fasta=fasta, target="perhaps")
    mutagenesis(model, tmp_path / "own.csv", fasta=fasta)  # the class that it predicts
    assert len(table(tmp_path / "own.csv")) == 30


def test_resumed_output_is_the_same_and_every_record_has_its_picture(tmp_path, fasta):
    model, out = make_model(), tmp_path / "ism.csv"
    found = mutagenesis(model, out, fasta=fasta, batch_size=12, rc="average")
    whole = out.read_bytes()
    for size in (30, len(whole) // 2):
        out.write_bytes(whole[:size])
        assert mutagenesis(model, out, fasta=fasta, batch_size=12, rc="average") == found
        assert out.read_bytes() == whole
    assert found["pictures"] == [str(tmp_path / f"ism.{x}.png") for x in ("one", "two_x")]
    assert all(Path(x).read_bytes()[:4] == b"\x89PNG" for x in found["pictures"])


def test_command(tmp_path, genome, saved, capsys):
    out = tmp_path / "ism.csv"
    command = ["dna", "mutagenesis", "--model", saved(), "--region", "chr2:10-30"]
    main([*command, "--genome", str(genome[0]), "--out", str(out)])
    said = capsys.readouterr().out
    assert said == f"wrote {out}: 21 bases in 1 sequences\nwrote {tmp_path / 'ism.png'}\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"region": "chr1:1-5"}, "needs --fasta, or --region together with --genome"),
        ({"fasta": None, "region": "chr1:1-5"}, "needs --fasta, or --region together"),
        ({"flank": 5}, "which goes with --region"),
        ({"out": "x.png"}, "--out that ends in .csv"),
        ({"target": "yes"}, "--target is for classifiers; the model is a causal one"),
        (
            {"fasta": None, "region": "one:0-5", "genome": "s.fa"},
            "must lie within contig one, 1-18",
        ),
        ({"fasta": None, "region": "one", "genome": "s.fa"}, "a region is written chr1:100-200"),
        ({"fasta": None, "region": "x:1-2", "genome": "s.fa"}, "no contig 'x'"),
    ],
)
def test_mistakes(tmp_path, fasta, changes, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        mutagenesis(make_model(), **({"out": "x.csv", "fasta": fasta} | changes))
