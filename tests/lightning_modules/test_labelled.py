"""Tasks with labels: losses, both directions, scales, files, reports, and answers to mistakes."""

import csv
import json
import math

import pytest
import torch
from tests.lightning_modules.labels import NAMES, Labels
from tests.lightning_modules.motifs import COMPLEMENT
from torch.nn import functional as F

import statezoo
from statezoo.lightning_modules import (
    MultiLabelClassifier,
    Regressor,
    SequenceClassifier,
    TokenClassifier,
    export_checkpoint,
    load_checkpoint,
)
from statezoo.lightning_modules.report import EvaluationReport
from statezoo.lightning_modules.tables import WritePredictions

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*You defined a `validation_step`.*"),
    pytest.mark.filterwarnings("ignore:The number of training batches.*"),
]
TASKS = {
    "class": SequenceClassifier,
    "classes": MultiLabelClassifier,
    "number": Regressor,
    "tags": TokenClassifier,
}
SGD = {"schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0, "clip_norm": 0.0}


def make(kind, mixers=("gla",), **settings):
    torch.manual_seed(1)
    shape = {"vocab_size": 8, "d_model": 16, "n_layers": 1, "class_names": NAMES[kind]}
    module = TASKS[kind](list(mixers), **{**shape, **settings})
    torch.nn.init.normal_(module.net.score.weight, std=1.0)
    return module


def loss_by_hand(module, batch, weights=(1.0, 1.0)):
    """Read every sequence alone, without padding, and every label alone."""
    total, count = 0.0, 0.0
    for row, mask, labels in zip(
        batch["tokens"], batch["attention_mask"], batch["labels"], strict=True
    ):
        logits = module.net(row[: int(mask.sum())][None]).logits[0]
        if module.kind == "class":
            pairs = [(logits, int(labels))]
        elif module.kind == "tags":
            pairs = [*zip(logits, labels.tolist(), strict=False)]
        else:
            pairs = [*zip(logits, labels.tolist(), range(len(labels)), strict=True)]
        for said, y, *which in pairs:
            if y == -100 or math.isnan(y):
                continue
            if module.kind in ("class", "tags"):
                w, nats = weights[y], -said.log_softmax(-1)[y]
            elif module.kind == "classes":
                w = weights[which[0]] if y else 1.0
                nats = -(said if y else -said).sigmoid().log()
            else:
                z = (said - y) / module.net.config.label_scale[which[0]][1]
                huber = z.abs() - 0.5 if z.abs() > 1 else z**2 / 2
                w, nats = 1.0, z**2 if module.loss == "mse" else huber
            total, count = total + w * nats, count + w
    return total, count


CASES = [(kind, {}) for kind in TASKS]
CASES += [(kind, {"class_weights": [0.5, 3.0]}) for kind in ("class", "classes", "tags")]
CASES += [("number", {"loss": "huber"})]


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_losses_and_gradients_are_those_of_a_loop(kind, settings):
    module = make(kind, bidirectional=True, **settings)
    if kind == "number":
        module.net.config.label_scale = [[1010.0, 4.0]]
    batch = Labels(kind).batches(16, 0)[0]
    total, count = loss_by_hand(module, batch, settings.get("class_weights", (1.0, 1.0)))
    total.backward()
    want = {name: p.grad.clone() for name, p in module.net.named_parameters()}
    module.zero_grad()
    loss = module.training_loss(batch)
    loss["nats"].backward()
    assert float(loss["count"]) == pytest.approx(float(count))
    torch.testing.assert_close(loss["nats"], total, rtol=1e-4, atol=1e-4)
    for name, p in module.net.named_parameters():
        torch.testing.assert_close(p.grad, want[name], rtol=2e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("kind", TASKS)
def test_packed_sequences_have_the_rows_of_padded_ones(kind):
    module, batch = make(kind, bidirectional=True).eval(), Labels(kind).batches(16, 0)[0]
    mask = batch["attention_mask"].bool()
    packed = {
        "tokens": batch["tokens"][mask][None],
        "labels": batch["labels"][mask][None] if kind == "tags" else batch["labels"],
        "cu_seqlens": F.pad(mask.sum(1).cumsum(0), (1, 0)).int(),
    }
    for one, other in zip(module.row(batch), module.row(packed), strict=True):
        assert len(one) < 16 or kind == "tags"
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("treatment", ["average", "equivariant"])
def test_tags_of_the_other_strand_are_those_of_this_one_reversed(treatment):
    module = make("tags", reverse_complement=treatment, complement=COMPLEMENT).eval()
    x = Labels("tags", lengths=False).batches(4, 0)[0]["tokens"]
    one = module.predict_step({"tokens": x}, 0)["probabilities"]
    other = module.predict_step({"tokens": torch.tensor(COMPLEMENT)[x.flip(1)]}, 0)
    torch.testing.assert_close(other["probabilities"].flip(1), one, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(one, one.flip(1), atol=1e-3)


def fitted(kind, trainer, steps=150, **settings):
    module = make(kind, optim={**SGD, "lr": 2e-2, "schedule": "linear"}, **settings)
    torch.nn.init.zeros_(module.net.score.weight)
    made = trainer(max_steps=steps)
    made.fit(module, Labels(kind))
    (found,) = made.validate(module, Labels(kind), verbose=False)
    return module, found, made


def test_tags_are_learnt_from_the_future(trainer):
    settings = {"mixers": ["gated_deltanet"]}
    _, found, _ = fitted("tags", trainer, 100, **settings)
    _, blind, _ = fitted("tags", trainer, 60, bidirectional=False, **settings)
    assert blind["val/mcc"] < 0.3 < 0.7 < found["val/mcc"]


def test_numbers_are_learnt_and_said_in_their_units_everywhere(trainer, tmp_path):
    from transformers import AutoModelForSequenceClassification

    module, found, made = fitted("number", trainer)
    assert found["val/r2"] > 0.9
    assert found["val/rmse"] < 2.5
    labels = torch.cat([b["labels"] for b in Labels("number").train_dataloader()])
    ((mean, std),) = module.net.config.label_scale
    assert mean == pytest.approx(float(labels.nanmean()), rel=1e-6)
    known = labels[~labels.isnan()].double()
    assert std == pytest.approx(float(known.std(correction=0)), rel=1e-4)
    made.save_checkpoint(path := tmp_path / "a.ckpt")
    batch = Labels("number").val_dataloader()[0]
    want = module.eval().predict_step(batch, 0)["predictions"].detach()
    assert 1000 < float(want.mean()) < 1030
    again = load_checkpoint(path).eval()
    torch.testing.assert_close(again.predict_step(batch, 0)["predictions"], want)
    assert dict(again.hparams) == dict(module.hparams)
    export_checkpoint(path, tmp_path / "out")
    for net in (
        statezoo.load(tmp_path / "out"),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out"),
    ):
        got = net.eval()(batch["tokens"], attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(got, want)
    more = Regressor(vocab_size=8, class_names=["g"], pretrained=str(tmp_path / "out")).eval()
    torch.testing.assert_close(more.predict_step(batch, 0)["predictions"], want)
    other = Regressor(vocab_size=8, class_names=["h"], pretrained=str(tmp_path / "out"))
    assert other.net.config.label_scale is None, "the scale of a head that is gone"


def test_exports_of_tags_are_read_by_transformers(trainer, tmp_path):
    from transformers import AutoModelForTokenClassification

    module, made = make("tags"), trainer(max_steps=1)
    made.fit(module, Labels("tags"))
    made.save_checkpoint(path := tmp_path / "a.ckpt")
    export_checkpoint(path, tmp_path / "out")
    batch = Labels("tags").val_dataloader()[0]
    net = AutoModelForTokenClassification.from_pretrained(tmp_path / "out").eval()
    got = net(batch["tokens"], attention_mask=batch["attention_mask"]).logits.softmax(-1)
    want = module.eval().predict_step(batch, 0)["probabilities"]
    torch.testing.assert_close(got, want)
    assert net.config.id2label == {0: "no", 1: "yes"}
    first = SequenceClassifier(vocab_size=8, class_names=["no", "yes"], pretrained=str(path))
    assert not torch.equal(first.net.score.weight, module.net.score.weight), "head of another kind"


@pytest.mark.parametrize("kind", ["class", "classes", "tags"])
def test_class_weights_change_what_is_learnt(kind, trainer):
    said = []
    for weights in ([1.0, 0.05], [0.05, 1.0]):
        if kind == "classes":
            weights = [weights[1]] * 2
        module, _, made = fitted(kind, trainer, 8, class_weights=weights)
        p = torch.cat(
            [x["probabilities"].flatten(0, -2) for x in made.predict(module, Labels(kind))]
        )
        said.append(float(p.mean() if kind == "classes" else p[:, 1].mean()))
    assert said[1] > said[0] + (0.1 if kind == "classes" else 0.2)


def test_balanced_labels_count_those_that_lack_for_each_that_has(trainer):
    module, data = make("classes", class_weights="balanced"), Labels("classes")
    trainer(max_steps=1).fit(module, data)
    labels = torch.cat([batch["labels"] for batch in data.train_dataloader()])
    ones, zeros = (labels == 1).sum(0), (labels == 0).sum(0)
    torch.testing.assert_close(module.class_weight, zeros / ones)


# ------------------------------------------------------------------------------- files

FILES = {
    "class": {"confusion", "roc"},
    "classes": {"confusion", "roc"},
    "number": {"scatter"},
    "tags": {"confusion"},
}


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("kind", TASKS)
def test_a_fit_and_a_test_report_scores_with_intervals(kind, trainer, tmp_path):
    made = trainer(max_epochs=1, callbacks=[EvaluationReport(resamples=50)])
    made.fit(module := make(kind), Labels(kind))
    files = {f"{name}.{end}" for name in FILES[kind] for end in ("csv", "png")}
    assert {f.name for f in tmp_path.iterdir() if f.is_file()} == {"metrics.json", *files}
    found = json.loads((tmp_path / "metrics.json").read_text())
    logged = {k: float(v) for k, v in made.callback_metrics.items() if k.startswith("val/")}
    assert {k: v["value"] for k, v in found.items()} == pytest.approx(logged, rel=1e-6)
    for name, x in found.items():
        assert x["low"] <= x["value"] <= x["high"] or name == "val/spearman"
        assert x["n"] == 40 - sum(len(range(1, size, 7)) for size in (16, 16, 8))
    if kind == "number":
        assert len(rows_of(tmp_path / "scatter.csv")) == x["n"]
    elif kind != "classes":
        table = rows_of(tmp_path / "confusion.csv")
        count = sum(int(v) for row in table for k, v in row.items() if k != "label")
        assert count == x["n"] if kind == "class" else count > 5 * x["n"]
    made.test(module, Labels(kind), verbose=False)
    assert {k[:5] for k in json.loads((tmp_path / "metrics.json").read_text())} == {"test/"}


def test_tables_of_predictions(trainer, tmp_path):
    for kind in ("classes", "number", "tags"):
        made = trainer(callbacks=[WritePredictions(str(tmp_path / kind))])
        made.predict(make(kind), Labels(kind))
    rows = rows_of(tmp_path / "classes")
    assert list(rows[0]) == ["id", "label", "predicted", "p_G", "p_TT"]
    for row in rows:
        likely = [name for name in NAMES["classes"] if float(row[f"p_{name}"]) > 0.5]
        assert row["predicted"] == ";".join(likely)
    rows = rows_of(tmp_path / "number")
    assert list(rows[0]) == ["id", "label_g", "predicted_g"]
    assert rows[1]["label_g"] == ""
    assert float(rows[0]["label_g"]) >= 1000
    rows = rows_of(tmp_path / "tags")
    assert list(rows[0]) == ["id", "position", "label", "predicted", "p_no", "p_yes"]
    masks = [b["attention_mask"].sum(1) for b in Labels("tags").val_dataloader()]
    places = [(str(i), str(t)) for i, n in enumerate(torch.cat(masks).tolist()) for t in range(n)]
    assert [(row["id"], row["position"]) for row in rows] == places


# ---------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("kind", "data", "answer"),
    [
        ("class", "number", r"SequenceClassifier learns classes, the labels of Labels are numbers:"
         r" the task for them is --model Regressor"),
        ("number", "tags", "are tags: the task for them is --model TokenClassifier"),
        ("tags", "classes", "are labels: the task for them is --model MultiLabelClassifier"),
        ("classes", "class", "are classes: the task for them is --model SequenceClassifier"),
    ],
)  # fmt: skip
def test_labels_of_another_kind_are_refused(kind, data, answer, trainer):
    with pytest.raises(ValueError, match=answer):
        trainer(max_steps=1).fit(make(kind), Labels(data))


@pytest.mark.parametrize(
    ("kind", "change", "answer"),
    [
        ("class", lambda y: y + 2 * (y == 1), r"labels that are classes 0 to 1, or -100 .*; got 3"),
        ("class", lambda y: y * 0, "training split has only 'few'"),
        ("class", lambda y: y.float(), r"needs labels \[B\], int64, .* these are \[16\], float32"),
        ("tags", lambda y: y * 3, "labels that are tags 0 to 1, or -100 where unknown; got"),
        ("tags", lambda y: y[:, 1:], r"a tag for each token \[16, 12\], .* these are \[16, 11\]"),
        ("classes", lambda y: y / 2, "0 where a label does not hold, 1 where it does, .* got 0.5"),
        ("classes", lambda y: y[:, :1], r"with 2 labels, these are \[16, 1\], float32"),
        ("number", lambda y: y / 0, "finite numbers, or nan where unknown; got inf"),
        ("number", lambda y: y * math.nan, "cannot learn 'g', which is known for no training"),
        ("number", lambda y: y * 0 + 3, "cannot learn 'g', which is always 3"),
    ],
)
def test_labels_that_cannot_be_are_told(kind, change, answer, trainer):
    with pytest.raises(ValueError, match=answer):
        trainer(max_steps=1).fit(make(kind), Labels(kind, change=change))


@pytest.mark.parametrize(
    ("task", "settings", "answer"),
    [
        (SequenceClassifier, {"class_names": ["y"]}, r"a number is for Regressor, one label for M"),
        (Regressor, {"class_names": None}, r"Regressor needs data with numbers \(a list `class_n"),
        (Regressor, {"loss": "l1"}, "loss must be mse or huber, got 'l1'"),
        (MultiLabelClassifier, {"class_names": ["a", "a"]}, r"needs different labels, got \['a', "),
    ],
)
def test_settings_that_cannot_be_are_told(task, settings, answer):
    with pytest.raises(ValueError, match=answer):
        task(["gla"], vocab_size=8, d_model=16, n_layers=1, **settings)
