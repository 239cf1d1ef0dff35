"""A SYNTHETIC genome with the statistics of a bacterial one, its annotation and its entropy.

No natural sequence comes with the package, so this is what the data modules read by default. It is
made of units laid end to end, each on a strand drawn at random::

    promoter - (gap, RBS, spacer, CDS) x (1 + Poisson) - terminator - background

A fixed-order model cannot see the reading frame, the strand, or a gene's relatives, so it stays
about 0.15 bits per base above the generator's own entropy, which is known.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray

__all__ = ["KINDS", "NAME", "Interval", "SyntheticGenome", "synthetic_genome"]

Codes = NDArray[np.uint8]  # 0 A, 1 C, 2 G, 3 T: the complement of x is 3 - x
Bits = NDArray[np.float32]

NAME = "SYNTHETIC_1"
"""Name of the contig, wherever it is written."""

KINDS = ("CDS", "promoter", "RBS", "terminator", "insertion_sequence", "tandem_repeat")
"""Kinds of annotated intervals; what lies between them is background."""

BASES = np.frombuffer(b"ACGT", dtype=np.uint8)
GENETIC_CODE = "KNKNTTTTRSRSIIMIQHQHPPPPRRRRLLLLEDEDAAAAGGGGVVVV*Y*YSSSS*CWCLFLF"  # AAA AAC .. TTT
AMINO_ACIDS = {  # per cent, rounded from the composition of bacterial proteins
    **{"A": 9.5, "R": 5.5, "N": 3.9, "D": 5.2, "C": 1.2, "Q": 4.4, "E": 5.8, "G": 7.4, "H": 2.3},
    **{"I": 6.0, "L": 10.6, "K": 4.4, "M": 2.8, "F": 3.9, "P": 4.4, "S": 5.8, "T": 5.4},
    **{"W": 1.5, "Y": 2.8, "V": 7.1},
}
STOPS = {"TAA": 0.64, "TGA": 0.29, "TAG": 0.07}
MINUS_35, MINUS_10, SHINE_DALGARNO = "TTGACA", "TATAAT", "AGGAGG"
LOOP, T_RUN = 4, 7  # bases of a terminator's hairpin loop and of the T's after it
NOISE = 0.2  # part of the bases of a box that are others
COMPOSITION = (0.28, 0.22, 0.22, 0.28)  # background
STEM = (0.15, 0.35, 0.35, 0.15)  # of a terminator
WARM_UP = 16  # steps of the background chain before the first base
SHRINK = 45.0  # Dirichlet weight of the composition in a row of the chain
THIRD_BASE = (0.6, 1.4, 1.3, 0.7)  # preference in synonymous codons
CODON_BIAS = 6.0  # Dirichlet weight per synonymous codon: less is more bias
IN_FAMILY, FAMILIES, REDRAWN = 0.35, 40, 0.88  # genes in families; codons that a member redraws
INSERTIONS, TANDEMS, ELEMENTS = 0.04, 0.02, 6  # of the units; families of insertion sequences
DIVERGENCE = 0.02  # substitutions in copies of insertion sequences and tandem repeats


class Interval(NamedTuple):
    """A piece of the annotation: ``[start, end)``, 0-based, on strand ``+`` or ``-``."""

    start: int
    end: int
    strand: str
    kind: str

    @property
    def frame(self) -> int:
        """Position modulo 3 of the first base of each codon, in the genome's coordinates."""
        return self.start % 3 if self.strand == "+" else (self.end - 1) % 3


@dataclass(frozen=True)
class SyntheticGenome:
    """A SYNTHETIC genome.

    Attributes:
        sequence: ``[n]`` uint8, the bases as ASCII capitals A C G T.
        intervals: Annotation in the order of the genome; it does not overlap.
        bits: ``[n]`` float32, minus the binary logarithm of the probability with which each base
            was drawn, given the annotation and, for a copy, its original: 0 for what is
            determined, such as a start codon or the second half of a hairpin.
        name: Name of the contig.
    """

    sequence: NDArray[np.uint8]
    intervals: list[Interval]
    bits: Bits
    name: str = NAME

    @property
    def entropy(self) -> float:
        """Mean of ``bits``: bits per base that who knows the annotation needs.

        No model does better on average. One that must find lengths, strands and relatives by
        itself needs about 0.015 bits per base more at the least.
        """
        return float(self.bits.mean(dtype=np.float64))

    def covered(self, *kinds: str) -> NDArray[np.bool_]:
        """``[n]`` whether each base lies in an interval of these kinds."""
        inside = np.zeros(len(self.sequence), dtype=np.bool_)
        for interval in self.intervals:
            if interval.kind in kinds:
                inside[interval.start : interval.end] = True
        return inside

    def write_fasta(self, path: str | Path, width: int = 70) -> None:
        """Write the sequence as FASTA, its header saying that it is SYNTHETIC."""
        lines = textwrap.wrap(self.sequence.tobytes().decode("ascii"), width)
        header = f">{self.name} SYNTHETIC genome, {len(self.sequence)} bp, no natural sequence"
        Path(path).write_text("\n".join([header, *lines]) + "\n", encoding="ascii")

    def write_gff(self, path: str | Path) -> None:
        """Write the annotation as GFF3."""
        lines = ["##gff-version 3", f"##sequence-region {self.name} 1 {len(self.sequence)}"]
        for number, (start, end, strand, kind) in enumerate(self.intervals, start=1):
            phase = "0" if kind == "CDS" else "."
            columns = (self.name, "SYNTHETIC", kind, start + 1, end, ".", strand, phase)
            lines.append("\t".join(map(str, columns)) + f"\tID={kind}_{number}")
        Path(path).write_text("\n".join(lines) + "\n", encoding="ascii")


class _Piece(NamedTuple):
    """Part of a unit; ``origin`` numbers the family that it is a copy of, -1 for none."""

    kind: str
    length: int
    origin: int = -1


class _Unit(NamedTuple):
    """Pieces read along one strand."""

    pieces: list[_Piece]
    reverse: bool

    @property
    def length(self) -> int:
        return sum(piece.length for piece in self.pieces)


def synthetic_genome(n_bases: int = 1_000_000, seed: int = 0) -> SyntheticGenome:
    """Draw a SYNTHETIC genome; 1 Mb has 87 % in genes, GC 0.53 and 1.83 bits per base.

    ``seed`` draws the organism (codon usage, background, families) as well as its genome, and
    the result depends on both arguments alone. What remains after the last whole unit is
    background.

    Args:
        n_bases: Length.
        seed: Seeds all draws.

    Raises:
        ValueError: If ``n_bases`` is below 1 or ``seed`` below 0.

    Source: the shape is this project's own; consensus boxes after Harley and Reynolds 1987 and
        Shine and Dalgarno 1974.
    """
    if n_bases < 1 or seed < 0:
        raise ValueError(
            "synthetic_genome needs n_bases of at least 1 and seed of at least 0, "
            f"got n_bases={n_bases}, seed={seed}."
        )
    rng = np.random.default_rng(seed)
    units = list(_layout(rng, n_bases))
    maker = _Maker(rng, [piece for unit in units for piece in unit.pieces])
    sequence, bits = np.empty(n_bases, dtype=np.uint8), np.empty(n_bases, dtype=np.float32)
    intervals: list[Interval] = []
    at = 0
    for unit in units:
        end = at + unit.length
        made = [maker.make(piece) for piece in unit.pieces]
        codes = np.concatenate([codes for codes, _ in made])
        cost = np.concatenate([cost for _, cost in made])
        sequence[at:end] = 3 - codes[::-1] if unit.reverse else codes
        bits[at:end] = cost[::-1] if unit.reverse else cost
        intervals.extend(_annotate(unit, at))
        at = end
    return SyntheticGenome(BASES[sequence], intervals, bits)


def _annotate(unit: _Unit, start: int) -> list[Interval]:
    found, at = [], 0
    for piece in unit.pieces:
        begin, end = at, at + piece.length
        at = end
        if piece.kind not in KINDS:
            continue
        if unit.reverse:
            begin, end = unit.length - end, unit.length - begin
        found.append(Interval(start + begin, start + end, "-" if unit.reverse else "+", piece.kind))
    return sorted(found)


def _layout(rng: Generator, n_bases: int) -> Iterator[_Unit]:
    """Units of ``n_bases`` together: what there is, how long, on which strand."""
    protein = _protein_lengths(rng, FAMILIES)
    elements = rng.integers(700, 1401, size=ELEMENTS)
    left = n_bases
    while left:
        kind = rng.random()
        if kind < INSERTIONS:
            origin = int(rng.integers(ELEMENTS))
            pieces = [_Piece("insertion_sequence", int(elements[origin]), origin)]
        elif kind < INSERTIONS + TANDEMS:
            pieces = [_Piece("tandem_repeat", int(rng.integers(100, 401)))]
        else:
            pieces = [_Piece("promoter", 12 + int(rng.integers(16, 19)))]
            for _ in range(1 + rng.poisson(1.2)):
                member = rng.random() < IN_FAMILY
                origin = int(rng.integers(FAMILIES)) if member else -1
                size = protein[origin] if member else _protein_lengths(rng, 1)[0]
                gap, spacer = int(rng.integers(10, 40)), int(rng.integers(5, 9))
                pieces += [
                    _Piece("background", gap),
                    _Piece("RBS", len(SHINE_DALGARNO)),
                    _Piece("background", spacer),
                    _Piece("CDS", 3 * int(size) + 3, origin),
                ]
            hairpin = 2 * int(rng.integers(6, 12)) + LOOP + T_RUN
            pieces += [_Piece("background", 20), _Piece("terminator", hairpin)]
        pieces.append(_Piece("background", int(rng.gamma(2.0, 40.0)) + 15))
        unit = _Unit(pieces, bool(rng.integers(2)))
        if unit.length > left:
            unit = _Unit([_Piece("background", left)], False)
        yield unit
        left -= unit.length


def _protein_lengths(rng: Generator, n: int) -> NDArray[np.int64]:
    """``[n]`` amino acids of proteins."""
    return rng.gamma(3.0, 105.0, size=n).clip(60, 900).astype(np.int64)


class _Maker:
    """Draws the bases of pieces, with what each of them costs in bits."""

    def __init__(self, rng: Generator, pieces: list[_Piece]) -> None:
        self.rng = rng
        self.founders: dict[tuple[str, int], Codes] = {}
        lengths = [p.length for p in pieces if p.kind in ("background", "insertion_sequence")]
        self.background = _chain(rng, np.array(lengths, dtype=np.int64))
        self.usage = _codon_usage(rng)
        self.kinds: dict[str, Callable[[_Piece], tuple[Codes, Bits]]] = {
            "background": lambda piece: next(self.background),
            "insertion_sequence": self._insertion,
            "tandem_repeat": self._tandem,
            "promoter": self._promoter,
            "RBS": lambda piece: self._box(SHINE_DALGARNO),
            "CDS": self._gene,
            "terminator": self._terminator,
        }

    def make(self, piece: _Piece) -> tuple[Codes, Bits]:
        """Bases ``[n]`` of a piece and the bits ``[n]`` of each."""
        return self.kinds[piece.kind](piece)

    def _iid(self, n: int, p: Sequence[float]) -> tuple[Codes, Bits]:
        """Independent draws with probabilities ``p``."""
        codes = self.rng.choice(len(p), size=n, p=p)
        return codes.astype(np.uint8), -np.log2(np.asarray(p, np.float32))[codes]

    def _copy(self, codes: Codes, rate: float) -> tuple[Codes, Bits]:
        """A copy in which a base is another one, each of three as likely, with ``rate``."""
        change = self.rng.random(len(codes)) < rate
        shift = self.rng.integers(1, 4, size=len(codes)).astype(np.uint8)
        bits = np.where(change, -np.log2(rate / 3), -np.log2(1 - rate)).astype(np.float32)
        return np.where(change, (codes + shift) % 4, codes).astype(np.uint8), bits

    def _box(self, consensus: str) -> tuple[Codes, Bits]:
        return self._copy(_codes(consensus), NOISE)

    def _promoter(self, piece: _Piece) -> tuple[Codes, Bits]:
        spacer = piece.length - len(MINUS_35) - len(MINUS_10)
        return _join(self._box(MINUS_35), self._iid(spacer, COMPOSITION), self._box(MINUS_10))

    def _terminator(self, piece: _Piece) -> tuple[Codes, Bits]:
        """Stem, loop, the stem's reverse complement, and a run of T."""
        size = (piece.length - LOOP - T_RUN) // 2
        stem, loop = self._iid(size, STEM), self._iid(LOOP, COMPOSITION)
        return _join(stem, loop, _free(3 - stem[0][::-1]), _free(_codes("T" * T_RUN)))

    def _tandem(self, piece: _Piece) -> tuple[Codes, Bits]:
        """A motif of 3 to 60 bases again and again, with substitutions."""
        motif = self._iid(int(self.rng.integers(3, 61)), COMPOSITION)
        size = len(motif[0])
        again = np.resize(motif[0], piece.length - size)
        return _join(motif, self._copy(again, DIVERGENCE))

    def _insertion(self, piece: _Piece) -> tuple[Codes, Bits]:
        """The first of its family is background, the others are copies of it."""
        fresh = next(self.background)
        founder = self.founders.setdefault((piece.kind, piece.origin), fresh[0])
        return fresh if founder is fresh[0] else self._copy(founder, DIVERGENCE)

    def _gene(self, piece: _Piece) -> tuple[Codes, Bits]:
        """Start, codons, stop; a member of a family redraws part of the codons of the first."""
        fresh = self.rng.choice(64, size=piece.length // 3 - 2, p=self.usage).astype(np.uint8)
        p = self.usage[fresh]
        if piece.origin >= 0:
            founder = self.founders.setdefault((piece.kind, piece.origin), fresh)
            if founder is not fresh:
                redraw = self.rng.random(len(fresh)) < REDRAWN
                fresh = np.where(redraw, fresh, founder)
                p = REDRAWN * self.usage[fresh] + (1 - REDRAWN) * (fresh == founder)
        stop = self.rng.choice(len(STOPS), p=list(STOPS.values()))
        end = _codes(list(STOPS)[stop])
        return _join(
            _free(_codes("ATG")),
            (_codon_bases(fresh), _thirds(-np.log2(p))),
            (end, _thirds(-np.log2([list(STOPS.values())[stop]]))),
        )


def _codes(text: str) -> Codes:
    return np.searchsorted(BASES, np.frombuffer(text.encode(), dtype=np.uint8)).astype(np.uint8)


def _free(codes: Codes) -> tuple[Codes, Bits]:
    """Bases that cost nothing: the annotation says them."""
    return codes, np.zeros(len(codes), dtype=np.float32)


def _join(*parts: tuple[Codes, Bits]) -> tuple[Codes, Bits]:
    return np.concatenate([c for c, _ in parts]), np.concatenate([b for _, b in parts])


def _codon_bases(codons: Codes) -> Codes:
    """``[3 n]`` bases of ``n`` codons, numbered in the order of ``GENETIC_CODE``."""
    return np.stack([codons >> 4, codons >> 2 & 3, codons & 3], axis=1).reshape(-1)


def _thirds(bits: ArrayLike) -> Bits:
    """Share the bits of a codon between its three bases."""
    return np.repeat(np.asarray(bits, dtype=np.float32) / 3, 3)


def _codon_usage(rng: Generator) -> NDArray[np.float64]:
    """``[64]`` probability of each codon inside a gene; stop codons have none."""
    usage = np.zeros(64)
    third = np.tile(THIRD_BASE, 16)
    letters = np.array(list(GENETIC_CODE))
    for letter, percent in AMINO_ACIDS.items():
        synonyms = np.flatnonzero(letters == letter)
        usage[synonyms] = percent * rng.dirichlet(CODON_BIAS * third[synonyms])
    total: float = usage.sum()
    return usage / total


def _chain(rng: Generator, lengths: NDArray[np.int64]) -> Iterator[tuple[Codes, Bits]]:
    """Pieces of an order-4 Markov chain, all grown at once; each begins in its equilibrium."""
    rows = rng.dirichlet(SHRINK * np.array(COMPOSITION), size=256)  # [256 4]
    cumulative, bits = rows.cumsum(axis=1)[:, :3], -np.log2(rows)
    order = np.argsort(-lengths, kind="stable")
    alive = np.searchsorted(-lengths[order], -np.arange(lengths.max(initial=0)), "left")
    starts = np.concatenate([[0], np.cumsum(lengths)])
    codes = np.empty(starts[-1], dtype=np.uint8)
    cost = np.empty(starts[-1], dtype=np.float32)
    context = rng.integers(256, size=len(lengths))
    for step in range(-WARM_UP, len(alive)):
        n = len(lengths) if step < 0 else int(alive[step])
        context = context[:n]
        drawn = (rng.random((n, 1)) >= cumulative[context]).sum(axis=1)
        if step >= 0:
            at = starts[order[:n]] + step
            codes[at], cost[at] = drawn, bits[context, drawn]
        context = (4 * context + drawn) % 256
    for start, end in pairwise(starts.tolist()):
        yield codes[start:end], cost[start:end]
