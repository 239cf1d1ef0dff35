"""``statezoo score``: how surprising texts are to a model, a row for each."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from statezoo.listing import aligned

if TYPE_CHECKING:
    from statezoo.evaluation.scoring import Score

__all__ = ["score"]

GROUP = 64
"""Batches of texts that are sorted by length together."""


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
) -> None:
    """Write how surprising each text of a file is to a model, in nats and in bits per byte.

    A text is scored from its first token on, given the token that begins documents; tokens are
    counted without that one. Bits are per base for DNA, and per token for music, which is given as
    names of tokens. Memory of a recurrent model does not grow with the length of a text.

    Args:
        path: What ``--data Text`` reads: .txt, .jsonl, .parquet (plain or .gz) or a folder of them.
        model: Checkpoint, folder of a run, exported folder, or name of a model.
        text: Text to score, instead of a file.
        lines: Whether every line of a text is a text of its own; empty ones are left out.
        text_field: Field of .jsonl and .parquet that holds the text.
        out: CSV to write; without, the rows are shown.
        batch_size: Texts at once; it changes results by rounding alone.
        device: Where to run: cpu, cuda, mps.

    Raises:
        ValueError: If there is nothing to score, or the model cannot score it.
        FileNotFoundError: If there is no such file.
    """
    if (path is None) == (text is None):
        raise ValueError("score needs a file or --text, one of the two.")
    if out and not Path(out).resolve().parent.is_dir():
        raise ValueError(f"cannot write {out}: there is no folder {str(Path(out).parent)!r}.")
    report: list[str] = []
    texts = _texts(path, text, lines, text_field, report)
    if (first := next(texts, None)) is None:
        raise ValueError("\n".join([f"there is no text in {path or '--text'}.", *report[:10]]))

    from statezoo.evaluation.scoring import open_scorer

    scorer = open_scorer(model, device, batch_size)
    found = scorer.score([first])
    while group := list(islice(texts, GROUP * batch_size)):
        found += scorer.score(group)
    for line in report[:20]:
        sys.stderr.write(f"skipped {line}\n")
    _write(found, scorer.unit, out)


def _texts(
    path: str | None, text: str | None, lines: bool, text_field: str, report: list[str]
) -> Iterator[bytes]:
    """Yield the texts; what is left out, and why, is added to ``report``."""
    from statezoo.datamodules.readers import source_for
    from statezoo.datamodules.records import Report

    skipped = Report()
    if text is not None:
        whole = iter([text.encode("utf-8", "surrogateescape")] if text else [])
    else:
        whole = (found.text for found in source_for(path, text_field).documents(skipped))
    for one in whole:
        if not lines:
            yield one
            continue
        yield from (line for line in one.splitlines() if line.strip())
    report += skipped


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
