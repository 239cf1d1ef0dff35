"""What the tasks share that say something about sequences, or tokens, which carry labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from statezoo.datamodules.batch import Batch
from statezoo.lightning_modules.causal_lm import MIXERS, defaults
from statezoo.lightning_modules.kinds import KINDS, check_labels, check_names, check_weights
from statezoo.lightning_modules.metrics import Rows
from statezoo.lightning_modules.network import build_network
from statezoo.lightning_modules.optim import Optim
from statezoo.lightning_modules.scores import Scoring
from statezoo.lightning_modules.strands import (
    Treatment,
    augment,
    check_treatment,
    other_strand,
    treatment_of,
)
from statezoo.lightning_modules.task import OPTIM, Task
from statezoo.lightning_modules.tuning import ADAPTER, Adapter, Tune
from statezoo.zoo import StateZooForSequenceClassification, StateZooForTokenClassification
from statezoo.zoo.auxiliary import Auxiliary


class LabelTask(Task):
    """Base of the tasks that learn labels.

    Not for use by itself: subclasses define ``training_loss``, ``row`` and ``scoring``.

    Args:
        mixers: Mixers along time, by name, ``[gla, gla, attention]``, or as mappings of a ``name``
            and settings, ``[{name: gla, n_heads: 2}, attention]``; repeated over the layers.
        vocab_size: Number of symbols; comes from the data on the command line.
        class_names: Names of the classes, labels, numbers or tags, in the order of the labels; come
            from the data on the command line. Default: those of ``pretrained``.
        d_model: Width of the stream of tokens.
        n_layers: Number of blocks.
        channel: Channel mixer, by name or as a mapping of a ``name`` and settings; null for none.
        bidirectional: Run every mixer forward and backward in time; null does as ``pretrained``
            does, and forward only without one.
        tie_directions: Run it with the same weights both ways.
        pooling: What of the stream speaks for the sequence: its mean over the tokens, the last
            token's, or its ``profile`` along the sequence, for what depends on where something
            stands; null does as ``pretrained`` does.
        class_weights: What each class counts in the training loss: a number for each, in the order
            of ``class_names``; ``balanced`` for the inverse of how often it comes in the training
            split; null for all alike. Where several labels may hold, it is what a label counts
            that holds, beside 1 for one that does not.
        reverse_complement: What to do about the other strand of DNA: nothing; ``augment`` reads
            either in training; ``average`` takes the mean of what both say in validation, test and
            prediction; ``equivariant`` reads both with the same weights.
        complement: The complement of each symbol; comes from the data on the command line.
        optim: Optimiser and schedule.
        pretrained: Checkpoint, Hub folder or Hub name whose weights and shape to start from: of a
            language model, causal or masked, or of a task with labels. The head is new unless it
            was for this task and its classes are these.
        tune: What of pretrained weights is trained: all; the ``head`` alone; low-rank updates of
            all projections in mixers and channel mixers (``lora``); or mixers' initial ``state``.
        adapter: Settings of ``lora`` and ``state``.

    Raises:
        ValueError: If a setting is unknown or out of range, or differs from ``pretrained``'s.
    """

    net: StateZooForSequenceClassification | StateZooForTokenClassification
    class_weight: Tensor
    scored = "sequence"
    kind: ClassVar[str] = "class"
    """Of the labels, a key of ``KINDS``."""
    network: ClassVar[type] = StateZooForSequenceClassification
    problem: ClassVar[str | None] = None
    """``problem_type`` of the network, as transformers has it."""

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
        pooling: Literal["mean", "last", "profile"] | None = "mean",
        class_weights: Literal["balanced"] | list[float] | None = None,
        reverse_complement: Treatment = "none",
        complement: list[int] | None = None,
        optim: Optim = OPTIM,
        pretrained: str | None = None,
        tune: Tune = "full",
        adapter: Adapter = ADAPTER,
    ) -> None:
        check_treatment(type(self).__name__, reverse_complement, complement)
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
            "problem_type": self.problem,
        }
        if class_names or pretrained is None:
            settings["id2label"] = dict(enumerate(check_names(self.kind, class_names)))
        net: Any = build_network(self.network, settings, pretrained, defaults(LabelTask), tune)
        super().__init__(net, optim, pretrained, tune, adapter)
        self.class_names = [str(name) for name in dict(net.config.id2label or {}).values()]
        self.reverse_complement, self.complement = treatment_of(
            reverse_complement, complement, net.config.complement
        )
        self.class_weights = check_weights(class_weights, self.class_names)
        weight = torch.ones(len(self.class_names))
        if isinstance(self.class_weights, list):
            weight = torch.tensor(self.class_weights)
        self.register_buffer("class_weight", weight, persistent=False)
        self.rows = Rows()
        self.save_hyperparameters(self.plain_settings())

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

    # -------------------------------------------------------------------- data

    def setup(self, stage: str) -> None:
        """Learn from the data what symbols stand for and how frequent classes are.

        Raises:
            ValueError: If the data has labels of another kind or other classes, or cannot do or
                does not say what a setting needs.
        """
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        self._check_data(data)
        if stage != "fit":
            return
        if self.reverse_complement == "augment":
            augment(type(self).__name__, data)
        counts = getattr(data, "class_counts", None) if self.kind in ("class", "tags") else None
        if counts and sum(n > 0 for n in counts) == 1:
            (name,) = (x for x, n in zip(self.class_names, counts, strict=False) if n > 0)
            raise ValueError(
                f"{type(self).__name__} needs two {KINDS[self.kind].names} at least to tell apart, "
                f"the training split has only {name!r}: give data in which others come too."
            )
        if self.class_weights == "balanced":
            self.class_weight = self._balanced(counts)

    def _check_data(self, data: Any) -> None:
        has, names = getattr(data, "label_kind", self.kind), getattr(data, "class_names", None)
        if has != self.kind:
            right = KINDS[has].task if has in KINDS else f"one of labels of the kind {has!r}"
            raise ValueError(
                f"{type(self).__name__} learns {KINDS[self.kind].names}, the labels of "
                f"{type(data).__name__} are {KINDS[has].names if has in KINDS else has}: "
                f"the task for them is --model {right}."
            )
        if names and list(names) != self.class_names:
            what = "tells" if self.kind == "class" else "says"
            raise ValueError(
                f"the model {what} {self.class_names}{' apart' if what == 'tells' else ''}, the "
                f"data has {list(names)}: start from the weights with --model.pretrained for other "
                f"{KINDS[self.kind].names}."
            )

    def _balanced(self, counts: Sequence[int] | None) -> Tensor:
        """Inverse frequencies, 1 on average over what is counted; 0 for a class that never comes.

        Raises:
            ValueError: If the data does not count.
        """
        if counts is None or len(counts) != len(self.class_names):
            raise ValueError(
                f"class_weights 'balanced' needs data that counts the training {self.scored}s of "
                f"each of {len(self.class_names)} {KINDS[self.kind].names} (a list "
                f"`class_counts`), got {counts}."
            )
        n = torch.tensor(list(counts), dtype=torch.float32)
        return torch.where(n > 0, n.sum() / ((n > 0).sum() * n.clamp(min=1)), n)

    def training_labels(self) -> Tensor:
        """Read all labels of the training split, of all processes; sequences are not kept.

        Raises:
            ValueError: If there is no data module.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is None:
            raise ValueError(
                f"{type(self).__name__} reads the labels of the training split before it starts, "
                "so it needs a data module, got loaders alone."
            )
        rows, place = Rows(), self.trainer.strategy.root_device
        rows.to(place)
        for batch in data.train_dataloader():
            labels = self.labels_of(batch)
            rows.update(labels.to(place), labels.new_zeros(0, device=place))
        found: Tensor = rows.compute()[0].cpu()
        return found

    def labels_of(self, batch: Batch) -> Tensor:
        """Return the labels of a batch.

        Raises:
            ValueError: If it has none, or they cannot be what this task learns.
        """
        if "labels" not in batch:
            raise ValueError(
                f"{type(self).__name__} needs batches with labels {KINDS[self.kind].labels}; these "
                f"have {', '.join(batch)}."
            )
        check_labels(self.kind, batch["labels"], len(self.class_names))
        return batch["labels"]

    # ----------------------------------------------------------------- answers

    def logits(self, batch: Batch) -> tuple[Tensor, Auxiliary]:
        """Return logits ``[B C]``, a row per sequence, packed too, and what mixers say beside.

        Those of tags are ``[B T C]``.
        """
        mask, bounds = batch.get("attention_mask"), batch.get("cu_seqlens")
        out = self.net.model(input_ids=batch["tokens"], attention_mask=mask, cu_seqlens=bounds)
        return self.net.answers(out, mask, bounds).float(), out.auxiliary or {}

    def answers(self, batch: Batch) -> Tensor:
        """Return logits as they count in validation, test and prediction: averaged over strands.

        The mean of logits gives the geometric mean of probabilities, scaled to sum to 1.
        """
        logits, _ = self.logits(batch)
        if self.reverse_complement != "average" or self.complement is None:
            return logits
        other, index = other_strand(batch, self.complement, self.net.config.bos_token_id)
        turned, _ = self.logits(other)
        if self.kind == "tags":
            turned = turned.flatten(0, 1)[index].view_as(logits)
        return (logits + turned) / 2

    # -------------------------------------------------------------- evaluation

    def row(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return labels and answers of the labelled sequences of a batch, as ``scoring`` reads."""
        raise NotImplementedError

    def scoring(self, labels: Tensor, answers: Tensor) -> Scoring:
        """Return the scores of rows, whose values are logged under their names."""
        raise NotImplementedError

    def scored_rows(self) -> Scoring:
        """Return the scores of all rows of the split that was evaluated last, of all processes."""
        return self.scoring(*(x.cpu() for x in self.rows.compute()))

    def _log_scores(self, stage: str) -> None:
        if not self.rows.update_called:
            return
        for name, value in self.scored_rows().values().items():
            self.log(f"{stage}/{name}", value, prog_bar=True, sync_dist=True)

    def on_validation_epoch_start(self) -> None:
        """Collect rows anew."""
        self.rows.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect the labelled sequences of the split."""
        self.rows.update(*self.row(batch))

    def on_validation_epoch_end(self) -> None:
        """Score the whole split."""
        self._log_scores("val")

    def on_test_epoch_start(self) -> None:
        """Collect rows anew."""
        self.rows.reset()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect the labelled sequences of the split."""
        self.rows.update(*self.row(batch))

    def on_test_epoch_end(self) -> None:
        """Score the whole split."""
        self._log_scores("test")
