"""Scores under weights: values against scikit-learn, intervals against a loop over resamples."""

import numpy as np
import pytest

from statezoo.lightning_modules.scores import (
    ClassScores,
    LabelScores,
    NumberScores,
    TagScores,
    intervals,
    roc,
)

metrics = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")
RNG = np.random.default_rng(3)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def of_classes(y, said, C):
    best, p = said.argmax(1), np.exp(said)
    ovr = p if C > 2 else p[:, 1]
    return {
        "nll": metrics.log_loss(y, p, labels=range(C)),
        "accuracy": metrics.accuracy_score(y, best),
        "mcc": metrics.matthews_corrcoef(y, best),
        "auroc": metrics.roc_auc_score(y, ovr, multi_class="ovr", labels=range(C)),
    }


def classes(C, n=60):
    y = np.arange(n) % C
    said = RNG.normal(size=(n, C)).round(1) + 1.5 * np.eye(C)[y]  # with ties
    return y, log_softmax(said)


def numbers(y, said):
    return {
        "loss": ((y - said) ** 2).mean(),
        "rmse": metrics.mean_squared_error(y, said) ** 0.5,
        "mae": metrics.mean_absolute_error(y, said),
        "pearson": stats.pearsonr(y, said).statistic,
        "spearman": stats.spearmanr(y, said).statistic,
        "r2": metrics.r2_score(y, said),
    }


@pytest.mark.parametrize("C", [2, 3])
def test_classes_are_scored_as_by_scikit_learn(C):
    y, said = classes(C)
    assert ClassScores(y, said).values() == pytest.approx(of_classes(y, said, C), rel=1e-9)


def test_numbers_are_scored_as_by_scikit_learn():
    y = RNG.normal(size=(50, 2)).round(1) + 1e4
    said = y + RNG.normal(size=(50, 2)).round(1)
    y[3, 0] = y[7, 1] = np.nan
    got = NumberScores(y, said, (y - said) ** 2).values()
    each = []
    for c in range(2):
        known = np.isfinite(y[:, c])
        each.append(numbers(y[known, c], said[known, c]))
    for name in each[0]:
        want = np.mean([part[name] for part in each])
        assert got[name] == pytest.approx(want, rel=1e-7), name


def test_labels_are_scored_as_by_scikit_learn():
    y = (RNG.random((60, 3)) < 0.4).astype(float)
    odds = RNG.normal(size=(60, 3)) + 2 * y - 1
    y[::5, 1] = np.nan
    got = LabelScores(y, odds).values()
    f1, area, nats, right = [], [], [], []
    for c in range(3):
        known = np.isfinite(y[:, c])
        truth, x = y[known, c], odds[known, c]
        f1.append(metrics.f1_score(truth, x > 0))
        area.append(metrics.roc_auc_score(truth, x))
        nats += [
            np.log1p(np.exp(-v)) if t else np.log1p(np.exp(v))
            for t, v in zip(truth, x, strict=True)
        ]
        right += [*((x > 0) == truth)]
    want = {"nll": np.mean(nats), "accuracy": np.mean(right), "f1": np.mean(f1)}
    assert got == pytest.approx({**want, "auroc": np.mean(area)}, rel=1e-9)
    table = LabelScores(y, odds).table()
    assert table.sum(1).tolist() == [60, 48, 60]
    hits = [int((odds[y[:, c] == 1, c] > 0).sum()) for c in range(3)]
    assert table[:, 0].tolist() == hits


def test_tags_are_scored_as_by_scikit_learn():
    rows = [(RNG.integers(0, 3, n), RNG.integers(0, 3, n)) for n in (5, 1, 9)]
    tables = np.array([metrics.confusion_matrix(*row, labels=[0, 1, 2]) for row in rows])
    got = TagScores(tables, np.array([1.0, 2.0, 3.0])).values()
    y, said = (np.concatenate(x) for x in zip(*rows, strict=True))
    assert got == pytest.approx(
        {
            "nll": 6 / 15,
            "accuracy": metrics.accuracy_score(y, said),
            "f1": metrics.f1_score(y, said, average="macro"),
            "mcc": metrics.matthews_corrcoef(y, said),
        }
    )


def brute_force(one, n, resamples, seed):
    rng, found = np.random.default_rng(seed), []
    for _ in range(resamples):
        found.append(one(rng.integers(n, size=n)))
    names = found[0].keys()
    return {k: np.percentile([x[k] for x in found], [2.5, 97.5]) for k in names}


def test_intervals_of_classes_are_those_of_a_loop():
    y, said = classes(2)
    got = intervals(ClassScores(y, said), resamples=60, seed=4)
    want = brute_force(lambda at: of_classes(y[at], said[at], 2), len(y), 60, 4)
    for name, (value, low, high, n) in got.items():
        np.testing.assert_allclose([low, high], want[name], rtol=1e-8, err_msg=name)
        assert low <= value <= high
        assert n == 60
    assert got == intervals(ClassScores(y, said), resamples=60, seed=4)
    assert got != intervals(ClassScores(y, said), resamples=60, seed=5)


def test_intervals_of_numbers_are_those_of_a_loop(monkeypatch):
    monkeypatch.setattr("statezoo.lightning_modules.scores.CELLS", 400)  # ten parts
    y = RNG.normal(size=40).round(1)
    said = y + RNG.normal(size=40).round(1)
    scoring = NumberScores(y[:, None], said[:, None], ((y - said) ** 2)[:, None])
    got = intervals(scoring, resamples=60)
    want = brute_force(lambda at: numbers(y[at], said[at]), 40, 60, 0)
    for name, (_, low, high, _) in got.items():
        np.testing.assert_allclose([low, high], want[name], rtol=1e-7, err_msg=name)


def test_what_is_undefined_is_nan():
    got = ClassScores(np.array([1, 1]), np.log([[0.2, 0.8], [0.6, 0.4]])).values()
    assert np.isnan(got["auroc"])
    assert (got["accuracy"], got["mcc"]) == (0.5, 0.0)
    one = NumberScores(np.array([[1.3]]), np.array([[1.0]]), np.array([[0.09]])).values()
    assert np.isnan([one["pearson"], one["spearman"], one["r2"]]).all()
    assert one["mae"] == pytest.approx(0.3)
    none = ClassScores(np.zeros(0, dtype=np.int64), np.zeros((0, 2)))
    assert all(np.isnan(x.value) and np.isnan(x.low) for x in intervals(none).values())
    odd = intervals(ClassScores(np.array([0, 1]), np.log([[0.9, 0.1], [0.1, 0.9]])), 50)
    assert odd["auroc"] == (1.0, 1.0, 1.0, 2), "samples of one class alone have no area"


def test_curves_have_the_corners_of_scikit_learn():
    y, said = classes(2)
    points = roc(y == 1, said[:, 1])
    false, true, at = metrics.roc_curve(y, said[:, 1], drop_intermediate=False)
    all_points = {tuple(np.round(x, 9)) for x in zip(at, false, true, strict=True)}
    assert {tuple(np.round(x, 9)) for x in points} <= all_points
    assert len(points) < len(all_points)
    assert np.trapezoid(points[:, 2], points[:, 1]) == pytest.approx(
        metrics.roc_auc_score(y, said[:, 1])
    )
