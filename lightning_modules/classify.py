"""The tasks: say the class of each sequence, or which of several labels hold for it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from statezoo.datamodules.batch import IGNORE, Batch
from statezoo.lightning_modules.labelled import LabelTask
from statezoo.lightning_modules.scores import ClassScores, LabelScores
from statezoo.lightning_modules.task import Loss


class SequenceClassifier(LabelTask):
    """Train a network to say the class of each sequence.

    The loss is the mean over the labelled sequences of one optimiser step, in nats: over all its
    micro-batches (``trainer.accumulate_grad_batches``) and processes, however unevenly filled.
    Validation and test log ``nll`` in nats per sequence, ``accuracy``, ``mcc`` (Matthews'
    correlation coefficient) and ``auroc`` (area under the ROC curve; of several classes the mean,
    each against the rest), each over the whole split.
    """

    kind = "class"
    problem = "single_label_classification"

    def training_loss(self, batch: Batch) -> Loss:
        """Return the nats of the labelled sequences, weighted where classes are."""
        labels = self.labels_of(batch)
        logits, auxiliary = self.logits(batch)
        weight = self.class_weight[labels.clamp(min=0)] * (labels != IGNORE)
        nll = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
        return Loss(nats=(nll * weight).sum(), count=weight.sum(), auxiliary=auxiliary)

    def log_probabilities(self, batch: Batch) -> Tensor:
        """Log-probability of each class ``[B C]``, averaged if so over both strands."""
        return self.answers(batch).log_softmax(-1)

    def row(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return classes ``[n]`` and log-probabilities ``[n C]``."""
        labels, said = self.labels_of(batch), self.log_probabilities(batch)
        return labels[labels != IGNORE], said[labels != IGNORE]

    def scoring(self, labels: Tensor, answers: Tensor) -> ClassScores:
        """Score classified sequences."""
        return ClassScores(labels.numpy(), answers.double().numpy())

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return ``probabilities [B C]``."""
        return {"probabilities": self.log_probabilities(batch).exp()}


class MultiLabelClassifier(LabelTask):
    """Train a network to say which labels hold for each sequence: any number of them, or none.

    Each label is a question of its own. The loss is the mean over the known labels of one optimiser
    step, in nats: over all its micro-batches (``trainer.accumulate_grad_batches``) and processes.
    Validation and test log ``nll`` in nats per label, ``accuracy`` (part of the labels said right,
    where a probability of 1/2 says that one holds), and the means over labels of ``f1`` and of
    ``auroc`` (area under the ROC curve), each over the whole split.
    """

    kind = "classes"
    problem = "multi_label_classification"
    scored = "label"

    def training_loss(self, batch: Batch) -> Loss:
        """Return the nats of the known labels, weighted where labels that hold are."""
        labels = self.labels_of(batch)
        logits, auxiliary = self.logits(batch)
        known, truth = ~labels.isnan(), labels.nan_to_num()
        weight = torch.where(truth > 0.5, self.class_weight, 1.0) * known
        nats = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        return Loss(nats=(nats * weight).sum(), count=weight.sum(), auxiliary=auxiliary)

    def _balanced(self, counts: object) -> Tensor:
        """What a label that holds counts: how many do not, for each that does."""
        labels = self.training_labels()
        hold, known = labels.nansum(0), (~labels.isnan()).sum(0)
        return torch.where(hold > 0, (known - hold) / hold.clamp(min=1), 1.0)

    def row(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return labels and log-odds, both ``[n C]``."""
        labels, said = self.labels_of(batch), self.answers(batch)
        known = ~labels.isnan().all(-1)
        return labels[known], said[known]

    def scoring(self, labels: Tensor, answers: Tensor) -> LabelScores:
        """Score sequences of which several labels may hold."""
        return LabelScores(labels.double().numpy(), answers.double().numpy())

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return ``probabilities [B C]``, each between 0 and 1 by itself."""
        return {"probabilities": self.answers(batch).sigmoid()}
