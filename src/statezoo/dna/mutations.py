"""Saturation mutagenesis: what each other base in each place would change."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from statezoo.datamodules.dna.fasta import Genome
from statezoo.datamodules.dna.sequence import reverse_complement, to_codes
from statezoo.dna.output import Lines
from statezoo.dna.pictures import save_heatmap
from statezoo.dna.regions import Region, genome_source, parse_region, whole
from statezoo.dna.scoring import Model, extend, masked_log_probs, open_model, score_ends

__all__ = ["mutagenesis"]

PICTURES = 20
"""Most pictures of one run."""


class _Target(NamedTuple):
    """Bases ``start`` to ``stop`` of a sequence are mutated; the others are read and scored.

    ``before`` is the base before the sequence, none at the start of a contig.
    """

    region: Region
    before: NDArray[np.uint8]
    bases: NDArray[np.uint8]
    start: int
    stop: int
    after: NDArray[np.uint8]

    def flipped(self) -> _Target:
        """Return the same on the other strand."""
        own = (self.after, self.bases, self.before)
        before, bases, after = (reverse_complement(x) for x in own)
        n = len(bases)
        return _Target(self.region, before, bases, n - self.stop, n - self.start, after)


def mutagenesis(
    model: str | Model,
    out: str | Path,
    *,
    fasta: str | Path | None = None,
    region: str | None = None,
    genome: str | Path | None = None,
    flank: int = 0,
    target: str | None = None,
    rc: Literal["none", "average"] = "none",
    batch_size: int = 48,
    device: str = "cpu",
) -> dict[str, Any]:
    """Write what every other base in every place changes, as a table and as heat maps.

    A causal model gives ``log p(mutated) - log p(sequence)`` in nats; what is before a mutation is
    read once for a block of places, and mutants run from copies of the state. A masked model gives
    ``log p(base) - log p(base that is there)`` in the hidden place. A classifier gives the change
    of the log-odds of a class, in nats (of the value, for a regression). The base that is there has
    0; places that are not A, C, G or T stay empty.

    Args:
        model: Checkpoint, folder of a run, exported folder or Hub id, of any kind of model; or an
            opened one.
        out: CSV to write: id, position (from 1), ref, A, C, G, T. Pictures are beside it, one per
            sequence, of the first 20.
        fasta: Sequences.
        region: ``chr1:100-200`` of ``genome``, counted from 1.
        genome: FASTA that the region is cut from.
        flank: Bases either side of the region that are read, and scored, but not mutated.
        target: Name or number of a classifier's class; default the one that it predicts.
        rc: ``average`` takes the mean of both strands.
        batch_size: Mutants at once.
        device: Where to run.

    Returns:
        Counts of sequences and bases, and the pictures.

    Raises:
        ValueError: If an input cannot be used.
    """
    if (fasta is None) == (region is None) or (region is None) != (genome is None):
        raise ValueError("mutagenesis needs --fasta, or --region together with --genome.")
    if Path(out).suffix != ".csv" or batch_size < 3 or flank < 0 or (flank and region is None):
        raise ValueError(
            "mutagenesis needs --out that ends in .csv, batch_size of at least 3, and flank of at "
            f"least 0, which goes with --region; got {out}, {batch_size}, {flank}."
        )
    opened = open_model(model, device, "mutagenesis", ("causal", "masked", "classifier"))
    wanted = None if target is None else _class_number(opened, target)
    source = Genome(str(fasta if region is None else genome))
    regions = whole(source) if region is None else [parse_region(region, source)]
    settings = {"source": genome_source(source), "region": region, "flank": flank, "rc": rc}
    settings |= {"target": target, "weights": opened.fingerprint}
    with Lines(out, "mutagenesis", settings, "id,position,ref,A,C,G,T\n") as lines:
        if lines.finished is None:
            for one in regions:
                _run(opened, lines, _cut(source, one, flank), wanted, rc, batch_size)
            bases = sum(r.stop - r.start for r in regions)
            lines.finish({"sequences": len(regions), "bases": bases})
        summary = dict(lines.finished or {})
    return summary | {"pictures": _draw(Path(out), opened.kind)}


def _cut(genome: Genome, region: Region, flank: int) -> _Target:
    a = max(region.start - flank, 0)
    b = min(region.stop + flank, genome.length(region.contig))
    ends = (max(a - 1, 0), a), (a, b), (b, min(b + 1, genome.length(region.contig)))
    before, bases, after = (genome.fetch(region.contig, *end) for end in ends)
    return _Target(region, before, bases, region.start - a, region.stop - a, after)


def _run(
    model: Model, lines: Lines, target: _Target, wanted: int | None, rc: str, batch_size: int
) -> None:
    """Write the lines of one sequence, block by block."""
    size = max(batch_size // 3, 1)
    other = target.flipped()
    chosen: int | None = wanted
    n = len(target.bases)
    first = target.region.start - target.start
    for a in range(target.start, target.stop, size):
        b = min(a + size, target.stop)
        if lines.skip(b - a):
            continue
        if model.kind == "classifier" and chosen is None:
            chosen = int(_logits(model, [model.ids(target.bases)]).argmax())
        values = _block(model, target, a, b, chosen)
        if rc == "average":
            values = (values + _block(model, other, n - b, n - a, chosen)[::-1, ::-1]) / 2
        lines.write([*_rows(target, first, a, values)])


def _rows(target: _Target, first: int, a: int, values: NDArray[np.float64]) -> Iterator[str]:
    name = target.region.name.replace(",", ";")
    for i, row in enumerate(values, a):
        cells = ",".join("" if np.isnan(x) else f"{x + 0.0:.5f}" for x in row)
        yield f"{name},{first + i + 1},{chr(target.bases[i]).upper()},{cells}"


def _block(
    model: Model, target: _Target, a: int, b: int, wanted: int | None
) -> NDArray[np.float64]:
    """Return ``[b-a 4]`` changes in the places ``a`` to ``b``, NaN where there is no base."""
    codes = to_codes(target.bases[a:b])
    values = np.full((b - a, 4), np.nan)
    places: list[int] = np.flatnonzero(codes < 4).tolist()
    if not places:
        return values
    ids = model.ids(target.bases)
    bases = torch.tensor(model.tokenizer.scored)
    values[places, codes[places]] = 0
    if model.kind == "masked":
        hidden = [[a + i] for i in places]
        found = masked_log_probs(model, [ids] * len(places), hidden)
        for i, p in zip(places, found, strict=True):
            values[i] = (p[0, bases] - p[0, ids[a + i]]).numpy()
        return values
    mutants = [(i, base) for i in places for base in range(4) if base != codes[i]]
    rows = [ids]
    for i, base in mutants:
        rows.append(ids.clone())
        rows[-1][a + i] = bases[base]
    if model.kind == "causal":
        prefix = extend(model, torch.cat([model.first(target.before), ids[:a]])[None])
        scores = score_ends(model, prefix, [0] * len(rows), [row[a:] for row in rows])
    else:
        scores = _log_odds(model, _logits(model, rows), wanted or 0)
    for (i, base), change in zip(mutants, (scores[1:] - scores[0]).tolist(), strict=True):
        values[i, base] = change
    return values


@torch.inference_mode()
def _logits(model: Model, rows: list[Tensor]) -> Tensor:
    """Return ``[B C]`` of sequences of one length, float64 on the CPU."""
    found: Tensor = model.net(torch.stack(rows).to(model.net.device)).logits.cpu().double()
    return found


def _log_odds(model: Model, logits: Tensor, wanted: int) -> Tensor:
    """Return ``log p / (1 - p)`` of a class, or the value itself of a regression."""
    own = logits[:, wanted]
    single = model.net.config.problem_type in (None, "single_label_classification")
    if logits.shape[1] == 1 or not single:
        return own
    others = [i for i in range(logits.shape[1]) if i != wanted]
    return own - logits[:, others].logsumexp(1)


def _class_number(model: Model, target: str) -> int:
    """Find a class by name or number.

    Raises:
        ValueError: If the model is no classifier or has no such class.
    """
    if model.kind != "classifier":
        raise ValueError(f"--target is for classifiers; the model is a {model.kind} one.")
    names = {str(name): int(i) for i, name in model.net.config.id2label.items()}
    numbers = {str(i): i for i in names.values()}
    if target not in names and target not in numbers:
        raise ValueError(f"the model has no class {target!r}; it has {', '.join(names)}.")
    return names.get(target, numbers.get(target, 0))


def _draw(out: Path, kind: str) -> list[str]:
    """Draw the finished table, a picture for each of the first sequences."""
    label = {"causal": "nats", "masked": "nats", "classifier": "log-odds"}[kind]
    pictures: list[str] = []
    with out.open(newline="") as file:
        rows = csv.reader(file)
        next(rows)
        for name, own in groupby(rows, key=lambda row: row[0]):
            cells = [row for row in own]
            if len(pictures) == PICTURES:
                break
            values = np.array([[float(x or "nan") for x in row[3:]] for row in cells])
            safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
            ref = "".join(row[2] for row in cells)
            path = out.with_suffix(f".{safe}.png")
            pictures.append(str(save_heatmap(path, values, ref, int(cells[0][1]), name, label)))
    if len(pictures) == 1:
        only = out.with_suffix(".png")
        Path(pictures[0]).replace(only)
        pictures = [str(only)]
    return pictures
