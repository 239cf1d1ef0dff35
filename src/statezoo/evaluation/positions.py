"""Loss by position in windows of 1, 2, 4 ... times the trained length, on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from statezoo.datamodules.tokenizers import Encoded
from statezoo.evaluation.scoring import TOKENS, Scorer, Stream, grows, tokens_at_once

__all__ = ["Bin", "Curve", "Store", "bin_edges", "choose_spans", "growing_bytes", "measure"]

Numbers = NDArray[np.float64]


class Bin(NamedTuple):
    """Positions of windows, and the loss there.

    Attributes:
        start: First position, from 0, which is that of the first scored token.
        stop: One past the last.
        tokens: Scored tokens.
        nll: Nats per token; NaN where there is none.
        stderr: Standard error of ``nll``; NaN where it cannot be told.
    """

    start: int
    stop: int
    tokens: int
    nll: float
    stderr: float


class Curve(NamedTuple):
    """What a model does in windows of one length.

    Standard errors take pieces of one trained length for independent, which tokens are not.

    Attributes:
        length: Tokens of a window.
        windows: How many there are.
        whole: All positions.
        bits: Bits per byte, base or token of music.
        change: Nats per token more (above 0) than in windows of one trained length.
        change_stderr: Standard error of ``change``, from differences of the same tokens.
        bins: Parts of the positions, in order.
    """

    length: int
    windows: int
    whole: Bin
    bits: float
    change: float
    change_stderr: float
    bins: list[Bin]


class Store:
    """Tokens of documents in a temporary file, as they are many; a context manager.

    Attributes:
        bounds: Where documents begin, and where the last one ends.
    """

    def __init__(self) -> None:
        self._file = TemporaryFile()  # noqa: SIM115  # gone with the store
        self._row = np.dtype([("id", np.uint32), ("size", np.uint32)])
        self.bounds = [0]

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, pieces: Iterable[Encoded]) -> None:
        """Add a document, unless it is empty."""
        end = self.bounds[-1]
        for ids, sizes in pieces:
            rows = np.ones(len(ids), self._row)
            rows["id"] = ids
            if sizes is not None:
                rows["size"] = sizes
            self._file.write(rows.tobytes())
            end += len(ids)
        if end > self.bounds[-1]:
            self.bounds.append(end)

    def read(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
        """Return ids and units of tokens, counted over all documents."""
        self._file.seek(start * self._row.itemsize)
        data = self._file.read((stop - start) * self._row.itemsize)
        rows = np.frombuffer(data, self._row)
        return rows["id"].astype(np.int64), rows["size"]


def choose_spans(bounds: Sequence[int], size: int, most: int) -> list[tuple[int, bool]]:
    """Choose up to ``most`` spans of ``size`` tokens, spread evenly over what documents hold.

    Args:
        bounds: Where documents begin, and where the last one ends.
        size: Tokens of a span, which lies within a document.
        most: How many.

    Returns:
        First token of each, and whether a document begins with it.
    """
    starts = [a for begin, end in pairwise(bounds)
              for a in range(begin, end - size + 1, size)]  # fmt: skip
    n = min(most, len(starts))
    begins = set(bounds)
    chosen = [starts[(2 * i + 1) * len(starts) // (2 * n)] for i in range(n)]
    return [(a, a in begins) for a in chosen]


def bin_edges(trained: int, length: int) -> NDArray[np.int64]:
    """Return bounds of bins of positions: two to a doubling, the trained length among them."""
    steps = range(-2 * math.ceil(math.log2(trained)), 2 * math.ceil(math.log2(length / trained)))
    found = {min(round(trained * 2 ** (k / 2)), length) for k in steps}
    return np.array(sorted({0, *found, length}), dtype=np.int64)


def growing_bytes(net: Any, length: int) -> int:
    """Estimate the bytes that attention needs after ``length`` tokens; 0 if no state grows.

    Counts keys and values of all layers, two copies of one layer's while they are put together, and
    the mask of the tokens that are read at once.
    """
    if not grows(net):
        return 0
    sizes: list[int] = [mixer.state_size(length) for mixer in net.base_model.mixers()]
    distance_and_mask = 8 + 1 + 1  # bytes for each pair of tokens
    return sum(sizes) + 2 * max(sizes) + distance_and_mask * tokens_at_once(net) * length


def measure(
    scorer: Scorer, store: Store, spans: Sequence[tuple[int, bool]], trained: int, times: int
) -> Iterator[Curve]:
    """Score the same spans in windows of ``trained``, 2, 4 ... ``times * trained`` tokens.

    A span is cut into windows, so every token is scored at every length, and only what lies before
    it in its window differs. The state is empty where a window begins, which reads the token
    before it first, or the one that begins documents, as in training; within a window it is handed
    on, so the memory of a recurrent net does not depend on the length.

    Args:
        scorer: Model and tokenizer.
        store: The tokens.
        spans: Where spans of ``times * trained`` tokens begin, and whether a document does.
        trained: Tokens per window of training.
        times: Longest window, a power of 2.
    """
    units = _units(scorer, store, spans, times * trained)
    one: Numbers | None = None  # nats of each trained length of the spans, in its own window
    for k in range(times.bit_length()):
        length = trained << k
        edges = np.union1d(bin_edges(trained, length), np.arange(0, length, trained))
        sums, counts = _window_sums(scorer, store, spans, times * trained, edges)
        pieces = edges[:-1] // trained  # which trained length of its window each part is of
        nats, tokens = _joined(sums, pieces).ravel(), _joined(counts, pieces).ravel()
        one = nats if one is None else one
        n, nll, error = _mean(nats, tokens)
        _, change, change_error = _mean(nats - one, tokens)
        bits = nll * n / math.log(2) / units if units else math.nan
        whole = Bin(0, length, n, nll, error)
        bins = _bins(bin_edges(trained, length), edges, sums, counts)
        yield Curve(length, len(sums), whole, bits, change, change_error, bins)


def _units(scorer: Scorer, store: Store, spans: Sequence[tuple[int, bool]], size: int) -> int:
    found = 0
    for start, _ in spans:
        for a in range(start, start + size, TOKENS):
            found += scorer.units(*store.read(a, min(a + TOKENS, start + size)))
    return found


def _window_sums(
    scorer: Scorer,
    store: Store,
    spans: Sequence[tuple[int, bool]],
    size: int,
    edges: NDArray[np.int64],
) -> tuple[Numbers, Numbers]:
    """Return nats and scored tokens ``[windows parts]`` between ``edges`` of each window."""
    length = int(edges[-1])
    first = {start: begins for start, begins in spans}
    starts = [a for start, _ in spans for a in range(start, start + size, length)]
    sums, counts = np.zeros((2, len(starts), len(edges) - 1))
    for row in range(0, len(starts), scorer.batch_size):
        own = starts[row : row + scorer.batch_size]
        bos = scorer.tokenizer.bos_id
        before = [bos if first.get(a) else int(store.read(a - 1, a)[0][0]) for a in own]
        stream = Stream(scorer.net, torch.tensor(before))
        for at in range(0, length, stream.step):
            stop = min(at + stream.step, length)
            ids = np.stack([store.read(a + at, a + stop)[0] for a in own])
            nats = -stream.read(torch.from_numpy(ids))[0].double().numpy()
            scored = scorer.scored(ids)
            part = np.searchsorted(edges, np.arange(at, stop), side="right") - 1
            rows = slice(row, row + len(own))
            np.add.at(sums[rows].T, part, np.where(scored, nats, 0).T)
            np.add.at(counts[rows].T, part, scored.T)
    return sums, counts


def _joined(parts: Numbers, of: NDArray[np.int64]) -> Numbers:
    """Add the columns of ``parts`` that belong together, by the ascending numbers in ``of``."""
    found: Numbers = np.add.reduceat(parts, np.unique(of, return_index=True)[1], axis=1)
    return found


def _bins(
    bounds: NDArray[np.int64], edges: NDArray[np.int64], sums: Numbers, counts: Numbers
) -> list[Bin]:
    own = np.searchsorted(bounds, edges[:-1], side="right") - 1
    return [
        Bin(int(a), int(b), *_mean(sums[:, own == i].ravel(), counts[:, own == i].ravel()))
        for i, (a, b) in enumerate(pairwise(bounds))
    ]


def _mean(sums: Numbers, counts: Numbers) -> tuple[int, float, float]:
    """Return the tokens of clusters, their mean, and its standard error as of a ratio.

    Source: Cochran, Sampling Techniques, 3rd ed. 1977, chapter 6, without correction for a finite
    population.
    """
    sums, counts = sums[counts > 0], counts[counts > 0]
    n, clusters = int(counts.sum()), len(counts)
    if not n:
        return 0, math.nan, math.nan
    mean = float(sums.sum()) / n
    if clusters < 2:
        return n, mean, math.nan
    spread = float(((sums - mean * counts) ** 2).sum()) * clusters / (clusters - 1)
    return n, mean, math.sqrt(spread) / n
