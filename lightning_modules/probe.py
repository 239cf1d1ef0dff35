"""What two simple models say about the same labels: the majority, and a frozen body with a head."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from statezoo.datamodules.batch import IGNORE, Batch
from statezoo.lightning_modules.callbacks import run_folder
from statezoo.lightning_modules.network import load_network
from statezoo.zoo import StateZooForSequenceClassification, with_head

log = logging.getLogger(__name__)

FEW = 100
"""Validation sequences below which a score says little."""
PULLS = (1e-3, 1e-2, 1e-1, 1.0)
"""Strengths of the pull to zero among which a fifth of the training rows chooses."""
Answer = Callable[[Batch], Tensor]


class CompareWithProbe(Callback):
    """Print what simple models reach on the validation split beside a task with labels.

    ``majority`` says the same of everything: the shares of classes, labels or tags in the training
    split, or the mean of the numbers. ``frozen probe`` is a linear model (logistic or ridge
    regression) of what the pretrained body, as it was before training, says about a sequence,
    pooled as the task pools it, or about a token. The run is at its best validation. All have the
    scores of the task on the same rows; they are written to ``baselines.json`` too.

    Args:
        rows: Training sequences that the probe is fitted on, drawn by the data's seed; of tags
            sixteen times as many tokens.
    """

    def __init__(self, rows: int = 4000) -> None:
        if rows < 2:
            raise ValueError(f"CompareWithProbe needs rows of at least 2, got {rows}.")
        self.rows = rows
        self._best, self._scores = math.inf, {}  # type: float, dict[str, float]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn where the validation split is so small that its scores say little."""
        data: Any = getattr(trainer, "datamodule", None)
        if hasattr(pl_module, "scored_rows") and hasattr(data, "windows"):
            n = len(data.windows("val") or ())
            if 0 < n < FEW and trainer.is_global_zero:
                low, high = wilson(0.8, n)
                log.warning(
                    f"the validation split has {n} sequence{'s' if n > 1 else ''}: an accuracy of "
                    f"0.80 there would mean {low:.2f} to {high:.2f} (95 %): add data, or read "
                    "scores with that in mind"
                )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the scores of the best validation."""
        task: Any = pl_module
        if not hasattr(task, "scored_rows") or trainer.sanity_checking:
            return
        loss = float(trainer.callback_metrics.get(f"val/{task.measure}", math.nan))
        if loss < self._best or not self._scores:
            found = trainer.callback_metrics.items()
            self._best = loss
            self._scores = {k[4:]: float(x) for k, x in found if k.startswith("val/")}

    def state_dict(self) -> dict[str, Any]:
        """Return the best scores so far."""
        return {"best": self._best, "scores": self._scores}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back the best scores so far."""
        self._best, self._scores = state_dict["best"], state_dict["scores"]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit, score, print and write."""
        task: Any = pl_module
        data: Any = getattr(trainer, "datamodule", None)
        tried = getattr(trainer, "fast_dev_run", False)
        if not (self._scores and data is not None) or tried or trainer.world_size > 1:
            return
        batches = data.train_dataloader
        constant = majority(task, batches())
        said = {"majority": score(task, data.val_dataloader(), lambda batch: constant)}
        if task.base:
            with torch.inference_mode(False), torch.enable_grad():
                answer = frozen_probe(task, batches(), self.rows, constant)
            said["frozen probe"] = score(task, data.val_dataloader(), answer)
        said[type(task).__name__] = self._scores
        names = list(said["majority"])
        table = Table("model", *names, title="on the same validation split")
        for label, values in said.items():
            own = label == type(task).__name__
            cells = (f"{values.get(name, math.nan):.4g}" for name in names)
            table.add_row(label, *cells, style="bold" if own else "")
        Console().print(table)
        folder = run_folder(trainer)
        if folder.is_dir():
            plain = {
                label: {k: x if math.isfinite(x) else None for k, x in values.items()}
                for label, values in said.items()
            }
            (folder / "baselines.json").write_text(json.dumps(plain, indent=2) + "\n")


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of ``n`` sequences.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    z = 1.959964
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def score(task: Any, batches: Iterable[Batch], answer: Answer) -> dict[str, float]:
    """Return the scores that a task would have if ``answer(batch)`` were its logits.

    Args:
        task: A task with labels.
        batches: The split.
        answer: Gives ``[B C]``, or ``[B T C]`` of tags, or what broadcasts to it.
    """
    found = []

    def logits(batch: Batch) -> tuple[Tensor, dict[int, Any]]:
        B, T = batch["tokens"].shape
        shape = (B, T, -1) if task.kind == "tags" else (len(batch["labels"]), -1)
        return answer(batch).float().expand(*shape), {}

    task.logits = logits  # hides the method
    try:
        with torch.no_grad():
            for batch in batches:
                found.append(task.row(batch))
    finally:
        del task.logits
    rows = [torch.cat(parts).cpu() for parts in zip(*found, strict=True)]
    values: dict[str, float] = task.scoring(*rows).values()
    return values


def majority(task: Any, batches: Iterable[Batch]) -> Tensor:
    """Return what says the same of everything, ``[C]``: log-shares, log-odds or means."""
    n = len(task.class_names)
    total, count = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for batch in batches:
        labels = task.labels_of(batch)
        if task.kind in ("class", "tags"):
            total += torch.bincount(labels[labels != IGNORE], minlength=n)
        else:
            total += labels.double().nan_to_num(0.0).sum(0)
            count += (~labels.isnan()).sum(0)
    if task.kind in ("class", "tags"):
        return ((total + 0.5) / (total + 0.5).sum()).log().float()  # half a row more of each
    if task.kind == "number":
        return (total / count).float()
    return ((total + 0.5) / (count + 1)).logit().float()


def frozen_probe(task: Any, batches: Iterable[Batch], rows: int, constant: Tensor) -> Answer:
    """Fit a linear model of the pretrained body's features; return how it answers.

    Args:
        task: A task with labels that started from pretrained weights.
        batches: The training split.
        rows: How many sequences of it are used; of tags sixteen times as many tokens.
        constant: What it answers where nothing can be fitted.
    """
    tags = task.kind == "tags"
    pooling = "mean" if tags else task.net.config.pooling
    labels = {"num_labels": 2, "problem_type": None}
    body, _ = with_head(
        load_network(task.base), StateZooForSequenceClassification, pooling=pooling, **labels
    )
    body.train(False).requires_grad_(False)

    def features(batch: Batch) -> Tensor:
        mask, bounds = batch.get("attention_mask"), batch.get("cu_seqlens")
        with torch.no_grad():
            out = body.model(input_ids=batch["tokens"], attention_mask=mask, cu_seqlens=bounds)
            x: Tensor = out.last_hidden_state if tags else body.pool(out, mask, bounds)
        return x.float()

    xs, ys, n = [], [], 0
    for batch in batches:
        x, y = features(batch), task.labels_of(batch)
        known = y != IGNORE if not y.is_floating_point() else ~y.isnan().all(-1)
        xs.append(x[known])
        ys.append(y[known])
        n += len(ys[-1])
        if n >= rows * (16 if tags else 1):
            break
    x, y = torch.cat(xs), torch.cat(ys)
    mean, std = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    weight, bias = fit_linear((x - mean) / std, y, task.kind, constant)
    return lambda batch: (features(batch) - mean) / std @ weight + bias


def fit_linear(x: Tensor, y: Tensor, kind: str, constant: Tensor) -> tuple[Tensor, Tensor]:
    """Fit ``x @ weight + bias`` to labels, with a pull to zero that held-out rows choose.

    Args:
        x: Features of mean 0 and deviation 1, ``[n F]``.
        y: Labels ``[n]``, or ``[n C]`` with NaN where unknown.
        kind: Of the labels.
        constant: Answers ``[C]`` that the fit begins with.

    Returns:
        ``weight [F C]`` and ``bias [C]``.
    """
    scale = torch.ones_like(constant)
    if kind == "number":
        scale = (y - constant).square().nanmean(0).sqrt().clamp(min=1e-12)
        y = (y - constant) / scale
    start = torch.zeros_like(constant) if kind == "number" else constant
    best = PULLS[1]
    held = torch.arange(len(y)) % 5 == 4
    if int(held.sum()) >= 4:
        losses = []
        for pull in PULLS:
            weight, bias = _lbfgs(x[~held], y[~held], kind, start, pull)
            losses.append(float(_loss(x[held] @ weight + bias, y[held], kind)))
        best = PULLS[min(range(len(PULLS)), key=losses.__getitem__)]
    weight, bias = _lbfgs(x, y, kind, start, best)
    return weight * scale, bias * scale + (constant if kind == "number" else 0)


def _loss(said: Tensor, y: Tensor, kind: str) -> Tensor:
    """Return the mean loss of the known labels."""
    if kind in ("class", "tags"):
        return F.cross_entropy(said, y)
    known = ~y.isnan()
    loss = F.mse_loss if kind == "number" else F.binary_cross_entropy_with_logits
    return loss(said[known], y[known].to(said.dtype))


def _lbfgs(x: Tensor, y: Tensor, kind: str, start: Tensor, pull: float) -> tuple[Tensor, Tensor]:
    weight = x.new_zeros(x.shape[1], len(start)).requires_grad_()
    bias = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _loss(x @ weight + bias, y, kind) + 0.5 * pull * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()
