"""``statezoo score``: how surprising texts are to a model, a row for each."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from statezoo.listing import aligned

if TYPE_CHECKING:
    from statezoo.evaluation.scoring import Score, Scorer

__all__ = ["score"]

GROUP = 64
"""Batches of short texts that are sorted by length together."""
SHORT = 1 << 13
"""Bytes of a text that runs in a batch; longer ones run alone, piece by piece."""


def score(
    path: str | None = None,
    *,
    model: str,
    text: str | None = None,
    lines: bool = False,
    text_field: str = "text",
    out: str | None = None,
    batch_size: int = 8,
    device: str = "cpu",
    knn: str | None = None,
    knn_weight: float | None = None,
    knn_temperature: float | None = None,
    knn_neighbours: int | None = None,
    knn_tokens: int | None = None,
) -> None:
    """Write how surprising each text of a file is to a model, in nats and in bits per byte.

    A text is scored from its first token on, given the token that begins documents; tokens are
    counted without that one. Bits are per base for DNA, whose N are not scored, and per token for
    music. Memory of a recurrent model does not grow with the length of a .txt or of a record of
    FASTA, which are read piece by piece.

    Args:
        path: What ``--data Text`` reads: .txt, .jsonl, .parquet (plain or .gz) or a folder of them;
            for a model of DNA also FASTA, for one of music MIDI, MusicXML or ABC.
        model: Checkpoint, folder of a run, exported folder, or name of a model.
        text: Text to score, instead of a file.
        lines: Whether every line of a text is a text of its own; empty ones are left out.
        text_field: Field of .jsonl and .parquet that holds the text.
        out: CSV to write; without, the rows are shown.
        batch_size: Texts at once; it changes results by rounding alone.
        device: Where to run: cpu, cuda, mps.
        knn: Corpus, such as path may be, to mix in what followed the nearest contexts there; a text
            that stands in it finds itself. Weight and temperature, where they are not given, are
            found on its last tenth, and told.
        knn_weight: Share of the neighbours, from 0 to 1.
        knn_temperature: What squared distances are divided by; the lower, the more the nearest
            count.
        knn_neighbours: Contexts that a prediction asks; default 1024.
        knn_tokens: Tokens of the corpus that are kept, its first ones; default 250000.

    Raises:
        ValueError: If there is nothing to score, or the model cannot score it.
        FileNotFoundError: If there is no such file.
    """
    if (path is None) == (text is None):
        raise ValueError("score needs a file or --text, one of the two.")
    if out and not Path(out).resolve().parent.is_dir():
        raise ValueError(f"cannot write {out}: there is no folder {str(Path(out).parent)!r}.")
    from statezoo.datamodules.records import Report
    from statezoo.evaluation.documents import cut, documents
    from statezoo.evaluation.knn import asked
    from statezoo.evaluation.scoring import open_scorer

    report = Report()
    neighbours = asked(knn, knn_weight, knn_temperature, knn_neighbours, knn_tokens)
    scorer = open_scorer(model, device, batch_size, neighbours)
    sys.stderr.writelines(f"{line}\n" for line in scorer.notes)
    if path is None:
        texts = iter([cut((text or "").encode("utf-8", "surrogateescape"))])
    else:
        texts = documents(path, scorer.tokenizer, report, text_field)
    found = _score_all(scorer, _lines(texts) if lines else texts)
    if not found:
        raise ValueError("\n".join([f"there is no text in {path or '--text'}.", *report[:10]]))
    for line in report[:20]:
        sys.stderr.write(f"skipped {line}\n")
    _write(found, scorer.unit, out)


def _score_all(scorer: Scorer, texts: Iterable[Iterator[bytes]]) -> list[Score]:
    """Score texts in parts: short ones in batches, long ones alone."""
    from statezoo.evaluation.documents import encode

    found: list[Score] = []
    short: list[bytes] = []
    for parts in texts:
        first, more = next(parts, b""), next(parts, b"")
        if not more and len(first) <= SHORT:
            short += [first] if first else []
        else:
            found, short = found + scorer.score(short), []
            whole = chain([first, more], parts)
            found.append(scorer.score_pieces(encode(scorer.tokenizer, whole)))
        if len(short) == GROUP * scorer.batch_size:
            found, short = found + scorer.score(short), []
    return found + scorer.score(short)


def _lines(texts: Iterable[Iterator[bytes]]) -> Iterator[Iterator[bytes]]:
    """Make every line a text of its own; empty ones are left out."""
    for parts in texts:
        rest = b""
        for part in parts:
            *lines, rest = (rest + part).splitlines(keepends=True)
            yield from (iter([line.rstrip(b"\r\n")]) for line in lines if line.strip())
        yield from (iter([line]) for line in rest.splitlines() if line.strip())


def _write(found: list[Score], unit: str, out: str | None) -> None:
    """Write a row per text as CSV, or show them, and then their mean over units."""
    names = ["text", "tokens"] + ([] if unit == "token" else [f"{unit}s"])
    names += ["nats", f"bits_per_{unit}"]
    rows = []
    for number, one in enumerate(found, 1):
        counts = [one.tokens] if unit == "token" else [one.tokens, one.units]
        rows.append([str(x) for x in (number, *counts)] + [f"{one.nats:.6f}", f"{one.bits:.6f}"])
    if out:
        with Path(out).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([names, *rows])
    else:
        sys.stdout.write("\n".join(aligned([names, *rows])) + "\n")
    tokens, units = sum(one.tokens for one in found), sum(one.units for one in found)
    nats = math.fsum(one.nats for one in found)
    bits = f"{nats / math.log(2) / units:.4f}" if units else "nan"
    what = f"{len(found)} text{'s' if len(found) != 1 else ''}, {tokens} tokens"
    what += "" if unit == "token" else f", {units} {unit}s"
    sys.stdout.write(f"{what}: {bits} bits per {unit}\n" + (f"wrote {out}\n" if out else ""))
