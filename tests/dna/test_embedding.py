"""One vector per record that depends on nothing else in the batch."""

import json
import sys

import numpy as np
import pytest
import torch
from pyarrow import parquet
from tests.dna.conftest import FAMILIES, make_model, write_fasta

from statezoo.datamodules.dna.sequence import reverse_complement
from statezoo.dna import embed, embedding
from statezoo.main import main

IDS = dict(zip("ACGTN", range(3, 8), strict=True))
POOLS = {"mean": lambda x: x.mean(0), "max": lambda x: x.amax(0), "last": lambda x: x[-1]}


def alone(model, text, layer=-1, pool="mean"):
    ids = torch.tensor([[IDS[base] for base in text.upper()]])
    with torch.no_grad():
        streams = model.net.base_model(input_ids=ids, output_hidden_states=True).hidden_states
    return POOLS[pool](streams[layer][0]).numpy()


@pytest.fixture
def fasta(tmp_path):
    rng = np.random.default_rng(1)
    sizes = [7, 128, 33, 2, 1, 60]
    records = {f"s{i}": "".join(rng.choice(list("ACGTN"), n)) for i, n in enumerate(sizes)}
    return write_fasta(tmp_path / "s.fa", records), records


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(
    ("kind", "family", "settings"),
    [
        *[("causal", family, {}) for family in FAMILIES],
        ("masked", "gla", {"bidirectional": True}),
        ("masked", "gla", {"bidirectional": True, "complement": [0, 1, 2, 6, 5, 4, 3, 7]}),
        ("classifier", "gla", {"num_labels": 2}),
    ],
)
def test_a_record_has_the_vector_it_has_alone(tmp_path, fasta, kind, family, settings, pool):
    model, out = make_model(kind, family, **settings), tmp_path / "e.parquet"
    found = embed(model, out, fasta=fasta[0], pool=pool, layer=-2, batch_size=4)
    assert found == {"records": 6, "width": 16}
    table = parquet.read_table(out).to_pydict()
    assert table["id"] == [*fasta[1]]
    assert table["length"] == [len(x) for x in fasta[1].values()]
    for vector, text in zip(table["embedding"], fasta[1].values(), strict=True):
        np.testing.assert_allclose(vector, alone(model, text, -2, pool), atol=1e-5)


def test_regions_on_their_strand_and_both_strands(tmp_path, genome):
    model, (fasta, contigs) = make_model(), genome
    (tmp_path / "r.bed").write_text(
        "track name=x\nchr1\t100\t160\tone\t0\t+\n2\t5\t50\ttwo\t0\t-\nchr1\t300\t350\n"
    )
    given = {"bed": tmp_path / "r.bed", "genome": fasta}
    embed(model, tmp_path / "e.parquet", **given)
    embed(model, tmp_path / "both.parquet", rc="average", **given)
    table = parquet.read_table(tmp_path / "e.parquet").to_pydict()
    assert table["id"] == ["one", "two", "chr1:300-350"]
    assert (table["contig"][1], table["start"][1], table["end"][1]) == ("chr2", 5, 50)
    texts = [contigs["chr1"][100:160], reverse_complement(contigs["chr2"][5:50])]
    both = parquet.read_table(tmp_path / "both.parquet")["embedding"].to_pylist()
    for i, text in enumerate(texts):
        np.testing.assert_allclose(table["embedding"][i], alone(model, text), atol=1e-5)
        want = (alone(model, text) + alone(model, reverse_complement(text))) / 2
        np.testing.assert_allclose(both[i], want, atol=1e-5)


def test_killed_run_goes_on_with_the_groups_it_has(tmp_path, fasta, monkeypatch):
    model, out = make_model(), tmp_path / "e.parquet"
    monkeypatch.setattr(embedding, "ROWS", 2)
    embed(model, tmp_path / "whole.parquet", fasta=fasta[0])
    plain, calls = embedding._vectors, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(embedding, "_vectors", killed)
    with pytest.raises(KeyboardInterrupt):
        embed(model, out, fasta=fasta[0])
    assert not out.exists()
    embed(model, out, fasta=fasta[0])
    assert len(calls) == 4, "the first two groups were there"
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert parquet.ParquetFile(out).num_row_groups == 3
    assert not out.with_name("e.parquet.parts").exists()
    embed(model, out, fasta=fasta[0])
    assert len(calls) == 4
    saved = json.loads(parquet.read_metadata(out).metadata[b"statezoo"])
    assert saved["pool"] == "mean"
    with pytest.raises(ValueError, match="pool 'mean', now 'max'"):
        embed(model, out, fasta=fasta[0], pool="max")


def test_other_tokenizers_embed_too(tmp_path, fasta):
    from statezoo.datamodules.dna.tokenizers import KMers
    from statezoo.dna import Model
    from statezoo.zoo import StateZooConfig, StateZooForCausalLM

    torch.manual_seed(0)
    net = StateZooForCausalLM(StateZooConfig(vocab_size=24, d_model=8, n_layers=1)).eval()
    embed(Model(net, KMers(2), "causal"), tmp_path / "e.parquet", fasta=fasta[0])
    assert parquet.read_metadata(tmp_path / "e.parquet").num_rows == 6


def test_command(tmp_path, fasta, saved, capsys):
    out = tmp_path / "e.parquet"
    main(["dna", "embed", "--model", saved(), "--fasta", str(fasta[0]), "--out", str(out)])
    assert capsys.readouterr().out == f"wrote {out}: 6 vectors of 16 numbers\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fasta": None}, "embed needs --fasta, or --bed together with --genome"),
        ({"genome": "g.fa"}, "embed needs --fasta, or --bed together with --genome"),
        ({"layer": 3}, r"the model has layers 0 to 2 \(or -3 to -1\), not 3"),
        ({"out": "x.csv"}, "--out that ends in .parquet"),
        ({"fasta": "none.fa"}, "No FASTA file 'none.fa'"),
        ({"fasta": None, "bed": "b.bed", "genome": "s.fa"}, r"b.bed, line 1: .* no contig 'chr1'"),
        ({"fasta": None, "bed": "c.bed", "genome": "s.fa"}, "c.bed, line 1: 0-9 must lie within"),
        ({"fasta": None, "bed": "d.bed", "genome": "s.fa"}, "d.bed has no regions"),
        ({"fasta": None, "bed": "e.bed", "genome": "s.fa"}, "a BED line is contig, start and end"),
    ],
)
def test_mistakes(tmp_path, fasta, changes, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    beds = {"b": "chr1\t0\t5\n", "c": "s0\t0\t9\n", "d": "# none\n", "e": "s0 0 5\n"}
    for name, text in beds.items():
        (tmp_path / f"{name}.bed").write_text(text)
    with pytest.raises((ValueError, OSError), match=message):
        embed(make_model(), **({"out": "x.parquet", "fasta": fasta[0]} | changes))


def test_missing_pyarrow_is_told(tmp_path, fasta, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r'needs pyarrow: pip install "statezoo\[dna\]"'):
        embed(make_model(), tmp_path / "x.parquet", fasta=fasta[0])
