"""``statezoo lengths``: does a model work beyond its trained length, and use what it has read?"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from statezoo.evaluation.positions import Curve, Store
    from statezoo.evaluation.scoring import Scorer

__all__ = ["lengths"]


def lengths(
    *paths: str,
    model: str,
    trained_length: int | None = None,
    times: int = 64,
    tokens: int = 1 << 18,
    text_field: str = "text",
    out: str = "lengths.csv",
    batch_size: int = 8,
    device: str = "cpu",
) -> None:
    """Measure loss by position in windows of 1, 2, 4 ... 64 times the trained length.

    The same tokens are scored at every length, so that lengths compare: where the loss falls, the
    model uses what lies further back; where it rises, it fails beyond its trained length.

    Args:
        paths: Files or folders that ``statezoo score`` reads: text; FASTA for a model of DNA; MIDI,
            MusicXML or ABC for one of music. Best such that the model was not trained on.
        model: Checkpoint, folder of a run, exported folder, or name of a model.
        trained_length: Tokens per window of training; default what the run or metrics.json says.
        times: Longest window in trained lengths, a power of 2; less where documents are shorter.
        tokens: Score about so many, in spans of the longest window, at least one, from all over
            the data.
        text_field: Field of .jsonl and .parquet that holds the text.
        out: CSV to write, loss by position; the same as a picture goes beside it, as .png.
        batch_size: Windows at once; it changes results by rounding alone.
        device: Where to run: cpu, cuda, mps.

    Raises:
        ValueError: If the data has no window of the trained length, that is not known, the model
            is not causal, or a setting is out of range.
        FileNotFoundError: If there is no such file.
    """
    _check(trained_length, times, tokens, out)
    from statezoo.download import local
    from statezoo.evaluation.positions import Store, choose_spans, measure
    from statezoo.evaluation.scoring import open_scorer
    from statezoo.evaluation.scoring import trained_length as known_length

    place = local(model)
    scorer = open_scorer(place, device, batch_size)
    trained = trained_length or known_length(place)
    if trained is None:
        raise ValueError(
            f"the length that {model!r} was trained on stands in no config.yaml or metrics.json "
            "beside it: give --trained_length TOKENS."
        )
    with Store() as store:
        _read(store, paths, scorer, text_field)
        times = _fit(store.bounds, trained, times)
        size = times * trained
        spans = choose_spans(store.bounds, size, max(tokens // size, 1))
        _warn(scorer.net, size)
        _tell(store.bounds, size, len(spans))
        curves = [
            _show(curve, trained, scorer.unit)
            for curve in measure(scorer, store, spans, trained, times)
        ]
    _say("change: on the same tokens, against 1x; s.e.: standard error")
    picture = Path(out).with_suffix(".png")
    _write(Path(out), curves)
    _draw(picture, curves, f"{Path(model).name}, trained on {trained} tokens", trained)
    _say(f"wrote {out}\nwrote {picture}")


def _check(trained_length: int | None, times: int, tokens: int, out: str) -> None:
    """Raise where the arguments cannot be meant."""
    if trained_length is not None and trained_length < 1:
        raise ValueError(f"trained_length must be at least 1 token, got {trained_length}.")
    if times < 1 or times & (times - 1):
        raise ValueError(f"times must be a power of 2, from 1 on, got {times}.")
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}.")
    if not out.endswith(".csv"):
        raise ValueError(f"out must end in .csv (the picture is named after it), got {out!r}.")
    if not Path(out).resolve().parent.is_dir():
        raise ValueError(f"cannot write {out}: there is no folder {str(Path(out).parent)!r}.")


def _read(store: Store, paths: Sequence[str], scorer: Scorer, text_field: str) -> None:
    """Tokenise all documents into ``store``.

    Raises:
        ValueError: If there is none.
    """
    from statezoo.datamodules.records import Report
    from statezoo.evaluation.documents import documents, encode

    report = Report()
    for path in paths:
        for parts in documents(path, scorer.tokenizer, report, text_field):
            store.add(encode(scorer.tokenizer, parts))
    if len(store.bounds) == 1:
        raise ValueError("\n".join([f"there is no text in {', '.join(paths)}.", *report[:10]]))
    for line in report[:20]:
        sys.stderr.write(f"skipped {line}\n")


def _fit(bounds: Sequence[int], trained: int, times: int) -> int:
    """Return ``times``, or the largest power of 2 below for which a document is long enough.

    Raises:
        ValueError: If none has one trained length.
    """
    longest = max(b - a for a, b in pairwise(bounds))
    if longest < trained:
        raise ValueError(
            f"the longest document has {longest} tokens, and a window of the trained length needs "
            f"{trained}: give longer documents, or a lower --trained_length."
        )
    if longest >= times * trained:
        return times
    fits = 1 << (longest // trained).bit_length() - 1
    _say(
        f"no document has {times * trained} tokens ({times}x), the longest has {longest}: windows "
        f"go up to {fits}x"
    )
    return fits


def _warn(net: Any, size: int) -> None:
    """Say what memory attention will need."""
    from statezoo.evaluation.positions import growing_bytes
    from statezoo.lightning_modules.memory import available_bytes, gigabytes

    needed = growing_bytes(net, size)
    if not needed:
        return
    left = available_bytes(net.device)
    more = f", and {gigabytes(left)} are free: lower --times" if needed > left else ""
    sys.stderr.write(
        f"this model has attention, whose memory grows with the window: {size} tokens need about "
        f"{gigabytes(needed)}{more}\n"
    )


def _tell(bounds: Sequence[int], size: int, spans: int) -> None:
    """Say what is scored, and what is not."""
    documents = [b - a for a, b in pairwise(bounds)]
    short = [n for n in documents if n < size]
    left = f"; {len(short)} with {sum(short)} tokens are shorter and left out" if short else ""
    _say(f"{_count(spans, 'span')} of {size} tokens; {_count(len(documents), 'document')}{left}")


def _show(curve: Curve, trained: int, unit: str) -> Curve:
    """Write a row of the table at once, as a length takes its time; the heads before the first."""
    whole, times = curve.whole, curve.length // trained
    if times == 1:
        heads = ("tokens", "times", "windows", "nats/token", "s.e.", "change", "s.e.")
        _say(_cells(*heads, f"bits/{unit}"))
    numbers = (whole.nll, whole.stderr, curve.change, curve.change_stderr, curve.bits)
    written = ("" if math.isnan(x) else f"{x:.4f}" for x in numbers)
    _say(_cells(curve.length, f"{times}x", curve.windows, *written))
    return curve


def _cells(*cells: object) -> str:
    return " ".join(f"{cell!s:>10}" for cell in cells).rstrip()


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' if n != 1 else ''}"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _write(path: Path, curves: Sequence[Curve]) -> None:
    """Write loss by position, a row for each bin of each length."""
    names = ["length", "position_from", "position_to", "tokens", "nll", "standard_error"]
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(names)
        for curve in curves:
            for one in curve.bins:
                numbers = ("" if math.isnan(x) else f"{x:.6f}" for x in (one.nll, one.stderr))
                rows.writerow([curve.length, one.start, one.stop, one.tokens, *numbers])


def _draw(path: Path, curves: Sequence[Curve], title: str, trained: int) -> None:
    """Draw nats against position, a line for each length, with bands of a standard error."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    for i, curve in enumerate(curves):
        bins = [one for one in curve.bins if one.tokens]
        place = [math.sqrt((one.start + 1) * one.stop) for one in bins]  # from 1, as the axis is
        nll = [one.nll for one in bins]
        low, high = ([one.nll + sign * one.stderr for one in bins] for sign in (-1, 1))
        color = colormaps["viridis"](i / len(curves))
        axes.plot(place, nll, color=color, linewidth=1.2, label=f"{curve.length // trained}x")
        axes.fill_between(place, low, high, color=color, alpha=0.15, linewidth=0)
    axes.axvline(trained, linestyle=":", color="grey", linewidth=1)
    axes.set(xlabel="position in the window", ylabel="nats per token")
    axes.set_title(title, fontsize=9, loc="left")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, title="window")
    figure.savefig(path, dpi=120, metadata={"Software": None})
