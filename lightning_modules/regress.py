"""The task: say a number about each sequence, or several."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from statezoo.datamodules.batch import Batch
from statezoo.lightning_modules import checkpoint as ckpt
from statezoo.lightning_modules.causal_lm import MIXERS
from statezoo.lightning_modules.labelled import LabelTask
from statezoo.lightning_modules.scores import NumberScores
from statezoo.lightning_modules.task import Loss


class Regressor(LabelTask):
    r"""Train a network to say a number about each sequence, or several.

    It is trained on :math:`z = (y - \mu) / \sigma` with mean and deviation of the training split,
    one pair per number, which are kept with the weights (``label_scale`` of the configuration): all
    answers are in the units of the numbers, those of exported folders too. A head that comes with
    ``pretrained`` keeps its pair.

    The loss is the mean over the known numbers of one optimiser step, over all its micro-batches
    (``trainer.accumulate_grad_batches``) and processes. Validation and test log it as ``loss``, in
    squares of deviations, and in units of the numbers ``rmse`` and ``mae``, then ``pearson``,
    ``spearman`` and ``r2`` (the part of the variance that is explained), each over the whole split;
    of several numbers the mean.

    Args:
        mixers: Mixers along time, by name, ``[gla, gla, attention]``, or as mappings of a ``name``
            and settings, ``[{name: gla, n_heads: 2}, attention]``; repeated over the layers.
        loss: ``mse``, the squared error; or ``huber``, half of it up to one deviation and linear
            beyond, which bears outliers.
        **settings: As of every task with labels.
    """

    kind = "number"
    problem = "regression"
    scored = "number"
    measure = "loss"
    loss: Literal["mse", "huber"] = "mse"

    def __init__(
        self,
        mixers: list[str | dict[str, Any]] = MIXERS,
        *,
        loss: Literal["mse", "huber"] = "mse",
        **settings: Any,
    ) -> None:
        if loss not in ("mse", "huber"):
            raise ValueError(f"loss must be mse or huber, got {loss!r}.")
        super().__init__(mixers, class_weights=None, **settings)
        self.loss = loss
        self.save_hyperparameters(self.plain_settings())

    def plain_settings(self) -> dict[str, Any]:
        """Return the arguments that build this module again, as plain data."""
        settings = super().plain_settings()
        del settings["class_weights"]
        return {**settings, "loss": self.loss}

    def setup(self, stage: str) -> None:
        """Learn mean and deviation of the training split, unless the head came with some.

        Raises:
            ValueError: If a number is known nowhere or the same everywhere.
        """
        super().setup(stage)
        if stage == "fit" and self.net.config.label_scale is None:
            self.net.config.label_scale = self._moments(self.training_labels())

    def _moments(self, labels: Tensor) -> list[list[float]]:
        mean, pairs = labels.nanmean(0), []
        std = (labels - mean).square().nanmean(0).sqrt()
        for name, m, s in zip(self.class_names, mean.tolist(), std.tolist(), strict=True):
            if not s > 1e-12 * abs(m):
                what = "is known for no training sequence" if m != m else f"is always {m:g}"
                raise ValueError(f"Regressor cannot learn {name!r}, which {what}.")
            pairs.append([m, s])
        return pairs

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back the scale too."""
        super().on_load_checkpoint(checkpoint)
        self.net.config.label_scale = checkpoint[ckpt.KEY]["config"].get("label_scale")

    def losses(self, answers: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each number ``[n R]``; NaN where it is unknown."""
        pairs = self.net.config.label_scale or [[0.0, 1.0]] * len(self.class_names)
        std = torch.tensor(pairs, dtype=answers.dtype, device=answers.device)[:, 1]
        error = (answers - labels) / std
        if self.loss == "mse":
            return error.square()
        return F.huber_loss(error, torch.zeros_like(error), reduction="none")

    def training_loss(self, batch: Batch) -> Loss:
        """Return the summed loss of the known numbers."""
        labels = self.labels_of(batch)
        answers, auxiliary = self.logits(batch)
        known = ~labels.isnan()
        losses = self.losses(answers, torch.where(known, labels, answers.detach()))
        return Loss(nats=(losses * known).sum(), count=known.sum(), auxiliary=auxiliary)

    def row(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return numbers and predictions, both ``[n R]``."""
        labels, said = self.labels_of(batch), self.answers(batch)
        known = ~labels.isnan().all(-1)
        return labels[known], said[known]

    def scoring(self, labels: Tensor, answers: Tensor) -> NumberScores:
        """Score predicted numbers."""
        truth, said = labels.double(), answers.double()
        return NumberScores(truth.numpy(), said.numpy(), self.losses(said, truth).numpy())

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return ``predictions [B R]`` in the units of the numbers."""
        return {"predictions": self.answers(batch)}
