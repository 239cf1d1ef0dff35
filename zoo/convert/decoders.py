"""Llama, Mistral, Qwen2 and Qwen3 of transformers: softmax attention in all layers."""

from typing import Any

from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from statezoo.zoo.attention import SCALING
from statezoo.zoo.convert.source import Settings, Tensors

DECODERS: dict[str, type[PreTrainedConfig]] = {
    kind.model_type: kind for kind in (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config)
}
NORMS = {"input_layernorm": "mixer_norm", "post_attention_layernorm": "channel_norm"}
ATTENTION_TYPES = ("full_attention", "sliding_attention")


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """Write out the settings of a decoder, of whatever age, with transformers' own defaults."""
    full: dict[str, Any] = DECODERS[config["model_type"]].from_dict(config).to_dict()
    return full


def convert_decoder(settings: Settings, tensors: Tensors) -> dict[str, Any]:
    """Convert a decoder.

    Args:
        settings: As :func:`complete` writes them.
        tensors: Named ``model.layers.<i>.self_attn.*`` and so on.

    Returns:
        The configuration here.
    """
    embeddings = "model.embed_tokens.weight"
    d, n_layers = tensors.shape(embeddings)[1], settings.need("num_hidden_layers")
    settings.agree("hidden_size", d)
    settings.only("hidden_act", "silu", "swish")
    settings.only("mlp_bias", False)
    settings.take("attention_dropout", 0.0)  # in training alone
    settings.take("pretraining_tp", 1)  # the same sums in another order
    eps = settings.need("rms_norm_eps")
    mixers = _attention(settings, tensors, n_layers, eps)
    config = {
        "d_model": d,
        "n_layers": n_layers,
        "mixers": mixers if any(mixer != mixers[0] for mixer in mixers) else mixers[:1],
        "norm_eps": eps,
        "vocab_size": tensors.vocabulary(settings, embeddings),
        "tie_embeddings": tensors.head(settings, embeddings, False),
        "initializer_range": settings.take("initializer_range", 0.02),
        "bos_token_id": settings.take("bos_token_id", None),
        "eos_token_id": settings.take("eos_token_id", None),
        "pad_token_id": settings.take("pad_token_id", None),
    }
    tensors.move(embeddings, "model.embeddings.weight")
    tensors.move("model.norm.weight", "model.norm.weight")
    for i in range(n_layers):
        _move_layer(tensors, i)
    inner = settings.agree("intermediate_size", tensors.new[_down(0)].shape[1])
    return config | {"channel": {"name": "swiglu", "inner": inner}}


def _attention(s: Settings, tensors: Tensors, n_layers: int, eps: float) -> list[dict[str, Any]]:
    """Read the attention of every layer."""
    first = "model.layers.0.self_attn."
    if first + "o_proj.bias" in tensors:
        raise ValueError("o_proj has a bias, which attention here has not.")
    s.take("attention_bias", None)  # the tensors say it
    window, sliding = s.take("sliding_window", None), s.take("use_sliding_window", None)
    s.take("max_window_layers", None)  # layer_types say it
    usual = "full_attention" if window is None or sliding is False else "sliding_attention"
    kinds = s.take("layer_types", [usual] * n_layers)
    if len(kinds) != n_layers or not {*kinds} <= {*ATTENTION_TYPES}:
        raise ValueError(
            f"{s.what} has layer_types {kinds}: needed is one of {', '.join(ATTENTION_TYPES)} "
            f"for each of {n_layers} layers."
        )
    base, scaling = _positions(s)
    entry = {
        "name": "attention",
        "n_heads": s.need("num_attention_heads"),
        "n_kv_heads": s.take("num_key_value_heads", None),
        "head_dim": s.take("head_dim", None),
        "rope_base": base,
        "rope_scaling": scaling,
        "qkv_bias": first + "q_proj.bias" in tensors,
        "qk_norm": first + "q_norm.weight" in tensors,
        "norm_eps": eps,
    }
    return [entry | {"window": window if kind == ATTENTION_TYPES[1] else None} for kind in kinds]


def _positions(s: Settings) -> tuple[float, dict[str, float] | None]:
    """Read base and scaling of the rotary positions."""
    rope = Settings(s.need("rope_parameters"), s.report, "rope_parameters")
    kind, base = rope.take("rope_type", "default"), float(rope.need("rope_theta"))
    rope.only("partial_rotary_factor", 1.0)
    scaling = None
    if kind in ("linear", "llama3"):
        names = SCALING[:1] if kind == "linear" else SCALING
        scaling = {name: float(rope.need(name)) for name in names}
    elif kind != "default":
        raise ValueError(
            f"{s.what} has rope_type={kind!r}, which is not implemented here; implemented: "
            "default, linear, llama3."
        )
    rope.read.add("type")  # its name before rope_type
    rope.finish()
    return base, scaling


def _down(i: int) -> str:
    return f"model.layers.{i}.channel.down_proj.weight"


def _move_layer(tensors: Tensors, i: int) -> None:
    """Give the tensors of a layer their new names."""
    layer = f"model.layers.{i}."
    for old, new in NORMS.items():
        tensors.move(f"{layer}{old}.weight", f"{layer}{new}.weight")
    for name in ("gate_proj", "up_proj", "down_proj"):
        tensors.move(f"{layer}mlp.{name}.weight", f"{layer}channel.{name}.weight")
    for name in [name for name in tensors.old if name.startswith(layer + "self_attn.")]:
        if name.endswith("rotary_emb.inv_freq"):
            tensors.drop(name, "computed from rope_theta")
        else:
            tensors.move(name, name.replace(".self_attn.", ".mixer."))
