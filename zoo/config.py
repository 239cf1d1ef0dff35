"""The configuration of a model: plain data, strict about names and types."""

from dataclasses import field
from typing import Any, ClassVar, Literal, cast

from transformers import PreTrainedConfig

from statezoo.zoo.cache import LAYER_TYPE
from statezoo.zoo.channel import CHANNELS
from statezoo.zoo.mixer import resolve_mixer
from statezoo.zoo.settings import check_type, resolve, suggestion

FROM_TRANSFORMERS = {  # what transformers itself passes, or writes to config.json
    "attn_implementation",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "torch_dtype",
}
LABELS = ("num_labels", "id2label", "label2id", "problem_type")  # what transformers itself declares


class StateZooConfig(PreTrainedConfig):
    """Sizes of a model and the settings of its parts.

    Args:
        vocab_size: Number of tokens.
        d_model: Width of the stream.
        n_layers: Number of blocks.
        mixers: Mixers, each a name or a mapping of ``name`` and settings, cycled over the layers:
            one for all, or a pattern, or one per layer. Stored with all settings written out.
        channel: Channel mixer of every block, in the same form; ``None`` for none.
        norm_eps: Added under the root of the norms between the parts.
        tie_embeddings: Whether the head shares the embedding's weight.
        initializer_range: Standard deviation of initial weights.
        bidirectional: Whether every mixer also runs backward in time; such a net can be a masked
            language model or a classifier, not a causal language model.
        tie_directions: Whether both directions share their weights.
        complement: The complement of every token, for a net that reads both strands and is
            equivariant under reverse complement, see :mod:`statezoo.zoo.strands`.
        initial_states: How many outer products make up the learnt state of each head before the
            first token, 0 for whole matrices, see :mod:`statezoo.zoo.initial_state`; by default
            states start empty.
        pooling: How a classifier sums up a sequence: by the mean over its tokens, by the last, or
            by its ``profile``, which keeps what stands where.
        num_labels: Number of classes of a classifier, or of numbers that it predicts; default 2.
        id2label: Their names, by number.
        label2id: Their numbers, by name; follows from ``id2label``.
        problem_type: ``"regression"``, ``"single_label_classification"`` or
            ``"multi_label_classification"``; by default told by the labels.
        label_scale: Mean and standard deviation of each number of a regression, which is trained
            on ``(number - mean) / deviation`` and answers in units of the numbers; default: none.
        bos_token_id: First token of a text, if there is one.
        eos_token_id: Token (or tokens) that ends a text, if there is one.
        pad_token_id: Padding, if there is one.

    Raises:
        ValueError: If a key is unknown or a value out of range.
        TypeError: If a value has the wrong type.
    """

    model_type: ClassVar[str] = "statezoo"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "tie_word_embeddings": "tie_embeddings",
    }

    vocab_size: int = 256
    d_model: int = 256
    n_layers: int = 4
    mixers: list[Any] = field(default_factory=lambda: ["gla"])
    channel: Any = "swiglu"
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    bidirectional: bool = False
    tie_directions: bool = True
    complement: list[int] | None = None
    initial_states: int | None = None
    pooling: Literal["mean", "last", "profile"] = "mean"
    label_scale: list[list[float]] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check names and types, and write out all settings."""
        own = [*self.own_keys(), *LABELS]
        for key in kwargs:
            if key not in FROM_TRANSFORMERS and not key.startswith("_"):
                other = self.attribute_map.get(key)
                hint = f" (did you mean {other!r}?)" if other else suggestion(key, own)
                raise ValueError(f"StateZooConfig has no key {key!r}{hint}.")
        self.resolve()
        n = kwargs.get("num_labels")
        if n is not None and check_type("num_labels", n, int) < 1:
            raise ValueError(f"num_labels must be at least 1, got {n}.")
        if n is not None and self.id2label is not None and len(self.id2label) != n:
            raise ValueError(f"num_labels={n}, but id2label names {len(self.id2label)} labels.")
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self._check_labels()

    def resolve(self) -> None:
        """Check all values again, and write out the settings of all parts.

        Raises:
            ValueError: If a name is unknown or a value out of range.
            TypeError: If a value has the wrong type.
        """
        for key, kind in self.own_keys().items():
            setattr(self, key, check_type(key, getattr(self, key), kind))
        for key in ("vocab_size", "d_model", "n_layers"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}.")
        if not 1 <= len(self.mixers) <= self.n_layers:
            raise ValueError(
                f"mixers must name 1 to n_layers={self.n_layers} mixers, got {len(self.mixers)}."
            )
        self.mixers = [resolve_mixer(entry) for entry in self.mixers]
        if self.channel is not None:
            self.channel = resolve(CHANNELS, self.channel, "channel mixer")
        if self.bidirectional is False and self.tie_directions is False:
            raise ValueError(
                "tie_directions: false gives the backward direction weights of its own, so it "
                "needs bidirectional: true."
            )
        if self.initial_states is not None and self.initial_states < 0:
            raise ValueError(f"initial_states must be at least 0, got {self.initial_states}.")
        if self.complement is not None:
            _check_complement(self.complement, self.vocab_size)

    @classmethod
    def own_keys(cls) -> dict[str, Any]:
        """List the keys that are our own, with their types."""
        kinds = StateZooConfig.__annotations__.items()
        return {key: kind for key, kind in kinds if key not in ("model_type", "attribute_map")}

    def _check_labels(self) -> None:
        named = cast(dict[int, str], self.id2label or {})
        if sorted(named) != [*range(len(named))]:
            raise ValueError(f"id2label must name labels 0, 1, ... in turn, got {sorted(named)}.")
        inverse = {label: number for number, label in named.items()}
        if self.label2id is None:
            self.label2id = inverse
        if self.label2id != inverse or len(inverse) < len(named):
            raise ValueError(
                f"label2id must be the inverse of id2label {named}, got {self.label2id}."
            )
        scale = self.label_scale
        if scale is not None and (
            self.problem_type not in (None, "regression")
            or len(scale) != len(named)
            or any(len(pair) != 2 or pair[1] <= 0 for pair in scale)
        ):
            raise ValueError(
                "label_scale needs a mean and a deviation above 0 for each of the "
                f"{len(named)} numbers of a regression, got {scale}."
            )

    @property
    def layer_mixers(self) -> list[dict[str, Any]]:
        """The mixer of every layer, with all its settings."""
        return [self.mixers[i % len(self.mixers)] for i in range(self.n_layers)]

    @property
    def is_causal(self) -> bool:
        """Whether no token sees a later one, so that there can be a state to hand on."""
        return not self.bidirectional and self.complement is None

    @property
    def layer_types(self) -> list[str]:
        """What each layer keeps in the cache, as transformers asks."""
        return [LAYER_TYPE] * self.n_layers

    def validate(self) -> None:
        """Check all values; transformers asks before it saves, and lacks our layer type."""
        self.resolve()


def _check_complement(complement: list[int], vocab_size: int) -> None:
    if len(complement) != vocab_size:
        raise ValueError(
            f"complement must say the complement of each of vocab_size={vocab_size} tokens, got "
            f"{len(complement)}."
        )
    for token, other in enumerate(complement):
        if not 0 <= other < vocab_size or complement[other] != token:
            raise ValueError(
                f"complement must be its own inverse: it sends token {token} to {other}, and "
                f"{other} {_sent(complement, other)}. Special tokens are their own complement."
            )


def _sent(complement: list[int], token: int) -> str:
    known = 0 <= token < len(complement)
    return f"to {complement[token]}" if known else f"is not one of {len(complement)} tokens"
