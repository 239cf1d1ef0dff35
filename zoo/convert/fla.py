"""Models of flash-linear-attention (fla) and linear-moe, of all ages: one skeleton, many mixers."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from statezoo.zoo.convert.source import Settings, Tensors

OUTPUT_GATE = {"g_norm_swish_gate.weight": "g_norm.weight"}
DELTA = {"norm.weight": "o_norm.weight"}
UNUSED = {
    "D": "never used by the published code",
    "rotary.inv_freq": "computed from rope_theta",
    "rotary_emb.inv_freq": "computed from rope_theta",
}


class Layer:
    """The mixer of one layer, seen through the names and shapes of its tensors.

    Args:
        tensors: Those of the checkpoint.
        i: The layer.
    """

    def __init__(self, tensors: Tensors, i: int) -> None:
        self.tensors, self.i, self.prefix = tensors, i, f"model.layers.{i}.attn."

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor of the mixer."""
        return self.tensors.shape(self.prefix + name)

    def members(self, name: str) -> int:
        """Count the members of a list of layers, such as ``k_projs.0``, ``k_projs.1``."""
        n = 0
        while f"{name}.{n}.weight" in self:
            n += 1
        return n


def _taps(s: Settings, layer: Layer) -> int:
    """Count the taps of the short convolutions; 0 where there are none."""
    names = [name for name in ("q_conv1d.weight", "q_conv1ds.0.weight") if name in layer]
    taps = layer.shape(names[0])[-1] if names else 0
    s.agree("use_short_conv", bool(taps))
    if taps:
        s.agree("conv_size", taps)
    return taps


def _gla(s: Settings, layer: Layer) -> dict[str, Any]:
    s.only("use_output_gate", True)
    s.only("feature_map", None)
    s.only("clamp_min", None)
    s.only("use_gk", True)
    s.only("use_gv", False)
    return {
        "name": "gla",
        "n_heads": s.take("num_heads", 4),
        "n_kv_heads": s.take("num_kv_heads", None),
        "expand_k": s.take("expand_k", 0.5),
        "expand_v": s.take("expand_v", 1.0),
        "gate_rank": s.agree("gate_low_rank_dim", layer.shape("gk_proj.0.weight")[0]),
        "gate_logit_normalizer": s.take("gate_logit_normalizer", 16.0),
        "d_conv": _taps(s, layer),
    }


def _delta_net(s: Settings, layer: Layer) -> dict[str, Any]:
    s.only("use_beta", True)
    s.only("use_output_norm", True)
    s.only("qk_norm", "l2")
    s.only("qk_activation", "silu")
    s.only("use_rope", False)
    s.only("use_elu", False)
    return {
        "name": "deltanet",
        "n_heads": s.take("num_heads", 16),
        "expand_k": s.take("expand_k", 1.0),
        "expand_v": s.take("expand_v", 1.0),
        "use_gate": s.agree("use_gate", "g_proj.weight" in layer),
        "negative_eigenvalues": s.take("allow_neg_eigval", False),
        "d_conv": _taps(s, layer),
    }


def _gated_deltanet(s: Settings, layer: Layer) -> dict[str, Any]:
    s.only("output_gate_activation", "swish", "silu")
    s.only("use_mamba_gate", True)
    s.only("use_residual", False)
    s.only("use_input_gate", False)
    s.only("use_mva", False)
    s.only("qk_norm", "l2")
    return {
        "name": "gated_deltanet",
        "n_heads": s.take("num_heads", 6),
        "n_v_heads": s.take("num_v_heads", None),
        "head_dim": s.take("head_dim", 256),
        "expand_v": s.take("expand_v", 2.0),
        "use_gate": s.agree("use_gate", "g_proj.weight" in layer),
        "negative_eigenvalues": s.take("allow_neg_eigval", False),
        "d_conv": _taps(s, layer),
    }


def _gated_deltaproduct(s: Settings, layer: Layer) -> dict[str, Any]:
    H, K = s.take("num_heads", 6), s.take("head_dim", 256)
    n = layer.members("k_projs") or layer.shape("k_proj.weight")[0] // (H * K)
    if "g_proj.weight" not in layer or not s.take("use_output_gate", True, "use_gate"):
        raise ValueError("config.json has no output gate: DeltaProduct here always has one.")
    forget = "a_proj.weight" in layer
    return {
        "name": "deltaproduct",
        "n_heads": H,
        "n_v_heads": s.take("num_v_heads", None),
        "head_dim": K,
        "expand_v": s.take("expand_v", 2.0),
        "n_householder": s.agree("num_householder", n),
        "use_forget_gate": s.agree("use_forget_gate", forget, "use_decay_gate"),
        "negative_eigenvalues": s.take("allow_neg_eigval", False),
        "d_conv": _taps(s, layer),
    }


def _kda(s: Settings, layer: Layer) -> dict[str, Any]:
    H = s.take("num_heads", 16)
    s.only("num_v_heads", None, H)
    floor = s.take("lower_bound", None)
    if s.take("safe_gate", False) and floor is None:
        raise ValueError("config.json has safe_gate without its lower_bound.")
    return {
        "name": "kda",
        "n_heads": H,
        "head_dim": s.take("head_dim", 128),
        "expand_v": s.take("expand_v", 1.0),
        "gate_floor": floor,
        "negative_eigenvalues": s.take("allow_neg_eigval", False),
        "d_conv": _taps(s, layer),
    }


def _retnet(s: Settings, layer: Layer) -> dict[str, Any]:
    H = s.take("num_heads", 8)
    s.only("num_kv_heads", None, H)
    s.only("feature_map", None)
    s.only("use_output_gate", True)
    return {
        "name": "retnet",
        "n_heads": H,
        "expand_k": s.take("expand_k", 1.0),
        "expand_v": s.take("expand_v", 2.0),
    }


def _linear_attn(s: Settings, layer: Layer) -> dict[str, Any]:
    H = s.take("num_heads", 4)
    s.only("num_kv_heads", None, H)
    s.only("feature_map", "elu", "relu", "identity", default="elementwise_product")
    for key in ("norm_q", "norm_k", "norm_feature_map"):
        s.only(key, False)
    s.take("tie_feature_map_qk", None)  # these maps have no weights to tie
    return {
        "name": "linear_attention",
        "n_heads": H,
        "expand_k": s.take("expand_k", 1.0),
        "expand_v": s.take("expand_v", 1.0),
        "feature_map": s.take("feature_map", None),
    }


def _hgrn2(s: Settings, layer: Layer) -> dict[str, Any]:
    d = layer.shape("i_proj.weight")[0]
    ratio, H = s.take("expand_ratio", None), s.take("num_heads", None)
    if ratio is None and H is None:
        ratio = 128
    s.only("use_short_conv", False)
    bounds = s.agree("use_lower_bound", "model.lower_bounds" in layer.tensors)
    return {
        "name": "hgrn2",
        "n_heads": d // ratio if ratio else H,
        "lower_bound": None if bounds and layer.i else 0.0,
        "norm_eps": 1e-5,  # the published code ignores its setting here
    }


def _mom(s: Settings, layer: Layer) -> dict[str, Any]:
    s.only("mom_backend", "gated_deltanet")
    single = s.agree("single_kv_proj", "k_proj.0.weight" not in layer, "single_expert")
    shared = s.take("shared_mem", True)
    s.take("use_layer_wise_balance", None)  # here it always is
    if s.take("capacity", 1.0) != 1.0:
        s.report.note("capacity is ignored, as in the published code")
    inner = {
        "n_heads": s.take("num_heads", 4),
        "head_dim": s.take("head_dim", 256),
        "expand_v": s.take("expand_v", 1.0),
        "use_gate": s.agree("use_output_gate", "g_proj.weight" in layer, "use_gate"),
        "d_conv": _taps(s, layer),
    }
    M = layer.shape("gate.weight")[0]
    return {
        "name": "mom",
        "inner": "gated_deltanet",
        "inner_settings": inner,
        "n_memories": s.agree("num_memories", M, "num_experts"),
        "top_k": s.take("topk", 2),
        "shared_memory": shared,
        "single_kv": single,
        "balance_coefficient": s.take("aux_loss_scale", 0.01),
    }


def _attention(s: Settings, layer: Layer) -> dict[str, Any]:
    if s.config.get("rope_theta", 0) is None:
        raise ValueError(f"{s.what} has rope_theta=null, with which the published code fails.")
    return {
        "name": "attention",
        "n_heads": s.take("num_heads", 32),
        "n_kv_heads": s.take("num_kv_heads", None),
        "rope_base": float(s.take("rope_theta", 10000.0)),
        "window": s.take("window_size", None),
        "qkv_bias": s.agree("qkv_bias", "q_proj.bias" in layer),
        "qk_norm": s.agree("qk_norm", "q_norm.weight" in layer),
        "norm_eps": 1e-5,
    }


Family = tuple[Callable[[Settings, Layer], dict[str, Any]], dict[str, str]]
FAMILIES: dict[str, Family] = {  # how to read the settings, and which tensors have other names here
    "delta_net": (_delta_net, DELTA),
    "gated_deltanet": (_gated_deltanet, DELTA),
    "gated_deltaproduct": (_gated_deltaproduct, DELTA),
    "gla": (_gla, OUTPUT_GATE),
    "hgrn2": (_hgrn2, {}),
    "kda": (_kda, {}),
    "linear_attn": (_linear_attn, {}),
    "mom": (_mom, DELTA),
    "mom_gated_deltanet": (_mom, DELTA),
    "retnet": (_retnet, OUTPUT_GATE),
    "transformer": (_attention, {}),
}


def convert_fla(settings: Settings, tensors: Tensors) -> dict[str, Any]:
    """Convert a model of fla's skeleton.

    Args:
        settings: ``model_type`` says which.
        tensors: Named ``model.layers.<i>.attn.*`` and so on.

    Returns:
        The configuration here.
    """
    read, renames = FAMILIES[settings.need("model_type")]
    first = "model.embed_tokens.weight" in tensors  # as it was called at first
    embeddings = f"model.embed{'_tokens' if first else 'dings'}.weight"
    d, n_layers = tensors.shape(embeddings)[1], settings.need("num_hidden_layers")
    settings.agree("hidden_size", d)
    settings.only("hidden_act", "swish", "silu")
    settings.only("attnres_block_size", None)
    settings.only("elementwise_affine", True)
    settings.only("norm_first", False)
    eps = settings.take("norm_eps", 1e-6, "rms_norm_eps", "layer_norm_epsilon")
    attention = _attention_layers(settings, tensors)
    mixers = []
    for i in range(n_layers):
        native = i not in attention
        mixer = read(settings, Layer(tensors, i)) if native else attention[i]
        inside = mixer.get("inner_settings", mixer)  # where there is a norm
        inside.setdefault("norm_eps", eps)
        mixers.append(mixer)
    config = {
        "d_model": d,
        "n_layers": n_layers,
        "mixers": mixers if any(mixer != mixers[0] for mixer in mixers) else mixers[:1],
        "norm_eps": eps,
        "vocab_size": tensors.vocabulary(settings, embeddings),
        "tie_embeddings": tensors.head(settings, embeddings, None),
        "initializer_range": settings.take("initializer_range", 0.02),
        "bos_token_id": settings.take("bos_token_id", 1),
        "eos_token_id": settings.take("eos_token_id", 2),
        "pad_token_id": settings.take("pad_token_id", None),
    }
    tensors.move(embeddings, "model.embeddings.weight")
    tensors.move("model.norm.weight", "model.norm.weight")
    if "model.lower_bounds" in tensors:
        _lower_bounds(tensors, [i for i in range(1, n_layers) if i not in attention])
    for i in range(n_layers):
        _move_mixer(tensors, i, {} if i in attention else renames)
        inner = _move_mlp(tensors, i)
    settings.agree("intermediate_size", inner)
    return config | {"channel": {"name": "swiglu", "inner": inner}}


def _attention_layers(settings: Settings, tensors: Tensors) -> dict[int, dict[str, Any]]:
    """Read which layers of a hybrid are attention, and of what kind."""
    given = settings.take("attn", [])
    found: dict[int, dict[str, Any]] = {}
    for entry in [given] if isinstance(given, dict) else given:
        spec = Settings(entry, settings.report, "attn")
        for i in spec.need("layers"):
            if i in found:
                raise ValueError(f"config.json has two kinds of attention in layer {i}.")
            spec.need("num_heads")
            found[i] = _attention(spec, Layer(tensors, i))
        spec.finish()
    return found


def _move_mixer(tensors: Tensors, i: int, renames: dict[str, str]) -> None:
    """Give the tensors of a mixer and the norm before it their new names."""
    old, new = f"model.layers.{i}.attn.", f"model.layers.{i}.mixer."
    tensors.move(f"model.layers.{i}.attn_norm.weight", f"model.layers.{i}.mixer_norm.weight")
    several = old + "gate.weight" in tensors  # the router of several memories
    lists: dict[str, list[tuple[int, str]]] = {}
    for name in [name for name in tensors.old if name.startswith(old)]:
        own = name.removeprefix(old)
        member = re.fullmatch(r"([qkvb]_(?:proj|conv1d))s\.(\d+)\.weight", own)
        memory = re.fullmatch(r"(?:shared_([kvba])|([kvba])_proj\.(\d+))\.weight", own)
        if own in UNUSED:
            tensors.drop(name, UNUSED[own])
        elif member:
            lists.setdefault(member[1], []).append((int(member[2]), name))
        elif memory:  # the shared one comes first
            whose = f"inner.{memory[1] or memory[2]}_proj"
            lists.setdefault(whose, []).append((int(memory[3] or -1), name))
        else:
            inner = "inner." if several and own != "gate.weight" else ""
            flat = torch.flatten if own == "A_log" else None  # ones around its heads in early KDA
            tensors.move(name, new + inner + renames.get(own, own), flat)
    for own, members in lists.items():  # one row block per write, (n h d), or per memory
        tensors.join([name for _, name in sorted(members)], f"{new}{own}.weight")


def _move_mlp(tensors: Tensors, i: int) -> int:
    """Give the tensors of a channel mixer their new names; return its inner width."""
    old, new = f"model.layers.{i}.mlp.", f"model.layers.{i}.channel."
    inner = tensors.shape(old + "down_proj.weight")[1]
    tensors.move(f"model.layers.{i}.mlp_norm.weight", f"model.layers.{i}.channel_norm.weight")
    tensors.move(old + "down_proj.weight", new + "down_proj.weight")
    news = [new + "gate_proj.weight", new + "up_proj.weight"]
    if old + "up_proj.weight" in tensors:
        for name in ("gate_proj.weight", "up_proj.weight"):
            tensors.move(old + name, new + name)
    else:  # until early 2025: both in one, the gate in the first half
        tensors.split(old + "gate_proj.weight", news, [inner, inner])
        tensors.report.note("mlp.gate_proj holds gate and value, in this order: it is cut in two")
    return inner


def _lower_bounds(tensors: Tensors, layers: list[int]) -> None:
    """Turn the table of all layers' bounds into one logit per layer and channel.

    The bound of layer ``i`` is the sum of rows ``1..i`` of the softmax over layers.
    """

    def logit(table: Tensor, i: int) -> Tensor:
        table = table.double()
        below = torch.logsumexp(table[1 : i + 1], 0)
        rest = torch.logsumexp(torch.cat([table[:1], table[i + 1 :]]), 0)
        return (below - rest).float()

    name = "model.lower_bounds"
    if not layers:
        tensors.drop(name, "no layer has a bound: the first has none")
        return
    (table,) = tensors.take(name)
    tensors.put({f"model.layers.{i}.mixer.bound_bias": logit(table, i) for i in layers}, name)
