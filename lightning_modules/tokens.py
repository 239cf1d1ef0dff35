"""What tasks share whose targets are tokens: their nats, and bits per byte, base or note."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from statezoo.datamodules.batch import IGNORE, Batch
from statezoo.lightning_modules.metrics import PerCount
from statezoo.lightning_modules.optim import Optim
from statezoo.lightning_modules.task import Loss, Task
from statezoo.lightning_modules.tuning import ADAPTER, Adapter, Tune
from statezoo.lightning_modules.vocabulary import Vocabulary
from statezoo.zoo.auxiliary import Auxiliary

Reduction = Literal["mean", "sum", "none"]


class TokenTask(Task):
    """Base of the tasks that say tokens.

    Where batches have ``weights``, the training loss is ``sum(weight * nll) / sum(weight)``;
    validation counts every scored token once, and logs the bits of those of weight 1 beside.

    Subclasses define ``scored_nll``.

    Args:
        net: The network.
        optim: Optimiser and schedule.
        pretrained: Where the network came from, if it did.
        tune: What of it is trained.
        adapter: Settings of what is added to it for that.
        vocabulary: Whether the data's symbols are those of the weights, and more, or others.
    """

    def __init__(
        self,
        net: Any,
        optim: Optim | Mapping[str, Any],
        pretrained: str | None = None,
        tune: Tune = "full",
        adapter: Adapter | Mapping[str, Any] = ADAPTER,
        vocabulary: Vocabulary = "same",
    ) -> None:
        super().__init__(net, optim, pretrained, tune, adapter, vocabulary)
        stages = ("val", "test")
        self.nll = nn.ModuleDict({stage: PerCount() for stage in stages})
        self.bits = nn.ModuleDict({stage: PerCount(bits=True) for stage in stages})
        self.unmasked = nn.ModuleDict({stage: PerCount(bits=True) for stage in stages})

    def plain_settings(self) -> dict[str, Any]:
        """Return the arguments that build this module again, as plain data."""
        return {**super().plain_settings(), "tie_embeddings": self.net.config.tie_embeddings}

    def scored_nll(self, batch: Batch, reduction: Reduction) -> tuple[Tensor, Auxiliary]:
        """Return nats: their sum or mean, or each ``[B T]``; and what mixers say beside."""
        raise NotImplementedError

    def token_nll(self, batch: Batch, reduction: Reduction = "sum") -> Tensor:
        """Nats of the scored tokens: the sum, or at each position ``[B T]``, 0 if not scored."""
        return self.scored_nll(batch, reduction)[0]

    def training_loss(self, batch: Batch) -> Loss:
        """Return the nats of the scored tokens, weighted where the batch has weights."""
        scored, weights = batch["targets"] != IGNORE, batch.get("weights")
        if weights is None:
            nats, auxiliary = self.scored_nll(batch, "sum")
            return Loss(nats=nats, count=scored.sum(), auxiliary=auxiliary)
        nll, auxiliary = self.scored_nll(batch, "none")
        weights = weights * scored
        return Loss(nats=(nll * weights).sum(), count=weights.sum(), auxiliary=auxiliary)

    # -------------------------------------------------------------- evaluation

    def evaluation_nll(self, batch: Batch, reduction: Reduction) -> Tensor:
        """Nats as they count in validation, test and prediction; those of training by default."""
        return self.token_nll(batch, reduction)

    def _evaluate(self, batch: Batch, stage: str) -> None:
        scored, weights = batch["targets"] != IGNORE, batch.get("weights")
        nll = self.evaluation_nll(batch, "sum" if weights is None else "none")
        self._log_bits(self.nll[stage], f"{stage}/nll", nll.sum(), scored.sum())
        if "n_bytes" not in batch:
            return
        units = torch.as_tensor(batch["n_bytes"]).sum()
        name = f"{stage}/bits_per_{self.unit}"
        self._log_bits(self.bits[stage], name, nll.sum(), units)
        if weights is not None:
            plain = scored & (weights == 1)
            units = units.to(nll.device) * plain.sum() / scored.sum().clamp(min=1)
            name = f"{name}_unmasked"
            self._log_bits(self.unmasked[stage], name, (nll * plain).sum(), units, bar=False)

    def _log_bits(
        self, metric: Any, name: str, nats: Tensor, count: Tensor, *, bar: bool = True
    ) -> None:
        metric.update(nats, count)
        self.log_mean(name, metric, bar=bar)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Average over all scored tokens of the split."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Average over all scored tokens of the split."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return ``nll``, the nats at each position ``[B T]``, and ``scored``, which count."""
        nll = self.evaluation_nll(batch, "none").view_as(batch["targets"])
        return {"nll": nll, "scored": batch["targets"] != IGNORE}
