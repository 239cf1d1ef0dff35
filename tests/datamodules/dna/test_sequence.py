import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from statezoo.datamodules.dna.sequence import (
    Composition,
    check_letters,
    composition,
    reverse_complement,
    to_codes,
)

LETTERS = "ACGTNRYSWKMBDHVX"
STANDS_FOR = {  # IUPAC: the bases that a letter may be
    "A": "A", "C": "C", "G": "G", "T": "T", "R": "AG", "Y": "CT", "S": "CG", "W": "AT", "K": "GT",
    "M": "AC", "B": "CGT", "D": "AGT", "H": "ACT", "V": "ACG", "N": "ACGT", "X": "ACGT",
}  # fmt: skip
sequences = st.text(LETTERS + LETTERS.lower(), max_size=60)


@given(sequences)
def test_twice_is_once(text):
    assert reverse_complement(reverse_complement(text)) == text


@given(sequences)
def test_text_bytes_and_arrays_agree(text):
    other = reverse_complement(text)
    assert reverse_complement(text.encode()) == other.encode()
    array = reverse_complement(np.frombuffer(text.encode(), dtype=np.uint8))
    assert array.tobytes() == other.encode()


@given(sequences)
def test_each_letter_means_the_opposite_bases(text):
    other = reverse_complement(text)
    assert len(other) == len(text)
    for letter, opposite in zip(text, reversed(other), strict=True):
        assert opposite.islower() == letter.islower()
        want = {"ACGT"["TGCA".index(base)] for base in STANDS_FOR[letter.upper()]}
        assert set(STANDS_FOR[opposite.upper()]) == want


def test_a_worked_example():
    assert reverse_complement("AAcgNRt-") == "-aYNcgTT"
    both = reverse_complement(np.frombuffer(b"ACGTTT", dtype=np.uint8).reshape(2, 3))
    assert [row.tobytes() for row in both] == [b"CGT", b"AAA"]


def test_codes_and_composition():
    assert to_codes(b"ACGTacgtNnRx").tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 4, 4, 4]
    found = composition(b"ACGTacgtaNnnRx")
    assert found == Composition(bases=9, soft_masked=5, n=3, ambiguous=2)
    assert found.total == 14
    assert str(found) == "9 bases (5 soft-masked), 3 N, 2 other IUPAC codes read as N"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (b"ACGUu", "'U' at base 4, which is no letter of DNA; this is RNA: write T for U, for "
                   "example with seqkit seq --rna2dna."),
        (b"ACMKLV", "'L' at base 5, which is no letter of DNA; this looks like protein: give the "
                    "nucleotide sequence."),
        (b"AC--GT", "'-' at base 3, which is no letter of DNA; this looks like an alignment: take "
                    "the gaps out."),
        (b"AC1", "'1' at base 3, which is no letter of DNA; allowed are A C G T N and the IUPAC "
                 "codes."),
    ],
)  # fmt: skip
def test_other_letters_are_refused(text, hint):
    with pytest.raises(ValueError) as error:  # noqa: PT011  # compared in full
        check_letters(text, "x.fa, contig 'c',")
    assert str(error.value) == f"x.fa, contig 'c', has {hint}"
    check_letters(b"".join(map(bytes.upper, [b"acgtn", b"ryswkmbdhvx"])), "all letters")
