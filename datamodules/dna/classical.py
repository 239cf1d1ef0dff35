"""Classical classifiers of DNA: what a network must beat before it has learned anything new."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from statezoo.datamodules.dna.sequence import to_codes

__all__ = ["Scores", "classical_baselines", "kmer_presence", "one_hot", "require_sklearn", "score"]

Split = tuple[list[bytes], NDArray[np.int64]]

K = 6


class Scores(NamedTuple):
    """How well a method does.

    Attributes:
        accuracy: Part of the rows whose class is right.
        mcc: Matthews' correlation coefficient, of several classes Gorodkin's.
        auc: Area under the ROC curve, of several classes the mean of each against the rest; NaN
            where a class does not occur.
    """

    accuracy: float
    mcc: float
    auc: float


def require_sklearn() -> None:
    """Raise ValueError, with the command that helps, where scikit-learn is absent."""
    if find_spec("sklearn") is None:
        raise ValueError('The classical baselines need scikit-learn: pip install "statezoo[dna]".')


def one_hot(sequences: list[bytes]) -> NDArray[np.uint8]:
    """``[n 4 T]``, flat: which base is at each place of sequences of one length; N is none."""
    codes = np.stack([to_codes(sequence) for sequence in sequences])
    columns: NDArray[np.uint8] = (codes[:, :, None] == np.arange(4)).astype(np.uint8)
    return columns.reshape(len(codes), -1)


def kmer_presence(sequences: list[bytes], k: int = K) -> Any:
    """``[n 4**k]`` sparse: whether each word of ``k`` bases occurs; words with N do not count."""
    from scipy.sparse import csr_matrix  # type: ignore[import-untyped]

    columns = []
    for sequence in sequences:
        codes = to_codes(sequence).astype(np.int64)
        size = max(len(codes) - k + 1, 0)
        word, real = np.zeros(size, dtype=np.int64), np.ones(size, dtype=np.bool_)
        for i in range(k):
            word = 4 * word + codes[i : i + size]
            real &= codes[i : i + size] < 4
        columns.append(np.unique(word[real]))
    bounds = np.cumsum([0, *map(len, columns)])
    values = np.ones(bounds[-1], dtype=np.float32)
    shape = (len(sequences), 4**k)
    return csr_matrix((values, np.concatenate(columns), bounds), shape=shape)


def score(labels: NDArray[np.int64], probabilities: NDArray[np.float64]) -> Scores:
    """Scores of ``[n C]`` probabilities against ``[n]`` classes."""
    from sklearn.metrics import matthews_corrcoef, roc_auc_score  # type: ignore[import-untyped]

    guesses = probabilities.argmax(axis=1)
    n_classes = probabilities.shape[1]
    places = [roc_auc_score(labels == c, probabilities[:, c]) for c in range(n_classes)
              if 0 < (labels == c).sum() < len(labels)]  # fmt: skip
    return Scores(
        float((guesses == labels).mean()),
        float(matthews_corrcoef(labels, guesses)),
        float(np.mean(places)) if len(places) == n_classes else float("nan"),
    )


def classical_baselines(train: Split, test: Split, *, limit: int = 20_000) -> dict[str, Scores]:
    """Scores on ``test`` of four methods trained on ``train``, from the weakest on.

    ``majority`` says the most frequent class, ``length`` is a decision tree of depth 8 that sees
    the length alone, ``one_hot`` a logistic regression on the base at each place (only where all
    lengths are equal), ``kmers`` one on which words of 6 bases occur.

    Args:
        train: Letters and ``[n]`` classes, numbered from 0.
        test: The same.
        limit: Training rows that the regressions see, drawn evenly.

    Raises:
        ValueError: If scikit-learn is not installed, or a split is empty.
    """
    require_sklearn()
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
    from sklearn.tree import DecisionTreeClassifier  # type: ignore[import-untyped]

    (sequences, labels), (held_out, wanted) = train, test
    if not sequences or not held_out:
        raise ValueError(
            f"The classical baselines need rows to train and to test on, got {len(sequences)} and "
            f"{len(held_out)}."
        )
    n_classes = 1 + int(max(labels.max(), wanted.max()))
    found: dict[str, Scores] = {}

    def add(name: str, model: Any, features: Callable[[list[bytes]], Any], few: bool) -> None:
        step = -(-len(sequences) // limit) if few else 1
        model.fit(features(sequences[::step]), labels[::step])
        p = np.zeros((len(held_out), n_classes))
        p[:, model.classes_] = model.predict_proba(features(held_out))
        found[name] = score(wanted, p)

    p = np.tile(np.bincount(labels, minlength=n_classes) / len(labels), (len(held_out), 1))
    found["majority"] = score(wanted, p)
    tree = DecisionTreeClassifier(max_depth=8, random_state=0)
    add("length", tree, lambda x: np.array([[len(s)] for s in x]), few=False)
    if len({len(s) for s in (*sequences, *held_out)}) == 1:
        add("one_hot", LogisticRegression(C=0.1, max_iter=500), one_hot, few=True)
    add("kmers", LogisticRegression(C=0.02, max_iter=500), kmer_presence, few=True)
    return found
