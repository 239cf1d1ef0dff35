"""Majority and frozen probe: against closed forms, scikit-learn, and from the command line."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from statezoo.lightning_modules.probe import fit_linear, majority, wilson
from statezoo.main import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
NAN = float("nan")


def task(kind, n):
    return SimpleNamespace(kind=kind, class_names=["x"] * n, labels_of=lambda b: b["labels"])


def test_the_majority_by_hand():
    labels = [torch.tensor([0, 2, 2, -100]), torch.tensor([2])]
    batches = [{"labels": x} for x in labels]
    found = majority(task("class", 3), batches).exp()
    torch.testing.assert_close(found, torch.tensor([1.5, 0.5, 3.5]) / 5.5)
    torch.testing.assert_close(majority(task("tags", 3), batches).exp(), found)
    labels = torch.tensor([[1.0, 0.0], [1.0, NAN], [0.0, 0.0]])
    found = majority(task("classes", 2), [{"labels": labels}]).sigmoid()
    torch.testing.assert_close(found, torch.tensor([2.5 / 4, 0.5 / 3]))
    found = majority(task("number", 2), [{"labels": torch.tensor([[1.0, 5.0], [2.0, NAN]])}])
    torch.testing.assert_close(found, torch.tensor([1.5, 5.0]))


def test_the_interval_of_wilson():
    """Of 8 in 10: Newcombe 1998, by the formula's quadratic, solved here another way."""
    low, high = wilson(0.8, 10)
    for p in (low, high):
        assert abs(0.8 - p) == pytest.approx(1.959964 * (p * (1 - p) / 10) ** 0.5)
    assert low < 0.8 < high


def test_a_probe_is_a_logistic_regression():
    linear_model = pytest.importorskip("sklearn.linear_model")
    torch.manual_seed(0)
    x = torch.randn(120, 5)
    y = (x[:, :3] + 0.7 * torch.randn(120, 3)).argmax(1)
    constant = torch.zeros(3)
    weight, bias = fit_linear(x, y, "class", constant)
    fits = []
    for pull in (1e-3, 1e-2, 1e-1, 1.0):  # one of these is what held-out rows chose
        theirs = linear_model.LogisticRegression(C=1 / (pull * len(y)), tol=1e-8, max_iter=500)
        theirs.fit(x.numpy(), y.numpy())
        fits.append(theirs.predict_proba(x.numpy()))
    ours = (x @ weight + bias).softmax(-1).numpy()
    assert min(np.abs(ours - fit).max() for fit in fits) < 5e-3


def test_a_probe_of_numbers_and_of_labels():
    torch.manual_seed(0)
    x = torch.randn(200, 4)
    truth = torch.tensor([[1.0], [-2.0], [0.0], [3.0]])
    y = 50 + 10 * x @ truth
    weight, bias = fit_linear(x, y, "number", y.mean(0))
    torch.testing.assert_close(weight, 10 * truth, rtol=0.01, atol=0.1)
    torch.testing.assert_close(bias, torch.tensor([50.0]), rtol=0.01, atol=0.0)
    y = torch.stack([(x[:, 0] > 0).float(), (x[:, 1] > 0).float()], 1)
    y[::7, 0] = NAN
    weight, bias = fit_linear(x, y, "classes", torch.zeros(2))
    known = ~y.isnan()
    assert ((x @ weight + bias > 0).float() == y)[known].float().mean() > 0.95


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A base, and tables of ten labelled sequences."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STATEZOO_CACHE", str(tmp_path / "cache"))
    letters = np.random.default_rng(0).choice(list(b"ACGT"), 3000).astype(np.uint8).tobytes()
    Path("genome.fa").write_bytes(b">chr1\n" + letters + b"\n")
    rng = np.random.default_rng(1)
    rows = [f"{''.join(rng.choice([*('AACCT', 'GGTTC')[i % 2]], 40))},{i % 2}" for i in range(10)]
    Path("ten.csv").write_text("\n".join(["sequence,label", *rows]))
    main(["fit", "--model", "GLA", "--model.d_model", "16", "--model.n_layers", "1", "--data",
          "DNA", "--data.path", "genome.fa", "--data.seq_len", "32", "--trainer.max_steps", "2",
          "--trainer.enable_progress_bar", "false", "--name", "base"])  # fmt: skip
    return tmp_path


def test_ten_examples_with_all_defaults(folder, capsys, caplog):
    main(["fit", "--config", "finetune/dna_classify", "--model.pretrained", "runs/base",
          "--data.path", "ten.csv", "--name", "ten"])  # fmt: skip
    run = Path("runs/ten/version_0")
    found = json.loads((run / "baselines.json").read_text())
    assert [*found] == ["majority", "frozen probe", "SequenceClassifier"]
    scores = {"nll", "accuracy", "mcc", "auroc"}
    assert all(values.keys() >= scores for values in found.values())
    assert found["majority"]["mcc"] == 0  # it says the same of everything
    told = " ".join(r.getMessage() for r in caplog.records)
    assert re.search(
        r"the validation split has \d seq.*: an accuracy of 0.80 there would mean", told
    )
    out = capsys.readouterr().out
    assert "frozen probe" in out
    assert (run / "best.ckpt").is_file()
    best = torch.load(run / "best.ckpt", weights_only=True)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["val/nll"]["value"] == pytest.approx(found["SequenceClassifier"]["nll"])
    score = best["callbacks"]["Checkpoints"]["best_score"]
    assert score == pytest.approx(found["SequenceClassifier"]["nll"], rel=1e-5)


def test_a_probe_reads_the_body_as_it_was_before(folder):
    """The features hold the label, so it is right though nothing was trained."""
    main(["fit", "--config", "finetune/dna_classify", "--model.pretrained", "runs/base",
          "--model.optim.lr", "0", "--data.path", "ten.csv", "--trainer.max_steps", "1",
          "--trainer.val_check_interval", "1", "--data.val_fraction", "0.3",
          "--trainer.enable_progress_bar", "false", "--name", "zero"])  # fmt: skip
    found = json.loads(Path("runs/zero/version_0/baselines.json").read_text())
    assert found["frozen probe"]["accuracy"] == 1.0
