"""The task: say the tokens that were hidden, from those around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from statezoo.datamodules.batch import IGNORE, Batch
from statezoo.kernels.linear_cross_entropy import linear_cross_entropy
from statezoo.lightning_modules.causal_lm import MIXERS, defaults
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
from statezoo.lightning_modules.task import OPTIM
from statezoo.lightning_modules.tokens import Reduction, TokenTask
from statezoo.lightning_modules.tuning import ADAPTER, Adapter, Tune
from statezoo.lightning_modules.vocabulary import Vocabulary
from statezoo.zoo import StateZooForMaskedLM
from statezoo.zoo.auxiliary import Auxiliary


class MaskedLM(TokenTask):
    """Train a language model to say hidden tokens from those on both sides.

    The loss is the mean over the scored tokens of one optimiser step, in nats: over all its
    micro-batches (``trainer.accumulate_grad_batches``) and processes, however unevenly filled. The
    data hides the tokens.

    Args:
        mixers: Mixers along time, by name, ``[gla, gla, attention]``, or as mappings of a ``name``
            and settings, ``[{name: gla, n_heads: 2}, attention]``; repeated over the layers.
        vocab_size: Number of symbols; comes from the data on the command line.
        d_model: Width of the stream of tokens.
        n_layers: Number of blocks.
        channel: Channel mixer, by name or as a mapping of a ``name`` and settings; null for none.
        tie_embeddings: Read and write symbols with one table.
        bidirectional: Run every mixer forward and backward in time.
        tie_directions: Run it with the same weights both ways.
        reverse_complement: What to do about the other strand of DNA: nothing; ``augment`` reads
            either in training; ``average`` takes the mean of the log-probabilities of both in
            validation, test and prediction; ``equivariant`` reads both with the same weights.
        complement: The complement of each symbol; comes from the data on the command line.
        optim: Optimiser and schedule.
        pretrained: Checkpoint, Hub folder or Hub name whose weights and shape to start from; one
            of a causal model too.
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

    net: StateZooForMaskedLM
    objective = "masked"

    def __init__(
        self,
        mixers: list[str | dict[str, Any]] = MIXERS,
        *,
        vocab_size: int = 256,
        d_model: int = 128,
        n_layers: int = 4,
        channel: str | dict[str, Any] | None = "swiglu",
        tie_embeddings: bool = True,
        bidirectional: bool = True,
        tie_directions: bool = True,
        reverse_complement: Treatment = "none",
        complement: list[int] | None = None,
        optim: Optim = OPTIM,
        pretrained: str | None = None,
        tune: Tune = "full",
        adapter: Adapter = ADAPTER,
        vocabulary: Vocabulary = "same",
        attention: dict[str, Any] | None = None,
    ) -> None:
        check_treatment(type(self).__name__, reverse_complement, complement)
        settings = {
            "vocab_size": vocab_size,
            "d_model": d_model,
            "n_layers": n_layers,
            "mixers": mixers,
            "channel": channel,
            "tie_embeddings": tie_embeddings,
            "bidirectional": bidirectional,
            "tie_directions": tie_directions,
            "complement": complement if reverse_complement == "equivariant" else None,
        }
        usual, kind = defaults(MaskedLM), StateZooForMaskedLM
        net = build_network(kind, settings, pretrained, usual, tune, vocabulary, attention)
        super().__init__(net, optim, pretrained, tune, adapter, vocabulary)
        self.reverse_complement, self.complement = treatment_of(
            reverse_complement, complement, net.config.complement
        )
        self.save_hyperparameters(self.plain_settings())

    def plain_settings(self) -> dict[str, Any]:
        """Return the arguments that build this module again, as plain data."""
        return {
            **super().plain_settings(),
            "bidirectional": self.net.config.bidirectional,
            "tie_directions": self.net.config.tie_directions,
            "reverse_complement": self.reverse_complement,
            "complement": self.complement,
        }

    def setup(self, stage: str) -> None:
        """Learn from the data what its symbols stand for, and have it read either strand if so."""
        super().setup(stage)
        if self.reverse_complement == "augment" and stage == "fit":
            augment(type(self).__name__, getattr(self.trainer, "datamodule", None))

    def scored_nll(self, batch: Batch, reduction: Reduction) -> tuple[Tensor, Auxiliary]:
        """Return nats: their sum or mean, or each ``[B T]``; and what mixers say beside."""
        x, weight, auxiliary = self._factors(batch)
        nll: Tensor = linear_cross_entropy(
            x, weight, batch["targets"], ignore_index=IGNORE, reduction=reduction
        )
        return nll, auxiliary

    def _factors(self, batch: Batch) -> tuple[Tensor, Tensor, Auxiliary]:
        """Return the two factors of the logits, and what mixers say beside."""
        out = self.net.model(
            input_ids=batch["tokens"],
            attention_mask=batch.get("attention_mask"),
            cu_seqlens=batch.get("cu_seqlens"),
        )
        return *self.net.head(out), out.auxiliary or {}

    def log_probabilities(self, batch: Batch) -> Tensor:
        """Log-probability of each symbol at each position ``[B T W]``, averaged if so over strands.

        The other strand's are turned back: both say something about the same place.
        """
        logits = F.linear(*self._factors(batch)[:2])
        if self.reverse_complement != "average" or self.complement is None:
            return logits.float().log_softmax(-1)
        other, index = other_strand(batch, self.complement, self.net.config.bos_token_id)
        turned = F.linear(*self._factors(other)[:2]).flatten(0, 1)[index].view_as(logits)
        table = torch.tensor(self.complement, device=logits.device)
        return mean_log_probabilities(logits, turned.index_select(-1, table))

    def evaluation_nll(self, batch: Batch, reduction: Reduction) -> Tensor:
        """Nats as they count in validation, test and prediction."""
        if self.reverse_complement != "average":
            return self.token_nll(batch, reduction)
        said, targets = self.log_probabilities(batch), batch["targets"]
        nll = F.nll_loss(
            said.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction=reduction
        )
        return nll.view_as(targets) if reduction == "none" else nll
