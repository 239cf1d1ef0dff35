"""The task: say the next token with a linearised model, near its teacher if that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statezoo.datamodules.batch import IGNORE, Batch
from statezoo.lightning_modules.causal_lm import MIXERS, CausalLM
from statezoo.lightning_modules.metrics import PerCount
from statezoo.lightning_modules.network import load_network
from statezoo.lightning_modules.optim import Optim
from statezoo.lightning_modules.tokens import Reduction
from statezoo.lightning_modules.tuning import Adapter, Tune
from statezoo.zoo.auxiliary import Auxiliary

OPTIM = Optim(lr=1e-3, weight_decay=0.0)
LORA = Adapter(rank=8, alpha=8.0, targets=["q_proj", "k_proj", "v_proj"])


class Linearize(CausalLM):
    r"""Train a linearised Transformer, what ``statezoo linearize`` writes, to write as before.

    .. math::
        \mathrm{NLL} + a \, \mathrm{mean}_l \, |y_l - y^*_l|^2
        + b \, \tau^2 \, \mathrm{KL}(p^*_\tau \,\|\, p_\tau)

    ``y_l`` is what the liger mixer of layer ``l`` adds to the stream and ``y*_l`` what the
    teacher's attention there would on the same input, as a mean over channels and tokens; ``p*``
    is what the teacher expects of the next token, at temperature ``tau``, as a mean over scored
    tokens. The teacher is no part of this module: it has no gradients, and no checkpoint holds it.

    Args:
        mixers: Mixers along time; they come from ``pretrained``.
        vocab_size: Number of symbols; comes from the data on the command line.
        d_model: Width of the stream of tokens.
        n_layers: Number of blocks.
        channel: Channel mixer.
        tie_embeddings: Read and write symbols with one table.
        optim: Optimiser and schedule.
        pretrained: The linearised model.
        teacher: What it was made of: folder, name on the Hub or checkpoint. Needed where a weight
            is above 0; where it is given, validation logs its ``val/teacher_nll`` too.
        attention_transfer: Weight ``a``, at least 0.
        distillation: Weight ``b``, at least 0; holds the logits of a batch in memory, twice.
        temperature: ``tau``, above 0.
        tune: What of the weights is trained.
        adapter: Settings of ``lora``.

    Raises:
        ValueError: If a setting is out of range, or a weight needs a teacher and there is none.

    Source: Lan et al., Liger, arXiv:2503.01496v2, section 3.3; attention transfer after Zhang et
    al., LoLCATs, arXiv:2410.10254v3, section 3.1; distillation after Hinton et al.,
    arXiv:1503.02531v1, section 2.
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
        teacher: str | None = None,
        attention_transfer: float = 0.0,
        distillation: float = 0.0,
        temperature: float = 1.0,
        tune: Tune = "lora",
        adapter: Adapter = LORA,
    ) -> None:
        if attention_transfer < 0 or distillation < 0 or temperature <= 0:
            raise ValueError(
                "linearize needs attention_transfer and distillation of at least 0 and a "
                f"temperature above 0, got {attention_transfer}, {distillation} and {temperature}."
            )
        if teacher is None and (attention_transfer or distillation):
            raise ValueError(
                "attention_transfer and distillation need the teacher: give --model.teacher "
                "NAME_OR_PATH, or set both to 0."
            )
        super().__init__(
            mixers,
            vocab_size=vocab_size,
            d_model=d_model,
            n_layers=n_layers,
            channel=channel,
            tie_embeddings=tie_embeddings,
            optim=optim,
            pretrained=pretrained,
            tune=tune,
            adapter=adapter,
        )
        if pretrained is not None and not self._linearized():
            raise ValueError(
                f"no layer of {pretrained!r} is liger: make a linearised model first, "
                f"statezoo linearize --teacher {pretrained} --out FOLDER."
            )
        self.teacher, self.temperature = teacher, temperature
        self.attention_transfer, self.distillation = attention_transfer, distillation
        self.teacher_nll = PerCount()
        self._teacher: list[Any] = []  # hidden from torch: no parameter of this module
        self.save_hyperparameters(self.plain_settings())

    def plain_settings(self) -> dict[str, Any]:
        """Return the arguments that build this module again, as plain data."""
        own = ("teacher", "attention_transfer", "distillation", "temperature")
        return {**super().plain_settings(), **{key: getattr(self, key, None) for key in own}}

    def _linearized(self) -> list[int]:
        """List the layers that are liger."""
        mixers = self.net.config.layer_mixers
        return [i for i, mixer in enumerate(mixers) if mixer["name"] == "liger"]

    # ----------------------------------------------------------------- teacher

    def setup(self, stage: str) -> None:
        """Read the teacher before training; see :meth:`read_teacher`.

        Raises:
            ValueError: If states are to be carried: a teacher sees its window alone.
        """
        super().setup(stage)
        if stage == "fit":
            if self.teacher and getattr(getattr(self.trainer, "datamodule", None), "carry", False):
                raise ValueError(
                    "a teacher sees no more than a window, the model would: set data.carry to "
                    "false, or leave model.teacher out."
                )
            self.read_teacher()

    def read_teacher(self) -> None:
        """Read the teacher, if there is one.

        Raises:
            ValueError: If it cannot be the one that the network was made of.
        """
        if self.teacher is None:
            return
        teacher: Any = load_network(self.teacher)
        teacher.eval().requires_grad_(False)
        for key in ("vocab_size", "d_model", "n_layers"):
            has, wanted = (getattr(net.config, key) for net in (teacher, self.net))
            if has != wanted:
                raise ValueError(
                    f"the teacher {self.teacher!r} has {key} {has}, the model {wanted}: give the "
                    "one that it was made of."
                )
        self._teacher = [teacher]

    def _teach(self, batch: Batch) -> Tensor:
        """Return the teacher's stream ``[B T D]`` before its head."""
        teacher = self._teacher[0].to(self.device)
        with torch.no_grad():
            out = teacher.model(
                input_ids=batch["tokens"],
                attention_mask=batch.get("attention_mask"),
                cu_seqlens=batch.get("cu_seqlens"),
                use_cache=False,
            )
        stream: Tensor = out.last_hidden_state
        return stream

    def _teacher_logits(self, batch: Batch, scored: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self._teacher[0].lm_head(self._teach(batch)[scored])
        return logits

    # -------------------------------------------------------------------- loss

    def scored_nll(self, batch: Batch, reduction: Reduction) -> tuple[Tensor, Auxiliary]:
        """Return nats: their sum or mean, or each ``[B T]``; and the distances from the teacher."""
        follows = self.attention_transfer or self.distillation
        if not (self.training and self._teacher and follows):
            return super().scored_nll(batch, reduction)
        errors: list[Tensor] = []
        streams: list[Tensor] = []
        with self._watched(errors, streams):
            nats, auxiliary = super().scored_nll(batch, reduction)
        loss, beside = nats.new_zeros(()), {}
        if self.attention_transfer:
            beside["attention_error"] = torch.stack(errors).mean()
            loss = loss + self.attention_transfer * beside["attention_error"]
        if self.distillation:
            beside["distillation"] = self._divergence(batch, streams[0])
            loss = loss + self.distillation * beside["distillation"]
        said: Auxiliary = auxiliary or {0: {"loss": torch.zeros_like(loss)}}
        first = next(iter(said))  # the mean over what has a loss is what counts
        said = {i: found | {"loss": found["loss"] + loss} for i, found in said.items()}
        said[first] |= beside
        return nats, said

    def _divergence(self, batch: Batch, stream: Tensor) -> Tensor:
        """Return the mean divergence from the teacher at scored tokens, times temperature^2."""
        scored, tau = batch["targets"] != IGNORE, self.temperature
        mine = F.log_softmax(self.net.lm_head(stream[scored]).float() / tau, -1)
        wanted = F.log_softmax(self._teacher_logits(batch, scored).float() / tau, -1)
        nats = F.kl_div(mine, wanted, reduction="sum", log_target=True)
        return tau**2 * nats / scored.sum().clamp(min=1)

    @contextmanager
    def _watched(self, errors: list[Tensor], streams: list[Tensor]) -> Iterator[None]:
        """Note the distance of every liger mixer from attention, and the stream before the head."""
        body, teacher = self.net.model, self._teacher[0].to(self.device).model
        handles = [
            body.register_forward_hook(lambda _net, _x, out: streams.append(out.last_hidden_state))
        ]
        if self.attention_transfer:
            for i in self._linearized():
                hook = error_of(teacher.layers[i].mixer, errors)
                handles.append(body.layers[i].mixer.register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Average over all scored tokens of the split, the teacher's beside."""
        super().validation_step(batch, batch_idx)
        if self._teacher:
            scored = batch["targets"] != IGNORE
            logits = self._teacher_logits(batch, scored).float()
            nats = F.cross_entropy(logits, batch["targets"][scored], reduction="sum")
            self.teacher_nll.update(nats, scored.sum())
            self.log_mean("val/teacher_nll", self.teacher_nll)


def error_of(attention: nn.Module, errors: list[Tensor]) -> Callable[..., None]:
    """Return a hook that notes how far a mixer is from what attention makes of the same input."""

    def note(_mixer: nn.Module, given: tuple[Any, ...], made: tuple[Tensor, Any]) -> None:
        x, _, cu_seqlens = given
        with torch.no_grad():
            wanted, _ = attention(x, None, cu_seqlens)
        errors.append(F.mse_loss(made[0].float(), wanted.float()))

    return note
