"""The task: say the class of each sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
)

from statezoo.datamodules.batch import IGNORE, Batch
from statezoo.lightning_modules.causal_lm import MIXERS, defaults
from statezoo.lightning_modules.metrics import Matthews, PerCount
from statezoo.lightning_modules.network import build_network
from statezoo.lightning_modules.optim import Optim
from statezoo.lightning_modules.strands import (
    Treatment,
    augment,
    check_treatment,
    mean_log_probabilities,
    other_strand,
    treatment_of,
)
from statezoo.lightning_modules.task import OPTIM, Loss, Task
from statezoo.lightning_modules.tuning import ADAPTER, Adapter, Tune
from statezoo.zoo import StateZooForSequenceClassification
from statezoo.zoo.auxiliary import Auxiliary


class SequenceClassifier(Task):
    """Train a network to say the class of each sequence.

    The loss is the mean over the labelled sequences of one optimiser step, in nats: over all its
    micro-batches (``trainer.accumulate_grad_batches``) and processes, however unevenly filled.
    Validation and test log ``nll`` in nats per sequence, ``accuracy``, ``mcc`` (Matthews'
    correlation coefficient) and ``auroc`` (area under the ROC curve; of several classes the mean,
    each against the rest), each over the whole split.

    Args:
        mixers: Mixers along time, by name, ``[gla, gla, attention]``, or as mappings of a ``name``
            and settings, ``[{name: gla, n_heads: 2}, attention]``; repeated over the layers.
        vocab_size: Number of symbols; comes from the data on the command line.
        class_names: Names of the classes, in the order of their labels; come from the data on the
            command line. Default: those of ``pretrained``.
        d_model: Width of the stream of tokens.
        n_layers: Number of blocks.
        channel: Channel mixer, by name or as a mapping of a ``name`` and settings; null for none.
        bidirectional: Run every mixer forward and backward in time; null does as ``pretrained``
            does, and forward only without one.
        tie_directions: Run it with the same weights both ways.
        pooling: What of the stream says the class: its mean over the tokens, the last token's, or
            its ``profile`` along the sequence, for classes that depend on where something stands.
        class_weights: ``balanced`` weighs each sequence in the training loss by the inverse
            frequency of its class in the training split; null weighs all alike.
        reverse_complement: What to do about the other strand of DNA: nothing; ``augment`` reads
            either in training; ``average`` takes the mean of the log-probabilities of both in
            validation, test and prediction; ``equivariant`` reads both with the same weights.
        complement: The complement of each symbol; comes from the data on the command line.
        optim: Optimiser and schedule.
        pretrained: Checkpoint, Hub folder or Hub name whose weights and shape to start from: of a
            language model, causal or masked, or of a classifier. The head is new unless its
            classes are these.
        tune: What of pretrained weights is trained: all; the ``head`` alone; low-rank updates of
            all projections in mixers and channel mixers (``lora``); or mixers' initial ``state``.
        adapter: Settings of ``lora`` and ``state``.

    Raises:
        ValueError: If a setting is unknown or out of range, or differs from ``pretrained``'s.
    """

    net: StateZooForSequenceClassification
    class_weight: Tensor
    scored = "sequence"

    def __init__(
        self,
        mixers: list[str | dict[str, Any]] = MIXERS,
        *,
        vocab_size: int = 256,
        class_names: list[str] | None = None,
        d_model: int = 128,
        n_layers: int = 4,
        channel: str | dict[str, Any] | None = "swiglu",
        bidirectional: bool | None = None,
        tie_directions: bool = True,
        pooling: Literal["mean", "last", "profile"] = "mean",
        class_weights: Literal["balanced"] | None = None,
        reverse_complement: Treatment = "none",
        complement: list[int] | None = None,
        optim: Optim = OPTIM,
        pretrained: str | None = None,
        tune: Tune = "full",
        adapter: Adapter = ADAPTER,
    ) -> None:
        name = type(self).__name__
        check_treatment(name, reverse_complement, complement)
        if class_weights not in (None, "balanced"):
            raise ValueError(f"class_weights must be balanced or null, got {class_weights!r}.")
        settings = {
            "vocab_size": vocab_size,
            "d_model": d_model,
            "n_layers": n_layers,
            "mixers": mixers,
            "channel": channel,
            "bidirectional": bidirectional,
            "tie_directions": tie_directions,
            "complement": complement if reverse_complement == "equivariant" else None,
            "pooling": pooling,
            **(_labels(class_names) if class_names or pretrained is None else {}),
        }
        net = build_network(
            StateZooForSequenceClassification,
            settings,
            pretrained,
            defaults(SequenceClassifier),
            tune,
        )
        super().__init__(net, optim, pretrained, tune, adapter)
        self.class_names = [str(name) for name in dict(net.config.id2label or {}).values()]
        self.reverse_complement, self.complement = treatment_of(
            reverse_complement, complement, net.config.complement
        )
        self.class_weights = class_weights
        self.register_buffer("class_weight", torch.ones(net.num_labels), persistent=False)
        self._make_metrics(net.num_labels)
        self.save_hyperparameters(self.plain_settings())

    def _make_metrics(self, n: int) -> None:
        stages = ("val", "test")
        self.nll = nn.ModuleDict({stage: PerCount() for stage in stages})
        kinds: dict[str, Callable[[], Metric]] = {
            "accuracy": lambda: MulticlassAccuracy(n, average="micro", ignore_index=IGNORE),
            "mcc": lambda: Matthews(n, ignore_index=IGNORE),
            "auroc": lambda: MulticlassAUROC(n, ignore_index=IGNORE),
        }
        self.scores = nn.ModuleDict(
            {stage: nn.ModuleDict({k: make() for k, make in kinds.items()}) for stage in stages}
        )
        self.confusion = MulticlassConfusionMatrix(n, ignore_index=IGNORE)

    def plain_settings(self) -> dict[str, Any]:
        """Return the arguments that build this module again, as plain data."""
        config = self.net.config
        return {
            **super().plain_settings(),
            "class_names": self.class_names,
            "bidirectional": config.bidirectional,
            "tie_directions": config.tie_directions,
            "pooling": config.pooling,
            "class_weights": self.class_weights,
            "reverse_complement": self.reverse_complement,
            "complement": self.complement,
        }

    def setup(self, stage: str) -> None:
        """Learn from the data what symbols stand for and how frequent classes are.

        Raises:
            ValueError: If the data cannot do or does not say what a setting needs, or has other
                classes.
        """
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        names = getattr(data, "class_names", None)
        if names and list(names) != self.class_names:
            raise ValueError(
                f"the model tells {self.class_names} apart, the data has {list(names)}: start from "
                "the weights with --model.pretrained for other classes."
            )
        if stage != "fit":
            return
        if self.reverse_complement == "augment":
            augment(type(self).__name__, data)
        if self.class_weights == "balanced":
            self.class_weight = self._balanced(getattr(data, "class_counts", None))

    def _balanced(self, counts: Sequence[int] | None) -> Tensor:
        """Inverse frequencies, 1 on average over the sequences; 0 for a class that never comes."""
        if counts is None or len(counts) != len(self.class_names):
            raise ValueError(
                "class_weights 'balanced' needs data that counts the training sequences of each of "
                f"{len(self.class_names)} classes (a list `class_counts`), got {counts}."
            )
        n = torch.tensor(list(counts), dtype=torch.float32)
        return torch.where(n > 0, n.sum() / ((n > 0).sum() * n.clamp(min=1)), n)

    # ------------------------------------------------------------------ loss

    def logits(self, batch: Batch) -> tuple[Tensor, Auxiliary]:
        """Return logits ``[B C]``, a row per sequence, packed too, and what mixers say beside."""
        mask, bounds = batch.get("attention_mask"), batch.get("cu_seqlens")
        out = self.net.model(input_ids=batch["tokens"], attention_mask=mask, cu_seqlens=bounds)
        return self.net.score(self.net.pool(out, mask, bounds)).float(), out.auxiliary or {}

    def training_loss(self, batch: Batch) -> Loss:
        """Return the nats of the labelled sequences, weighted where classes are."""
        labels = _labels_of(batch)
        logits, auxiliary = self.logits(batch)
        weight = self.class_weight[labels.clamp(min=0)] * (labels != IGNORE)
        nll = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
        return Loss(nats=(nll * weight).sum(), count=weight.sum(), auxiliary=auxiliary)

    # -------------------------------------------------------------- evaluation

    def log_probabilities(self, batch: Batch) -> Tensor:
        """Log-probability of each class ``[B C]``, averaged if so over both strands."""
        logits, _ = self.logits(batch)
        if self.reverse_complement != "average" or self.complement is None:
            return logits.log_softmax(-1)
        other, _ = other_strand(batch, self.complement, self.net.config.bos_token_id)
        return mean_log_probabilities(logits, self.logits(other)[0])

    def _evaluate(self, batch: Batch, stage: str) -> None:
        labels, said = _labels_of(batch), self.log_probabilities(batch)
        nll: Any = self.nll[stage]
        nats = F.nll_loss(said, labels, ignore_index=IGNORE, reduction="sum")
        nll.update(nats, (labels != IGNORE).sum())
        self.log_mean(f"{stage}/nll", nll)
        scores: Any = self.scores[stage]
        for name, metric in scores.items():
            metric.update(said.exp() if name == "auroc" else said.argmax(-1), labels)
            self.log_mean(f"{stage}/{name}", metric)
        if stage == "val":
            self.confusion.update(said.argmax(-1), labels)

    def on_validation_epoch_start(self) -> None:
        """Count confusions anew."""
        self.confusion.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score all labelled sequences of the split."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Score all labelled sequences of the split."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return ``probabilities [B C]``."""
        return {"probabilities": self.log_probabilities(batch).exp()}


def _labels(class_names: Sequence[str] | None) -> dict[str, Any]:
    """Return the settings of a head for these classes."""
    if not class_names:
        raise ValueError(
            "SequenceClassifier needs data with classes (a list `class_names`, as LabelledDNA has "
            "it), or class_names=[...] in Python; this data has none."
        )
    names = [str(name) for name in class_names]
    if len(set(names)) < max(2, len(names)):
        raise ValueError(f"SequenceClassifier needs at least two different classes, got {names}.")
    return {
        "id2label": dict(enumerate(names)),
        "problem_type": "single_label_classification",
    }


def _labels_of(batch: Batch) -> Tensor:
    if "labels" not in batch:
        raise ValueError(
            "SequenceClassifier needs batches with labels [B], int64, -100 where unknown; these "
            f"have {', '.join(batch)}."
        )
    return batch["labels"]
