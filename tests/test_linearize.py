"""statezoo linearize: public decoders keep their logits, and what is refused."""

import re
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import statezoo
from statezoo.main import main
from statezoo.zoo import StateZooConfig, StateZooForCausalLM
from statezoo.zoo.convert.linearize import linearize, plan_layers

WORDS, T = 37, 33
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
TEACHERS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"rms_norm_eps": 1e-3}),
    "llama-tied": (
        LlamaForCausalLM,
        LlamaConfig,
        {"head_dim": 12, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    ),
    "llama-stretched": (
        LlamaForCausalLM,
        LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "mistral-window": (MistralForCausalLM, MistralConfig, {"sliding_window": 7}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2-window": (Qwen2ForCausalLM, Qwen2Config, SLIDING),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 10, "num_key_value_heads": 1}),
}
IDS = torch.randint(WORDS, (2, T), generator=torch.Generator().manual_seed(0))


def random_teacher(name, folder, **more):
    """Make a teacher by transformers, all its weights away from 0 and 1, and save it."""
    torch.manual_seed(0)
    kind, config, settings = TEACHERS[name]
    net = kind(config(**SIZES | settings | more)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    net.save_pretrained(folder)
    return net


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    random_teacher("llama", folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize("name", TEACHERS)
def test_the_window_alone_has_the_logits_of_the_teacher(name, tmp_path):
    want = random_teacher(name, tmp_path)(IDS).logits.detach()
    teacher = statezoo.load(tmp_path).eval()
    torch.testing.assert_close(teacher(IDS).logits, want, atol=1e-5, rtol=0)
    student = linearize(teacher, window=T, arm="window")
    assert {m["name"] for m in student.config.layer_mixers} == {"liger"}
    torch.testing.assert_close(student(IDS).logits, want, atol=1e-5, rtol=0)
    both = linearize(teacher, window=T, arm="both")
    assert {n: tuple(p.shape) for n, p in both.named_parameters()} == {
        n: tuple(p.shape) for n, p in teacher.named_parameters()
    }
    with torch.no_grad():
        for block in both.model.layers:  # without the recurrent half, twice the other
            block.mixer.remember = lambda q, k, v, S, cu: (torch.zeros_like(q), S)
            block.mixer.o_proj.weight.mul_(2)
    torch.testing.assert_close(both(IDS).logits, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["gla", "gated_deltanet", "mamba2"])
def test_decoding_is_the_whole_pass_beyond_the_window(kind, llama):
    net = linearize(statezoo.load(llama, dtype=torch.float64), kind, window=4, layers="keep:3")
    net = net.eval()
    assert [m["name"] for m in net.config.layer_mixers] == ["liger", "liger", "attention"]
    want, cache, steps = net(IDS).logits, None, []
    for token in IDS.split(1, 1):
        out = net(token, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), want, atol=1e-10, rtol=0)
    assert not torch.allclose(want, statezoo.load(llama, dtype=torch.float64)(IDS).logits)


def test_the_command_writes_a_folder(llama, tmp_path, capsys):
    out = tmp_path / "out"
    more = ["--mixer", "mamba2", "--window", "8", "--layers", "0,2"]
    main(["linearize", "--teacher", str(llama), "--out", str(out), *more])
    said = capsys.readouterr().out
    assert "2 layers of liger (mamba2, window 8, arm both), 1 of the teacher" in said
    assert (out / "tokenizer.json").read_text() == "{}"
    net = statezoo.load(out).eval()
    mixers = net.config.layer_mixers
    assert [m["name"] for m in mixers] == ["liger", "attention", "liger"]
    assert (mixers[0]["recurrence"], mixers[0]["window"], mixers[0]["arm"]) == ("mamba2", 8, "both")
    own = linearize(statezoo.load(llama), "mamba2", 8, "0,2").eval()
    assert torch.equal(net(IDS).logits, own(IDS).logits)
    again = tmp_path / "again"
    main(["linearize", "--teacher", str(out), "--out", str(again), "--layers", "1"])
    assert {m["name"] for m in statezoo.load(again).config.layer_mixers} == {"liger"}


def test_the_shorter_window_counts(tmp_path):
    random_teacher("qwen2-window", tmp_path)
    net = linearize(statezoo.load(tmp_path), window=8)
    assert [m["window"] for m in net.config.layer_mixers] == [8, 8, 5]


def test_plans():
    assert plan_layers("all", 4) == [0, 1, 2, 3]
    assert plan_layers("keep:4", 8) == [0, 1, 2, 4, 5, 6]
    assert plan_layers("0,2-4", 6) == [0, 2, 3, 4]
    for plan in ("some", "keep:0", "keep:1", "4", "2-1", "1,,2"):
        with pytest.raises(ValueError, match="layers "):
            plan_layers(plan, 4)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("llama", {"attention_bias": True}, "o_proj has a bias, which attention here has not"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True, which would change the function"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu', which would change the function"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type='dynamic', which is not implemented here; implemented: default, linear",
        ),
    ],
)
def test_refuses_by_name_what_it_cannot_do(name, settings, words, tmp_path):
    random_teacher(name, tmp_path, **settings)
    with pytest.raises(ValueError, match=re.escape(words)):
        statezoo.load(tmp_path)


def told(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["linearize", *arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_says_what_is_wrong(llama, tmp_path, capsys):
    base = ["--teacher", str(llama), "--out", str(tmp_path / "out")]
    assert "the teacher itself: write to another folder" in told(
        ["--teacher", str(llama), "--out", str(llama)], capsys
    )
    said = told([*base, "--layers", "3"], capsys)
    assert "layers '3' must name some of the layers 0 to 2 of the teacher" in said
    assert "window must be at least 1, got window=0" in told([*base, "--window", "0"], capsys)
    missing = str(Path("no") / "such" / "folder")
    assert "no/such/folder" in told(["--teacher", missing, "--out", "x"], capsys)
    assert not (tmp_path / "out").exists()
    StateZooForCausalLM(StateZooConfig(n_layers=2, d_model=16)).save_pretrained(tmp_path / "gla")
    said = told(["--teacher", str(tmp_path / "gla"), "--out", "x"], capsys)
    assert "layer 0 of the teacher is gla, which is recurrent already" in said
