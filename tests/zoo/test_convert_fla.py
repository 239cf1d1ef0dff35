"""Checkpoints of flash-linear-attention and linear-moe, of all ages, against written-out layers."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tests.zoo.published import D, I, L, W, logits, skeleton

import statezoo
from statezoo.zoo import convert

COMMON = {"hidden_size": D, "num_hidden_layers": L, "vocab_size": W, "tie_word_embeddings": False}
CONV = {f"{s}_conv1d.weight": (D, 1, 4) for s in "qkv"}
QKVO = {f"{s}_proj.weight": (D, D) for s in "qkvo"}
GLA = {
    **{"q_proj.weight": (8, D), "k_proj.weight": (8, D), "v_proj.weight": (D, D)},
    **{"g_proj.weight": (D, D), "o_proj.weight": (D, D), "g_norm_swish_gate.weight": (8,)},
    **{"gk_proj.0.weight": (16, D), "gk_proj.1.weight": (8, 16), "gk_proj.1.bias": (8,)},
}
GLA_GROUPED = GLA | {
    **{"k_proj.weight": (4, D), "v_proj.weight": (8, D), "g_norm.weight": (8,)},
    **{"gk_proj.1.weight": (4, 16), "gk_proj.1.bias": (4,)},
    **{"q_conv1d.weight": (8, 1, 4), "k_conv1d.weight": (4, 1, 4), "v_conv1d.weight": (8, 1, 4)},
}
del GLA_GROUPED["g_norm_swish_gate.weight"]
DELTA = {**QKVO, **CONV, "b_proj.weight": (2, D), "o_norm.weight": (8,)}
OLD_DELTA = {("norm.weight" if k == "o_norm.weight" else k): v for k, v in DELTA.items()}
GDN = {  # 2 heads of 6, 4 of values of width 12
    **{"q_proj.weight": (12, D), "k_proj.weight": (12, D), "v_proj.weight": (48, D)},
    **{"q_conv1d.weight": (12, 1, 4), "k_conv1d.weight": (12, 1, 4), "v_conv1d.weight": (48, 1, 4)},
    **{"a_proj.weight": (4, D), "b_proj.weight": (4, D), "A_log": (4,), "dt_bias": (4,)},
    **{"g_proj.weight": (48, D), "o_norm.weight": (12,), "o_proj.weight": (D, 48)},
}
GDP = {  # 2 heads of 6, values of width 12, 3 writes
    **{"q_proj.weight": (12, D), "k_proj.weight": (36, D), "v_proj.weight": (72, D)},
    **{"q_conv1d.weight": (12, 1, 4), "k_conv1d.weight": (36, 1, 4), "v_conv1d.weight": (72, 1, 4)},
    **{"a_proj.weight": (2, D), "b_proj.weight": (6, D), "A_log": (2,), "dt_bias": (2,)},
    **{"g_proj.weight": (24, D), "o_norm.weight": (12,), "o_proj.weight": (D, 24)},
}
NO_FORGET = {k: v for k, v in GDP.items() if k not in ("a_proj.weight", "A_log", "dt_bias")}
KDA = {  # 2 heads of 8
    **{**QKVO, **CONV, "b_proj.weight": (2, D), "A_log": (2,), "dt_bias": (D,)},
    **{"f_proj.0.weight": (8, D), "f_proj.1.weight": (D, 8), "o_norm.weight": (8,)},
    **{"g_proj.0.weight": (8, D), "g_proj.1.weight": (D, 8), "g_proj.1.bias": (D,)},
}
RETNET = {
    **{"q_proj.weight": (D, D), "k_proj.weight": (D, D), "v_proj.weight": (32, D)},
    **{"g_proj.weight": (32, D), "o_proj.weight": (D, 32), "g_norm_swish_gate.weight": (16,)},
}
LINEAR = {**QKVO, "norm.weight": (8,)}
HGRN2 = {f"{s}_proj.weight": (D, D) for s in "qfio"} | {"g_norm.weight": (D,)}
ATTENTION = {**QKVO, "k_proj.weight": (8, D), "v_proj.weight": (8, D)}
RICH = ATTENTION | {
    **{"q_proj.bias": (D,), "k_proj.bias": (8,), "v_proj.bias": (8,)},
    **{"q_norm.weight": (4,), "k_norm.weight": (4,)},
}
CASES = {
    "gla": ({"num_heads": 2, "num_kv_heads": None, "fuse_norm": True}, GLA),
    "gla-grouped": ({"num_heads": 2, "num_kv_heads": 1, "use_short_conv": True}, GLA_GROUPED),
    "delta_net": ({"num_heads": 2}, DELTA),
    "delta_net-old": ({"num_heads": 2, "rms_norm_eps": 1e-6}, OLD_DELTA),
    "delta_net-gated": (
        {"num_heads": 2, "use_gate": True, "allow_neg_eigval": True, "norm_eps": 1e-5},
        {**DELTA, "g_proj.weight": (D, D)},
    ),
    "gated_deltanet": ({"num_heads": 2, "num_v_heads": 4, "head_dim": 6}, GDN),
    "gated_deltaproduct": (
        {"num_heads": 2, "head_dim": 6, "num_householder": 3, "use_forget_gate": True},
        GDP,
    ),
    "gated_deltaproduct-plain": (
        {"num_heads": 2, "head_dim": 6, "num_householder": 3, "allow_neg_eigval": True},
        NO_FORGET,
    ),
    "kda": ({"num_heads": 2, "head_dim": 8}, KDA),
    "kda-early": ({"num_heads": 2, "head_dim": 8}, KDA | {"A_log": (1, 1, 2, 1)}),
    "kda-bounded": ({"num_heads": 2, "head_dim": 8, "safe_gate": True, "lower_bound": -5.0}, KDA),
    "retnet": ({"num_heads": 2, "feature_map": None}, RETNET),
    "linear_attn": ({"num_heads": 2, "feature_map": "elu"}, LINEAR),
    "hgrn2": ({"expand_ratio": 8, "num_heads": None}, HGRN2),
    "transformer": ({"num_heads": 4, "num_kv_heads": 2, "rope_theta": 500.0}, ATTENTION),
    "transformer-rich": (
        {"num_heads": 4, "num_kv_heads": 2, "window_size": 3, "qkv_bias": True, "qk_norm": True},
        RICH,
    ),
}


def write(folder, config, tensors):
    """Save in the public format."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def source(case, fused=False):
    """Settings and tensors of a case."""
    own, shapes = CASES[case]
    config = {"model_type": case.partition("-")[0], **COMMON, **own}
    tensors = skeleton(lambda _: shapes, fused)
    if config["model_type"] == "hgrn2":
        tensors["model.lower_bounds"] = torch.randn(L, D)
    return config, tensors


def assert_equals_published(folder, config, tensors):
    """Compare logits of two sequences: to 1e-6 in float64, as a bound is rounded to float32."""
    net, report = convert.load(folder)
    ids = torch.randint(W, (2, 9))
    with torch.no_grad():
        got = net.double()(ids).logits
    want = torch.stack([logits(config, tensors, one) for one in ids])
    error = ((got - want).norm() / want.norm()).item()
    assert error < 1e-6, f"relative error {error:.1e}"
    assert not report.tensors.keys() & report.dropped.keys()
    assert report.tensors.keys() | (report.dropped.keys() & tensors.keys()) == tensors.keys()
    return net, report


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_published_layers(case, tmp_path):
    config, tensors = source(case)
    assert_equals_published(write(tmp_path, config, tensors), config, tensors)


def test_the_gate_is_the_first_half_of_a_fused_mlp(tmp_path):
    config, tensors = source("gla", fused=True)
    net, report = assert_equals_published(write(tmp_path, config, tensors), config, tensors)
    old = tensors["model.layers.1.mlp.gate_proj.weight"]
    channel = net.model.layers[1].channel
    assert torch.equal(channel.gate_proj.weight, old[:I].double())
    assert torch.equal(channel.up_proj.weight, old[I:].double())
    assert "cut in two" in str(report)
    first = {name.replace("embeddings", "embed_tokens"): w for name, w in tensors.items()}
    again, _ = convert.load(write(tmp_path, config, first))
    assert torch.equal(again.model.embeddings.weight, tensors["model.embeddings.weight"])


def test_linear_moe_gated_deltanet_has_an_unused_D(tmp_path):
    config, tensors = source("gated_deltanet", fused=True)
    tensors |= {f"model.layers.{i}.attn.D": torch.randn(4) for i in range(L)}
    config |= {"use_residual": False, "norm_first": False, "fuse_cross_entropy": True}
    _, report = assert_equals_published(write(tmp_path, config, tensors), config, tensors)
    assert "never used" in report.dropped["model.layers.2.attn.D"]
    assert "model.layers.*.attn.D: never used by the published code  (3 times)" in str(report)


def test_lists_of_the_deltaproduct_paper_are_joined(tmp_path):
    config, tensors = source("gated_deltaproduct")
    old = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition("_")
        if name.endswith(("k_proj.weight", "v_proj.weight", "b_proj.weight", "conv1d.weight")):
            parts = [tensor] if "q_conv1d" in name else tensor.chunk(3)
            module = kind.removesuffix(".weight")
            old |= {f"{stem}_{module}s.{j}.weight": p.clone() for j, p in enumerate(parts)}
        else:
            old[name] = tensor
    paper = {k: v for k, v in config.items() if k != "use_forget_gate"}
    paper |= {"use_decay_gate": True, "use_gate": True}
    net, report = convert.load(write(tmp_path, paper, old))
    again, _ = convert.load(write(tmp_path / "new", config, tensors))
    assert all(
        torch.equal(a, b)
        for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert "use_decay_gate is read as use_forget_gate" in str(report)
    assert report.tensors.keys() == old.keys()


@pytest.mark.parametrize("case", ["gla", "gated_deltanet", "hgrn2"])
def test_hybrids(case, tmp_path):
    config, _ = source(case)
    config["attn"] = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 4}
    tensors = skeleton(lambda i: ATTENTION if i == 1 else CASES[case][1])
    if case == "hgrn2":
        tensors["model.lower_bounds"] = torch.randn(L, D)
    net, _ = assert_equals_published(write(tmp_path, config, tensors), config, tensors)
    assert [block.mixer.name for block in net.model.layers][1] == "attention"
    config["attn"] = [config["attn"]]
    assert convert.load(write(tmp_path, config, tensors))[0].config.mixers == net.config.mixers


def test_heads_and_vocabularies(tmp_path):
    config, tensors = source("gla")
    del config["tie_word_embeddings"]
    net, report = convert.load(write(tmp_path, config, tensors))
    assert not net.config.tie_embeddings
    assert "the tensors say it is not" in str(report)
    del tensors["lm_head.weight"]
    net, _ = assert_equals_published(write(tmp_path, config, tensors), config, tensors)
    assert net.config.tie_embeddings
    net, report = convert.load(write(tmp_path, config | {"vocab_size": 20}, tensors))
    assert (net.config.vocab_size, net.lm_head.weight.shape[0]) == (W, W)
    assert f"20 tokens is padded to {W}" in str(report)
    with pytest.raises(ValueError, match="too few for vocab_size=99"):
        convert.load(write(tmp_path, config | {"vocab_size": 99}, tensors))
    with pytest.raises(ValueError, match=r"lacks the tensor lm_head\.weight"):
        convert.load(write(tmp_path, config | {"tie_word_embeddings": False}, tensors))
    tensors["lm_head.weight"] = tensors["model.embeddings.weight"].clone()
    tied = config | {"tie_word_embeddings": True}
    assert "a copy" in convert.load(write(tmp_path, tied, tensors))[1].dropped["lm_head.weight"]
    tensors["lm_head.weight"] += 1
    with pytest.raises(ValueError, match="ties the head"):
        convert.load(write(tmp_path, tied, tensors))


REFUSED = [
    ("gla", {"clamp_min": -3.0}, "clamp_min=-3.0, which would change the function"),
    ("gla", {"feature_map": "relu"}, "feature_map='relu'"),
    ("gla", {"use_output_gate": False}, "use_output_gate=False"),
    ("gla", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("gla", {"attnres_block_size": 4}, "attnres_block_size=4"),
    ("gla", {"frobnicate": 1}, "frobnicate=1, which no converter knows"),
    ("gla", {"num_heads": 2.5}, "n_heads: expected int"),
    ("gla", {"norm_eps": 1e-5, "rms_norm_eps": 1e-6}, "contradicts itself"),
    ("gla", {"hidden_size": 32}, "hidden_size=32, but the tensors have 16"),
    ("gla", {"attn": {"layers": [1], "num_heads": 2}}, r"no place for: model\.layers\.1\.attn\.g"),
    ("gla", {"attn": {"layers": [1], "num_heads": 2, "gate": 1}}, "attn has gate=1"),
    ("gla", {"use_short_conv": True}, "use_short_conv=True, but the tensors have False"),
    ("gla", {"intermediate_size": 32}, "intermediate_size=32, but the tensors have 24"),
    ("gla", {"quantization_config": {"bits": 4}}, "quantization_config="),
    ("delta_net", {"conv_size": 3}, "conv_size=3, but the tensors have 4"),
    ("delta_net", {"qk_norm": "sum"}, "qk_norm='sum'"),
    ("delta_net", {"qk_activation": "elu"}, "qk_activation='elu'"),
    ("delta_net", {"use_beta": False}, "use_beta=False"),
    ("delta_net", {"use_gate": True}, "use_gate=True, but the tensors have False"),
    ("gated_deltanet", {"output_gate_activation": "sigmoid"}, "output_gate_activation"),
    ("gated_deltanet", {"use_mamba_gate": False}, "use_mamba_gate=False"),
    ("gated_deltanet", {"head_dim": 12}, r"wrong shape: model\.layers\.0\.attn\.k_conv1d"),
    ("gated_deltaproduct", {"use_output_gate": False}, "no output gate"),
    ("gated_deltaproduct", {"num_householder": 2}, "num_householder=2, but the tensors have 3"),
    ("kda", {"num_v_heads": 4}, "num_v_heads=4"),
    ("retnet", {"num_kv_heads": 1}, "num_kv_heads=1"),
    ("linear_attn", {"feature_map": "hedgehog"}, "feature_map='hedgehog'"),
    ("linear_attn", {"norm_q": True}, "norm_q=True"),
    ("transformer", {"rope_theta": None}, "rope_theta=null"),
]


@pytest.mark.parametrize(("case", "change", "words"), REFUSED)
def test_refuses_by_name_what_it_cannot_do(case, change, words, tmp_path):
    config, tensors = source(case)
    with pytest.raises((ValueError, TypeError), match=words):
        convert.load(write(tmp_path, config | change, tensors))


def test_says_which_tensor_is_wrong(tmp_path):
    config, tensors = source("gla")
    name = "model.layers.1.attn.k_proj.weight"
    for changed, words in [
        ({k: v for k, v in tensors.items() if k != name}, f"missing: {name}"),
        (tensors | {name: torch.zeros(3, D)}, rf"wrong shape: {name} gives \[3, 16\] .* \[8, 16\]"),
        (tensors | {"model.layers.0.attn.z": torch.ones(2)}, r"for: model\.layers\.0\.attn\.z"),
        (tensors | {"model.layers.3.attn_norm.weight": torch.ones(D)}, r"for: model\.layers\.3"),
    ]:
        with pytest.raises(ValueError, match=words):
            convert.load(write(tmp_path, config, changed))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("single", [False, True])
def test_mom(single, shared, tmp_path):
    """Settings of either age, and the unused tensor of the first; the shared memory comes first."""
    parts = {f"{s}_proj.weight": (D, D) for s in "qgo"} | CONV
    parts |= {"gate.weight": (4, D), "A_log": (2,), "dt_bias": (2,), "o_norm.weight": (8,)}
    rows = {"k": D, "v": D, "b": 2, "a": 2}
    if single or shared:
        parts |= {f"shared_{s}.weight": (n, D) for s, n in rows.items()}
    if not single:
        parts |= {f"{s}_proj.{j}.weight": (n, D) for s, n in rows.items() for j in range(4)}
    tensors = skeleton(lambda _: {**parts, "D": (2,)}, fused=True)
    common = {**COMMON, "num_heads": 2, "head_dim": 8, "topk": 2, "norm_eps": 1e-5}
    common |= {"expand_v": 1, "shared_mem": shared, "aux_loss_scale": 0.002}
    new = {"model_type": "mom", "num_memories": 4, "single_kv_proj": single, **common}
    old = {"num_experts": 4, "single_expert": single, "use_gate": True, "capacity": 1.0, **common}
    net, report = assert_equals_published(write(tmp_path, new, tensors), new, tensors)
    (mixer,) = net.config.mixers
    assert (mixer["n_memories"], mixer["top_k"], mixer["single_kv"]) == (4, 2, single)
    assert mixer["balance_coefficient"] == 0.002
    assert mixer["inner_settings"]["norm_eps"] == 1e-5
    assert "never used" in report.dropped["model.layers.0.attn.D"]
    if not single:
        stacked = net.model.layers[1].mixer.inner.k_proj.weight.chunk(4 + shared)
        names = ["shared_k", "k_proj.0"] if shared else ["k_proj.0", "k_proj.1"]
        for part, name in zip(stacked, names, strict=False):
            assert torch.equal(part, tensors[f"model.layers.1.attn.{name}.weight"].double())
    old["model_type"] = "mom_gated_deltanet"
    again, report = convert.load(write(tmp_path, old, tensors))
    assert again.config.mixers == net.config.mixers
    assert "num_experts is read as num_memories" in str(report)


def test_load_converts(tmp_path):
    config, tensors = source("retnet")
    net = statezoo.load(write(tmp_path, config, tensors), dtype=torch.bfloat16)
    assert net.dtype == torch.bfloat16
    assert not net.training
    assert net.config.eos_token_id == 2
