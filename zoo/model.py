"""The one skeleton: embedding, blocks of mixer and channel mixer, norm, head."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from statezoo.kernels.sequence import Shard
from statezoo.zoo.auxiliary import Auxiliary, add_auxiliary, take_auxiliary
from statezoo.zoo.bidirectional import Reversal, both_ways
from statezoo.zoo.cache import states_of
from statezoo.zoo.calls import check_causal, check_unknown
from statezoo.zoo.channel import CHANNELS
from statezoo.zoo.config import StateZooConfig
from statezoo.zoo.initial_state import begin, learnt_state
from statezoo.zoo.loss import IGNORE, mean_loss, next_tokens
from statezoo.zoo.mixer import Mixer, State, build_mixer
from statezoo.zoo.norm import RMSNorm
from statezoo.zoo.padding import find_padding
from statezoo.zoo.settings import build
from statezoo.zoo.slices import check_slice, refuse_slice
from statezoo.zoo.strands import Strands, merge


@dataclass
class StreamOutput(BaseModelOutputWithPast):
    """The stream and the states; in training mode also what mixers say beside.

    That is numbered as in :meth:`StateZooModel.mixers`: by layer, then those that run backward.
    The stream of a net that reads both strands is their mean; ``strands [B T 2D]`` has both.
    """

    strands: Tensor | None = None
    auxiliary: Auxiliary | None = None


class Block(GradientCheckpointingLayer):
    """Add to the stream what the mixer and then the channel mixer make of it, each after a norm.

    Args:
        config: Sizes and channel mixer.
        mixer: The mixer's name and settings.
    """

    def __init__(self, config: StateZooConfig, mixer: dict[str, Any]) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer: Mixer = build_mixer(mixer, config.d_model)
        self.mixer_back: Mixer | None = None
        if config.bidirectional and not config.tie_directions:
            self.mixer_back = build_mixer(mixer, config.d_model)
        rank = config.initial_states
        self.initial_state = learnt_state(mixer, config.d_model, rank)
        back = None if self.mixer_back is None else rank
        self.initial_state_back = learnt_state(mixer, config.d_model, back)
        self.channel: nn.Module | None = None
        if config.channel is not None:
            self.channel_norm = RMSNorm(config.d_model, config.norm_eps)
            self.channel = build(CHANNELS, config.channel, config.d_model, "channel mixer")

    def forward(
        self,
        x: Tensor,
        state: State = None,
        cu_seqlens: Tensor | None = None,
        reversal: Reversal | None = None,
        shard: Shard | None = None,
        ids: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Transform the stream ``x [B T D]``; under autocast it stays in the weights' dtype.

        ``shard`` is the one that is open, for when this is run again in the backward pass; ``ids``
        are the tokens ``[B T]``, for mixers that read them.
        """
        y = self.mixer_norm(x)
        learnt = self.initial_state, self.initial_state_back
        if reversal is None:
            state = begin(learnt[0], y, cu_seqlens) if state is None else state
            with shard or nullcontext():
                y, state = self.mixer.mix(y, state, cu_seqlens, ids)
        else:
            y = both_ways(self.mixer, self.mixer_back, learnt, y, cu_seqlens, reversal, ids)
        x = x + y
        if self.channel is not None:
            x = x + self.channel(self.channel_norm(x))
        return x, state

    def first_state(self, n: int, like: Tensor) -> State:
        """Return the state of ``n`` sequences before their first token, whole, for a cache."""
        state = self.mixer.initial_state(n, like)
        return state if self.initial_state is None else self.initial_state(n, state)


class StateZooPreTrainedModel(PreTrainedModel):
    """What all models share: configuration, initial values, strict loading."""

    config_class = StateZooConfig
    config: StateZooConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _is_stateful = True
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "bound_bias", "initial_state"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        """Give a module its initial values, children before parents."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Mixer):
            loaded = (getattr(p, "_is_hf_initialized", False) for p in module.parameters())
            if not any(loaded):
                module.reset_parameters(self.config.n_layers)

    @classmethod
    def from_pretrained(cls, *args: Any, strict: bool = True, **kwargs: Any) -> Any:
        """Load a model; see transformers' method of this name.

        Args:
            *args: Folder or Hub id, as transformers takes them.
            strict: Whether every tensor must be there, fit, and have a place.
            **kwargs: Further arguments of transformers.

        Raises:
            ValueError: If a tensor is missing, left over or of the wrong shape.
        """
        wanted = kwargs.pop("output_loading_info", False)
        if strict:
            kwargs.setdefault(
                "ignore_mismatched_sizes", True
            )  # they are reported below, with names
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        faults = {
            "missing": sorted(info["missing_keys"]),
            "left over": sorted(info["unexpected_keys"]),
            "of another shape": sorted(str(key) for key in info["mismatched_keys"]),
        }
        if strict and any(faults.values()):
            listed = "; ".join(
                f"{what}: {', '.join(keys)}" for what, keys in faults.items() if keys
            )
            raise ValueError(
                f"the checkpoint does not fit its configuration: {listed}. "
                "Pass strict=False to load what fits."
            )
        return (model, info) if wanted else model


class StateZooModel(StateZooPreTrainedModel):
    """Embedding, blocks and final norm.

    Args:
        config: Sizes and parts.
    """

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.", r"^score\."]  # noqa: RUF012

    def __init__(self, config: StateZooConfig) -> None:
        config.resolve()
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList([Block(config, mixer) for mixer in config.layer_mixers])
        for layer, block in enumerate(self.layers):
            for part in block.modules():
                if isinstance(part, Mixer):
                    part.layer = layer
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.embeddings = cast(nn.Embedding, value)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> StreamOutput:
        """Run the blocks over tokens.

        Args:
            input_ids: Tokens ``[B T]``.
            attention_mask: ``[B T]``, or ``[B past+T]``: 1 for tokens, 0 for padding, anywhere.
            past_key_values: States of the tokens before these.
            inputs_embeds: The stream ``[B T D]`` instead of tokens.
            use_cache: Whether to return the states; by default if ``past_key_values`` is given.
            cu_seqlens: Bounds ``[N+1]`` of sequences packed along ``T``; then ``B = 1``.
            output_hidden_states: Whether to return the stream before every block, and the last.
            **kwargs: What transformers passes to every model and this one has no use for.

        Returns:
            The stream after the final norm, zero at padding, the states, and in training mode what
            mixers say beside.

        Raises:
            ValueError: If arguments exclude each other or the configuration, or shapes disagree.
            TypeError: If an argument is unknown.
        """
        check_unknown(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds.")
        refuse_slice(
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            complement=self.config.complement,
            bidirectional=self.config.bidirectional,
        )
        x = cast(Tensor, input_ids if inputs_embeds is None else inputs_embeds)
        if past_key_values is not None or use_cache:
            check_causal(self.config)
        B, T = x.shape[:2]
        padding = find_padding(attention_mask, B, T)
        if padding is not None:
            if cu_seqlens is not None:
                raise ValueError("give either cu_seqlens or an attention_mask with padding.")
            x, cu_seqlens = padding.pack(x), padding.cu_seqlens
        strands = None
        if self.config.complement is not None:
            if inputs_embeds is not None:
                raise ValueError(
                    "a net that reads both strands needs input_ids: of these it makes "
                    "the other strand."
                )
            strands = Strands(x, cu_seqlens, self.config.complement)
            x, cu_seqlens = strands.ids, strands.cu_seqlens
        ids = x if inputs_embeds is None else None
        if ids is not None:
            x = self.embeddings(ids)
        cache = past_key_values
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        streams = self._run(x, ids, cu_seqlens, cache, T)
        if not output_hidden_states:
            streams = streams[-1:]
        if strands is not None:
            streams = [strands.align(x) for x in streams]
        if padding is not None:
            streams = [padding.unpack(x) for x in streams]
        last = streams[-1]
        if strands is not None:
            streams = [merge(x) for x in streams]
        return StreamOutput(
            last_hidden_state=streams[-1],
            past_key_values=cache,
            hidden_states=tuple(streams) if output_hidden_states else None,
            strands=None if strands is None else last,
            auxiliary=take_auxiliary(self.mixers() if self.training else []) or None,
        )

    def mixers(self) -> list[Mixer]:
        """List the mixers of all layers, then those that run backward, if they are others."""
        blocks = [cast(Block, block) for block in self.layers]
        back = [block.mixer_back for block in blocks if block.mixer_back is not None]
        return [*(block.mixer for block in blocks), *back]

    def _run(
        self, x: Tensor, ids: Tensor | None, cu_seqlens: Tensor | None, cache: Cache | None, T: int
    ) -> list[Tensor]:
        """Return the stream before every block and after the final norm; update the cache."""
        n = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        memory = [None] * len(self.layers) if cache is None else states_of(cache)
        if len(memory) != len(self.layers):
            raise ValueError(
                f"the cache has {len(memory)} layers, the model {len(self.layers)}: was it made by "
                "another model?"
            )
        streams, shard = [], check_slice(x, cu_seqlens)
        reversal = Reversal(x, cu_seqlens) if self.config.bidirectional else None
        for block, layer in zip(self.layers, memory, strict=True):
            streams.append(x)
            if layer is None:
                x, _ = block(x, None, cu_seqlens, reversal, shard, ids)
                continue
            state = cast(Block, block).first_state(n, x) if layer.state is None else layer.state
            x, state = block(x, state, cu_seqlens, ids=ids)
            layer.put(state, T)
        return [*streams, self.norm(x)]


class StateZooForCausalLM(StateZooPreTrainedModel, GenerationMixin):
    """A model that predicts the next token.

    Args:
        config: Sizes and parts.

    Raises:
        ValueError: If the net would see the tokens that it is to predict.

    Example:
        >>> net = StateZooForCausalLM(StateZooConfig(vocab_size=256, mixers=["gla"]))
        >>> net.generate(torch.tensor([[72, 101]]), max_new_tokens=8).shape
        torch.Size([1, 10])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: StateZooConfig) -> None:
        if not config.is_causal:
            key = "bidirectional: true" if config.bidirectional else "complement"
            raise ValueError(
                f"a causal language model cannot have {key}: the other direction, or strand, shows "
                "the tokens that are to be predicted, and nothing can be generated. Use "
                "StateZooForMaskedLM; a causal model takes reverse complements by augmentation."
            )
        super().__init__(config)
        self.model = StateZooModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the token after each; arguments as in :class:`StateZooModel`, and these.

        Args:
            input_ids: Tokens ``[B T]``.
            attention_mask: 1 for tokens, 0 for padding, anywhere.
            past_key_values: States of the tokens before these.
            inputs_embeds: The stream ``[B T D]`` instead of tokens.
            labels: Tokens to predict ``[B T]``, usually ``input_ids``; shifted by one in here, -100
                is not scored, nor is padding, nor a token from another packed sequence.
            use_cache: Whether to return the states; by default if ``past_key_values`` is given.
            logits_to_keep: Compute this many last logits, or those at these positions; 0 for all.
            cu_seqlens: Bounds of packed sequences.
            output_hidden_states: Whether to return the stream before every block, and the last.
            num_items_in_batch: Divides the summed loss, instead of the scored tokens here, for
                means over accumulated batches.
            **kwargs: What transformers passes to every model and this one has no use for.

        Returns:
            Loss in nats per token if there are labels, logits ``[B T W]``, and states. In training
            mode with labels there are no logits: the loss is computed without holding them, and
            mixers' auxiliary losses are added.

        Raises:
            ValueError: If arguments exclude each other or shapes disagree.
            TypeError: If an argument is unknown.
        """
        refuse_slice(labels=labels)
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        x, loss, logits = out.last_hidden_state, None, None
        if labels is not None:
            targets = next_tokens(labels, attention_mask, cu_seqlens)
            n, scored = num_items_in_batch, (targets != IGNORE).sum()
            loss = mean_loss(x, self.lm_head.weight, targets, n)
            loss = add_auxiliary(loss, out.auxiliary, scored, n)
        if labels is None or not self.training:
            keep = logits_to_keep
            logits = self.lm_head(x[:, slice(-keep, None) if isinstance(keep, int) else keep])
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
        )
