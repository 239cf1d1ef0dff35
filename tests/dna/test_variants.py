"""Scores of variants against whole sequences scored by the net's own logits."""

import gzip
import math

import pytest
import torch
from tests.dna.conftest import FAMILIES, make_model

from statezoo.datamodules.dna.sequence import reverse_complement
from statezoo.datamodules.dna.tokenizers import KMers
from statezoo.datamodules.tokenizers import Bytes
from statezoo.dna import score_variants
from statezoo.main import main
from statezoo.zoo import StateZooConfig, StateZooForCausalLM

HEADER = (
    "##fileformat=VCFv4.3\n##contig=<ID=chr1>\n"
    '##INFO=<ID=AC,Number=A,Type=Integer,Description="Count">\n'
    "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
)
IDS = dict(zip("ACGTN", range(3, 8), strict=True))


def oracle(net, contig, pos, ref, alt, window, reverse=False):
    """Score both whole windows one token at a time, each from its own start."""
    start, flank = pos - 1, (window - 1) // 2
    a, b = max(start - flank, 0), min(start + len(ref) + flank, len(contig))
    contig = contig.upper().replace("R", "N")
    scores = []
    for allele in (ref, alt):
        before = contig[a - 1] if a else ""
        after = contig[b] if b < len(contig) else ""
        text = contig[a:start] + allele + contig[start + len(ref) : b]
        outside = before
        if reverse:
            text, outside = reverse_complement(text), reverse_complement(after)
        ids = [IDS[outside] if outside else 1, *(IDS[base] for base in text)]
        with torch.no_grad():
            log_probs = net(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        scores.append(sum(log_probs[i, t].item() for i, t in enumerate(ids[1:]) if 3 <= t < 7))
    return scores[1] - scores[0]


def read_info(path):
    opened = gzip.open(path, "rt") if str(path).endswith("gz") else open(path)  # noqa: SIM115
    with opened as file:
        rows = [line.rstrip("\n").split("\t") for line in file if not line.startswith("#")]
    return [dict(entry.partition("=")[::2] for entry in row[7].split(";")) for row in rows]


@pytest.fixture
def vcf(tmp_path, genome):
    """20 records: what can be scored, on every edge, and every reason why it cannot."""
    contigs = genome[1]
    one, two = contigs["chr1"].upper(), contigs["chr2"]

    def other(base):
        return "CGTA"["ACGT".index(base)]

    rows = [  # unsorted on purpose
        ("chr1", 1000, one[999], other(one[999])),
        ("chr1", 400, one[399], ",".join(x for x in "ACGT" if x != one[399])),
        ("1", 500, one[499], other(one[499])),
        ("chr1", 1, one[0], other(one[0])),
        ("chr1", 2000, one[1999], other(one[1999])),
        ("chr2", 300, two[299], other(two[299])),
        ("2", 150, two[149:153], two[149]),
        ("chr2", 100, two[99], two[99] + "ACGTAC"),
        ("chr1", 1999, one[1998:2000], one[1998]),
        ("chr1", 720, one[719].lower(), other(one[719]).lower()),
        ("chr1", 1200, one[1199:1202], "".join(map(other, one[1199:1202]))),
        ("chr1", 880, one[879], other(one[879]) + ",*"),
        ("chr1", 950, one[949], "<DEL>"),
        ("chr1", 960, one[959], "."),
        ("chr1", 970, other(one[969]), one[969]),
        ("chr1", 910, "N", "A"),
        ("chr1", 1100, one[1099], "N"),
        ("chr9", 10, "A", "C"),
        ("chr2", 301, "A", "C"),
        ("chr1", 1300, one[1299], one[1299] + "[chr2:17["),
    ]
    path = tmp_path / "v.vcf"
    lines = [f"{c}\t{p}\t.\t{r}\t{a}\t.\tPASS\tAC=1;LLR=777" for c, p, r, a in rows]
    path.write_text(HEADER + "\n".join(lines) + "\n")
    return path, rows


REASONS = {
    "UNKNOWN_CONTIG": 1,
    "OFF_CONTIG": 1,
    "REF_MISMATCH": 1,
    "NO_ALTERNATE": 1,
    "SPANNING_DELETION": 1,
    "SYMBOLIC": 2,
    "NOT_ACGT": 2,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_variant_against_whole_sequences(tmp_path, genome, vcf, family):
    model, (fasta, contigs), (path, rows) = make_model("causal", family), genome, vcf
    out = tmp_path / "scored.vcf"
    found = score_variants(model, path, fasta, out, window=300, rc="average", batch_size=3)
    counts = {"records": 20, "alternates": 23, "scored": 14, "renamed": 2}
    assert found == counts | {"skipped": REASONS}
    compared, largest = 0, 0.0
    for (chrom, pos, ref, alts), info in zip(rows, read_info(out), strict=True):
        assert info["AC"] == "1"
        values = info.get("LLR", ",".join("." for _ in alts.split(","))).split(",")
        why = info.get("LLR_SKIPPED", ",".join("." for _ in values)).split(",")
        for alt, value, reason in zip(alts.split(","), values, why, strict=True):
            assert (value == ".") == (reason != "."), (pos, alt)
            if value != ".":
                contig = contigs["chr" + chrom.removeprefix("chr")]
                args = (model.net, contig, pos, ref.upper(), alt.upper(), 300)
                want = (oracle(*args) + oracle(*args, reverse=True)) / 2
                assert float(value) == pytest.approx(want, abs=1e-4), (pos, alt)
                compared, largest = compared + 1, max(largest, abs(want))
    assert compared == 14
    assert largest > 0.5, "the variants must matter to this net"


def test_forward_alone_differs_and_is_exact(tmp_path, genome, vcf):
    model, (fasta, contigs), (path, rows) = make_model(), genome, vcf
    score_variants(model, path, fasta, tmp_path / "a.vcf", window=64, rc="none")
    score_variants(model, path, fasta, tmp_path / "b.vcf", window=64, rc="average")
    one, both = (float(read_info(tmp_path / f"{x}.vcf")[0]["LLR"]) for x in "ab")
    _, pos, ref, alt = rows[0]
    assert one == pytest.approx(oracle(model.net, contigs["chr1"], pos, ref, alt, 64), abs=1e-4)
    assert abs(one - both) > 1e-3


def test_both_strands_do_not_depend_on_the_strand_of_the_file(tmp_path, genome):
    model, (_, contigs) = make_model(), genome
    contig = contigs["chr1"].upper()
    turned = reverse_complement(contig)
    found = []
    for text, pos in ((contig, 600), (turned, len(contig) + 1 - 600)):
        ref = text[pos - 1]
        alt = {"A": "C", "C": "A", "G": "T", "T": "G"}[ref]  # RC turns one into the other
        (tmp_path / "g.fa").write_text(f">c\n{text}\n")
        (tmp_path / "g.fa.fai").unlink(missing_ok=True)
        (tmp_path / "v.vcf").write_text(f"{HEADER}c\t{pos}\t.\t{ref}\t{alt}\t.\t.\t.\n")
        out = tmp_path / f"{len(found)}.vcf"
        score_variants(model, tmp_path / "v.vcf", tmp_path / "g.fa", out, window=128)
        found.append(float(read_info(out)[0]["LLR"]))
    assert found[0] == pytest.approx(found[1], abs=2e-5)


def test_a_record_of_several_alternates_and_its_split_records_agree(tmp_path, genome):
    model, (fasta, contigs) = make_model(family="hybrid"), genome
    ref = contigs["chr1"][1000:1002]
    alts = [ref[0], ref + "GG", "TT"]
    joint = f"chr1\t1001\t.\t{ref}\t{','.join(alts)}\t.\t.\t.\n"
    split = "".join(f"chr1\t1001\t.\t{ref}\t{alt}\t.\t.\t.\n" for alt in alts)
    for name, rows in (("joint", joint), ("split", split)):
        (tmp_path / f"{name}.vcf").write_text(HEADER + rows)
        score_variants(model, tmp_path / f"{name}.vcf", fasta, tmp_path / f"{name}.out.vcf")
    together = read_info(tmp_path / "joint.out.vcf")[0]["LLR"].split(",")
    alone = [info["LLR"] for info in read_info(tmp_path / "split.out.vcf")]
    assert [*map(float, together)] == pytest.approx([*map(float, alone)], abs=1e-4)


@pytest.mark.parametrize("complement", [None, [0, 1, 2, 6, 5, 4, 3, 7]])
def test_masked_model_compares_hidden_bases(tmp_path, genome, vcf, complement):
    model = make_model("masked", "gla", bidirectional=True, complement=complement)
    (fasta, contigs), (path, rows) = genome, vcf
    out = tmp_path / "scored.vcf"
    found = score_variants(model, path, fasta, out, window=101, rc="none", batch_size=4)
    assert found["skipped"] == REASONS | {"INDEL": 3}
    for row in (0, 1, 3, 10):
        _, pos, ref, alts = rows[row]
        contig = contigs["chr1"].upper().replace("R", "N")
        a, start = max(pos - 51, 0), pos - 1
        ids = [IDS[base] for base in contig[a : start + len(ref) + 50]]
        values = read_info(out)[row]["LLR"].split(",")
        for alt, value in zip(alts.split(","), values, strict=True):
            hidden = [start - a + i for i in range(len(ref))]
            masked = torch.tensor([2 if i in hidden else t for i, t in enumerate(ids)])
            with torch.no_grad():
                p = model.net(masked[None]).logits[0].double().log_softmax(-1)
            want = sum(
                (p[i, IDS[x]] - p[i, IDS[y]]).item()
                for i, x, y in zip(hidden, alt, ref, strict=True)
            )
            assert float(value) == pytest.approx(want, abs=1e-4)
    average = tmp_path / "average.vcf"
    score_variants(model, path, fasta, average, window=101, rc="average")
    pairs = zip(read_info(out), read_info(average), strict=True)
    changes = [
        abs(float(a["LLR"]) - float(b["LLR"])) for a, b in pairs if "," not in a.get("LLR", ",")
    ]
    assert (max(changes) < 2e-5) == (complement is not None), (
        "an equivariant net says both the same"
    )


@pytest.mark.parametrize("suffix", ["vcf", "vcf.gz", "csv", "tsv.gz"])
def test_resumed_output_is_the_same(tmp_path, genome, vcf, suffix):
    model, (fasta, _), (path, _) = make_model(), genome, vcf
    out = tmp_path / f"scored.{suffix}"

    def run():
        return score_variants(model, path, fasta, out, window=64, batch_size=4)

    first = run()
    whole = out.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) * 3 // 4, len(whole) - 2):
        out.write_bytes(whole[:size])
        assert run() == first
        assert out.read_bytes() == whole
    assert run() == first


def test_table_has_a_row_per_alternate(tmp_path, genome, vcf):
    model, (fasta, _), (path, _) = make_model(), genome, vcf
    score_variants(model, path, fasta, tmp_path / "s.csv", window=64)
    head, *rows = (tmp_path / "s.csv").read_text().splitlines()
    assert head == "chrom,pos,id,ref,alt,llr,skipped"
    assert len(rows) == 23
    cells = [row.split(",") for row in rows]
    assert all((c[5] == "") == (c[6] != "") for c in cells)
    assert cells[3][:2] == ["chr1", "400"]


def test_command_scores_a_gzip_file_and_says_what_it_skipped(tmp_path, genome, vcf, saved, capsys):
    (fasta, _), (path, _) = genome, vcf
    zipped = tmp_path / "v.vcf.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    command = ["dna", "score-variants", "--model", saved(), "--vcf", str(zipped)]
    command += ["--genome", str(fasta), "--window", "64", "--out", str(tmp_path / "s.vcf")]
    main(command)
    said = capsys.readouterr().out
    assert "14 of 23 alternates in 20 records scored (LLR, nats)" in said
    assert "  2 records name their contig otherwise than the genome" in said
    assert "  1 REF_MISMATCH: REF is not what the genome has there" in said
    text = (tmp_path / "s.vcf").read_text()
    assert text.count("##INFO=<ID=LLR,Number=A,Type=Float") == 1
    assert "AC=1;LLR_SKIPPED=REF_MISMATCH\n" in text
    assert "LLR=777" not in text


def corrupted(tmp_path, fasta, name, text, **changes):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return {"vcf": str(path), "genome": str(fasta), "out": str(tmp_path / "o.vcf")} | changes


GOOD = HEADER + "chr1\t10\t.\tA\tC\t.\t.\t.\n"


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("chr1\t10\t.\tA\tC\t.\t.\t.\n", {}, "has no line #CHROM before its first variant"),
        (HEADER, {}, "has no variants: nothing follows its header"),
        (
            HEADER + "chr1 10 . A C . . .\n",
            {},
            "line 5: a VCF has at least 8 columns by tabs, this",
        ),
        (HEADER + "chr1\tx\t.\tA\tC\t.\t.\t.\n", {}, "POS must be a whole number from 1, got 'x'"),
        (HEADER + "chr9\t1\t.\tA\tC\t.\t.\t.\n", {}, "1 UNKNOWN_CONTIG. Is this the genome it was"),
        (gzip.compress(GOOD.encode() * 90)[:-20], {}, "gzip file that was cut off or damaged"),
        (GOOD, {"out": "x.bed"}, "--out must end in .vcf, .csv or .tsv"),
        (GOOD, {"window": 2}, "score-variants needs window of at least 4"),
        (GOOD, {"vcf": "none.vcf"}, "there is no file 'none.vcf'"),
        (GOOD, {"genome": "none.fa"}, "No FASTA file 'none.fa'"),
        (GOOD, {"device": "tpu"}, "cannot run on device 'tpu'"),
        (GOOD, {"model": "nowhere"}, "nowhere"),
    ],
)
def test_mistakes_are_told(tmp_path, genome, saved, capsys, text, changes, message):
    given = {"model": saved()} | corrupted(tmp_path, genome[0], "m.vcf", text, **changes)
    with pytest.raises(SystemExit) as stopped:
        main(["dna", "score-variants", *(f"--{k}={v}" for k, v in given.items())])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o.vcf").exists()


def test_models_that_cannot_answer_are_refused(tmp_path, genome):
    given = corrupted(tmp_path, genome[0], "m.vcf", GOOD)
    for tokenizer, size, message in (
        (Bytes(), 256, "was made with Text (bytes): train one with statezoo fit --data DNA"),
        (KMers(2), 24, "reads kmers tokens, which have no likelihood per base"),
    ):
        folder = tmp_path / tokenizer.kind
        config = StateZooConfig(vocab_size=size, d_model=16, n_layers=1)
        StateZooForCausalLM(config).save_pretrained(folder)
        tokenizer.save(folder)
        with pytest.raises(ValueError, match="score-variants needs a model") as error:
            score_variants(str(folder), given["vcf"], given["genome"], given["out"])
        assert message in str(error.value)
    model = make_model("classifier", num_labels=2)
    with pytest.raises(ValueError, match="needs a causal or masked model; the model is a class"):
        score_variants(model, given["vcf"], given["genome"], given["out"])


def test_insertion_costs_its_bases(tmp_path, genome):
    """Nothing is divided by length: a net that knows nothing pays ln W for every base."""
    model = make_model()
    with torch.no_grad():
        model.net.lm_head.weight.zero_()
    ref = genome[1]["chr1"][99]
    (tmp_path / "v.vcf").write_text(f"{HEADER}chr1\t100\t.\t{ref}\t{ref}ACG\t.\t.\t.\n")
    score_variants(model, tmp_path / "v.vcf", genome[0], tmp_path / "o.vcf", window=64)
    assert float(read_info(tmp_path / "o.vcf")[0]["LLR"]) == pytest.approx(-3 * math.log(8), 1e-5)
