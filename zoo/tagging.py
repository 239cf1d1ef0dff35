"""The head that says something about every token."""

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import TokenClassifierOutput
from transformers.utils.generic import can_return_tuple

from statezoo.zoo.auxiliary import add_auxiliary
from statezoo.zoo.config import StateZooConfig
from statezoo.zoo.loss import IGNORE
from statezoo.zoo.model import StateZooModel, StateZooPreTrainedModel, StreamOutput
from statezoo.zoo.slices import refuse_slice


class StateZooForTokenClassification(StateZooPreTrainedModel):
    """A model that says a class, or tag, of each token; best with ``bidirectional=True``.

    Read on the other strand, a net with ``complement`` says the same tags in reversed order.

    Args:
        config: Sizes and parts, among them ``num_labels`` (or ``id2label``).

    Example:
        >>> config = StateZooConfig(vocab_size=8, mixers=["gla"], num_labels=3, bidirectional=True)
        >>> StateZooForTokenClassification(config)(torch.tensor([[3, 4, 5]])).logits.shape
        torch.Size([1, 3, 3])
    """

    def __init__(self, config: StateZooConfig) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels or 0)
        self.model = StateZooModel(config)
        self.score = nn.Linear(config.d_model, self.num_labels)
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
    ) -> TokenClassifierOutput:
        """Tag tokens; arguments as in :class:`StateZooModel`, and these.

        Args:
            input_ids: Tokens ``[B T]``.
            attention_mask: 1 for tokens, 0 for padding, anywhere.
            inputs_embeds: The stream ``[B T D]`` instead of tokens.
            labels: Tags ``[B T]``; -100 is not scored, nor is padding.
            cu_seqlens: Bounds of packed sequences.
            output_hidden_states: Whether to return the stream before every block, and the last.
            num_items_in_batch: Divides the summed loss, instead of the scored tokens here.
            **kwargs: What transformers passes to every model and this one has no use for.

        Returns:
            Logits ``[B T C]``, and the loss in nats per token if there are labels, in training
            mode with mixers' auxiliary losses.

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
        logits, loss = self.answers(out), None
        if labels is not None:
            if labels.shape != logits.shape[:2]:
                raise ValueError(
                    f"tags of tokens {[*logits.shape[:2]]} need labels of the same shape, got "
                    f"{[*labels.shape]}."
                )
            targets = scored_labels(labels, attention_mask)
            total = F.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
            )
            n, scored = num_items_in_batch, (targets != IGNORE).sum()
            loss = add_auxiliary(total / (scored if n is None else n), out.auxiliary, scored, n)
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)

    def answers(
        self,
        out: StreamOutput,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Return the logits ``[B T C]`` of what ``.model`` returned, however it is padded."""
        return cast(Tensor, self.score(out.last_hidden_state))


def scored_labels(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return labels ``[B T]`` of which padding is not scored."""
    if attention_mask is None:
        return labels
    real = attention_mask[:, attention_mask.shape[1] - labels.shape[1] :]
    return labels.masked_fill(real == 0, IGNORE)
