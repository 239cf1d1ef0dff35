"""Tracks: every base once, with the context asked for, as sorted half-open lines."""

import math

import numpy as np
import pytest
import torch
from tests.dna.conftest import FAMILIES, make_model, write_fasta
from torch.nn.functional import cross_entropy

from statezoo.datamodules import DNA
from statezoo.datamodules.dna.sequence import reverse_complement
from statezoo.dna import nll, perplexity, scoring
from statezoo.dna.tracks import read_bedgraph
from statezoo.main import main

IDS = dict(zip("ACGTN", range(3, 8), strict=True))


def ids_of(text):
    return [IDS.get(base, 7) for base in text.upper()]


def oracle(net, contig, window, stride, start=0, stop=None):
    """NLL of each base from the net's own logits, each window from its own start."""
    stop = len(contig) if stop is None else stop
    found = {}
    for a in range(start, stop, stride):
        low = max(a - (window - stride), 0)
        ids = ids_of(contig[low : min(a + stride, stop)])
        before = ids_of(contig[low - 1]) if low else [1]
        with torch.no_grad():
            log_probs = net(torch.tensor([before + ids])).logits[0].double().log_softmax(-1)
        for i in range(a, min(a + stride, stop)):
            if contig[i].upper() in "ACGT":
                found[i] = -log_probs[i - low, ids[i - low]].item()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_lines(tmp_path, genome, family):
    model, (fasta, contigs), out = make_model(family=family), genome, tmp_path / "nll.bedGraph"
    found = perplexity(model, fasta, out, window=500, stride=200, batch_size=3)
    rows = list(read_bedgraph(out))
    assert [row[:2] for row in rows] == sorted(row[:2] for row in rows)
    assert all(stop == start + 1 for _, start, stop, _ in rows)
    total = 0.0
    for name, contig in contigs.items():
        want = oracle(model.net, contig, 500, 200)
        got = {start: value for c, start, _, value in rows if c == name}
        assert got.keys() == want.keys()
        assert max(abs(got[i] - want[i]) for i in want) < 1e-4
        total += sum(want.values())
    scored = 2300 - 30 - 1
    assert found["bits_per_base"] == pytest.approx(total / scored / math.log(2), abs=1e-4)
    counts = {k: found[k] for k in ("scored", "soft_masked", "n", "other_codes")}
    assert counts == {"scored": scored, "soft_masked": 60, "n": 30, "other_codes": 1}


def test_no_overlap_and_every_base_in_one_window(tmp_path, genome):
    model, (fasta, contigs) = make_model(), genome
    for name, window, stride in (("a", 100, 100), ("b", 5000, 5000)):
        perplexity(model, fasta, tmp_path / name, window=window, stride=stride)
        got = {row[1]: row[3] for row in read_bedgraph(tmp_path / name) if row[0] == "chr1"}
        want = oracle(model.net, contigs["chr1"], window, stride)
        assert max(abs(got[i] - want[i]) for i in want) < 1e-4
    values = nll(model, [np.frombuffer(contigs["chr1"].encode(), dtype=np.uint8)])[0]
    assert max(abs(values[i] - got[i]) for i in got) < 1e-5
    assert np.isnan(values).sum() == 31


def test_long_windows_go_piece_by_piece(monkeypatch, genome):
    model, contig = make_model(family="hybrid"), genome[1]["chr1"]
    bases = np.frombuffer(contig.encode(), dtype=np.uint8)
    whole = nll(model, [bases])[0]
    monkeypatch.setattr(scoring, "_pieces", lambda ids: list(ids.split(333, dim=1)))
    np.testing.assert_allclose(nll(model, [bases])[0], whole, atol=1e-4)


def test_regions_keep_the_context_before_them(tmp_path, genome):
    model, (fasta, contigs) = make_model(), genome
    (tmp_path / "r.bed").write_text("2\t10\t60\nchr1\t600\t800\nchr1\t700\t1000\n")
    out = tmp_path / "nll.bedGraph"
    found = perplexity(model, fasta, out, bed=tmp_path / "r.bed", window=300, stride=100)
    got = {(c, a): value for c, a, _, value in read_bedgraph(out)}
    want = {
        ("chr1", i): v for i, v in oracle(model.net, contigs["chr1"], 300, 100, 600, 1000).items()
    }
    want |= {
        ("chr2", i): v for i, v in oracle(model.net, contigs["chr2"], 300, 100, 10, 60).items()
    }
    assert got == pytest.approx(want, abs=1e-4)
    assert found["scored"] == 400 - 30 + 50
    assert found["regions"] == 2


def test_bins_average_scored_bases(tmp_path, genome):
    model, (fasta, _) = make_model(), genome
    for name, bin in (("one", 1), ("ten", 10)):
        perplexity(model, fasta, tmp_path / name, window=400, stride=200, bin=bin, unit="bits")
    single = {(c, a): v for c, a, _, v in read_bedgraph(tmp_path / "one")}
    for contig, a, b, value in read_bedgraph(tmp_path / "ten"):
        inside = [single[contig, i] for i in range(a, b) if (contig, i) in single]
        assert value == pytest.approx(np.mean(inside), abs=1e-5)
        assert a % 10 == 0
        assert b - a == 10


@pytest.mark.parametrize("suffix", ["bedGraph", "bedGraph.gz"])
def test_resumed_output_is_the_same(tmp_path, genome, suffix):
    model, (fasta, _), out = make_model(), genome, tmp_path / f"nll.{suffix}"

    def run():
        return perplexity(model, fasta, out, window=300, stride=100, batch_size=2, png=True)

    first = run()
    whole, picture = out.read_bytes(), (tmp_path / f"nll.{suffix}.png").read_bytes()
    for size in (3, len(whole) // 2):
        out.write_bytes(whole[:size])
        assert run() == first
        assert out.read_bytes() == whole
    assert picture[:4] == b"\x89PNG"
    assert first["png"] == str(tmp_path / f"nll.{suffix}.png")
    with pytest.raises(ValueError, match="window 300, now 200"):
        perplexity(model, fasta, out, window=200, stride=100)


def test_command(tmp_path, genome, saved, capsys):
    out = tmp_path / "nll.bedGraph"
    command = ["dna", "perplexity", "--model", saved(), "--genome", str(genome[0]), "--window=512"]
    main([*command, "--stride", "256", "--out", str(out), "--png"])
    said = capsys.readouterr().out
    assert "bits/base over 2,269 A, C, G and T (60 of them soft-masked); not scored: 30 N" in said
    assert f"wrote {out}.png" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stride": 0}, "perplexity needs 0 < stride <= window"),
        ({"stride": 600}, "perplexity needs 0 < stride <= window"),
        ({"bin": 7}, "stride a multiple of bin"),
        ({"bed": "none.bed"}, "none.bed"),
        ({"bed": "bad.bed"}, "no contig 'chr7'"),
        ({"out": "nowhere/x.bedGraph"}, "there is no folder 'nowhere'"),
        ({"genome": "empty.fa"}, "is empty"),
    ],
)
def test_mistakes(tmp_path, genome, changes, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.bed").write_text("chr7\t1\t5\n")
    (tmp_path / "empty.fa").write_text("")
    given = {"genome": genome[0], "out": "x.bedGraph", "window": 500, "stride": 250} | changes
    with pytest.raises((ValueError, OSError), match=message):
        perplexity(make_model(), **given)


def test_masked_models_have_no_track(tmp_path, genome):
    model = make_model("masked", bidirectional=True)
    with pytest.raises(ValueError, match="perplexity needs a causal model"):
        perplexity(model, genome[0], tmp_path / "x")


def test_upper_and_lower_case_are_the_same(tmp_path, genome):
    contig = genome[1]["chr1"]
    lower = write_fasta(tmp_path / "lower.fa", {"chr1": contig.lower()})
    upper = write_fasta(tmp_path / "upper.fa", {"chr1": contig.upper()})
    found = [
        perplexity(make_model(), f, tmp_path / f"{f.stem}.bg", window=512, stride=512)
        for f in (lower, upper)
    ]
    assert (tmp_path / "lower.bg").read_bytes() == (tmp_path / "upper.bg").read_bytes()
    assert found[0]["soft_masked"] == 1969
    assert found[1]["soft_masked"] == 0


def test_other_strand_is_what_is_asked_for():
    """The helper that all strand averages rest on."""
    model = make_model()
    x = np.frombuffer(b"ACGTTGCATGCCA", dtype=np.uint8)
    one, two = (nll(model, [y])[0].sum() for y in (x, reverse_complement(x)))
    assert abs(one - two) > 1e-3


def test_same_bits_as_validation(tmp_path, genome):
    """Windows read what those of the data module read, so training and track agree."""
    model, (fasta, contigs) = make_model(), genome
    data = DNA(path=str(fasta), val_contigs=["chr1"], seq_len=128, batch_size=3)
    data.prepare_data()
    data.setup("fit")
    total, n = 0.0, 0
    for batch in data.val_dataloader():
        packed = {k: batch[k] for k in ("cu_seqlens", "attention_mask") if k in batch}
        with torch.no_grad():
            logits = model.net(batch["tokens"], **packed).logits
        scored = batch["targets"] != -100
        total += cross_entropy(logits[scored], batch["targets"][scored], reduction="sum").item()
        n += int(scored.sum())
    (tmp_path / "r.bed").write_text(f"chr1\t0\t{len(contigs['chr1'])}\n")
    given = {"bed": tmp_path / "r.bed", "window": 128, "stride": 128}
    found = perplexity(model, fasta, tmp_path / "x.bedGraph", **given)
    assert found["scored"] == n
    assert found["bits_per_base"] == pytest.approx(total / n / math.log(2), abs=1e-5)
