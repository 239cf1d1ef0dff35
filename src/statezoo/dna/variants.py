"""Effects of variants: how much likelier a model finds the alternate allele than the reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from statezoo.datamodules.dna.fasta import Genome
from statezoo.datamodules.dna.sequence import reverse_complement
from statezoo.dna.output import Lines, source_of
from statezoo.dna.regions import batches, genome_source
from statezoo.dna.scoring import Model, extend, masked_log_probs, open_model, score_ends
from statezoo.dna.vcf import Record, read_header, read_records

__all__ = ["SKIPPED", "Job", "score_variants", "shared_ratios"]

SKIPPED = {
    "UNKNOWN_CONTIG": "the genome has no such contig",
    "OFF_CONTIG": "POS or the end of REF lies outside the contig",
    "REF_MISMATCH": "REF is not what the genome has there",
    "NO_ALTERNATE": "ALT is a dot: there is nothing to compare",
    "SPANNING_DELETION": "ALT is *, an upstream deletion",
    "SYMBOLIC": "ALT names a structural variant or breakend and no bases",
    "NOT_ACGT": "REF or ALT has letters other than A, C, G, T",
    "SAME_AS_REF": "ALT is REF",
    "TOO_LONG": "an allele is longer than half the window",
    "INDEL": "a masked model compares alleles of one length only",
}
"""Why an alternate has no score."""
COLUMNS = ("chrom", "pos", "id", "ref", "alt", "llr", "skipped")


class Job(NamedTuple):
    """Alleles between the bases on their left and right; the reference comes first.

    ``before`` and ``after`` are the bases outside the window, none at an end of the contig.
    """

    before: NDArray[np.uint8]
    left: NDArray[np.uint8]
    alleles: list[NDArray[np.uint8]]
    right: NDArray[np.uint8]
    after: NDArray[np.uint8]

    def flipped(self) -> Job:
        """Return the same on the other strand."""
        before, left, right, after = (
            reverse_complement(x) for x in (self.after, self.right, self.left, self.before)
        )
        return Job(before, left, [reverse_complement(x) for x in self.alleles], right, after)


def score_variants(
    model: str | Model,
    vcf: str | Path,
    genome: str | Path,
    out: str | Path,
    *,
    window: int = 8192,
    rc: Literal["none", "average"] = "average",
    batch_size: int = 8,
    device: str = "cpu",
) -> dict[str, Any]:
    """Write the log-likelihood ratio of every alternate allele of a VCF, in nats.

    The flanks are the ``(window - 1) // 2`` bases either side of REF, fewer at an end of the
    contig, where ``[BOS]`` is read first. A causal model gives ``log p(flank ALT flank) -
    log p(flank REF flank)``: a sum over ALT or REF and the bases after it, which are the same and
    end at the same place for both. N is read, never scored. Nothing is
    divided by length, so that every base of an insertion costs its nats and every deleted base
    saves them; to compare alleles of different lengths against chance, add ``ln 4`` per base that
    ALT has more than REF. Flanks depend on POS and REF alone: a record of several alternates and
    its split records score the same; normalise indels first (bcftools norm) where their
    representation varies. A masked model gives the sum of ``log p(alt) - log p(ref)`` over the
    bases that differ, all hidden at once.

    Args:
        model: Checkpoint, folder of a run, exported folder or Hub id; or an opened model.
        vcf: Variants, plain, gzip or bgzip, in any order.
        genome: FASTA of the same assembly.
        out: File to write: ``.vcf`` or ``.vcf.gz`` gets INFO entries LLR and LLR_SKIPPED per
            alternate, ``.csv`` or ``.tsv`` a row per alternate.
        window: Bases around a variant.
        rc: ``average`` takes the mean of both strands.
        batch_size: Variants at once.
        device: Where to run.

    Returns:
        Counts: records, alternates, scored, ``renamed`` records whose contig the genome names with
        or without ``chr``, and skipped by reason.

    Raises:
        ValueError: If an input cannot be used, or no variant can be scored.
    """
    if window < 4 or batch_size < 1:
        raise ValueError(
            "score-variants needs window of at least 4 and batch_size of at least 1; got "
            f"{window}, {batch_size}."
        )
    table = _table(Path(out))
    opened = open_model(model, device, "score-variants", ("causal", "masked"))
    bases = Genome(str(genome))
    header = read_header(vcf)
    counts = _survey(vcf, bases, opened.kind, window)
    settings = {"vcf": source_of(vcf), "genome": genome_source(bases), "window": window, "rc": rc}
    settings["weights"] = opened.fingerprint
    first = table.join(COLUMNS) + "\n" if table else _annotated_header(header, opened.kind, rc)
    with Lines(out, "score-variants", settings, first) as lines:
        if lines.finished is not None:
            return lines.finished
        for batch in batches(read_records(vcf), batch_size):
            rows = sum(len(r.alts) for r in batch) if table else len(batch)
            if not lines.skip(rows):
                reasons = [_reasons(r, bases, opened.kind, window) for r in batch]
                found = _score(opened, bases, batch, reasons, window, rc)
                zipped = zip(batch, found, reasons, strict=True)
                lines.write([*chain.from_iterable(_rows(*one, table) for one in zipped)])
        lines.finish(counts)
    return counts


def _table(out: Path) -> str:
    """Return the separator of a table, or nothing for a VCF."""
    name = out.name.removesuffix(".gz")
    for suffix, separator in ((".csv", ","), (".tsv", "\t"), (".vcf", "")):
        if name.endswith(suffix):
            return separator
    raise ValueError(f"--out must end in .vcf, .csv or .tsv (or one of them and .gz), got {out}.")


def _survey(vcf: str | Path, genome: Genome, kind: str, window: int) -> dict[str, Any]:
    """Look at all variants before any is scored."""
    records, renamed, skipped, alternates = 0, 0, Counter[str](), 0
    names = {*genome.names}
    for record in read_records(vcf):
        renamed += record.chrom not in names and record.chrom in genome
        reasons = _reasons(record, genome, kind, window)
        records, alternates = records + 1, alternates + len(reasons)
        skipped.update(reason for reason in reasons if reason)
    if not records:
        raise ValueError(f"{vcf} has no variants: nothing follows its header.")
    scored = alternates - skipped.total()
    if not scored:
        contigs = ", ".join(genome.names[:5]) + (" ..." if len(genome.names) > 5 else "")
        listed = ", ".join(f"{n} {reason}" for reason, n in skipped.most_common())
        raise ValueError(
            f"none of the {alternates} alternates in {vcf} can be scored: {listed}. Is this the "
            f"genome it was made with? It has the contigs {contigs}."
        )
    order = {reason: skipped[reason] for reason in SKIPPED if skipped[reason]}
    found = {"records": records, "alternates": alternates, "scored": scored}
    return found | {"renamed": renamed, "skipped": order}


def _reasons(record: Record, genome: Genome, kind: str, window: int) -> list[str]:
    """Say of each alternate why it cannot be scored, nothing where it can."""
    common = _reason_of_ref(record, genome, window)
    return [common or _reason_of_alt(record.ref, alt, kind, window) for alt in record.alts]


def _reason_of_ref(record: Record, genome: Genome, window: int) -> str:
    ref, start = record.ref, record.pos - 1
    if record.chrom not in genome:
        return "UNKNOWN_CONTIG"
    if start < 0 or start + len(ref) > genome.length(record.chrom):
        return "OFF_CONTIG"
    if set(ref) - {*"ACGT"}:
        return "NOT_ACGT"
    if genome.fetch(record.chrom, start, start + len(ref)).tobytes().upper() != ref.encode():
        return "REF_MISMATCH"
    return "TOO_LONG" if len(ref) > window // 2 else ""


def _reason_of_alt(ref: str, alt: str, kind: str, window: int) -> str:
    if alt in (".", ""):
        return "NO_ALTERNATE"
    if alt == "*":
        return "SPANNING_DELETION"
    if alt[0] == "<" or {*alt} & {*"[]."}:
        return "SYMBOLIC"
    if set(alt) - {*"ACGT"}:
        return "NOT_ACGT"
    if alt == ref:
        return "SAME_AS_REF"
    if len(alt) > window // 2:
        return "TOO_LONG"
    return "INDEL" if kind == "masked" and len(alt) != len(ref) else ""


def _score(
    model: Model,
    genome: Genome,
    records: Sequence[Record],
    reasons: list[list[str]],
    window: int,
    rc: str,
) -> list[list[float | None]]:
    """Return the ratio of every alternate of some records, ``None`` where there is a reason."""
    jobs, places = [], []
    for i, (record, why) in enumerate(zip(records, reasons, strict=True)):
        alts = [alt for alt, reason in zip(record.alts, why, strict=True) if not reason]
        if alts:
            places.append(i)
            jobs.append(_job(record, alts, genome, (window - 1) // 2))
    score: Callable[[Model, list[Job]], list[NDArray[np.float64]]]
    score = shared_ratios if model.kind == "causal" else _masked
    ratios = score(model, jobs)
    if rc == "average":
        other = score(model, [job.flipped() for job in jobs])
        ratios = [(a + b) / 2 for a, b in zip(ratios, other, strict=True)]
    of_record = dict(zip(places, (iter(r.tolist()) for r in ratios), strict=True))
    return [
        [None if reason else next(of_record[i]) for reason in why] for i, why in enumerate(reasons)
    ]


def _job(record: Record, alts: list[str], genome: Genome, flank: int) -> Job:
    start, stop = record.pos - 1, record.pos - 1 + len(record.ref)
    length = genome.length(record.chrom)
    alleles = [np.frombuffer(x.encode(), dtype=np.uint8) for x in (record.ref, *alts)]
    first, last = max(start - flank, 0), min(stop + flank, length)
    cuts = ((max(first - 1, 0), first), (first, start), (stop, last), (last, min(last + 1, length)))
    before, left, right, after = (genome.fetch(record.chrom, a, b) for a, b in cuts)
    return Job(before, left, alleles, right, after)


def shared_ratios(model: Model, jobs: list[Job]) -> list[NDArray[np.float64]]:
    """Read the left flank once, and every allele with the right flank from a copy of the state."""
    found: dict[int, NDArray[np.float64]] = {}
    for length in {len(job.left) for job in jobs}:
        own = [i for i, job in enumerate(jobs) if len(job.left) == length]
        left = [torch.cat([model.first(jobs[i].before), model.ids(jobs[i].left)]) for i in own]
        prefix = extend(model, torch.stack(left))
        rows = [row for row, i in enumerate(own) for _ in jobs[i].alleles]
        ends = [
            model.ids(np.concatenate([allele, jobs[i].right]))
            for i in own
            for allele in jobs[i].alleles
        ]
        sums = iter(score_ends(model, prefix, rows, ends).tolist())
        for i in own:
            ref, *alts = islice(sums, len(jobs[i].alleles))
            found[i] = np.array(alts) - ref
    return [found[i] for i in range(len(jobs))]


def _masked(model: Model, jobs: list[Job]) -> list[NDArray[np.float64]]:
    """Hide the bases that differ and compare what the model expects there."""
    ids: list[torch.Tensor] = []
    hidden: list[list[int]] = []
    of: list[int] = []
    for job in jobs:
        ref, *alts = job.alleles
        seen = model.ids(np.concatenate([job.left, ref, job.right]))
        index: dict[tuple[int, ...], int] = {}
        for alt in alts:
            differ = tuple((len(job.left) + np.flatnonzero(alt != ref)).tolist())
            if differ not in index:
                index[differ] = len(ids)
                ids.append(seen)
                hidden.append([*differ])
            of.append(index[differ])
    log_probs = masked_log_probs(model, ids, hidden) if ids else []
    found, turn = [], iter(of)
    for job in jobs:
        ref, *alts = job.alleles
        ratios = []
        for alt in alts:
            at = alt != ref
            p = log_probs[next(turn)]
            new, old = (model.ids(allele[at])[:, None] for allele in (alt, ref))
            ratios.append(float((p.gather(1, new) - p.gather(1, old)).sum()))
        found.append(np.array(ratios))
    return found


def _annotated_header(lines: list[str], kind: str, rc: str) -> str:
    """Describe our entries, in place of those of an earlier run."""
    strands = "mean of both strands" if rc == "average" else "forward strand"
    what = "masked marginal" if kind == "masked" else "sequence"
    why = ", ".join(f"{name} ({text})" for name, text in SKIPPED.items())
    own = [
        f'##INFO=<ID=LLR,Number=A,Type=Float,Description="Log-likelihood ratio of the alternate to '
        f'the reference, {what}, {strands}, in nats, by statezoo">',
        f'##INFO=<ID=LLR_SKIPPED,Number=A,Type=String,Description="Why there is no LLR: {why}">',
    ]
    kept = [x for x in lines[:-1] if not x.startswith(("##INFO=<ID=LLR,", "##INFO=<ID=LLR_SKIP"))]
    return "\n".join([*kept, *own, lines[-1]]) + "\n"


def _rows(record: Record, values: list[float | None], why: list[str], table: str) -> list[str]:
    """Return the lines of a record: one of a VCF, or one per alternate of a table."""
    texts = ["." if value is None else f"{value + 0.0:.5f}" for value in values]
    if not table:
        entries = {"LLR": "", "LLR_SKIPPED": ""}
        if any(value is not None for value in values):
            entries["LLR"] = ",".join(texts)
        if any(why):
            entries["LLR_SKIPPED"] = ",".join(reason or "." for reason in why)
        return [record.annotated(entries)]
    c, alts = record.columns, record.columns[4].split(",")
    rows = zip(alts, texts, why, strict=True)
    return [
        table.join([*c[:4], alt, "" if text == "." else text, reason]) for alt, text, reason in rows
    ]
