"""Mamba and Mamba-2: state-spaces' original files, and those of transformers and fla."""

import math
from typing import Any

import torch

from statezoo.zoo.convert.source import Settings, Tensors

LARGE = torch.finfo(torch.float32).max  # stands for infinity, which is no JSON


def convert_mamba(settings: Settings, tensors: Tensors) -> dict[str, Any]:
    """Convert a model whose layers are Mamba or Mamba-2.

    Args:
        settings: Those of state-spaces (``d_model``), transformers (``hidden_size``) or fla.
        tensors: Named ``backbone.*``.

    Returns:
        The configuration here.
    """
    original = "hidden_size" not in settings.config
    singular = "backbone.embedding.weight" in tensors
    embeddings = f"backbone.embedding{'' if singular else 's'}.weight"
    d = tensors.shape(embeddings)[1]
    settings.agree("hidden_size", d, "d_model")
    n_layers = settings.need("num_hidden_layers", "n_layer")
    settings.only("rms_norm", True)
    settings.only("hidden_act", "silu", "swish")
    eps = settings.take("norm_eps", 1e-5, "layer_norm_epsilon", "norm_epsilon")
    inner = settings
    if original:
        inner = Settings(settings.take("ssm_cfg", {}), settings.report, "ssm_cfg")
    else:
        settings.only("ssm_cfg", {})  # left over in files that were converted to transformers
    attention = _original_attention(settings, tensors, d)
    common: dict[str, Any] = {
        "vocab_size": tensors.vocabulary(settings, embeddings),
        "tie_embeddings": tensors.head(settings, embeddings, True if original else None),
        "initializer_range": settings.take("initializer_range", 0.02),
        **{
            key: settings.take(key, None)
            for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        },
    }
    mixers = [
        attention.get(i) or _mixer(inner, tensors, i, d, 1e-5 if original else eps)
        for i in range(n_layers)
    ]
    inner.finish()
    channel = _move(tensors, embeddings, n_layers, attention)
    if channel is not None:
        settings.take("d_intermediate", None)
    else:
        settings.only("d_intermediate", 0)
    return {
        "d_model": d,
        "n_layers": n_layers,
        "mixers": mixers if any(mixer != mixers[0] for mixer in mixers) else mixers[:1],
        "channel": channel,
        "norm_eps": eps,
        **common,
    }


def _mixer(settings: Settings, tensors: Tensors, i: int, d: int, eps: float) -> dict[str, Any]:
    """Read a layer's kind and sizes off its tensors, and check that the settings agree."""
    own = f"backbone.layers.{i}.mixer."
    if own + "B_bias" in tensors:
        raise ValueError("the checkpoint holds Mamba-3 layers, for which there is no converter.")
    W = tensors.shape(own + "conv1d.weight")[-1]
    entry = {
        "d_conv": settings.agree("conv_kernel", W, "d_conv"),
        "bias": settings.agree("use_bias", own + "in_proj.bias" in tensors, "bias"),
        "conv_bias": settings.agree("use_conv_bias", own + "conv1d.bias" in tensors, "conv_bias"),
    }
    layer = settings.take("layer", None)
    if layer not in (None, "Mamba1", "Mamba2"):
        raise ValueError(f"ssm_cfg has layer={layer!r}; converted are 'Mamba1' and 'Mamba2'.")
    second = own + "x_proj.weight" not in tensors
    if layer is not None and second != (layer == "Mamba2"):
        raise ValueError(f"ssm_cfg says {layer}, but the tensors of layer {i} are not.")
    more = _mamba2(settings, tensors, own, d) if second else _mamba1(settings, tensors, own, d)
    return {**more, **entry} | ({"norm_eps": eps} if second else {})


def _mamba1(settings: Settings, tensors: Tensors, own: str, d: int) -> dict[str, Any]:
    E, N = tensors.shape(own + "A_log")
    R = tensors.shape(own + "dt_proj.weight")[1]
    rank = settings.take("dt_rank", R, "time_step_rank")
    if rank not in (R, "auto"):
        raise ValueError(f"config.json has dt_rank={rank!r}, but the tensors have {R}.")
    settings.agree("intermediate_size", E, "d_inner")
    return {
        "name": "mamba",
        "d_state": settings.agree("state_size", N, "d_state"),
        "expand": _expand(settings, E, d),
        "dt_rank": R,
        "dt_min": settings.take("dt_min", 1e-3, "time_step_min"),
        "dt_max": settings.take("dt_max", 0.1, "time_step_max"),
    }


def _mamba2(settings: Settings, tensors: Tensors, own: str, d: int) -> dict[str, Any]:
    settings.only("rmsnorm", True)
    if "time_step_limit" in settings.config or "layer_norm_epsilon" in settings.config:
        if settings.take("norm_before_gate", False):
            settings.report.note("norm_before_gate is ignored, as by transformers: gate, then norm")
    else:
        settings.only("norm_before_gate", False)
    settings.only("D_has_hdim", False)
    (H,), E = tensors.shape(own + "dt_bias"), tensors.shape(own + "out_proj.weight")[1]
    G = settings.take("n_groups", None, "ngroups")
    if G is None and settings.what == "config.json":
        raise ValueError("config.json lacks n_groups, whose default differs between libraries.")
    G = G or 1
    settings.agree("d_ssm", E)
    settings.agree("num_heads", H)
    settings.agree("intermediate_size", E, "d_inner")
    N = (tensors.shape(own + "conv1d.weight")[0] - E) // (2 * G)
    for key in ("dt_min", "dt_max", "dt_rank", "time_step_min", "time_step_max"):
        settings.take(key, None)  # initial values, and what Mamba-2 has no use for
    limit = settings.take("dt_limit", [0.0, math.inf], "time_step_limit")
    low, high = (float(x["__float__"] if isinstance(x, dict) else x) for x in limit)
    bounds = None if low <= 0 and high == math.inf else [low, min(high, LARGE)]
    return {
        "name": "mamba2",
        "d_state": settings.agree("state_size", N, "d_state"),
        "head_dim": settings.agree("head_dim", E // H, "headdim"),
        "expand": _expand(settings, E, d),
        "n_groups": G,
        "dt_limit": bounds,
    }


def _expand(settings: Settings, E: int, d: int) -> float:
    expand = float(settings.take("expand", E / d))
    if int(expand * d) != E:
        raise ValueError(f"config.json has expand={expand:g}, but the tensors have {E} channels.")
    return expand


def _move(
    tensors: Tensors, embeddings: str, n_layers: int, attention: dict[int, Any]
) -> dict[str, Any] | None:
    """Give all tensors their new names; return the channel mixer's settings."""
    tensors.move(embeddings, "model.embeddings.weight")
    tensors.move("backbone.norm_f.weight", "model.norm.weight")
    channel = None
    for i in range(n_layers):
        old, new = f"backbone.layers.{i}.", f"model.layers.{i}."
        tensors.move(old + "norm.weight", new + "mixer_norm.weight")
        if old + "mlp.fc1.weight" in tensors:
            I = tensors.shape(old + "mlp.fc2.weight")[1]  # noqa: E741
            tensors.move(old + "norm2.weight", new + "channel_norm.weight")
            halves = [new + "channel.up_proj.weight", new + "channel.gate_proj.weight"]
            tensors.split(old + "mlp.fc1.weight", halves, [I, I])  # the gate is the second half
            tensors.move(old + "mlp.fc2.weight", new + "channel.down_proj.weight")
            channel = {"name": "swiglu", "inner": I}
        if i in attention:
            _move_attention(tensors, old, new, attention[i])
            continue
        for name in [name for name in tensors.old if name.startswith(old + "mixer.")]:
            tensors.move(name, new + name.removeprefix(old))
    return channel


def _move_attention(tensors: Tensors, old: str, new: str, entry: dict[str, Any]) -> None:
    rows, _ = tensors.shape(old + "mixer.in_proj.weight")
    kv = rows * entry["n_kv_heads"] // (entry["n_heads"] + 2 * entry["n_kv_heads"])
    for kind in ("weight", "bias"):
        if f"{old}mixer.in_proj.{kind}" in tensors:
            news = [f"{new}mixer.{stream}_proj.{kind}" for stream in "qkv"]
            tensors.split(f"{old}mixer.in_proj.{kind}", news, [rows - 2 * kv, kv, kv])
    tensors.move(old + "mixer.out_proj.weight", new + "mixer.o_proj.weight")


def _original_attention(settings: Settings, tensors: Tensors, d: int) -> dict[int, dict[str, Any]]:
    """Read which layers of an original checkpoint are attention, and of what kind."""
    layers = settings.take("attn_layer_idx", [])
    given = settings.take("attn_cfg", {})
    if not layers:
        return {}
    attn = Settings(given, settings.report, "attn_cfg")
    H = attn.need("num_heads")
    K = attn.take("head_dim", d // H)
    if d != K * H:
        raise ValueError(
            f"attn_cfg has {H} heads of {K}: attention here needs num_heads * head_dim = {d}."
        )
    attn.only("causal", True, default=False)
    attn.only("d_conv", 0)
    attn.only("mlp_dim", 0)
    attn.only("out_proj_bias", False, default=True)
    attn.only("rotary_emb_interleaved", False)
    attn.only("softmax_scale", K**-0.5)
    attn.only("rotary_emb_dim", 0, K)
    base = attn.take("rotary_emb_base", 10000.0)
    bias = attn.agree("qkv_proj_bias", f"backbone.layers.{layers[0]}.mixer.in_proj.bias" in tensors)
    entry = {
        "name": "attention",
        "n_heads": H,
        "n_kv_heads": attn.take("num_heads_kv", H),
        "rope_base": base if attn.take("rotary_emb_dim", 0) else None,
        "qkv_bias": bias,
    }
    attn.finish()
    return dict.fromkeys(layers, entry)
