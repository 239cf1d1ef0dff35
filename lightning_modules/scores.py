r"""Scores of a split, and how far they would vary over other samples of as many rows.

Every score is a function of the rows and of how often each one counts, so that one formula serves
the value (each counts once) and the bootstrap (each counts as often as it was drawn).

The interval is the percentile bootstrap: :math:`n` rows are drawn with replacement from the
:math:`n` of the split, the score is taken of each such sample, and its 2.5 and 97.5 % quantiles are
the bounds of the 95 % interval. It says what another test set would change, not another training.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
CELLS = 4_000_000
"""Numbers of weights that are held in memory at once."""


class Interval(NamedTuple):
    """A score, the bounds of its 95 % interval, and the rows it is of; NaN where undefined."""

    value: float
    low: float
    high: float
    n: int


class Scoring(ABC):
    """Rows that are scored together; one row is what the bootstrap draws.

    Attributes:
        n: Number of rows.
    """

    n: int

    @abstractmethod
    def __call__(self, weights: Floats) -> dict[str, Floats]:
        """Return each score ``[R]`` under ``weights [R n]``, whole numbers; NaN if undefined."""

    def values(self) -> dict[str, float]:
        """Return the scores of the rows as they are."""
        return {name: float(x[0]) for name, x in self(np.ones((1, self.n))).items()}


def intervals(scoring: Scoring, resamples: int = 1000, seed: int = 0) -> dict[str, Interval]:
    """Return each score with its bootstrap interval.

    Args:
        scoring: The rows.
        resamples: How many samples of ``n`` rows are drawn.
        seed: Of the draws.
    """
    n, rng = scoring.n, np.random.default_rng(seed)
    found: dict[str, list[Floats]] = {name: [] for name in scoring.values()}
    size = max(1, CELLS // max(n, 1))
    for begin in range(0, resamples if n else 0, size):
        draws = range(begin, min(begin + size, resamples))
        counts = [np.bincount(rng.integers(n, size=n), minlength=n) for _ in draws]
        for name, x in scoring(np.array(counts, dtype=np.float64)).items():
            found[name].append(x)
    bounds = {name: _quantiles(np.concatenate([*x, [np.nan]])) for name, x in found.items()}
    return {k: Interval(value, *bounds[k], n) for k, value in scoring.values().items()}


def _quantiles(x: Floats) -> tuple[float, float]:
    known = x[np.isfinite(x)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


class ClassScores(Scoring):
    """Scores of classified sequences.

    Args:
        labels: Classes ``[n]``.
        log_p: Log-probability of each class ``[n C]``.
    """

    def __init__(self, labels: NDArray[np.int64], log_p: Floats) -> None:
        self.n, self.classes = log_p.shape
        self.nll = -log_p[np.arange(self.n), labels]
        self.cells = labels * self.classes + log_p.argmax(1) if self.n else labels
        self.asked = range(self.classes) if self.classes > 2 else [1]  # of two, one mirrors one
        self.labels, self.log_p = labels, log_p
        self.areas = [Area(labels == c, log_p[:, c]) for c in self.asked]

    def __call__(self, weights: Floats) -> dict[str, Floats]:
        """Nats per sequence, accuracy, Matthews' correlation, mean area under ROC curves."""
        C = self.classes
        counts = [np.bincount(self.cells, weights=w, minlength=C * C) for w in weights]
        table = np.array(counts, dtype=np.float64).reshape(-1, C, C)
        return {
            "nll": ratio(weights @ self.nll, weights.sum(1)),
            "accuracy": accuracy(table),
            "mcc": matthews(table),
            "auroc": mean_known([area(weights) for area in self.areas]),
        }

    def table(self) -> NDArray[np.int64]:
        """Count rows by true and predicted class, ``[C C]``."""
        C = self.classes
        return np.bincount(self.cells, minlength=C * C).reshape(C, C)

    def questions(self) -> Iterator[Question]:
        """Go through the classes against the rest; of two, the second."""
        for c, area in zip(self.asked, self.areas, strict=True):
            yield Question(c, self.labels == c, np.exp(self.log_p[:, c]), area)


class LabelScores(Scoring):
    """Scores of sequences of which several labels may hold.

    Args:
        truth: 1 where a label holds, 0 where not, NaN where unknown, ``[n C]``.
        log_odds: What the model says, ``[n C]``.
    """

    def __init__(self, truth: Floats, log_odds: Floats) -> None:
        self.n = len(truth)
        self.known = np.isfinite(truth).astype(np.float64)
        true, said = np.nan_to_num(truth), (log_odds > 0).astype(np.float64)
        nats = np.logaddexp(0, log_odds) - true * log_odds
        self.nats = (nats * self.known).sum(1)
        cells = (true * said, (1 - true) * said, true * (1 - said), (1 - true) * (1 - said))
        self.cells = [x * self.known for x in cells]
        self.parts: list[tuple[NDArray[np.int64], Question]] = []
        for c in range(truth.shape[1]):
            rows = np.flatnonzero(self.known[:, c])
            holds, odds = truth[rows, c] == 1, log_odds[rows, c]
            p = 1 / (1 + np.exp(-odds.clip(-500, 500)))
            self.parts.append((rows, Question(c, holds, p, Area(holds, odds))))

    def __call__(self, weights: Floats) -> dict[str, Floats]:
        """Nats per label, part of labels said right at 1/2, mean F1, mean area under ROC curves."""
        labels = weights @ self.known.sum(1)
        hits, wrong, missed, noes = (weights @ x for x in self.cells)
        return {
            "nll": ratio(weights @ self.nats, labels),
            "accuracy": ratio((hits + noes).sum(1), labels),
            "f1": mean_f1(hits, wrong, missed),
            "auroc": mean_known([asked.area(weights[:, rows]) for rows, asked in self.parts]),
        }

    def table(self) -> NDArray[np.int64]:
        """Count hits, false alarms, misses and correct noes of each label, ``[C 4]``."""
        return np.stack([x.sum(0) for x in self.cells], 1).astype(np.int64)

    def questions(self) -> Iterator[Question]:
        """Go through the labels, where known."""
        yield from (asked for _, asked in self.parts)


class TagScores(Scoring):
    """Scores of tagged sequences; the rows are sequences, as tokens of one hang together.

    Args:
        tables: Tokens of each sequence by true and predicted tag, ``[n C C]``.
        nats: Summed negative log-likelihood of each sequence, ``[n]``.
    """

    def __init__(self, tables: NDArray[np.int64], nats: Floats) -> None:
        self.n, self.tables, self.nats = len(tables), tables.astype(np.float64), nats

    def __call__(self, weights: Floats) -> dict[str, Floats]:
        """Nats per token, accuracy, mean F1 and Matthews' correlation over tokens."""
        table = np.tensordot(weights, self.tables, 1)
        hits = np.diagonal(table, axis1=1, axis2=2)
        return {
            "nll": ratio(weights @ self.nats, table.sum((1, 2))),
            "accuracy": accuracy(table),
            "f1": mean_f1(hits, table.sum(1) - hits, table.sum(2) - hits),
            "mcc": matthews(table),
        }

    def table(self) -> NDArray[np.int64]:
        """Count tokens by true and predicted tag, ``[C C]``."""
        counts: NDArray[np.int64] = self.tables.sum(0).astype(np.int64)
        return counts


class NumberScores(Scoring):
    """Scores of predicted numbers, in their own units; of several, each score is the mean.

    Args:
        truth: Numbers ``[n R]``, NaN where unknown.
        said: Predictions ``[n R]``.
        losses: Loss of each, ``[n R]``, NaN where unknown.
    """

    def __init__(self, truth: Floats, said: Floats, losses: Floats) -> None:
        self.n = len(truth)
        self.columns = []
        for c in range(truth.shape[1]):
            rows = np.flatnonzero(np.isfinite(truth[:, c]))
            ties = [np.unique(x[rows, c], return_inverse=True)[1] for x in (truth, said)]
            self.columns.append((rows, truth[rows, c], said[rows, c], ties))
        self.known = np.isfinite(losses).sum(1)
        self.losses = np.nansum(losses, axis=1)

    def __call__(self, weights: Floats) -> dict[str, Floats]:
        """Loss, RMSE, MAE, both correlations, and the part of the variance that is explained."""
        parts = [_of_numbers(weights[:, rows], *column) for rows, *column in self.columns]
        means = {name: mean_known([part[name] for part in parts]) for name in parts[0]}
        return {"loss": ratio(weights @ self.losses, weights @ self.known), **means}


def _of_numbers(
    weights: Floats, y: Floats, said: Floats, ties: list[NDArray[np.int64]]
) -> dict[str, Floats]:
    total = weights.sum(1)
    squares = weights @ (y - said) ** 2
    center = _centred(weights, y)
    ranks = [_ranks(weights, tie) for tie in ties]
    return {
        "rmse": np.sqrt(ratio(squares, total)),
        "mae": ratio(weights @ np.abs(y - said), total),
        "pearson": correlation(weights, y, said),
        "spearman": correlation(weights, *ranks),
        "r2": 1 - ratio(squares, (weights * center**2).sum(1)),
    }


def _ranks(weights: Floats, tie: NDArray[np.int64]) -> Floats:
    """Return the mean rank ``[R n]`` of values, given which are equal, in order of size."""
    sizes = _grouped(weights, tie)
    ranks = sizes.cumsum(1) - (sizes - 1) / 2
    return ranks[:, tie]


def _grouped(weights: Floats, tie: NDArray[np.int64]) -> Floats:
    """Add up ``weights [R n]`` over equal values, ``[R G]``."""
    groups = int(tie.max()) + 1 if len(tie) else 0
    return np.array([np.bincount(tie, weights=w, minlength=groups) for w in weights])


def correlation(weights: Floats, x: Floats, y: Floats) -> Floats:
    """Pearson's correlation ``[R]`` of two ``[R n]`` or ``[n]``; NaN where one is constant."""
    x, y = _centred(weights, x), _centred(weights, y)
    square = (weights * x**2).sum(1) * (weights * y**2).sum(1)
    return ratio((weights * x * y).sum(1), np.sqrt(square))


def _centred(weights: Floats, x: Floats) -> Floats:
    """Subtract the mean of each sample from ``x [R n]``; what is rounding alone becomes 0."""
    x = np.broadcast_to(x, weights.shape)
    center = x - ratio((weights * x).sum(1), weights.sum(1))[:, None]
    return np.where(np.abs(center) > 1e-12 * np.abs(x).max(initial=0), center, 0)


class Area:
    """The area under the ROC curve of one class against the rest.

    Args:
        holds: Which rows are of the class, ``[n]``.
        said: What the model says for it, ``[n]``; only the order counts.
    """

    def __init__(self, holds: NDArray[np.bool_], said: Floats) -> None:
        self.holds = holds.astype(np.float64)
        self.tie = np.unique(said, return_inverse=True)[1]

    def __call__(self, weights: Floats) -> Floats:
        """Part of the pairs of one and other that are in order ``[R]``; NaN without pairs."""
        ones = _grouped(weights * self.holds, self.tie)
        others = _grouped(weights * (1 - self.holds), self.tie)
        below = others.cumsum(1) - others / 2
        return ratio((ones * below).sum(1), ones.sum(1) * others.sum(1))


class Question(NamedTuple):
    """Whether something holds: of which class, the rows where it does, its probability, its area.

    Attributes:
        number: Of the class or label.
        holds: ``[n]``.
        said: ``[n]``, probabilities.
        area: Under the ROC curve.
    """

    number: int
    holds: NDArray[np.bool_]
    said: Floats
    area: Area


def ratio(part: Floats, whole: Floats) -> Floats:
    """Divide; NaN where there is nothing to divide by."""
    part, whole = np.broadcast_arrays(part, whole)
    share: Floats = np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
    return share


def mean_known(parts: Sequence[Floats]) -> Floats:
    """Take the mean over what is not NaN."""
    x = np.stack(parts)
    return ratio(np.nan_to_num(x).sum(0), np.isfinite(x).sum(0))


def accuracy(table: Floats) -> Floats:
    """Return the part of ``table [R C C]`` that lies on the diagonal."""
    return ratio(np.trace(table, axis1=1, axis2=2), table.sum((1, 2)))


def mean_f1(hits: Floats, wrong: Floats, missed: Floats) -> Floats:
    """Mean over classes of ``2 hits / (2 hits + wrong + missed)``, all ``[R C]``.

    Classes that neither hold nor are said anywhere do not count.
    """
    f1 = ratio(2 * hits, 2 * hits + wrong + missed)
    return mean_known([*f1.T])


def matthews(table: Floats) -> Floats:
    r"""Matthews' correlation of true and predicted classes.

    .. math:: R = \frac{\mathrm{cov}(y, \hat y)}
        {\sqrt{\mathrm{cov}(y, y) \, \mathrm{cov}(\hat y, \hat y)}}

    over one-hot vectors. It is 0, as scikit-learn has it, where labels or predictions are all the
    same class.

    Args:
        table: How many rows are of each class and said to be of each, ``[R C C]``.

    Source: Gorodkin, Comparing two K-category assignments by a K-category correlation coefficient,
    2004, eq. 8.
    """
    n, labels, said = table.sum((1, 2)), table.sum(2), table.sum(1)
    both = np.trace(table, axis1=1, axis2=2) * n - (labels * said).sum(1)
    norm = np.sqrt((n**2 - (labels**2).sum(1)) * (n**2 - (said**2).sum(1)))
    found = np.divide(both, norm, out=np.zeros_like(both), where=norm > 0)
    return np.where(n > 0, found, np.nan)


def roc(holds: NDArray[np.bool_], said: Floats) -> Floats:
    """Return the corners of a ROC curve ``[k 3]``: threshold, false and true positive rate.

    A row counts as of the class where ``said`` is at least the threshold.
    """
    values, tie = np.unique(said, return_inverse=True)
    at = [np.bincount(tie[which], minlength=len(values))[::-1] for which in (holds, ~holds)]
    true, false = ((x.cumsum() / max(x.sum(), 1)) for x in at)
    points = np.stack([values[::-1], false, true], 1)
    points = np.concatenate([[[np.inf, 0.0, 0.0]], points])
    steps = np.diff(points[:, 1:], axis=0)
    turn = steps[1:, 0] * steps[:-1, 1] != steps[1:, 1] * steps[:-1, 0]
    return points[np.concatenate([[True], turn, [True]])] if len(points) > 2 else points
