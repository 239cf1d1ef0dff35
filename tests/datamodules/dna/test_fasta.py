import gzip
import multiprocessing
import os
import pickle
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from statezoo.datamodules.dna import fasta, index
from statezoo.datamodules.dna.fasta import Genome

REAL = Path(__file__).parents[3] / "../shared/data/dna"
real = pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")
CONTIGS = {"chr1": "ACGTNacgtnRYK" * 37, "chr2": "GATTACA", "chrM": "TTTTGGGGCCCC" * 10}


def text(contigs, width=60, end="\n", last=True):
    lines = []
    for name, letters in contigs.items():
        lines.append(f">{name} a description of >{name}")
        lines += [letters[i : i + width] for i in range(0, len(letters), width)]
    return (end.join(lines) + end * last).encode()


def bgzip(data, size=100):
    """Blocks as the SAM specification has them, section 4.1, and the one that marks the end."""
    out = b""
    for part in [*(data[i : i + size] for i in range(0, len(data), size)), b""]:
        packer = zlib.compressobj(wbits=-15)
        body = packer.compress(part) + packer.flush()
        head = struct.pack("<4BI2BH2BHH", 31, 139, 8, 4, 0, 0, 255, 6, 66, 67, 2, len(body) + 25)
        out += head + body + struct.pack("<2I", zlib.crc32(part), len(part))
    return out


def put(folder, data, name="g.fa"):
    path = folder / name
    path.write_bytes(data)
    return path


def agrees(genome, contigs, seed=0):
    assert genome.names == list(contigs)
    assert len(genome) == sum(map(len, contigs.values()))
    rng = random.Random(seed)
    for name, letters in contigs.items():
        assert genome.length(name) == len(letters)
        assert genome.fetch(name).tobytes().decode() == letters
        for _ in range(30):
            start = rng.randrange(len(letters) + 1)
            stop = rng.randrange(start, len(letters) + 1)
            found = genome.fetch(name, start, stop)
            assert found.dtype == np.uint8
            assert found.tobytes().decode() == letters[start:stop]


FORMS = {
    "plain": text(CONTIGS),
    "no last line end": text(CONTIGS, last=False),
    "CRLF": text(CONTIGS, end="\r\n"),
    "blank lines after": text(CONTIGS) + b"\n\n",
    "one line each": text(CONTIGS, width=10**6),
    "one base per line": text(CONTIGS, width=1),
    "uneven lines": b">chr1\n" + b"\n".join(
        CONTIGS["chr1"].encode()[i : i + w] for i, w in [(0, 10), (10, 21), (31, 10), (41, 999)]
    ) + b"\n" + text({k: v for k, v in CONTIGS.items() if k != "chr1"}),
    "blanks in lines": text(CONTIGS).replace(b"GATTACA", b"GAT TACA"),
    "gzip": gzip.compress(text(CONTIGS)),
    "bgzip": bgzip(text(CONTIGS)),
    "bgzip, big blocks": bgzip(text(CONTIGS), 65000),
    "bgzip, uneven": bgzip(text(CONTIGS).replace(b"GATTACA", b"GATT\nACA\n")),
}  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_letters(tmp_path, monkeypatch, form, chunk):
    monkeypatch.setattr(index, "_CHUNK", chunk)
    path = put(tmp_path, FORMS[form], "g.fa.gz" if "gzip" in form else "g.fa")
    agrees(Genome(path), CONTIGS)
    agrees(Genome(path), CONTIGS, seed=1)  # from the index


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_index_is_that_of_samtools(tmp_path, end):
    pyfaidx = pytest.importorskip("pyfaidx")
    path = put(tmp_path, text(CONTIGS, end=end))
    Genome(path)
    ours = Path(f"{path}.fai").read_text()
    os.remove(f"{path}.fai")
    pyfaidx.Faidx(str(path)).close()
    assert ours == Path(f"{path}.fai").read_text()


def test_a_line_of_double_length_is_seen(tmp_path):
    letters = "A" * 9 + "C" * 19 + "G" * 9  # lines of 10, 20 and 10 bytes
    path = put(tmp_path, f">c\n{'A' * 9}\n{'C' * 19}\n{'G' * 9}\n".encode())
    agrees(Genome(path), {"c": letters})


def test_contigs_without_bases_are_left_out(tmp_path):
    path = put(tmp_path, b">a\n\n>b\nACGT\n>c\n\n")
    agrees(Genome(path), {"b": "ACGT"})
    agrees(Genome(path), {"b": "ACGT"})


def test_a_folder_is_one_genome(tmp_path):
    put(tmp_path, text({"I": "ACGT", "II": "GG"}), "yeast.fa")
    put(tmp_path, gzip.compress(text({"I": "TTT", "X": "CCCC"})), "worm.fasta.gz")
    put(tmp_path, b"not read", "README.md")
    want = {"worm:I": "TTT", "X": "CCCC", "yeast:I": "ACGT", "II": "GG"}
    agrees(Genome(tmp_path), want)


@pytest.mark.parametrize("asked", ["chr1", "1"])
@pytest.mark.parametrize("there", ["chr1", "1"])
def test_chr_prefix_is_optional(tmp_path, there, asked):
    genome = Genome(put(tmp_path, text({there: "ACGT"})))
    assert asked in genome
    assert genome.resolve(asked) == there
    assert genome.fetch(asked, 1, 3).tobytes() == b"CG"


@pytest.mark.parametrize("there", ["chrM", "MT", "M"])
def test_mitochondrion_has_several_names(tmp_path, there):
    genome = Genome(put(tmp_path, text({there: "ACGT"})))
    assert all(name in genome for name in ("chrM", "MT", "chrMT", "M"))


def test_unknown_contig_names_the_nearest(tmp_path):
    path = put(tmp_path, text({f"chr{n}": "ACGT" for n in range(1, 8)}))
    genome = Genome(path)
    assert "chr9" not in genome
    for ask in (genome.length, genome.fetch, genome.resolve):
        with pytest.raises(ValueError) as error:  # noqa: PT011  # compared in full
            ask("scaffold_chr3")
        assert str(error.value) == (
            f"{path} has no contig 'scaffold_chr3'; nearest is 'chr3' (7 contigs: chr1, chr2, "
            "chr3, chr4, chr5, ...). Its names have a chr prefix; with and without were tried."
        )
    plain = Genome(put(tmp_path, text({"1": "ACGT"}), "plain.fa"))
    with pytest.raises(ValueError, match=r"Its names have no chr prefix; with and without were"):
        plain.length("chr2")


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 8), (8, 8)])
def test_ranges_outside_are_refused(tmp_path, start, stop):
    genome = Genome(put(tmp_path, text({"c": "GATTACA"})))
    with pytest.raises(
        ValueError, match=rf"c:{start}-{stop} is not within contig 'c' of .*bases 0 "
    ):
        genome.fetch("c", start, stop)
    assert genome.fetch("c", 7, 7).size == 0


MISTAKES = {
    "empty": (b"", "{} is empty: a FASTA file begins with '>' and a name."),
    "packed nothing": (gzip.compress(b""), "{} has nothing in it but no sequence: add some."),
    "text": (b"hello\nworld", "{} is no FASTA file: it begins with 'hello' instead of '>'."),
    "FASTQ": (b"@r\nACGT\n", "{} is no FASTA file: it begins with '@r' instead of '>'. This looks "
              "like FASTQ: convert it, for example with seqtk seq -A."),
    "GenBank": (b"LOCUS x\n", "{} is no FASTA file: it begins with 'LOCUS x' instead of '>'. This "
                "is GenBank: export it as FASTA."),
    "names only": (b">a\n>b\n", "{} has 2 names but no sequence: add some."),
    "no name": (b">\nACGT\n", "{} has a '>' without a name: give every sequence one."),
    "twice": (b">a x\nAC\n>a y\nGT\n", "{} has two sequences named 'a': rename one of them."),
    "protein": (b">p\nMKLVINGKTL\n", "{}, contig 'p', has 'L' at base 3, which is no letter of "
                "DNA; this looks like protein: give the nucleotide sequence."),
    "RNA": (b">r\nACGUU\n", "{}, contig 'r', has 'U' at base 4, which is no letter of DNA; this "
            "is RNA: write T for U, for example with seqkit seq --rna2dna."),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told(tmp_path, mistake):
    data, message = MISTAKES[mistake]
    path = put(tmp_path, data)
    with pytest.raises(ValueError) as error:  # noqa: PT011  # compared in full
        Genome(path)
    assert str(error.value) == message.format(path)


def test_missing_file(tmp_path):
    path = tmp_path / "no" / "g.fa"
    with pytest.raises(FileNotFoundError) as error:
        Genome(path)
    assert str(error.value) == f"No FASTA file {str(path)!r} ({tmp_path} exists)."
    with pytest.raises(
        ValueError, match=r"holds no FASTA file: accepted are names ending in .fa, "
    ):
        Genome(tmp_path)


@pytest.mark.parametrize("pack", [gzip.compress, bgzip])
@pytest.mark.parametrize("cut", [40, -12, -29, -35])
def test_truncated_gzip(tmp_path, pack, cut):
    whole = pack(text({"c": "".join(random.Random(1).choices("ACGT", k=5000))}))
    path = put(tmp_path, whole[:cut], "g.fa.gz")
    with pytest.raises(
        ValueError, match=r"g.fa.gz is a damaged or truncated gzip file \(.+\): copy"
    ):
        Genome(path)


def test_damaged_bgzip_block(tmp_path):
    data = bytearray(bgzip(text(CONTIGS), 65000))
    genome = Genome(put(tmp_path, bytes(data), "g.fa.gz"))
    data[30:60] = b"\xff" * 30
    put(tmp_path, bytes(data), "g.fa.gz")
    with pytest.raises(ValueError, match="damaged or truncated gzip file"):
        genome.fetch("chr1")


def test_index_is_made_and_made_again(tmp_path, caplog):
    caplog.set_level("INFO")
    path = put(tmp_path, text({"c": "ACGT"}))
    Genome(path)
    assert caplog.messages == [f"{path} has no index: wrote {path}.fai"]
    caplog.clear()
    Genome(path)
    assert not caplog.messages
    put(tmp_path, text({"c": "ACGT", "d": "TTT"}))
    os.utime(f"{path}.fai", (1, 1))
    agrees(Genome(path), {"c": "ACGT", "d": "TTT"})
    assert caplog.messages == [f"{path} is newer than its index {path}.fai: wrote {path}.fai"]


def test_index_goes_to_the_cache_where_the_folder_is_read_only(
    tmp_path, cache, monkeypatch, caplog
):
    caplog.set_level("INFO")
    path = put(tmp_path, text({"c": "ACGT"}))
    write = fasta.write_index

    def refuse(contigs, file):
        if file.parent == tmp_path or not cache.name:
            raise PermissionError(13, "Permission denied")
        write(contigs, file)

    monkeypatch.setattr(fasta, "write_index", refuse)
    agrees(Genome(path), {"c": "ACGT"})
    [made] = (cache / "dna").glob("*.fai")
    assert caplog.messages == [f"{path} has no index: wrote {made}"]
    caplog.clear()
    agrees(Genome(path), {"c": "ACGT"})
    assert not caplog.messages

    def never(contigs, file):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(fasta, "write_index", never)
    made.unlink()
    agrees(Genome(path), {"c": "ACGT"})
    assert "neither its folder nor the cache can be written" in caplog.messages[0]


@pytest.mark.parametrize("line", ["c\t4", "c\tfour\t3\t4\t5", "c\t4\t3\t0\t1"])
def test_broken_index(tmp_path, line):
    path = put(tmp_path, text({"c": "ACGT"}))
    Path(f"{path}.fai").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"g.fa.fai is no index of a FASTA file: remove it\.$"):
        Genome(path)


def test_index_of_another_file(tmp_path):
    path = put(tmp_path, text({"c": "ACGT" * 40}))
    Path(f"{path}.fai").write_text("c\t1000\t3\t50\t51\n")
    with pytest.raises(ValueError, match=r"does not fit its index: .* Remove g.fa.fai\.$"):
        Genome(path)


def _fetch(genome, queue):
    queue.put(genome.fetch("chr1", 5, 100).tobytes())


@pytest.mark.parametrize("method", ["fork", "pickle"])
def test_other_processes_read_for_themselves(tmp_path, method):
    genome = Genome(put(tmp_path, bgzip(text(CONTIGS)), "g.fa.gz"))
    want = genome.fetch("chr1", 5, 100).tobytes()
    if method == "pickle":
        assert pickle.loads(pickle.dumps(genome)).fetch("chr1", 5, 100).tobytes() == want
        return
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_fetch, args=(genome, queue))
    process.start()
    assert queue.get(timeout=30) == want
    process.join()
    assert genome.fetch("chr1", 5, 100).tobytes() == want


@real
def test_real_genomes():
    genome = Genome(REAL / "ecoli_k12_mg1655.fa.gz")
    assert (genome.names, len(genome)) == (["NC_000913.3"], 4_641_652)
    assert genome.fetch("NC_000913.3", 0, 10).tobytes() == b"AGCTTTTCAT"
    worm = Genome(REAL / "celegans_1pct.fa.gz")
    assert worm.names == ["I", "II", "III", "IV", "V", "X", "MtDNA"]
    assert worm.length("chrI") == 150_724
