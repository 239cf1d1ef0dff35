"""The synthetic genome: what it promises about itself, checked by counting."""

import time
from collections import Counter

import numpy as np
import pytest

from statezoo.datamodules.dna.synthetic import KINDS, NAME, synthetic_genome

PAIRS = bytes.maketrans(b"ACGT", b"TGCA")


@pytest.fixture(scope="module")
def genome():
    return synthetic_genome(1_000_000, seed=0)


def read(genome, interval):
    """Bases of an interval along its own strand."""
    text = genome.sequence[interval.start : interval.end].tobytes()
    return (text.translate(PAIRS)[::-1] if interval.strand == "-" else text).decode()


def of_kind(genome, kind):
    return [i for i in genome.intervals if i.kind == kind]


def order_bits(codes, k):
    """Order-k counts of both strands of the first 90 %, scored on the last 10 %."""
    cut = int(len(codes) * 0.9)

    def pairs(x):
        context = sum(x[i : len(x) - k + i].astype(np.int64) * 4 ** (k - 1 - i) for i in range(k))
        return context, x[k:]

    counts = np.full((4**k, 4), 1 / 16)
    for strand in (codes[:cut], 3 - codes[:cut][::-1]):
        context, base = pairs(strand)
        counts += np.bincount(4 * context + base, minlength=4 ** (k + 1)).reshape(-1, 4)
    p = counts / counts.sum(axis=1, keepdims=True)
    return -np.log2(p[pairs(codes[cut:])]).mean()


@pytest.mark.parametrize("seed", [0, 3])
def test_has_the_statistics_of_the_specification(seed):
    genome = synthetic_genome(1_000_000, seed)
    codes = np.searchsorted(np.frombuffer(b"ACGT", np.uint8), genome.sequence)
    # the organism is drawn too: codon usage alone moves these by about half of what is allowed
    assert genome.covered("CDS").mean() == pytest.approx(0.87, abs=0.015)
    assert np.isin(codes, (1, 2)).mean() == pytest.approx(0.53, abs=0.015)
    assert genome.entropy == pytest.approx(1.83, abs=0.015)
    assert order_bits(codes, 6) == pytest.approx(1.982, abs=0.012)
    assert order_bits(codes, 6) - genome.entropy > 0.13  # what a state can win


def test_is_drawn_by_its_arguments_alone_and_fast():
    start = time.process_time()
    first = synthetic_genome(1_000_000, 5)
    assert time.process_time() - start < 3.0
    again, other = synthetic_genome(1_000_000, 5), synthetic_genome(1_000_000, 6)
    assert np.array_equal(first.sequence, again.sequence)
    assert first.intervals == again.intervals
    assert first.entropy == again.entropy
    assert not np.array_equal(first.sequence, other.sequence)


def test_annotation_is_in_order_and_on_both_strands(genome):
    ends = 0
    for interval in genome.intervals:
        assert ends <= interval.start < interval.end <= len(genome.sequence)
        assert interval.kind in KINDS
        ends = interval.end
    for kind in KINDS:
        strands = Counter(i.strand for i in of_kind(genome, kind))
        assert min(strands["+"], strands["-"]) > 0.2 * strands.total() > 0
    assert set(np.unique(genome.sequence)) == set(b"ACGT")


def test_genes_read_from_start_to_stop_in_their_frame(genome):
    for interval in of_kind(genome, "CDS"):
        text = read(genome, interval)
        codons = [text[i : i + 3] for i in range(0, len(text), 3)]
        assert len(text) % 3 == 0
        assert codons[0] == "ATG"
        assert codons[-1] in ("TAA", "TGA", "TAG")
        assert not {"TAA", "TGA", "TAG"} & set(codons[:-1])
    first = next(i for i in of_kind(genome, "CDS") if i.strand == "-")
    assert first.frame == (first.end - 1) % 3
    assert genome.sequence[first.end - 1] == ord("T")  # the A of ATG on the other strand


def test_hairpins_and_boxes(genome):
    for interval in of_kind(genome, "terminator"):
        text = read(genome, interval)
        size = (len(text) - 4 - 7) // 2
        stem, back = text[:size], text[size + 4 : 2 * size + 4]
        assert back == stem.encode().translate(PAIRS)[::-1].decode()
        assert text.endswith("T" * 7)
    promoters = [read(genome, i) for i in of_kind(genome, "promoter")]
    assert {len(p) - 12 for p in promoters} == {16, 17, 18}
    for place, box in ((slice(0, 6), "TTGACA"), (slice(-6, None), "TATAAT")):
        same = np.mean([a == b for p in promoters for a, b in zip(p[place], box, strict=True)])
        assert same == pytest.approx(0.8, abs=0.03)
    boxes = [read(genome, i) for i in of_kind(genome, "RBS")]
    assert Counter(boxes).most_common(1)[0][0] == "AGGAGG"


def test_copies_cost_little_and_are_alike(genome):
    # elements of a family have one length and differ in 2 %
    whole = synthetic_genome(2_000_000, 1)
    by_length = {}
    for interval in of_kind(whole, "insertion_sequence"):
        by_length.setdefault(interval.end - interval.start, []).append(interval)
    families = [group for group in by_length.values() if len(group) > 1]
    assert families
    for founder, *copies in families:
        assert whole.bits[founder.start : founder.end].mean() > 1.8
        for copy in copies:
            pair = zip(read(whole, founder), read(whole, copy), strict=True)
            assert np.mean([a != b for a, b in pair]) < 0.05
            # entropy of a 2 % substitution: 0.98 log 1/0.98 + 0.02 log 3/0.02 = 0.173 bits
            assert whole.bits[copy.start : copy.end].mean() == pytest.approx(0.173, abs=0.12)


def test_bits_of_fresh_codons_are_those_of_their_frequencies(genome):
    counts, bits, n = Counter(), 0.0, 0
    for interval in of_kind(genome, "CDS"):
        text = read(genome, interval)
        cost = genome.bits[interval.start : interval.end]
        cost = cost[::-1] if interval.strand == "-" else cost
        assert not cost[:3].any()  # ATG is said by the annotation
        counts.update(text[i : i + 3] for i in range(3, len(text) - 3, 3))
        bits, n = bits + cost[3:-3].sum(), n + len(text) // 3 - 2
    p = np.array(list(counts.values())) / counts.total()
    # genes in families cost less than their codons are worth, the others just that
    assert 0.95 < bits / n / -(p * np.log2(p)).sum() < 0.99


def test_bits_of_the_background_are_those_of_an_order_4_chain(genome):
    codes = np.searchsorted(np.frombuffer(b"ACGT", np.uint8), genome.sequence)
    free = ~genome.covered(*KINDS)
    # pieces on either strand: the chain read backwards is another one, of the same entropy
    assert genome.bits[free].mean() == pytest.approx(1.94, abs=0.02)
    p = np.bincount(codes[free]) / free.sum()
    assert -(p * np.log2(p)).sum() == pytest.approx(1.99, abs=0.01)


def test_files_say_synthetic(tmp_path):
    genome = synthetic_genome(20_000, 1)
    genome.write_fasta(tmp_path / "g.fa")
    genome.write_gff(tmp_path / "g.gff")
    header, *lines = (tmp_path / "g.fa").read_text().splitlines()
    assert header.startswith(f">{NAME} SYNTHETIC")
    assert max(map(len, lines)) == 70
    assert "".join(lines).encode() == genome.sequence.tobytes()
    rows = [r.split("\t") for r in (tmp_path / "g.gff").read_text().splitlines() if r[0] != "#"]
    assert [(int(r[3]) - 1, int(r[4]), r[6], r[2]) for r in rows] == genome.intervals
    assert {r[0] for r in rows} == {NAME}
    assert {r[1] for r in rows} == {"SYNTHETIC"}


@pytest.mark.parametrize("n_bases", [1, 17, 999])
def test_short_ones_have_their_length(n_bases):
    genome = synthetic_genome(n_bases)
    assert len(genome.sequence) == len(genome.bits) == n_bases


def test_refuses_what_is_no_size():
    with pytest.raises(
        ValueError, match=r"n_bases of at least 1 and seed .* got n_bases=0, seed=0"
    ):
        synthetic_genome(0)
