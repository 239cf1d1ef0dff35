"""The task: say the tag of each token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from statezoo.datamodules.batch import IGNORE, Batch
from statezoo.lightning_modules.causal_lm import MIXERS
from statezoo.lightning_modules.labelled import LabelTask
from statezoo.lightning_modules.scores import TagScores
from statezoo.lightning_modules.task import Loss
from statezoo.zoo import StateZooForTokenClassification


class TokenClassifier(LabelTask):
    """Train a network to say the tag of each token from what stands on both sides of it.

    The loss is the mean over the tagged tokens of one optimiser step, in nats: over all its
    micro-batches (``trainer.accumulate_grad_batches``) and processes, however unevenly filled.
    Validation and test log ``nll`` in nats per token, ``accuracy``, ``f1`` (mean over tags) and
    ``mcc`` (Matthews' correlation coefficient), over all tokens of the split. The other strand of
    DNA has the same tags in reversed order.

    Args:
        mixers: Mixers along time, by name, ``[gla, gla, attention]``, or as mappings of a ``name``
            and settings, ``[{name: gla, n_heads: 2}, attention]``; repeated over the layers.
        bidirectional: Run every mixer forward and backward in time; forward only, a tag is said
            from the past alone. null does as ``pretrained`` does.
        tie_directions: Run it with the same weights both ways: such a net cannot tell what stands
            before a token from what stands after. null ties nothing in a new network, and does as
            ``pretrained`` does, tying what was causal; say false to copy the weights of that.
        **settings: As of every task with labels.
    """

    kind = "tags"
    network = StateZooForTokenClassification
    scored = "token"

    def __init__(
        self,
        mixers: list[str | dict[str, Any]] = MIXERS,
        *,
        bidirectional: bool | None = True,
        tie_directions: bool | None = None,
        **settings: Any,
    ) -> None:
        if tie_directions is None:
            tie_directions = settings.get("pretrained") is not None or not bidirectional
        super().__init__(
            mixers,
            bidirectional=bidirectional,
            tie_directions=tie_directions,
            pooling=None,
            **settings,
        )

    def plain_settings(self) -> dict[str, Any]:
        """Return the arguments that build this module again, as plain data."""
        settings = super().plain_settings()
        del settings["pooling"]
        return settings

    def labels_of(self, batch: Batch) -> Tensor:
        """Return the tags of a batch, none at padding.

        Raises:
            ValueError: If it has none, or not one for each token.
        """
        labels = super().labels_of(batch)
        if labels.shape != batch["tokens"].shape:
            raise ValueError(
                f"TokenClassifier needs a tag for each token {[*batch['tokens'].shape]}, -100 "
                f"where unknown; these are {[*labels.shape]}."
            )
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORE)
        return labels

    def training_loss(self, batch: Batch) -> Loss:
        """Return the nats of the tagged tokens, weighted where tags are."""
        labels = self.labels_of(batch).flatten()
        logits, auxiliary = self.logits(batch)
        weight = self.class_weight[labels.clamp(min=0)] * (labels != IGNORE)
        nll = F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORE, reduction="none")
        return Loss(nats=(nll * weight).sum(), count=weight.sum(), auxiliary=auxiliary)

    def row(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return tokens by true and predicted tag ``[n C C]``, and summed nats ``[n]``.

        A row is a sequence, also where several are packed into one.
        """
        labels, said = self.labels_of(batch), self.answers(batch).log_softmax(-1)
        B, T, C = said.shape
        bounds = batch.get("cu_seqlens")
        lengths = torch.full((B,), T) if bounds is None else bounds.long().diff().cpu()
        own = torch.arange(len(lengths)).repeat_interleave(lengths).to(said.device)
        labels, said, n = labels.flatten(), said.flatten(0, 1), len(lengths)
        kept = labels != IGNORE
        labels, said, own = labels[kept], said[kept], own[kept]
        cells = (own * C + labels) * C + said.argmax(-1)
        tables = torch.bincount(cells, minlength=n * C * C).view(n, C, C)
        nats = said.new_zeros(n, dtype=torch.float64)
        nats -= nats.index_add(0, own, said.gather(1, labels[:, None])[:, 0].double())
        full = tables.sum((1, 2)) > 0
        return tables[full], nats[full]

    def scoring(self, labels: Tensor, answers: Tensor) -> TagScores:
        """Score tagged sequences."""
        return TagScores(labels.numpy(), answers.numpy())

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return ``probabilities [B T C]``."""
        return {"probabilities": self.answers(batch).softmax(-1)}
