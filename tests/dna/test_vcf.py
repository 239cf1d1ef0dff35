"""Lines of VCF files in and out."""

import gzip

import pytest

from statezoo.dna.vcf import Record, read_header, read_records

HEADER = "##fileformat=VCFv4.3\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\ts1\n"


def record(info="AC=1", alt="c,<DEL>,*"):
    return Record(["1", "10", "rs1", "a", alt, ".", "PASS", info, "GT", "0/1"], 3)


def test_columns_are_read_in_upper_case_and_kept_as_they_are():
    one = record()
    assert (one.chrom, one.pos, one.ref, one.alts) == ("1", 10, "A", ["C", "<DEL>", "*"])
    assert one.annotated({}).split("\t")[3:5] == ["a", "c,<DEL>,*"]


@pytest.mark.parametrize(
    ("before", "values", "after"),
    [
        ("AC=1", {"LLR": "0.5"}, "AC=1;LLR=0.5"),
        (".", {"LLR": "0.5"}, "LLR=0.5"),
        ("LLR=9;AC=1;LLR_SKIPPED=x", {"LLR": "1", "LLR_SKIPPED": ""}, "AC=1;LLR=1"),
        ("LLR=9", {"LLR": ""}, "."),
        ("LLRX=9;DB", {"LLR": "1"}, "LLRX=9;DB;LLR=1"),
    ],
)
def test_entries_replace_older_ones_of_their_name(before, values, after):
    cells = record(before).annotated(values).split("\t")
    assert cells[7:] == [after, "GT", "0/1"]


@pytest.mark.parametrize("pack", [lambda x: x, gzip.compress])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_plain_and_gzip_and_line_ends(tmp_path, pack, end):
    path = tmp_path / "v.vcf"
    text = HEADER + "1\t10\t.\tA\tC\t.\t.\t.\t.\t.\n\n2\t20\t.\tA\tC\t.\t.\t.\t.\t.\n"
    path.write_bytes(pack(text.replace("\n", end).encode()))
    assert read_header(path)[-1].split("\t")[-1] == "s1"
    assert [(r.chrom, r.pos, r.line) for r in read_records(path)] == [("1", 10, 3), ("2", 20, 5)]


def test_header_must_name_its_columns(tmp_path):
    path = tmp_path / "v.vcf"
    path.write_text("##fileformat=VCFv4.3\n#CHROM POS ID\n")
    with pytest.raises(ValueError, match="the line #CHROM must name the columns CHROM POS ID REF"):
        read_header(path)
