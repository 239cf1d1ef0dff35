"""Heads beside the causal one: masked tokens, and one answer per sequence; and a change of head."""

from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from statezoo.zoo.auxiliary import add_auxiliary
from statezoo.zoo.config import LABELS, StateZooConfig
from statezoo.zoo.loss import IGNORE, mean_loss
from statezoo.zoo.model import (
    StateZooForCausalLM,
    StateZooModel,
    StateZooPreTrainedModel,
    StreamOutput,
)
from statezoo.zoo.pooling import TERMS, pool
from statezoo.zoo.slices import refuse_slice
from statezoo.zoo.strands import head_of_both
from statezoo.zoo.tagging import StateZooForTokenClassification, scored_labels

Net = TypeVar("Net", bound=StateZooPreTrainedModel)


class StateZooForMaskedLM(StateZooPreTrainedModel):
    """A model that says which tokens were hidden; best with ``bidirectional=True``.

    Args:
        config: Sizes and parts.

    Example:
        >>> config = StateZooConfig(vocab_size=8, mixers=["gla"], bidirectional=True)
        >>> StateZooForMaskedLM(config)(torch.tensor([[3, 2, 5]])).logits.shape
        torch.Size([1, 3, 8])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: StateZooConfig) -> None:
        super().__init__(config)
        self.model = StateZooModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Predict tokens in their own places; arguments as in :class:`StateZooModel`, and these.

        Args:
            input_ids: Tokens ``[B T]``, some of them hidden.
            attention_mask: 1 for tokens, 0 for padding, anywhere.
            inputs_embeds: The stream ``[B T D]`` instead of tokens.
            labels: What stands in each place ``[B T]``, not shifted; -100 is not scored, nor is
                padding.
            cu_seqlens: Bounds of packed sequences.
            output_hidden_states: Whether to return the stream before every block, and the last.
            num_items_in_batch: Divides the summed loss, instead of the scored tokens here.
            **kwargs: What transformers passes to every model and this one has no use for.

        Returns:
            Loss in nats per token if there are labels, and logits ``[B T W]``; in training mode
            with labels no logits, and mixers' auxiliary losses are added.

        Raises:
            ValueError: If arguments exclude each other or shapes disagree.
            TypeError: If an argument is unknown.
        """
        refuse_slice(labels=labels)
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cu_seqlens=cu_seqlens,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        (x, weight), loss, logits = self.head(out), None, None
        if labels is not None:
            targets = scored_labels(labels, attention_mask)
            n, scored = num_items_in_batch, (targets != IGNORE).sum()
            loss = add_auxiliary(mean_loss(x, weight, targets, n), out.auxiliary, scored, n)
        if labels is None or not self.training:
            logits = self.lm_head(x) if out.strands is None else F.linear(x, weight)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)

    def head(self, out: StreamOutput) -> tuple[Tensor, Tensor]:
        """Return the two factors of the logits.

        Args:
            out: What ``.model`` returned.

        Returns:
            ``x [B T D]`` and ``weight [W D]`` such that the logits are ``x @ weight.T``, as
            ``linear_cross_entropy`` takes them; ``2D`` wide where both strands are read.
        """
        if out.strands is None:
            return cast(Tensor, out.last_hidden_state), self.lm_head.weight
        return out.strands, head_of_both(self.lm_head.weight, self.config.complement or [])


class StateZooForSequenceClassification(StateZooPreTrainedModel):
    """A model that says one thing about each sequence: a class, several, or numbers.

    Args:
        config: Sizes and parts, among them ``num_labels`` (or ``id2label``), ``problem_type`` and
            ``pooling``.

    Example:
        >>> config = StateZooConfig(vocab_size=8, mixers=["gla"], num_labels=3)
        >>> StateZooForSequenceClassification(config)(torch.tensor([[3, 4, 5]])).logits.shape
        torch.Size([1, 3])
    """

    def __init__(self, config: StateZooConfig) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels or 0)
        self.model = StateZooModel(config)
        width = config.d_model * (TERMS if config.pooling == "profile" else 1)
        self.score = nn.Linear(width, self.num_labels)
        self.post_init()  # type: ignore[no-untyped-call]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Classify sequences; arguments as in :class:`StateZooModel`, and these.

        Args:
            input_ids: Tokens ``[B T]``.
            attention_mask: 1 for tokens, 0 for padding, anywhere.
            inputs_embeds: The stream ``[B T D]`` instead of tokens.
            labels: Classes ``[B]``, -100 where not scored; or numbers ``[B]`` or ``[B C]`` for a
                regression; or ``[B C]`` of 0 and 1 for several classes. ``problem_type`` says
                which; without, one label means regression, and whole numbers mean classes.
            cu_seqlens: Bounds of packed sequences.
            output_hidden_states: Whether to return the stream before every block, and the last.
            num_items_in_batch: Divides the summed loss, instead of the numbers scored here.
            **kwargs: What transformers passes to every model and this one has no use for.

        Returns:
            Logits ``[B C]``, a row per sequence, packed or not, and the loss if there are labels:
            nats per class, or squared error; in training mode with mixers' auxiliary losses.

        Raises:
            ValueError: If arguments exclude each other or shapes disagree.
            TypeError: If an argument is unknown.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cu_seqlens=cu_seqlens,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        logits, loss = self.answers(out, attention_mask, cu_seqlens), None
        if labels is not None:
            total, scored = self.loss_sum(logits, labels)
            n = num_items_in_batch
            loss = add_auxiliary(total / (scored if n is None else n), out.auxiliary, scored, n)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)

    def answers(
        self,
        out: StreamOutput,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Return the logits ``[B C]`` of what ``.model`` returned.

        With ``label_scale`` they are numbers in units of their own, in float32 at least.
        """
        logits: Tensor = self.score(self.pool(out, attention_mask, cu_seqlens))
        if self.config.label_scale is None:
            return logits
        acc = torch.promote_types(logits.dtype, torch.float32)
        mean, std = torch.tensor(self.config.label_scale, dtype=acc, device=logits.device).unbind(1)
        return mean + std * logits.to(acc)

    def pool(
        self, out: StreamOutput, attention_mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        """Sum up each sequence, the same for both of its strands if both are read.

        Returns:
            ``[B D]``, or ``[B 64D]`` as a profile.
        """
        how = self.config.pooling
        if how == "mean" or out.strands is None:
            return pool(cast(Tensor, out.last_hidden_state), attention_mask, cu_seqlens, how)
        ahead, behind = out.strands.chunk(2, -1)  # the last token of the other strand comes first
        one = pool(ahead, attention_mask, cu_seqlens, how)
        other = pool(behind, attention_mask, cu_seqlens, "first" if how == "last" else how)
        if how == "profile":  # odd cosines change sign where a sequence is turned round
            sign = 1 - 2 * (torch.arange(TERMS, device=other.device) % 2)
            other = (other.unflatten(-1, (TERMS, -1)) * sign[:, None]).flatten(1)
        return (one + other) / 2

    def loss_sum(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Add up the losses of ``logits [B C]``; return the sum and how many there are.

        Raises:
            ValueError: If the labels do not fit the problem.
        """
        kind: str | None = self.config.problem_type
        if kind is None:
            whole = not labels.is_floating_point()
            several = "single_label" if whole else "multi_label"
            kind = "regression" if self.num_labels == 1 else f"{several}_classification"
        shape = logits.shape[:1] if kind == "single_label_classification" else logits.shape
        if labels.numel() != shape.numel():
            raise ValueError(
                f"{kind} with {self.num_labels} labels of {len(logits)} sequences needs labels "
                f"{[*shape]}, got {[*labels.shape]}."
            )
        labels = labels.view(shape)
        if kind == "single_label_classification":
            total = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="sum")
            return total, (labels != IGNORE).sum()
        losses = F.mse_loss if kind == "regression" else F.binary_cross_entropy_with_logits
        total = losses(logits, labels.to(logits.dtype), reduction="sum")
        return total, torch.tensor(labels.numel(), device=logits.device)


@dataclass(frozen=True)
class Exchanged:
    """Tensors by name: those that a change of head ``dropped``, and those that are ``new``."""

    dropped: list[str]
    new: list[str]


def with_head(
    net: StateZooPreTrainedModel, kind: type[Net], **changes: Any
) -> tuple[Net, Exchanged]:
    """Copy a trained net into one for another task: the body stays, the head is new.

    A head that fits stays too: that of a causal model in a masked one; that of a classifier where
    it goes on to say the same kind of thing. A causal body may become ``bidirectional``; untied,
    its backward direction starts as a copy of the forward one.

    Args:
        net: The trained net.
        kind: Class of the new one.
        **changes: Keys of the configuration that are to differ, such as ``num_labels``.

    Returns:
        The new net, on the device of ``net``, and what became of the heads.

    Raises:
        ValueError: If the changes leave no room for the body's weights.

    Example:
        >>> net, exchanged = with_head(net, StateZooForSequenceClassification, num_labels=3)
        >>> exchanged
        Exchanged(dropped=['lm_head.weight'], new=['score.bias', 'score.weight'])
    """
    config = net.config.to_dict()
    ours = [*net.config.own_keys(), *LABELS]
    names = {"num_labels", "id2label", "label2id"}
    stale = names if changes.keys() & names else set()  # other labels have other names
    if stale and changes.get("id2label") != net.config.id2label:
        stale |= {"label_scale"}  # other numbers have other units
    kept = {key: config[key] for key in ours if key in config and key not in stale}
    new = kind(StateZooConfig(**{**kept, **changes}))
    prefix = "model." if isinstance(net, StateZooModel) else ""
    old = {prefix + name: tensor for name, tensor in net.state_dict().items()}
    problem = config.get("problem_type")
    if type(net) is not kind or problem not in (None, new.config.problem_type):
        old = {name: x for name, x in old.items() if not name.startswith("score.")}
    wanted = new.state_dict()
    for name in wanted.keys() - old.keys():
        ahead = name.replace(".mixer_back.", ".mixer.")
        ahead = ahead.replace(".initial_state_back.", ".initial_state.")
        if ahead in old:
            old[name] = old[ahead]
    fits = {k: x for k, x in old.items() if k in wanted and x.shape == wanted[k].shape}
    dropped, missing = sorted(old.keys() - fits.keys()), sorted(wanted.keys() - fits.keys())
    if lost := [name for name in {*dropped, *missing} if name.startswith("model.")]:
        raise ValueError(
            f"a new head leaves the body as it is, but {changes} changes the tensors "
            f"{', '.join(sorted(lost))}."
        )
    for name, parameter in new.named_parameters():
        dtype = fits[name].dtype if name in fits else net.dtype
        parameter.data = parameter.data.to(net.device, dtype)
    new.load_state_dict(fits, strict=False)
    if "label_scale" not in changes and not any(name.startswith("score.") for name in fits):
        new.config.label_scale = None  # of the head that is gone
    return new.train(net.training), Exchanged(dropped, missing)


TASKS: dict[str, type[StateZooPreTrainedModel]] = {
    "causal": StateZooForCausalLM,
    "masked": StateZooForMaskedLM,
    "classification": StateZooForSequenceClassification,
    "tagging": StateZooForTokenClassification,
}
