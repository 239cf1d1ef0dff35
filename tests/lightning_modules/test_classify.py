"""Classes of sequences: loss, metrics, both strands, weights from elsewhere, export."""

import csv

import numpy as np
import pytest
import torch
from tests.lightning_modules.motifs import COMPLEMENT, Motifs
from torch.nn import functional as F
from torch.utils.data import DataLoader

from statezoo.lightning_modules import (
    CausalLM,
    MaskedLM,
    SequenceClassifier,
    export_checkpoint,
    load_checkpoint,
    load_network,
)
from statezoo.lightning_modules.report import EvaluationReport
from statezoo.lightning_modules.tables import WritePredictions
from statezoo.zoo import MIXERS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*You defined a `validation_step`.*"),
    pytest.mark.filterwarnings("ignore:The number of training batches.*"),
]
SGD = {"schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0, "clip_norm": 0.0}
TINY = {"vocab_size": 8, "d_model": 16, "n_layers": 1}
NAMES = ["background", "motif"]


def classifier(mixers=("gla",), names=NAMES, **settings):
    torch.manual_seed(1)
    return SequenceClassifier(list(mixers), class_names=list(names), **{**TINY, **settings})


def labelled(labels, T=9, seed=0):
    """Make a batch of sequences of unequal lengths."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 7, (len(labels), T), generator=draw)
    lengths = torch.randint(2, T + 1, (len(labels), 1), generator=draw)
    mask = (torch.arange(T) < lengths).long()
    return {"tokens": tokens * mask, "attention_mask": mask, "labels": torch.tensor(labels)}


def gradients(module, trainer, made, **settings):
    seen = {}

    def keep(*_args, **_kwargs):
        seen.update({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})

    module.clip_gradients = keep
    trainer(max_steps=1, **settings).fit(module, DataLoader(made, batch_size=None))
    return seen


@pytest.mark.parametrize("weight", [[1.0, 1.0, 1.0], [0.2, 1.0, 5.0]])
def test_the_gradient_is_that_of_the_mean_over_all_labelled_sequences(weight, trainer):
    names = ["a", "b", "c"]
    parts = [labelled([0, 1, 2, -100], seed=1), labelled([-100], seed=2), labelled([2], seed=3)]

    def module():
        return classifier(names=names, optim=SGD, class_weights=weight)

    got = gradients(module(), trainer, parts, accumulate_grad_batches=3)
    net = module().net
    losses, weights = [], []
    for part in parts:  # every sequence alone, without padding
        for row, mask, y in zip(
            part["tokens"], part["attention_mask"], part["labels"].tolist(), strict=True
        ):
            if y >= 0:
                logits = net(row[: int(mask.sum())][None]).logits
                losses.append(weight[y] * -logits.log_softmax(-1)[0, y])
                weights.append(weight[y])
    (torch.stack(losses).sum() / sum(weights)).backward()
    want = {f"net.{n}": p.grad for n, p in net.named_parameters()}
    assert got.keys() == want.keys()
    for name in want:  # float32 sums in another order
        torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=1e-5, msg=name)


def test_metrics_are_exact_over_uneven_batches(trainer):
    metrics = pytest.importorskip("sklearn.metrics")
    module = classifier(names=["a", "b", "c"])
    torch.nn.init.normal_(module.net.score.weight, std=10.0)  # opinions
    parts = [labelled([0, 1, 2, -100, 1, 0, 2], seed=1), labelled([2], seed=2), labelled([-100])]
    (found,) = trainer().validate(module, DataLoader(parts, batch_size=None), verbose=False)
    said, labels = [], []
    with torch.no_grad():
        for part in parts:
            keep = part["labels"] >= 0
            said.append(module.eval().log_probabilities(part)[keep])
            labels.append(part["labels"][keep])
    said, labels = torch.cat(said), torch.cat(labels)
    best, y = said.argmax(-1).numpy(), labels.numpy()
    want = {
        "val/nll": float(F.nll_loss(said, labels)),
        "val/accuracy": metrics.accuracy_score(y, best),
        "val/mcc": metrics.matthews_corrcoef(y, best),
        "val/auroc": metrics.roc_auc_score(y, said.exp().numpy(), multi_class="ovr"),
    }
    assert found == pytest.approx(want, rel=1e-5)
    assert len(set(best)) > 1
    counts = module.scored_rows().table()
    np.testing.assert_array_equal(counts, metrics.confusion_matrix(y, best, labels=[0, 1, 2]))


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_every_mixer_classifies_and_says_hidden_tokens(name):
    batch = labelled([0, 1, 1])
    for both in (False, True):
        settings = {"d_model": 64, "vocab_size": 8, "n_layers": 1, "bidirectional": both}
        for module in (
            SequenceClassifier([name], class_names=NAMES, **settings),
            MaskedLM([name], **settings),
        ):
            loss = module.training_loss({**batch, "targets": batch["tokens"]})
            loss["nats"].backward()
            assert int(loss["count"]) == (3 if isinstance(module, SequenceClassifier) else 27)
            assert torch.isfinite(loss["nats"])
            assert all(p.grad is not None for p in module.net.model.layers[0].mixer.parameters())


def test_average_is_the_mean_over_strands_of_each_sequence():
    module = classifier(reverse_complement="average", complement=COMPLEMENT).eval()
    torch.nn.init.normal_(module.net.score.weight, std=10.0)
    batch = labelled([0, 1, 0, 1])
    with torch.no_grad():
        found = module.log_probabilities(batch)
        for row, mask, got in zip(batch["tokens"], batch["attention_mask"], found, strict=True):
            one = row[: int(mask.sum())]
            other = torch.tensor([COMPLEMENT[i] for i in reversed(one.tolist())])
            each = [module.net(x[None]).logits[0].log_softmax(-1) for x in (one, other)]
            want = (sum(each) / 2).log_softmax(-1)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(*each, atol=1e-3)


def test_equivariant_classifiers_say_the_same_of_both_strands():
    module = classifier(reverse_complement="equivariant", complement=COMPLEMENT).eval()
    x = torch.randint(3, 7, (2, 11))
    other = torch.tensor(COMPLEMENT)[x.flip(1)]
    torch.testing.assert_close(module.net(x).logits, module.net(other).logits, rtol=0, atol=1e-5)
    assert module.hparams["complement"] == COMPLEMENT


def test_augmentation_is_switched_on_in_the_data(trainer):
    data, fitting = Motifs(), trainer(max_steps=1)
    with pytest.raises(AssertionError, match="augmentation is switched on"):
        fitting.fit(classifier(reverse_complement="augment"), data)
    trainer().validate(classifier(reverse_complement="augment"), plain := Motifs(), verbose=False)
    assert not plain.rc_augment
    with pytest.raises(ValueError, match=r"data that can read the other strand .*`rc_augment`"):
        trainer(max_steps=1).fit(
            classifier(reverse_complement="augment"), DataLoader([labelled([0])], batch_size=None)
        )


def test_balanced_weights_are_inverse_frequencies(trainer):
    module, data = classifier(class_weights="balanced"), Motifs(n=12)
    trainer(max_steps=1).fit(module, data)
    assert data.class_counts == [8, 4]
    assert module.class_weight.tolist() == pytest.approx([12 / 8 / 2, 12 / 4 / 2])
    never = module._balanced([9, 0])
    assert never.tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"counts the training sequences of each of 2 classes"):
        module._balanced(None)
    assert "class_weight" not in module.state_dict()


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"names": []}, r"needs data with classes \(a list `class_names`"),
        ({"names": ["a"]}, "at least two different classes"),
        ({"names": ["a", "a"]}, "at least two different classes"),
        ({"class_weights": "equal"}, "must be balanced or null, got 'equal', or a number for"),
        ({"class_weights": [1.0]}, r"a number of at least 0 for each of background, motif, .*1.0"),
        ({"class_weights": [1.0, -1.0]}, "a number of at least 0 for each of background, motif"),
        ({"reverse_complement": "average"}, "says the complement of each symbol"),
        ({"reverse_complement": "equivariant"}, "says the complement of each symbol"),
        ({"tie_directions": False}, "needs bidirectional: true"),
        ({"pooling": "max"}, "pooling"),
    ],
)
def test_mistakes_are_told(settings, answer):
    with pytest.raises((ValueError, TypeError), match=answer):
        classifier(**settings)


def test_batches_and_data_that_do_not_fit_are_told(trainer):
    tokens = {"tokens": torch.tensor([[3, 4]])}
    with pytest.raises(ValueError, match=r"needs batches with labels .* these have tokens"):
        trainer(max_steps=1).fit(classifier(), DataLoader([tokens], batch_size=None))
    with pytest.raises(ValueError, match=r"tells \['a', 'b'\] apart, the data has"):
        trainer(max_steps=1).fit(classifier(names=["a", "b"]), Motifs())


# ------------------------------------------------------------------ weights from elsewhere


def trained(module, data, trainer, tmp_path):
    fitted = trainer(max_steps=2)
    fitted.fit(module, data)
    fitted.save_checkpoint(tmp_path / "first.ckpt")
    return str(tmp_path / "first.ckpt")


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_a_language_model_lends_its_body(kind, trainer, tmp_path, caplog):
    task = CausalLM if kind == "causal" else MaskedLM
    first = task(["gla", "attention"], vocab_size=8, d_model=16, n_layers=2)
    path = trained(first, Motifs(kind), trainer, tmp_path)
    module = SequenceClassifier(
        vocab_size=8, class_names=["a", "b", "c"], pooling="last", pretrained=path
    )
    kept = module.net.model.state_dict()
    for name, value in first.net.model.state_dict().items():
        torch.testing.assert_close(kept[name], value, rtol=0, atol=0)
    assert (
        "kept the embedding and 2 layers (gla, attention); new: the head for 3 classes (a, b, c)"
        in caplog.text
    )
    assert module.net.config.bidirectional == (kind == "masked")
    assert module.net.config.pooling == "last"
    assert module.hparams["pretrained"] is None
    trainer(max_steps=1).fit(module, Motifs(names=["a", "b", "c"]))
    with pytest.raises(ValueError, match="another tokenizer than the data has"):
        trainer(max_steps=1).fit(
            SequenceClassifier(vocab_size=8, class_names=NAMES, pretrained=path),
            Motifs(alphabet="-^?TGCA+"),
        )
    with pytest.raises(ValueError, match="has vocab_size 8, the data 9: give the data the token"):
        SequenceClassifier(vocab_size=9, class_names=NAMES, pretrained=path)
    with pytest.raises(ValueError, match="its mixers are gla, attention, asked for were mamba2"):
        SequenceClassifier(["mamba2"], vocab_size=8, class_names=NAMES, pretrained=path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_causal_body_may_read_both_ways(tied, trainer, tmp_path, caplog):
    path = trained(CausalLM(["gla"], **TINY), Motifs("causal"), trainer, tmp_path)
    module = SequenceClassifier(
        **TINY, class_names=NAMES, bidirectional=True, tie_directions=tied, pretrained=path
    )
    assert module.net.config.bidirectional
    how = "with the same weights" if tied else "from copies of the same weights"
    assert f"1 layer (gla), now reading both ways {how}; new: the head" in caplog.text
    block = module.net.model.layers[0]
    if not tied:
        for one, other in zip(block.mixer.parameters(), block.mixer_back.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    both = str(tmp_path / "both.ckpt")
    fitted = trainer(max_steps=1)
    fitted.fit(module, Motifs())
    fitted.save_checkpoint(both)
    with pytest.raises(ValueError, match="has bidirectional True, asked for was False"):
        classifier(bidirectional=False, pretrained=both)


def test_a_classifier_lends_its_head_to_the_same_classes_alone(trainer, tmp_path, caplog):
    path = trained(classifier(pooling="last"), Motifs(), trainer, tmp_path)
    first = load_network(path)
    again = SequenceClassifier(vocab_size=8, pretrained=path)
    assert again.class_names == NAMES
    assert again.net.config.pooling == "last"
    assert caplog.text.endswith("(gla) and the head\n")
    torch.testing.assert_close(again.net.score.weight, first.score.weight, rtol=0, atol=0)
    other = SequenceClassifier(vocab_size=8, class_names=["x", "y"], pretrained=path)
    assert "new: the head for 2 classes (x, y)" in caplog.text
    assert not torch.allclose(other.net.score.weight, first.score.weight)


# ------------------------------------------------------------------------------ files


def test_checkpoints_and_exported_folders_come_back(trainer, tmp_path):
    from transformers import AutoModelForSequenceClassification

    module = classifier(reverse_complement="average", complement=COMPLEMENT)
    path = trained(module, Motifs(), trainer, tmp_path)
    batch = labelled([0, 1])
    want = module.eval().logits(batch)[0]
    again = load_checkpoint(path).eval()
    assert type(again) is SequenceClassifier
    assert dict(again.hparams) == dict(module.hparams)
    torch.testing.assert_close(again.log_probabilities(batch), module.log_probabilities(batch))
    export_checkpoint(path, tmp_path / "out")
    net = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    logits = net(batch["tokens"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(logits, want)
    assert net.config.id2label == {0: "background", 1: "motif"}
    assert type(load_network(tmp_path / "out")) is type(net)
    assert SequenceClassifier(vocab_size=8, pretrained=str(tmp_path / "out")).class_names == NAMES


def test_tables_of_predictions_and_confusions(trainer, tmp_path):
    module, table = classifier(), WritePredictions(str(tmp_path / "p" / "out.csv"))
    trainer(max_epochs=1, callbacks=[EvaluationReport()]).fit(module, Motifs(n=8))
    data = Motifs(batch_size=7)
    found = torch.cat(
        [p["probabilities"] for p in trainer(callbacks=[table]).predict(module, data)]
    )
    with (tmp_path / "p" / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "label", "predicted", "p_background", "p_motif"]
    assert [row["id"] for row in rows] == [f"s{i}" for i in range(31)]
    assert [row["label"] for row in rows] == [NAMES[i % 3 == 0] for i in range(31)]
    assert [row["predicted"] for row in rows] == [NAMES[i] for i in found.argmax(-1).tolist()]
    given = [[float(row["p_background"]), float(row["p_motif"])] for row in rows]
    torch.testing.assert_close(torch.tensor(given), found, rtol=1e-4, atol=1e-6)
    with (tmp_path / "confusion.csv").open(newline="") as file:
        (head, *body) = csv.reader(file)
    assert head == ["label", "predicted background", "predicted motif"]
    assert [row[0] for row in body] == NAMES
    assert [sum(map(int, row[1:])) for row in body] == [20, 11]
    assert (tmp_path / "confusion.png").read_bytes()[1:4] == b"PNG"


def test_predictions_without_labels_and_ids_are_numbered(trainer, tmp_path):
    table = WritePredictions(str(tmp_path / "out.csv"))
    parts = [{k: v for k, v in labelled([0] * n).items() if k != "labels"} for n in (3, 1, 2)]
    trainer(callbacks=[table]).predict(classifier(), DataLoader(parts, batch_size=None))
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "predicted", "p_background", "p_motif"]
    assert [row["id"] for row in rows] == list("012345")
    assert table.path == tmp_path / "out.csv"


def test_rows_are_on_disk_before_the_next_batch(trainer, tmp_path):
    table, seen = WritePredictions(str(tmp_path / "out.csv")), []
    module = classifier()
    module.on_predict_batch_start = lambda *_: seen.append(
        len((tmp_path / "out.csv").read_text().splitlines()) if table.path else 0
    )
    parts = [labelled([0] * n) for n in (3, 1, 2)]
    trainer(callbacks=[table]).predict(module, DataLoader(parts, batch_size=None))
    assert seen == [0, 4, 5]


@pytest.mark.slow
def test_it_learns_a_motif(trainer):
    module = classifier(d_model=32, n_layers=2, bidirectional=True, optim={"lr": 3e-3})
    fitted = trainer(max_steps=600)
    fitted.fit(module, Motifs(n=2000, batch_size=32))
    (found,) = fitted.validate(module, Motifs(), verbose=False)
    assert found["val/accuracy"] > 0.95
