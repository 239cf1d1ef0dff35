"""Letters of DNA as bytes: the other strand, codes of bases, and what a sequence is made of."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["BASES", "Composition", "check_letters", "composition", "reverse_complement", "to_codes"]

BASES = b"ACGT"
AMBIGUOUS = b"RYSWKMBDHVX"  # IUPAC codes other than N; X is how some tools write a masked base
LETTERS = BASES + b"N" + AMBIGUOUS

_OTHER = bytes.maketrans(b"ACGTRYSWKMBDHVacgtryswkmbdhv", b"TGCAYRSWMKVHDBtgcayrswmkvhdb")
_OTHER_ARRAY = np.frombuffer(_OTHER, dtype=np.uint8)
_KNOWN = LETTERS + LETTERS.lower()

CODES: NDArray[np.uint8] = np.full(256, 4, dtype=np.uint8)
"""``[256]`` code of each ASCII letter: A C G T (and a c g t) are 0 1 2 3, all others 4."""
for _code, _base in enumerate(BASES):
    CODES[[_base, _base + 32]] = _code
CODES.flags.writeable = False

S = TypeVar("S", str, bytes, NDArray[np.uint8])


def reverse_complement(sequence: S) -> S:
    """The opposite strand, read in its own direction; case and IUPAC codes are kept.

    Twice is once: ``reverse_complement(reverse_complement(x)) == x``. What is no letter of DNA
    stays as it is.

    Args:
        sequence: Text, bytes, or ``[..., T]`` uint8 array of ASCII; the same type comes back.
    """
    if isinstance(sequence, np.ndarray):
        return _OTHER_ARRAY[sequence[..., ::-1]]
    if isinstance(sequence, bytes):
        return sequence.translate(_OTHER)[::-1]
    return sequence.translate({i: chr(other) for i, other in enumerate(_OTHER) if i != other})[::-1]


def to_codes(sequence: bytes | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``[T]`` codes of ASCII letters: A C G T in either case are 0 1 2 3, everything else 4."""
    if isinstance(sequence, bytes):
        sequence = np.frombuffer(sequence, dtype=np.uint8)
    codes: NDArray[np.uint8] = CODES[sequence]
    return codes


class Composition(NamedTuple):
    """How many letters of each kind.

    Attributes:
        bases: A, C, G and T in either case: those that are scored.
        soft_masked: How many of ``bases`` are in lower case.
        n: N in either case.
        ambiguous: Other IUPAC codes, which are read as N.
    """

    bases: int = 0
    soft_masked: int = 0
    n: int = 0
    ambiguous: int = 0

    @property
    def total(self) -> int:
        """All letters."""
        return self.bases + self.n + self.ambiguous

    def plus(self, other: Composition) -> Composition:
        """Sum, kind by kind."""
        return Composition(*(a + b for a, b in zip(self, other, strict=True)))

    def __str__(self) -> str:
        return (
            f"{self.bases:,} bases ({self.soft_masked:,} soft-masked), {self.n:,} N, "
            f"{self.ambiguous:,} other IUPAC codes read as N"
        )


def composition(sequence: bytes) -> Composition:
    """Count the letters of ``sequence``, which ``check_letters`` has passed."""
    upper = len(sequence) - len(sequence.translate(None, BASES))
    lower = len(sequence) - len(sequence.translate(None, BASES.lower()))
    n = sequence.count(b"N") + sequence.count(b"n")
    return Composition(upper + lower, lower, n, len(sequence) - upper - lower - n)


def check_letters(sequence: bytes, where: str, first: int = 0) -> None:
    """Raise ValueError if ``sequence`` has letters that DNA does not have.

    Args:
        sequence: ASCII letters without line ends.
        where: Begins the message: file and contig.
        first: Place of the first letter within the contig.
    """
    wrong = sequence.translate(None, _KNOWN)
    if not wrong:
        return
    letter = wrong[:1]
    at = first + sequence.index(letter) + 1
    shown = repr(letter.decode("latin-1"))
    if letter in b"Uu":
        hint = "this is RNA: write T for U, for example with seqkit seq --rna2dna"
    elif letter in b"EFILPQZJOefilpqzjo*":
        hint = "this looks like protein: give the nucleotide sequence"
    elif letter in b"-.":
        hint = "this looks like an alignment: take the gaps out"
    else:
        hint = "allowed are A C G T N and the IUPAC codes"
    raise ValueError(f"{where} has {shown} at base {at}, which is no letter of DNA; {hint}.")
