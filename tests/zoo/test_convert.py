"""Checkpoints of state-spaces and transformers, how files are read, and the way back."""

import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tests.zoo.oracle import rms
from tests.zoo.published import attention
from tests.zoo.test_convert_fla import source, write
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

import statezoo
from statezoo.main import main
from statezoo.zoo import StateZooForCausalLM, convert

CASES = {
    "mamba": (MambaConfig, MambaForCausalLM, {"state_size": 5}),
    "mamba-untied": (
        MambaConfig,
        MambaForCausalLM,
        {"tie_word_embeddings": False, "conv_kernel": 3},
    ),
    "mamba-biased": (
        MambaConfig,
        MambaForCausalLM,
        {"use_bias": True, "use_conv_bias": False, "time_step_rank": 3, "expand": 3},
    ),
    "mamba2": (Mamba2Config, Mamba2ForCausalLM, {"n_groups": 1, "tie_word_embeddings": True}),
    "mamba2-groups": (Mamba2Config, Mamba2ForCausalLM, {"n_groups": 4, "layer_norm_epsilon": 1e-3}),
    "mamba2-limits": (
        Mamba2Config,
        Mamba2ForCausalLM,
        {"n_groups": 2, "time_step_limit": (0.01, 0.05), "use_bias": True},
    ),
    "mamba2-floor": (Mamba2Config, Mamba2ForCausalLM, {"time_step_limit": (0.6, float("inf"))}),
}


def peer(case, dtype=torch.float32):
    """A small model of transformers whose values are all its own."""
    config, model, settings = CASES[case]
    if config is Mamba2Config:
        settings = {"num_heads": 8, "head_dim": 8, "state_size": 6, "chunk_size": 4, **settings}
    torch.manual_seed(0)
    net = model(config(vocab_size=24, hidden_size=32, num_hidden_layers=2, **settings)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net.to(dtype)


def assert_same_logits(net, want):
    ids = torch.randint(20, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = net(ids).logits, want(ids).logits
    error = ((a - b).abs().max() / b.abs().max()).item()
    assert error < 1e-5, f"relative error {error:.1e}, where float32 alone costs 1e-6"


@pytest.mark.parametrize("case", CASES)
def test_transformers_models_and_the_way_back(case, tmp_path):
    want = peer(case)
    want.save_pretrained(tmp_path / "a")
    net = statezoo.load(tmp_path / "a")
    assert_same_logits(net, want)
    convert.convert(tmp_path / "a", tmp_path / "b")
    assert_same_logits(statezoo.load(tmp_path / "b"), want)
    convert.convert(tmp_path / "b", tmp_path / "c", to="transformers")
    assert_bit_for_bit(tmp_path / "a", tmp_path / "c")
    assert_same_logits(net, type(want).from_pretrained(tmp_path / "c"))


def assert_bit_for_bit(a, b):
    """Compare names, dtypes and values of all tensors, and settings but the choice of chunk."""
    old, new = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert tensor.dtype == new[name].dtype, name
        assert torch.equal(tensor, new[name]), name
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (a, b))
    assert {k: v for k, v in old.items() if k != "chunk_size"} == {
        k: v for k, v in new.items() if k != "chunk_size"
    }


@pytest.mark.parametrize("case", ["mamba", "mamba2-groups"])
def test_half_precision_survives_the_round_trip(case, tmp_path):
    peer(case, torch.bfloat16).save_pretrained(tmp_path / "a")
    net, _ = convert.load(tmp_path / "a")
    assert net.dtype == torch.bfloat16
    assert net.model.layers[0].mixer.A_log.dtype == torch.float32
    convert.to_transformers(net, tmp_path / "b")
    assert_bit_for_bit(tmp_path / "a", tmp_path / "b")


def test_the_way_back_says_what_transformers_lacks(tmp_path):
    for settings, words in [
        ({"name": "gla", "n_heads": 2}, "the model has gla"),
        ({"name": "hybrid", "mixers": ["mamba", "mamba2"]}, "the model has mamba, mamba2"),
        ({"name": "mamba"}, "no channel mixer"),
        ({"name": "mamba", "channel": None, "negative_eigenvalues": True}, "negative_eigenvalues"),
        ({"name": "mamba", "channel": None, "expand": 1.5}, "whole expand"),
        ({"name": "mamba2", "channel": None, "head_dim": 8}, "one epsilon for all norms"),
    ]:
        net = statezoo.create_model(**settings, d_model=32, n_layers=2)
        with pytest.raises(ValueError, match=words):
            convert.to_transformers(net, tmp_path)
    assert not list(tmp_path.iterdir())


def original(case, ssm_cfg):
    """Settings and tensors as state-spaces published them: names, padding, a copy for the head."""
    net = peer(case)
    tensors = {
        name.replace("backbone.embeddings", "backbone.embedding"): tensor
        for name, tensor in net.state_dict().items()
    }
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    config = {
        **{"d_model": 32, "n_layer": 2, "vocab_size": 21, "ssm_cfg": ssm_cfg, "rms_norm": True},
        **{"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8},
    }
    return net, config, tensors


def write_bin(folder, config, tensors, name="pytorch_model.bin"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(tensors, folder / name)
    return folder


@pytest.mark.parametrize(
    ("case", "ssm_cfg"),
    [
        ("mamba", {}),
        ("mamba", {"layer": "Mamba1", "d_state": 5}),
        ("mamba2", {"layer": "Mamba2", "headdim": 8}),
    ],
)
def test_original_state_spaces(case, ssm_cfg, tmp_path):
    want, config, tensors = original(case, ssm_cfg)
    net = statezoo.load(write_bin(tmp_path, config, tensors))
    assert_same_logits(net, want)
    assert net.config.tie_embeddings
    assert net.config.vocab_size == 24
    report = convert.load(tmp_path)[1]
    assert "21 tokens is padded to 24" in str(report)
    assert report.tensors["backbone.embedding.weight"] == "model.embeddings.weight"
    assert "a copy of the embedding" in report.dropped["lm_head.weight"]


def test_original_with_attention_and_mlps(tmp_path):
    """A Transformer++ layer: rotary attention, and an MLP whose gate is the second half."""
    torch.manual_seed(0)
    shapes = {"backbone.embedding.weight": (24, 16), "backbone.norm_f.weight": (16,)}
    own = "backbone.layers.0."
    shapes |= {own + "norm.weight": (16,), own + "norm2.weight": (16,)}
    shapes |= {own + "mixer.in_proj.weight": (48, 16), own + "mixer.out_proj.weight": (16, 16)}
    shapes |= {own + "mlp.fc1.weight": (40, 16), own + "mlp.fc2.weight": (16, 20)}
    w = {name: torch.randn(shape) * 0.4 for name, shape in shapes.items()}
    attn = {"causal": True, "num_heads": 2, "head_dim": 8, "rotary_emb_dim": 8, "d_conv": 0}
    attn |= {"qkv_proj_bias": False, "out_proj_bias": False}
    config = {"d_model": 16, "n_layer": 1, "vocab_size": 24, "ssm_cfg": {}, "d_intermediate": 20}
    config |= {"attn_layer_idx": [0], "attn_cfg": attn, "tie_embeddings": True}
    net = statezoo.load(write_bin(tmp_path, config, w))

    ids = torch.randint(24, (7,))
    x = w["backbone.embedding.weight"][ids]
    q, k, v = w[own + "mixer.in_proj.weight"].chunk(3)
    layer = {"q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v}
    layer["o_proj.weight"] = w[own + "mixer.out_proj.weight"]
    x = x + attention(layer, rms(x, w[own + "norm.weight"], 1e-5), {"num_heads": 2})
    y, gate = (rms(x, w[own + "norm2.weight"], 1e-5) @ w[own + "mlp.fc1.weight"].T).chunk(2, -1)
    x = x + (y * F.silu(gate)) @ w[own + "mlp.fc2.weight"].T
    want = rms(x, w["backbone.norm_f.weight"], 1e-5) @ w["backbone.embedding.weight"].T
    with torch.no_grad():
        got = net(ids[None]).logits[0]
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())

    for change, words in [
        ({"d_conv": 4}, "attn_cfg has d_conv=4"),
        ({"rotary_emb_dim": 4}, "rotary_emb_dim=4"),
        ({"head_dim": 16}, r"needs num_heads \* head_dim = 16"),
        ({"out_proj_bias": True}, "out_proj_bias=True"),
        ({"causal": False}, "causal=False"),
    ]:
        with pytest.raises(ValueError, match=words):
            statezoo.load(write_bin(tmp_path, config | {"attn_cfg": attn | change}, w))


@pytest.mark.parametrize(
    ("case", "change", "words"),
    [
        ("mamba", {"rms_norm": False}, "rms_norm=False"),
        ("mamba", {"norm_epsilon": "small"}, "norm_eps: expected float"),
        ("mamba", {"ssm_cfg": {"layer": "Mamba2"}}, "says Mamba2, but the tensors"),
        ("mamba", {"ssm_cfg": {"layer": "Mamba3"}}, "layer='Mamba3'"),
        ("mamba", {"ssm_cfg": {"d_state": 16}}, "d_state|state_size=16, but the tensors have 5"),
        ("mamba", {"n_layer": 3}, r"lacks the tensor backbone\.layers\.2"),
        ("mamba", {"n_layer": 1}, r"no place for: backbone\.layers\.1"),
        ("mamba2", {"ssm_cfg": {"norm_before_gate": True}}, "norm_before_gate=True"),
        ("mamba2", {"ssm_cfg": {"rmsnorm": False}}, "rmsnorm=False"),
        ("mamba2", {"ssm_cfg": {"D_has_hdim": True}}, "D_has_hdim=True"),
        ("mamba2", {"ssm_cfg": {"warp": 9}}, "ssm_cfg has warp=9"),
    ],
)
def test_original_refuses_by_name(case, change, words, tmp_path):
    _, config, tensors = original(case, {})
    with pytest.raises((ValueError, TypeError), match=words):
        convert.load(write_bin(tmp_path, config | change, tensors))


@pytest.mark.parametrize("case", ["mamba", "mamba2-limits"])
def test_fla_writes_other_settings_for_the_same_tensors(case, tmp_path):
    want = peer(case)
    want.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    names = {"layer_norm_epsilon": "norm_eps", "time_step_limit": "dt_limit"}
    names |= {f"time_step_{key}": f"dt_{key}" for key in ("min", "max", "rank", "scale")}
    renamed = {names.get(key, key): value for key, value in config.items()}
    renamed.pop("tie_word_embeddings", None)  # as in mamba-130m-hf
    renamed |= {"fuse_norm": True, "fuse_cross_entropy": True, "use_l2warp": False}
    if case == "mamba":
        renamed["dt_rank"] = "auto"
    (tmp_path / "config.json").write_text(json.dumps(renamed))
    net, report = convert.load(tmp_path)
    assert_same_logits(net, want)
    assert "whether the head is tied" in str(report)


def test_the_settings_of_mamba_130m_hf(tmp_path):
    """All keys of that file: transformers', and those left over from the original."""
    want = peer("mamba")
    want.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"d_inner": 64, "d_model": 32, "n_layer": 2, "fused_add_norm": True, "rms_norm": True}
    config |= {"ssm_cfg": {}, "pad_vocab_size_multiple": 8, "torch_dtype": "float32"}
    config.pop("dtype"), config.pop("tie_word_embeddings", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_logits(statezoo.load(tmp_path), want)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    assert_same_logits(statezoo.load(write(tmp_path, config, tensors)), want)
    for change, words in [
        ({"d_model": 64}, "contradicts itself: .*'hidden_size': 32, 'd_model': 64"),
        ({"d_inner": 128}, "contradicts itself"),
        ({"ssm_cfg": {"d_state": 5}}, "ssm_cfg="),
        ({"rms_norm": False}, "rms_norm=False"),
    ]:
        with pytest.raises(ValueError, match=words):
            statezoo.load(write(tmp_path, config | change, tensors))


def test_transformers_ignores_norm_before_gate(tmp_path):
    want = peer("mamba2-groups")
    want.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"norm_before_gate": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_logits(type(want).from_pretrained(tmp_path), want)
    net, report = convert.load(tmp_path)
    assert_same_logits(net, want)
    assert "norm_before_gate is ignored" in str(report)


def shard(folder, suffix):
    """Cut the weights of a folder in two, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    places = {name: f"{stem}-{1 + i % 2}-of-2.{suffix}" for i, name in enumerate(tensors)}
    for place in set(places.values()):
        part = {name: tensors[name] for name in places if places[name] == place}
        if suffix == "safetensors":
            save_file(part, folder / place)
        else:
            torch.save(part, folder / place)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index, places


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(suffix, tmp_path):
    want = peer("mamba")
    want.save_pretrained(tmp_path)
    index, places = shard(tmp_path, suffix)
    assert_same_logits(statezoo.load(tmp_path), want)
    name = next(iter(places))
    for outside in ("../secret.bin", "/etc/secret.bin", "a/b.bin", "..\\secret.bin"):
        index.write_text(json.dumps({"weight_map": places | {name: outside}}))
        with pytest.raises(ValueError, match="points outside its folder"):
            statezoo.load(tmp_path)
    index.write_text(json.dumps({"weight_map": places | {"more": places[name]}}))
    with pytest.raises(ValueError, match="lacks more"):
        statezoo.load(tmp_path)
    index.write_text(json.dumps({"weight_map": places | {"more": f"model-3-of-2.{suffix}"}}))
    with pytest.raises(FileNotFoundError, match="model-3-of-2"):
        statezoo.load(tmp_path)


class Harmful:
    """What a malicious pickle holds."""

    def __reduce__(self):
        return (Path.touch, (Path("was_run"),))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, config, tensors = original("mamba", {})
    folder = write_bin(tmp_path / "m", config, {**tensors, "x": Harmful()})
    with pytest.raises(ValueError, match="run code"):
        statezoo.load(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful(), 2))
    with pytest.raises(ValueError, match="run code"):
        statezoo.load(folder)
    torch.save([torch.ones(2)], folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must map names to tensors"):
        statezoo.load(folder)
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil"}
    (folder / "evil.py").write_text("raise SystemExit('code of the checkpoint was run')")
    assert statezoo.load(write_bin(folder, config, tensors)).config.d_model == 32
    assert not (tmp_path / "was_run").exists()


def test_says_what_is_missing_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        convert.load(tmp_path)
    _, config, _ = original("mamba", {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors nor pytorch_model\.bin"):
        convert.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12345678901234567890")
    with pytest.raises(ValueError, match="not a safetensors file"):
        convert.load(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a mapping"):
        convert.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        convert.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "falcon_mamba"}')
    with pytest.raises(ValueError, match=r"'falcon_mamba'.*delta_net, .*mamba, mamba2"):
        convert.load(tmp_path)


def test_from_the_hub(tmp_path, monkeypatch):
    want, config, tensors = original("mamba", {})
    folder = write_bin(tmp_path, config, tensors)
    asked = []

    def download(name, allow_patterns, **kwargs):
        asked.append((name, any("bin" in pattern for pattern in allow_patterns), kwargs))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("statezoo.download._ask", lambda *asked: None)
    name = "state-spaces/mamba-130m"
    assert_same_logits(statezoo.load(name, revision="v1"), want)
    first, then = ({"revision": x, "token": None} for x in ("v1", folder.name))  # of one commit
    assert asked == [(name, False, first), (name, False, then), (name, True, then)]


def test_convert_command(tmp_path, capsys):
    config, tensors = source("gla", fused=True)
    folder = write(tmp_path / "a", config, tensors)
    (folder / "tokenizer.json").write_text("{}")
    main(["convert", str(folder), str(tmp_path / "b")])
    out = capsys.readouterr().out
    assert "note     mlp.gate_proj holds gate and value" in out
    assert "attn.g_norm_swish_gate.weight -> model.layers.*.mixer.g_norm.weight  (3 times)" in out
    assert "tokenizer copied: tokenizer.json" in out
    net = StateZooForCausalLM.from_pretrained(tmp_path / "b")
    want = convert.load(folder)[0]
    assert torch.equal(net(torch.arange(9)[None]).logits, want(torch.arange(9)[None]).logits)
    for arguments, words in [
        (["convert", str(folder), str(folder)], "is the source itself"),
        (["convert", str(tmp_path / "b"), str(tmp_path / "c")], "a statezoo model already"),
        (["convert", str(tmp_path / "b"), str(tmp_path / "c"), "--to", "transformers"], "has gla"),
        (["convert", "./nowhere", str(tmp_path / "c")], "is not a folder"),
    ]:
        with pytest.raises(SystemExit):
            main(arguments)
        assert words in capsys.readouterr().err
    peer("mamba").save_pretrained(tmp_path / "d")
    main(["convert", str(tmp_path / "d"), str(tmp_path / "e")])
    main(["convert", str(tmp_path / "e"), str(tmp_path / "f"), "--to", "transformers"])
    assert_bit_for_bit(tmp_path / "d", tmp_path / "f")
