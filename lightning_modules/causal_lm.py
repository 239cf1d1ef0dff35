"""The task: say every token from those before it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from statezoo.datamodules.batch import IGNORE, Batch
from statezoo.kernels.linear_cross_entropy import linear_cross_entropy
from statezoo.lightning_modules.carried import Carried, check_bounded
from statezoo.lightning_modules.checkpoint import KEY
from statezoo.lightning_modules.network import build_network
from statezoo.lightning_modules.optim import Optim
from statezoo.lightning_modules.task import GRADIENT_UNIT, OPTIM, Mixers
from statezoo.lightning_modules.tokens import Reduction, TokenTask
from statezoo.lightning_modules.tuning import ADAPTER, Adapter, Tune
from statezoo.lightning_modules.vocabulary import Vocabulary
from statezoo.zoo import StateZooForCausalLM
from statezoo.zoo.auxiliary import Auxiliary

__all__ = ["GRADIENT_UNIT", "MIXERS", "OPTIM", "SHAPE", "CausalLM", "defaults"]

MIXERS: Mixers = ["gla", "gla", "gla", "attention"]

SHAPE = ("mixers", "d_model", "n_layers", "tie_embeddings")
"""Arguments that, left at their defaults, give way to those of ``pretrained``."""


class CausalLM(TokenTask):
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
        tune: What of pretrained weights is trained: all; the ``head`` alone; low-rank updates of
            all projections in mixers and channel mixers (``lora``); or mixers' initial ``state``.
        adapter: Settings of ``lora`` and ``state``.
        vocabulary: Where the data has other symbols than ``pretrained``: ``extend`` keeps the old
            ones and begins new ones at their mean, the data's tokenizer made by ``statezoo
            tokenizer extend``; ``new`` begins embedding and head anew and keeps the layers.
        attention: ``rope_base`` and ``window`` that pretrained attention layers are to have, which
            no weight depends on; to read longer contexts, a larger base.

    Raises:
        ValueError: If a setting is unknown or out of range, or differs from ``pretrained``'s.
    """

    net: StateZooForCausalLM
    objective = "causal"

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
        tune: Tune = "full",
        adapter: Adapter = ADAPTER,
        vocabulary: Vocabulary = "same",
        attention: dict[str, Any] | None = None,
    ) -> None:
        settings = {
            "vocab_size": vocab_size,
            "d_model": d_model,
            "n_layers": n_layers,
            "mixers": mixers,
            "channel": channel,
            "tie_embeddings": tie_embeddings,
        }
        usual, kind = defaults(CausalLM), StateZooForCausalLM
        net = build_network(kind, settings, pretrained, usual, tune, vocabulary, attention)
        super().__init__(net, optim, pretrained, tune, adapter, vocabulary)
        self.carried: Carried | None = None
        self._saved_states: dict[str, Tensor] | None = None
        self.save_hyperparameters(self.plain_settings())

    def scored_nll(self, batch: Batch, reduction: Reduction) -> tuple[Tensor, Auxiliary]:
        """Return nats: their sum or mean, or each ``[B T]``; and what mixers say beside."""
        carried = self.carried if self.training and "starts" in batch else None
        cache = None if carried is None else carried.begin(self.net.model, batch)
        with batch.get("shard", nullcontext()):
            out = self.net.model(
                input_ids=batch["tokens"],
                attention_mask=batch.get("attention_mask"),
                cu_seqlens=batch.get("cu_seqlens"),
                past_key_values=cache,
                use_cache=cache is not None,
            )
        if carried is not None:
            carried.keep(out.past_key_values, batch)
        nll: Tensor = linear_cross_entropy(
            out.last_hidden_state,
            self.net.lm_head.weight,
            batch["targets"],
            ignore_index=IGNORE,
            reduction=reduction,
        )
        return nll, out.auxiliary or {}

    # ---------------------------------------------------------- carried states

    def setup(self, stage: str) -> None:
        """Learn from the data what its symbols stand for, and whether states are to be carried.

        Raises:
            ValueError: If they are, and would grow.
        """
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and getattr(data, "carry", False):
            check_bounded(self.net)

    def on_train_start(self) -> None:
        """Begin with the states of the run that is resumed, or without any."""
        super().on_train_start()
        saved, self._saved_states = self._saved_states, None
        self.carried = Carried() if saved is None else Carried.of(self.net, saved, *self._part())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the states that the next batch begins with, of all processes."""
        super().on_save_checkpoint(checkpoint)
        if self.carried is not None and (states := self.carried.tensors(self._part()[1])):
            checkpoint[KEY]["carried"] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them back."""
        super().on_load_checkpoint(checkpoint)
        self._saved_states = checkpoint.get(KEY, {}).get("carried")

    def _part(self) -> tuple[int, int]:
        """Return this process's number among those that share each batch, and how many."""
        part = self.trainer.distributed_sampler_kwargs or {}
        return part.get("rank", 0), part.get("num_replicas", 1)


def defaults(task: type) -> Mapping[str, Any]:
    """Return the defaults of a task's arguments that describe its network's shape."""
    arguments = inspect.signature(task).parameters
    return {key: arguments[key].default for key in SHAPE if key in arguments}
