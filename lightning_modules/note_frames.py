"""The task: say which of many notes sound in each frame from the frames before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statezoo.datamodules.music.frames import FrameBatch
from statezoo.lightning_modules.metrics import PerCount
from statezoo.lightning_modules.optim import Optim
from statezoo.lightning_modules.task import OPTIM, Loss, Mixers, Task
from statezoo.zoo import StateZooConfig
from statezoo.zoo.auxiliary import Auxiliary
from statezoo.zoo.model import StateZooModel, StateZooPreTrainedModel

RARE = -3.0
"""Logit of every note before training: about 4 of 88 sound."""
EMBEDDING_STD = 0.2
"""Of the initial embedding: four notes together then weigh about as much as what a block adds."""


class FrameNetwork(StateZooPreTrainedModel):
    r"""A model that says the notes of each frame, as independent Bernoulli variables.

    .. math:: x_t = \textstyle\sum_n f_{t-1,n} E_n \text{ if a note sounds in } f_{t-1},
        \text{ else } s, \qquad p(f_{t,n} = 1 \mid f_{<t}) = \sigma(W_n h_t + b_n)

    where ``h`` is the stream of a :class:`StateZooModel` over ``x``, whose embedding is ``E``, and
    ``s`` stands for silence, which is also before the first frame. A stream of zeros would not do:
    every norm multiplies its gradient by up to ``eps ** -0.5``, past float32 within a few layers.

    Args:
        config: Sizes and parts; ``vocab_size`` is the number of notes.
        dropout: Part of the stream that training hides from the head.
        note_dropout: Part of the notes that training hides from the input.
    """

    def __init__(
        self, config: StateZooConfig, dropout: float = 0.0, note_dropout: float = 0.0
    ) -> None:
        super().__init__(config)
        self.model = StateZooModel(config)
        self.start = nn.Parameter(torch.zeros(config.d_model))
        self.notes = nn.Linear(config.d_model, config.vocab_size)
        self.dropout, self.note_dropout = dropout, note_dropout
        self.post_init()  # type: ignore[no-untyped-call]
        for part in (self.start, self.model.get_input_embeddings().weight):
            nn.init.normal_(part, std=EMBEDDING_STD)
        nn.init.constant_(self.notes.bias, RARE)

    def forward(self, frames: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """Return logits of every frame given those before it, ``[B T N]``, and auxiliary values.

        Args:
            frames: ``[B T N]`` zeros and ones of any dtype.
            attention_mask: ``[B T]``: 1 for frames, 0 for padding; None where there is none.
        """
        table = self.model.get_input_embeddings().weight
        read = F.dropout(frames[:, :-1].to(table), self.note_dropout, self.training)
        read = F.pad(read, (0, 0, 1, 0))  # before the first frame nothing sounds
        sounds = (read > 0).any(-1, keepdim=True)
        out = self.model(
            inputs_embeds=torch.where(sounds, read @ table, self.start),
            attention_mask=attention_mask,
            use_cache=False,
        )
        x = F.dropout(out.last_hidden_state, self.dropout, self.training)
        return self.notes(x), out.auxiliary or {}


class NoteFrames(Task):
    """Say the notes of each frame of a piano roll from all frames before it.

    The loss is in nats per frame, summed over its notes, which are independent given the past. The
    first frame, and one after silence, is said from a learned start; padding is never scored.

    Args:
        mixers: Mixers along time, by name, ``[gla, attention]``, or as mappings of a ``name`` and
            settings, ``[{name: gla, n_heads: 2}]``; repeated over the layers.
        vocab_size: Number of notes; comes from the data on the command line.
        d_model: Width of the stream of frames.
        n_layers: Number of blocks.
        channel: Channel mixer, by name or as a mapping of a ``name`` and settings; null for none.
        dropout: Part of the stream that training hides from the head.
        note_dropout: Part of the notes that training hides from the input.
        optim: Optimiser and schedule.

    Raises:
        ValueError: If a setting is unknown or out of range.
    """

    scored = "frame"
    objective = "frames"

    def __init__(
        self,
        mixers: Mixers = ["gla"],  # noqa: B006  # never changed
        *,
        vocab_size: int = 88,
        d_model: int = 128,
        n_layers: int = 2,
        channel: str | dict[str, Any] | None = "swiglu",
        dropout: float = 0.3,
        note_dropout: float = 0.1,
        optim: Optim = OPTIM,
    ) -> None:
        for name, value in (("dropout", dropout), ("note_dropout", note_dropout)):
            if not 0 <= value < 1:
                raise ValueError(f"NoteFrames needs 0 <= {name} < 1, got {value}.")
        config = StateZooConfig(
            vocab_size=vocab_size,
            d_model=d_model,
            n_layers=n_layers,
            mixers=mixers,
            channel=channel,
        )
        super().__init__(FrameNetwork(config, dropout, note_dropout), optim)
        self.unit = "frame"
        self.nll = nn.ModuleDict({stage: PerCount() for stage in ("val", "test")})
        self.bits = nn.ModuleDict({stage: PerCount(bits=True) for stage in ("val", "test")})
        self.save_hyperparameters(self.plain_settings())

    def plain_settings(self) -> dict[str, Any]:
        """Return the arguments that build this module again, as plain data."""
        settings = super().plain_settings()
        for key in ("pretrained", "tune", "adapter"):  # it always starts anew
            del settings[key]
        hidden = {"dropout": self.net.dropout, "note_dropout": self.net.note_dropout}
        return {**settings, **hidden}

    # ------------------------------------------------------------------ loss

    def frame_nll(self, batch: FrameBatch) -> Tensor:
        """Nats of each frame ``[B T]``, 0 at padding."""
        return self._nll(batch)[0]

    def _nll(self, batch: FrameBatch) -> tuple[Tensor, Tensor, Auxiliary]:
        """Return the nats of each frame, which are scored, and what mixers say beside."""
        frames, lengths = batch["frames"], batch["lengths"]
        place = torch.arange(frames.shape[1], device=frames.device)
        read = place < lengths.clamp(min=1)[:, None]  # a row without frames is read, not scored
        mask = None if bool(read.all()) else read.long()
        logits, auxiliary = self.net(frames, mask)
        nats = F.binary_cross_entropy_with_logits(
            logits.float(), frames.float(), reduction="none"
        ).sum(-1)
        scored = place < lengths[:, None]
        return nats * scored, scored, auxiliary

    def training_loss(self, batch: Any) -> Loss:
        """Return the nats of all frames."""
        nats, scored, auxiliary = self._nll(batch)
        return Loss(nats=nats.sum(), count=scored.sum(), auxiliary=auxiliary)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the summed loss as every task does; a frame counts as one token read."""
        read: Any = {**batch, "tokens": batch["frames"][..., 0]}
        return super().training_step(read, batch_idx)

    # -------------------------------------------------------------- evaluation

    def _evaluate(self, batch: FrameBatch, stage: str) -> None:
        nats, scored, _ = self._nll(batch)
        metrics: dict[str, Any] = {"nll": self.nll[stage], "bits_per_frame": self.bits[stage]}
        for name, metric in metrics.items():
            metric.update(nats.sum(), scored.sum())
            self.log_mean(f"{stage}/{name}", metric, bar=name == "nll")

    def validation_step(self, batch: FrameBatch, batch_idx: int) -> None:
        """Average over all frames of the split."""
        self._evaluate(batch, "val")

    def test_step(self, batch: FrameBatch, batch_idx: int) -> None:
        """Average over all frames of the split."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: FrameBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return ``nll``, the nats of each frame ``[B T]``, and ``scored``, which count."""
        nats, scored, _ = self._nll(batch)
        return {"nll": nats, "scored": scored}
