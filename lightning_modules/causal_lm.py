"""The task: say every token from those before it."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from statezoo.datamodules.batch import IGNORE, Batch
from statezoo.kernels.linear_cross_entropy import linear_cross_entropy
from statezoo.lightning_modules import checkpoint as ckpt
from statezoo.lightning_modules.metrics import PerCount
from statezoo.lightning_modules.network import build_network
from statezoo.lightning_modules.optim import Optim, adamw, rate
from statezoo.zoo import StateZooForCausalLM
from statezoo.zoo.auxiliary import Auxiliary, auxiliary_loss, name_values, take_auxiliary, to_vector

MIXERS: list[str | dict[str, Any]] = ["gla", "gla", "gla", "attention"]
OPTIM = Optim()

Reduction = Literal["mean", "sum", "none"]

SHAPE = ("mixers", "d_model", "n_layers", "tie_embeddings")
"""Arguments that, left at their defaults, give way to those of ``pretrained``."""

GRADIENT_UNIT = 1024.0
"""Tokens by which the summed loss is divided in the backward pass: gradients stay in the range of
those of a mean until the exact division, one step later; the value changes rounding alone."""


class CausalLM(LightningModule):
    """Train a language model to say every token from those before it.

    The loss is the mean over the scored tokens of one optimiser step, in nats: over all its
    micro-batches (``trainer.accumulate_grad_batches``) and processes, however unevenly filled.

    Args:
        mixers: Mixers along time, by name, ``[gla, gla, attention]``, or as mappings of a ``name``
            and settings, ``[{name: gla, n_heads: 2}, attention]``; repeated over the layers.
        vocab_size: Number of symbols; comes from the data on the command line.
        d_model: Width of the stream of tokens.
        n_layers: Number of blocks.
        channel: Channel mixer, by name or as a mapping of a ``name`` and settings; null for none.
        tie_embeddings: Read and write symbols with one table.
        optim: Optimiser and schedule.
        pretrained: Checkpoint, Hub folder or Hub name whose weights and shape to start from.

    Raises:
        ValueError: If a setting is unknown or out of range, or differs from ``pretrained``'s.
    """

    def __init__(
        self,
        mixers: list[str | dict[str, Any]] = MIXERS,
        *,
        vocab_size: int = 256,
        d_model: int = 128,
        n_layers: int = 4,
        channel: str | dict[str, Any] | None = "swiglu",
        tie_embeddings: bool = True,
        optim: Optim = OPTIM,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        self.optim = Optim.of(optim)
        self.net: StateZooForCausalLM = build_network(
            {
                "vocab_size": vocab_size,
                "d_model": d_model,
                "n_layers": n_layers,
                "mixers": mixers,
                "channel": channel,
                "tie_embeddings": tie_embeddings,
            },
            pretrained,
            {key: p.default for key, p in _arguments().items() if key in SHAPE},
        )
        self.unit, self.tokenizer_files = "byte", dict[str, bytes]()
        self.nll = nn.ModuleDict({stage: PerCount() for stage in ("val", "test")})
        self.bits = nn.ModuleDict({stage: PerCount(bits=True) for stage in ("val", "test")})
        self._window: list[tuple[Tensor, Tensor]] = []  # nats and scored tokens of each micro-batch
        self._beside: list[Tensor] = []  # what mixers said beside, times tokens
        self._said: Auxiliary = {}  # and the last of it, for its names
        self._rng: Mapping[str, Any] | None = None
        self._tokens, self._clock = 0, 0.0
        self.save_hyperparameters(self.plain_settings())

    def plain_settings(self) -> dict[str, Any]:
        """Return the arguments that build this module again, as plain data."""
        config = self.net.config
        return {
            "mixers": [dict(mixer) for mixer in config.mixers],
            "vocab_size": config.vocab_size,
            "d_model": config.d_model,
            "n_layers": config.n_layers,
            "channel": dict(config.channel) if config.channel else None,
            "tie_embeddings": config.tie_embeddings,
            "optim": self.optim.plain(),
            "pretrained": None,
        }

    # ------------------------------------------------------------------ loss

    def token_nll(self, batch: Batch, reduction: Reduction = "sum") -> Tensor:
        """Nats of the scored tokens: the sum, or at each position ``[B T]``, 0 if not scored."""
        return self._nll(batch, reduction)[0]

    def _nll(self, batch: Batch, reduction: Reduction) -> tuple[Tensor, Auxiliary]:
        """Return the nats, and what mixers in training mode say beside."""
        out = self.net.model(
            input_ids=batch["tokens"], cu_seqlens=batch.get("cu_seqlens"), use_cache=False
        )
        nll: Tensor = linear_cross_entropy(
            out.last_hidden_state,
            self.net.lm_head.weight,
            batch["targets"],
            ignore_index=IGNORE,
            reduction=reduction,
        )
        return nll, out.auxiliary or {}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the summed loss in ``GRADIENT_UNIT``; the optimiser step divides by the tokens.

        Auxiliary losses of mixers count as often as there are tokens.
        """
        nats, auxiliary = self._nll(batch, "sum")
        tokens = (batch["targets"] != IGNORE).sum()
        self._window.append((nats.detach(), tokens))
        self._tokens += batch["tokens"].numel()
        more = auxiliary_loss(auxiliary)
        if more is None:
            return nats / GRADIENT_UNIT
        self._beside.append(to_vector(auxiliary) * tokens)
        self._said = {i: {k: v.detach() for k, v in f.items()} for i, f in auxiliary.items()}
        return (nats + more * tokens) / GRADIENT_UNIT

    def on_after_backward(self) -> None:
        """Forget what recomputation in the backward pass has said a second time."""
        take_auxiliary(block.mixer for block in self.net.model.layers)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turn the gradient of the sum into that of the mean; stop at a loss that is no number.

        Lightning has divided by ``accumulate_grad_batches``, data-parallel strategies by the
        number of processes: both are undone here.
        """
        nats = torch.stack([nats.double() for nats, _ in self._window]).sum()
        tokens = torch.stack([tokens for _, tokens in self._window]).sum().double()
        self._window.clear()
        sums = torch.stack([nats, tokens])
        if self._beside:
            sums = torch.cat([sums, torch.stack(self._beside).double().sum(0)])
            self._beside.clear()
        if self.trainer.world_size > 1:
            sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        nats, tokens, *beside = sums.tolist()
        if not math.isfinite(nats):
            raise FloatingPointError(self._not_finite(nats))
        divisor = self.trainer.accumulate_grad_batches * self.trainer.world_size
        factor = GRADIENT_UNIT * divisor / max(tokens, 1.0)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        means = [x / max(tokens, 1.0) for x in (nats, *beside)]
        self._log_step(means[0], optimizer.param_groups[0]["lr"], means[1:])

    def _not_finite(self, value: float) -> str:
        saved = getattr(self.trainer.checkpoint_callback, "last_model_path", "")
        return (
            f"the training loss is {value} at step {self.trainer.global_step}; the parameters are "
            "still those before this step. Lower optim.lr, raise optim.warmup_steps or use "
            f"--trainer.precision 32-true{f'; the last checkpoint is {saved}' if saved else ''}."
        )

    def _log_step(self, nll: float, lr: float, beside: list[float]) -> None:
        """Log what the optimiser step was made of."""
        self.log("train/nll", nll, prog_bar=True, rank_zero_only=True)
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

    # -------------------------------------------------------------- evaluation

    def _evaluate(self, batch: Batch, stage: str) -> None:
        nats = self.token_nll(batch)
        metric: Any = self.nll[stage]
        metric.update(nats, (batch["targets"] != IGNORE).sum())
        self.log(f"{stage}/nll", metric, on_step=False, on_epoch=True, prog_bar=True)
        if "n_bytes" in batch:
            name = f"{stage}/bits_per_{self.unit}"
            metric = self.bits[stage]
            metric.update(nats, torch.as_tensor(batch["n_bytes"]).sum())
            self.log(name, metric, on_step=False, on_epoch=True, prog_bar=True)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Average over all scored tokens of the split."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Average over all scored tokens of the split."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return ``nll``, the nats at each position ``[B T]``, and ``scored``, which count."""
        nll = self.token_nll(batch, reduction="none").view_as(batch["targets"])
        return {"nll": nll, "scored": batch["targets"] != IGNORE}

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
        """Learn from the data what its symbols stand for."""
        data = getattr(self.trainer, "datamodule", None)
        self.unit = getattr(data, "unit", self.unit)
        start = getattr(getattr(data, "tokenizer", None), "bos_id", None)
        if start is not None:
            self.net.config.bos_token_id = self.net.generation_config.bos_token_id = start
        self.tokenizer_files = ckpt.tokenizer_files(data) or self.tokenizer_files

    def on_train_start(self) -> None:
        """Start the clock of the throughput."""
        self._window.clear()
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
            "tokenizer": self.tokenizer_files,
            "rng": ckpt.rng_state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back the tokenizer and the state of the random numbers."""
        ours = checkpoint.get(ckpt.KEY, {})
        self.tokenizer_files = ours.get("tokenizer", self.tokenizer_files)
        self._rng = ours.get("rng")


def _arguments() -> Mapping[str, inspect.Parameter]:
    """List the arguments that all modules have."""
    return inspect.signature(CausalLM.__init__).parameters
