"""What all tasks share: exact means over an optimiser step, schedule, checkpoints."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from statezoo.datamodules.batch import Batch
from statezoo.lightning_modules import checkpoint as ckpt
from statezoo.lightning_modules import shards
from statezoo.lightning_modules.not_finite import report, unusable
from statezoo.lightning_modules.optim import Optim, adamw, freeze, rate
from statezoo.lightning_modules.tuning import ADAPTER, Adapter, Tune, learn_initial_states, tuned
from statezoo.lightning_modules.vocabulary import Vocabulary, check_extends
from statezoo.zoo.auxiliary import Auxiliary, auxiliary_loss, name_values, take_auxiliary, to_vector

OPTIM = Optim()

Mixers = list[str | dict[str, Any]]

GRADIENT_UNIT = 1024.0
"""Count by which the summed loss is divided in the backward pass: gradients stay in the range of
those of a mean until the exact division, one step later; the value changes rounding alone."""


class Loss(TypedDict):
    """What a batch adds to the loss of its optimiser step.

    Attributes:
        nats: Sum over what is scored, each times its weight.
        count: Sum of the weights; without weights, how many are scored.
        auxiliary: What mixers in training mode say beside.
    """

    nats: Tensor
    count: Tensor
    auxiliary: Auxiliary


class Task(LightningModule):
    """Base of the tasks: train a network on a loss that is a mean over what batches score.

    The mean is over one optimiser step: over all its micro-batches
    (``trainer.accumulate_grad_batches``) and processes, however unevenly filled.

    Not for use by itself: subclasses make a network and hand it over, define ``training_loss`` and
    ``plain_settings``, and call ``self.save_hyperparameters(self.plain_settings())``.

    Args:
        net: The network.
        optim: Optimiser and schedule.
        pretrained: Where the network came from, if it did; data must have the same tokenizer.
        tune: What of it is trained.
        adapter: Settings of what is added to it for that.
        vocabulary: Whether the data's symbols are those of the weights, and more, or others.
    """

    scored: ClassVar[str] = "token"
    """What the loss is a mean over."""
    measure: ClassVar[str] = "nll"
    """Name of the loss in what is logged, ``train/nll``; the smallest ``val/nll`` is the best."""
    objective: ClassVar[str | None] = None
    """What the data must be made for; None for anything."""

    def __init__(
        self,
        net: Any,
        optim: Optim | Mapping[str, Any],
        pretrained: str | None = None,
        tune: Tune = "full",
        adapter: Adapter | Mapping[str, Any] = ADAPTER,
        vocabulary: Vocabulary = "same",
    ) -> None:
        super().__init__()
        self.vocabulary: Vocabulary = vocabulary
        self.optim = Optim.of(optim)
        self.tune: Tune = tune
        self.base = None if pretrained is None else str(pretrained)
        self.net, self.adapter = tuned(net, tune, Adapter.of(adapter))
        freeze(self.net, self.optim.rates)
        self.unit = "byte"
        self.tokenizer_files = ckpt.pretrained_tokenizer(pretrained) if pretrained else {}
        self._window: list[tuple[Tensor, Tensor]] = []  # nats and count of each micro-batch
        self._read: list[tuple[int, Batch]] = []  # the micro-batches themselves
        self._beside: list[Tensor] = []  # what mixers said beside, times the count
        self._said: Auxiliary = {}  # and the last of it, for its names
        self._rng: Mapping[str, Any] | None = None
        self._tokens, self._clock = 0, 0.0

    @abstractmethod
    def training_loss(self, batch: Batch) -> Loss:
        """Return what the batch adds to the loss."""

    def plain_settings(self) -> dict[str, Any]:
        """Return the arguments that build this module again, as plain data."""
        config = self.net.config
        return {
            "mixers": [dict(mixer) for mixer in config.mixers],
            "vocab_size": config.vocab_size,
            "d_model": config.d_model,
            "n_layers": config.n_layers,
            "channel": dict(config.channel) if config.channel else None,
            "optim": self.optim.plain(),
            "pretrained": None,
            "tune": self.tune,
            "adapter": self.adapter.plain(),
        }

    # ------------------------------------------------------------------ loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the summed loss in ``GRADIENT_UNIT``; the optimiser step divides by the count.

        Auxiliary losses of mixers count as often as what is scored.
        """
        loss = self.training_loss(batch)
        nats, count = loss["nats"], loss["count"]
        self._window.append((nats.detach(), count))
        self._read.append((batch_idx, batch))
        self._tokens += batch["tokens"].numel()
        more = auxiliary_loss(loss["auxiliary"])
        if more is None:
            return nats / GRADIENT_UNIT
        self._beside.append(to_vector(loss["auxiliary"]) * count)
        self._said = {
            i: {k: v.detach() for k, v in found.items()} for i, found in loss["auxiliary"].items()
        }
        return (nats + more * count) / GRADIENT_UNIT

    def on_after_backward(self) -> None:
        """Forget what recomputation in the backward pass has said a second time."""
        take_auxiliary(self.net.model.mixers())

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turn the gradient of the sum into that of the mean; stop at one that is no number.

        Lightning has divided by ``accumulate_grad_batches``, data-parallel strategies by the
        number of processes: both are undone here.

        Raises:
            FloatingPointError: If the loss or a gradient is not finite; on all processes.
        """
        nats = torch.stack([nats.double() for nats, _ in self._window]).sum()
        total = torch.stack([count.double() for _, count in self._window]).sum()
        window, read = self._window, self._read
        self._window, self._read = [], []
        scaler = getattr(getattr(self.trainer, "precision_plugin", None), "scaler", None)
        sums = torch.stack([nats, total, unusable(optimizer, scaler).to(nats)])
        if self._beside:
            sums = torch.cat([sums, torch.stack(self._beside).double().sum(0)])
            self._beside.clear()
        if self.trainer.world_size > 1:
            sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        summed, count, bad, *beside = sums.tolist()
        if bad or not math.isfinite(summed):
            raise FloatingPointError(report(self, optimizer, summed, window, read))
        divisor = self.trainer.accumulate_grad_batches * self.trainer.world_size
        factor = GRADIENT_UNIT * divisor / (count or 1.0)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        means = [x / (count or 1.0) for x in (summed, *beside)]
        self._log_step(means[0], optimizer.param_groups[0]["lr"], means[1:])

    def _log_step(self, nll: float, lr: float, beside: list[float]) -> None:
        """Log what the optimiser step was made of."""
        self.log(f"train/{self.measure}", nll, prog_bar=True, rank_zero_only=True)
        self.log("train/lr", lr, rank_zero_only=True)
        every = max(1, getattr(self.trainer, "log_every_n_steps", 50))
        if (self.trainer.global_step + 1) % every == 0:
            now = time.perf_counter()
            per_second = self.trainer.world_size * self._tokens / max(now - self._clock, 1e-9)
            self.log("train/tokens_per_second", per_second, prog_bar=True, rank_zero_only=True)
            self._tokens, self._clock = 0, now
            named = name_values(self._said, beside)
            self.log_dict({f"train/{k}": x for k, x in named.items()}, rank_zero_only=True)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer was told, else the norm to ``optim.clip_norm``."""
        if gradient_clip_val is None:
            gradient_clip_val, gradient_clip_algorithm = self.optim.clip_norm, "norm"
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def log_mean(self, name: str, metric: Any, *, bar: bool = True) -> None:
        """Log a metric that has been updated, over the whole of a split."""
        self.log(name, metric, on_step=False, on_epoch=True, prog_bar=bar)

    # ---------------------------------------------------------------- schedule

    def total_steps(self) -> int | None:
        """Optimiser steps of the whole run, None where no one can know.

        ``trainer.estimated_stepping_batches`` would say it too, and silently drop the restored
        position of the loader.
        """
        trainer = self.trainer
        if self.optim.total_steps is not None:
            return self.optim.total_steps
        limits = [trainer.max_steps] if trainer.max_steps > 0 else []
        batches, epochs = trainer.num_training_batches, trainer.max_epochs
        if epochs is not None and epochs > 0 and 0 < batches < math.inf:
            limits.append(epochs * math.ceil(batches / trainer.accumulate_grad_batches))
        return min(limits, default=None)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW that leaves norms, biases and decays alone, and a rate per optimiser step."""
        optimizer = adamw(self.net, self.optim)
        schedule = LambdaLR(optimizer, lambda step: rate(step, self.optim, self.total_steps()))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    @property
    def lr(self) -> float:
        """Peak learning rate, where Lightning's rate finder looks for it."""
        return self.optim.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self.optim.lr = value
        self.hparams["optim"] = self.optim.plain()

    # ------------------------------------------------------------- checkpoints

    def setup(self, stage: str) -> None:
        """Learn from the data what its symbols stand for.

        Raises:
            ValueError: If the data is made for another task, or for another tokenizer than that
                of the weights this module started from.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        self._check_objective(data)
        self.unit = getattr(data, "unit", self.unit)
        start = getattr(getattr(data, "tokenizer", None), "bos_id", None)
        if start is not None:
            self.net.config.bos_token_id = start
            if getattr(self.net, "generation_config", None) is not None:
                self.net.generation_config.bos_token_id = start
        files = ckpt.tokenizer_files(data)
        if self.vocabulary == "same":
            ckpt.check_same_tokenizer(self.tokenizer_files, files)
        elif self.vocabulary == "extend":
            check_extends(self.tokenizer_files, files)
        self.tokenizer_files = files or self.tokenizer_files

    def _check_objective(self, data: Any) -> None:
        has = getattr(data, "objective", "causal")
        if data is None or self.objective in (None, has):
            return
        name = type(data).__name__
        advice = {"causal": "Text, DNA and Music have it", "masked": "DNA has it"}
        hint = advice.get(str(self.objective), "PianoFrames has it")
        if "frames" not in (has, self.objective) and hasattr(data, "objective"):
            hint = f"set --data.objective {self.objective}"
        raise ValueError(
            f"{type(self).__name__} needs data made for the {self.objective} objective, {name} is "
            f"made for the {has} one: {hint}."
        )

    def on_fit_start(self) -> None:
        """Refuse to train a part of weights that are fresh.

        Raises:
            ValueError: If there is neither ``pretrained`` nor a checkpoint of such a run.
        """
        if self.tune != "full" and not self.base:
            raise ValueError(
                f"tune: {self.tune} trains a part of what is trained already, and these weights "
                "are fresh: give --model.pretrained NAME_OR_PATH, or leave tune at full."
            )

    def on_train_start(self) -> None:
        """Start the clock of the throughput."""
        self._window.clear()
        self._read.clear()
        self._beside.clear()
        self._tokens, self._clock = 0, time.perf_counter()

    def on_validation_end(self) -> None:
        """Keep the time of validation out of the throughput."""
        self._tokens, self._clock = 0, time.perf_counter()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Put random numbers back where the interrupted run had left them."""
        if self._rng is not None:
            ckpt.set_rng_state(self._rng)
            self._rng = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what makes the file whole: class, configuration, tokenizer, random numbers."""
        checkpoint[ckpt.KEY] = {
            "class_path": f"{type(self).__module__}.{type(self).__qualname__}",
            "config": self.net.config.to_dict(),
            "network": type(self.net).__name__,
            "tokenizer": self.tokenizer_files,
            "rng": ckpt.rng_state(),
            "base": self.base,
            "tune": self.tune,
            "adapter": self.adapter.plain(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back the tokenizer, the state of the random numbers, and that of the mixers.

        Raises:
            CheckpointError: If tensors are in shards and no trainer knows where they are.
        """
        if shards.KEY in checkpoint:
            self._read_shards(checkpoint)
        self._check_rates_of(checkpoint.get("hyper_parameters", {}).get("optim") or {})
        ours = checkpoint.get(ckpt.KEY, {})
        self.base = ours.get("base", self.base)
        if (rank := ours.get("config", {}).get("initial_states")) is not None:
            learn_initial_states(self.net, rank)  # those of the weights that the run started from
        if self._trainer is not None:  # which reads weights before it widens them to float64
            self.trainer.precision_plugin.convert_module(self)
        self.tokenizer_files = ours.get("tokenizer", self.tokenizer_files)
        self._rng = ours.get("rng")

    def _read_shards(self, checkpoint: dict[str, Any]) -> None:
        """Put into a sharded checkpoint the tensors that it names."""
        if self._trainer is None or not self.trainer.ckpt_path:
            raise ckpt.CheckpointError(
                "a sharded checkpoint is read by statezoo.lightning_modules.load_checkpoint(PATH)."
            )
        found = shards.attach(checkpoint, str(self.trainer.ckpt_path))
        if found is not None and self.trainer.state.fn == "fit":
            found.fill(checkpoint.get("optimizer_states", []))

    def _check_rates_of(self, saved: Mapping[str, Any]) -> None:
        """Raise where a run that is to go on had other rates, so other groups of parameters."""
        resumes = self._trainer is not None and self.trainer.state.fn == "fit"
        if resumes and saved and (had := saved.get("rates") or {}) != self.optim.rates:
            raise ckpt.CheckpointError(
                f"the checkpoint was made with optim.rates {had}, this run has "
                f"{self.optim.rates}: give the same, or start a new run from its weights with "
                "--model.pretrained."
            )
