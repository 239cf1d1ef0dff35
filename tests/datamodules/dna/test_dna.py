import gzip
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from statezoo.datamodules import DNA
from statezoo.datamodules.batch import IGNORE
from statezoo.datamodules.dna.intervals import Region, intersect, merge, subtract
from statezoo.datamodules.dna.tokenizers import dna_tokenizer
from statezoo.datamodules.tokenizers import Bytes

REAL = Path(__file__).parents[3] / "../shared/data/dna"
real = pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")


def letters(n, seed=0, alphabet="ACGT"):
    return "".join(np.random.default_rng(seed).choice(list(alphabet), size=n))


def put(folder, contigs, name="g.fa"):
    path = folder / name
    path.write_text("".join(f">{c} x\n{text}\n" for c, text in contigs.items()))
    return str(path)


def ready(*args, **kwargs):
    data = DNA(*args, **kwargs)
    data.prepare_data()
    data.setup()
    return data


def said(data, batch):
    """Bases that the scored targets of each row stand for."""
    rows = [row[row != IGNORE].tolist() for row in batch["targets"]]
    return [data.tokenizer.decode(row) for row in rows]


def test_default_is_synthetic_and_says_so(caplog):
    caplog.set_level("INFO")
    data = ready()
    assert (data.vocab_size, data.unit, data.objective) == (8, "base", "causal")
    assert data.complement == [0, 1, 2, 6, 5, 4, 3, 7]
    assert all("SYNTHETIC" in name for name in data.genome.names)
    assert "the SYNTHETIC genome (no natural sequence): 1 contigs" in caplog.messages
    line = "train: 1 regions on 1 contigs, 900,000 bases (0 soft-masked), 0 N, 0 other IUPAC codes"
    assert f"{line} read as N" in caplog.messages
    batch = next(iter(data.val_dataloader()))
    assert set(batch) == {"tokens", "targets", "n_bytes"}
    assert batch["tokens"].shape == (8, 1024)


def regions(data):
    return {name: [tuple(r) for r in scan.regions] for name, scan in data.scans.items()}


def test_ends_of_contigs_are_held_out(tmp_path):
    path = put(tmp_path, {"a": letters(1001), "b": letters(333)})
    found = regions(ready(path, val_fraction=0.1, test_fraction=0.2))
    assert found == {
        "train": [("a", 0, 700), ("b", 0, 233)],
        "val": [("a", 700, 800), ("b", 233, 266)],
        "test": [("a", 800, 1001), ("b", 266, 333)],
    }


def test_named_contigs_are_held_out(tmp_path):
    contigs = {f"chr{n}": letters(100, n) for n in range(1, 5)}
    data = ready(put(tmp_path, contigs), val_contigs=["2"], test_contigs=["chr4"])
    assert regions(data) == {
        "train": [("chr1", 0, 100), ("chr3", 0, 100)],
        "val": [("chr2", 0, 100)],
        "test": [("chr4", 0, 100)],
    }
    assert said(data, next(iter(data.test_dataloader()))) == [contigs["chr4"]]
    only = regions(ready(data.path, test_contigs=["chr4"]))
    assert (only["val"][0], only["test"]) == (("chr1", 90, 100), [("chr4", 0, 100)])


def test_bed_with_a_split_column(tmp_path, caplog):
    path = put(tmp_path, {"1": letters(1000), "2": letters(500)})
    bed = tmp_path / "i.bed"
    bed.write_text(
        "track name=x\nchr1\t0\t100\ttrain\nchr1\t90\t300\ttrain\nchr1\t250\t400\tvalid\n"
        "chr2\t0\t900\ttest\nchr7\t0\t9\ttrain\n"
    )
    data = ready(path, intervals=str(bed))
    assert regions(data) == {
        "train": [("1", 0, 250)], "val": [("1", 250, 400)], "test": [("2", 0, 500)],
    }  # fmt: skip
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [
        f"{bed}: 1 intervals on contigs not in the genome: chr7",
        f"{bed}: 1 intervals reach beyond the end of their contig: cut there",
        f"{bed}: 50 bases of train are also held out: taken from it",
        f"{path}: the longest region to train on has 250 bases, windows have room for 1024: lower "
        "seq_len.",
    ]


def test_bed_without_one_and_gff(tmp_path):
    path = put(tmp_path, {"1": letters(1000), "2": letters(500)})
    bed = tmp_path / "i.bed.gz"
    bed.write_bytes(gzip.compress(b"#c\n1 100 200 geneA\n1 800 950 geneB\n2 0 10\n"))
    want = {
        "train": [("1", 100, 200), ("1", 800, 900), ("2", 0, 10)],
        "val": [("1", 900, 950)], "test": [],
    }  # fmt: skip
    assert regions(ready(path, intervals=str(bed), seq_len=8)) == want
    gff = tmp_path / "i.gff3"
    row = "{}\tx\t{}\t{}\t{}\t.\t+\t.\tID=1\n".format
    gff.write_text(
        "##gff-version 3\n" + row("1", "gene", 1, 50) + row("1", "CDS", 101, 200)
        + row("1", "CDS", 801, 950) + row("2", "CDS", 1, 10) + "##FASTA\n>x\nACGT\n"
    )  # fmt: skip
    assert regions(ready(path, intervals=f"{gff}:CDS", seq_len=8)) == want
    with pytest.raises(ValueError, match=r"no feature 'exon'; it has CDS \(3\), gene \(1\): write"):
        ready(path, intervals=f"{gff}:exon")


def test_long_runs_of_n_are_left_out(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    a, b, c = letters(500, 1), letters(700, 2), letters(300, 3)
    text = "N" * 1000 + a + "n" * 1500 + b + "N" * 999 + c + "N" * 2000
    path = put(tmp_path, {"c": text, "v": letters(50) + "R"})
    want = [("c", 1000, 1500), ("c", 3000, 4999)]
    for chunk in (64, 1 << 22):
        monkeypatch.setattr("statezoo.datamodules.dna.scan._CHUNK", chunk)
        monkeypatch.setenv("STATEZOO_CACHE", str(tmp_path / str(chunk)))
        data = ready(path, val_contigs=["v"], seq_len=10)
        assert regions(data)["train"] == want
        assert int(data.scans["train"].composition.bases) == 1500
    line = "1,500 bases (0 soft-masked), 5,499 N, 0 other IUPAC codes read as N, 4,500 N in 3 gaps"
    assert f"train: 2 regions on 1 contigs, {line} left out" in caplog.messages
    assert "50 bases (0 soft-masked), 0 N, 1 other IUPAC codes" in caplog.text


def test_rows_of_a_dataset(tmp_path):
    rows = [letters(40, n) for n in range(200)] + [letters(40, 5)] * 3
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"sequence": row}) + "\n" for row in rows))
    data = ready(str(file), seq_len=40, val_fraction=0.2)
    found = {s: {data.genome.fetch(*r).tobytes().decode() for r in scan.regions}
             for s, scan in data.scans.items()}  # fmt: skip
    assert found["train"] | found["val"] == set(rows)
    assert not found["train"] & found["val"]
    assert 20 < len(found["val"]) < 60
    other = tmp_path / "split"
    other.mkdir()
    for name, part in (("train", rows[:50]), ("valid", rows[60:70])):
        (other / f"{name}.jsonl").write_text(
            "".join(json.dumps({"sequence": r}) + "\n" for r in part)
        )
    data = ready(str(other), seq_len=40)
    sizes = {name: len(scan.regions) for name, scan in data.scans.items()}
    assert sizes == {"train": 50, "val": 10, "test": 0}
    file.write_text(json.dumps({"dna": "ACGT"}) + "\n")
    with pytest.raises(
        ValueError, match=r"no field 'sequence'; it has 'dna': name the one with the"
    ):
        ready(str(file))


def test_state_names_the_tokenizer(tmp_path):
    path = put(tmp_path, {"c": letters(300)})
    data = ready(path, "kmer2")
    state = json.loads(json.dumps(data.state_dict()))
    ready(path, "kmer2").load_state_dict(state)
    with pytest.raises(ValueError) as error:  # noqa: PT011  # compared in full
        ready(path).load_state_dict(state)
    assert str(error.value) == (
        "The checkpoint was made with another tokenizer (kmers, 24 ids) than this data has "
        "(nucleotides, 8 ids): set tokenizer to the checkpoint's own file, PATH.ckpt."
    )
    assert dna_tokenizer("kmer2").fingerprint != Bytes().fingerprint


SETTINGS = {
    "seq_len": (dict(seq_len=0), "DNA needs seq_len of at least 1, got 0."),
    "objective": (dict(objective="both"), "DNA needs objective 'causal' or 'masked', got 'both'."),
    "fraction": (dict(val_fraction=0.5, test_fraction=0.5), "DNA needs val_fraction and "
                 "test_fraction of at least 0 that leave something to train on, got "
                 "val_fraction=0.5, test_fraction=0.5."),
    "context": (dict(seq_len=8, val_context=8), "DNA needs 0 <= val_context < seq_len=8, got "
                "val_context=8."),
    "mask": (dict(mask_fraction=0), "DNA needs mask_fraction in (0, 1], got 0."),
    "weight": (dict(soft_mask_weight=2), "DNA needs soft_mask_weight in [0, 1], got 2."),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_out_of_range(name):
    settings, message = SETTINGS[name]
    with pytest.raises(ValueError) as error:  # noqa: PT011  # compared in full
        DNA(**settings)
    assert str(error.value) == message


def test_mistakes_of_users(tmp_path):
    path = put(tmp_path, {"chr1": letters(300), "chr2": letters(300)})
    with pytest.raises(
        ValueError, match=r"has no contig 'chr3'; nearest is 'chr[12]' \(2 contigs: "
    ):
        ready(path, val_contigs=["chr3"])
    with pytest.raises(ValueError, match=r"^DNA cannot use contig '1' for val and for test\.$"):
        ready(path, val_contigs=["chr1"], test_contigs=["1"])
    with pytest.raises(
        ValueError, match=r"leaves 0 bases to train on and 600 to validate on: change"
    ):
        ready(path, val_contigs=["chr1", "chr2"])
    with pytest.raises(
        FileNotFoundError, match=r"^No file '.*no.bed': give intervals as a BED or GF"
    ):
        ready(path, intervals=str(tmp_path / "no.bed"))
    with pytest.raises(
        FileNotFoundError, match=r"^No file or folder '.*g.fasta' \(.* exists\): give "
    ):
        ready(str(tmp_path / "g.fasta"))
    bad = {
        "1\t5\n": r"line 1, is no BED: needed are contig, start and end, got '1 5'\.$",
        "1\t9\t5\n": r"line 1: needed is 0 <= start < end, got 9 and 5\.$",
        "": r"i.bed has no interval: give lines of contig, start and end\.$",
        "chr9\t0\t5\n": r"has no contig 'chr9'; nearest is 'chr2'",
    }
    for content, message in bad.items():
        (tmp_path / "i.bed").write_text(content)
        with pytest.raises(ValueError, match=message):
            ready(path, intervals=str(tmp_path / "i.bed"))
    late = put(tmp_path, {"c": letters(70), "p": "ACGTMK" + "A" * 5_000_000 + "LV"}, "late.fa")
    with pytest.raises(ValueError, match=r"contig 'p', has 'L' at base 5000007, which"):
        ready(late, val_contigs=["p"])


@pytest.mark.parametrize("seed", range(5))
def test_regions_are_sets_of_bases(seed):
    rng = np.random.default_rng(seed)

    def draw():
        starts = rng.integers(0, 40, size=8)
        rows = zip(rng.choice(["a", "b"], size=8), starts, rng.integers(0, 9, size=8), strict=True)
        return [Region(str(c), int(s), int(s + n)) for c, s, n in rows]

    def bases(regions):
        return {(r.contig, i) for r in regions for i in range(r.start, r.stop)}

    a, b = draw(), draw()
    assert bases(merge(a)) == bases(a)
    ends = merge(a)
    assert all(x.contig != y.contig or x.stop < y.start for x, y in pairwise(ends))
    assert bases(intersect(merge(a), merge(b))) == bases(a) & bases(b)
    assert bases(subtract(merge(a), merge(b))) == bases(a) - bases(b)


@real
def test_the_last_tenth_of_e_coli():
    data = ready(str(REAL / "ecoli_k12_mg1655.fa.gz"))
    assert regions(data) == {
        "train": [("NC_000913.3", 0, 4_177_486)],
        "val": [("NC_000913.3", 4_177_486, 4_641_652)],
        "test": [],
    }


@real
def test_worm_genes():
    gff = REAL / "celegans_1pct.gff.gz"
    data = ready(str(REAL / "celegans_1pct.fa.gz"), intervals=f"{gff}:CDS", val_contigs=["chrX"])
    assert {region.contig for region in data.scans["val"].regions} == {"X"}
    assert data.scans["train"].composition.bases > 100_000
