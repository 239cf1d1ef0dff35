"""The configuration is plain data, resolved and strict."""

import json

import pytest
from transformers import AutoConfig

from statezoo.zoo import Mixer, StateZooConfig, StateZooForCausalLM, mixer_settings
from statezoo.zoo.channel import SwiGLU


def test_stores_every_setting_and_survives_json(tmp_path):
    config = StateZooConfig(d_model=32, mixers=["gla", {"name": "attention", "window": 8}])
    assert config.mixers[0] == {
        "name": "gla",
        **{key: p.default for key, p in mixer_settings("gla").items()},
    }
    assert config.mixers[1]["window"] == 8
    assert config.channel["name"] == "swiglu"
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is StateZooConfig
    assert again.to_diff_dict() == config.to_diff_dict()
    assert StateZooConfig(**json.loads(config.to_json_string())).mixers == config.mixers
    assert StateZooConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_cycles_mixers_over_the_layers():
    config = StateZooConfig(n_layers=5, mixers=["gla", "gla", "attention"])
    names = [mixer["name"] for mixer in config.layer_mixers]
    assert names == ["gla", "gla", "attention", "gla", "gla"]
    assert config.layer_types == ["recurrent_state"] * 5
    assert (config.num_hidden_layers, config.hidden_size) == (5, config.d_model)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"d_modle": 32}, ValueError, "no key 'd_modle' .did you mean 'd_model'"),
        ({"hidden_size": 32}, ValueError, "'hidden_size' .did you mean 'd_model'"),
        ({"temperature": 2.0}, ValueError, "no key 'temperature'"),
        ({"d_model": "32"}, TypeError, "d_model: expected int, got str '32'"),
        ({"d_model": True}, TypeError, "d_model: expected int, got bool True"),
        ({"norm_eps": "x"}, TypeError, "norm_eps: expected float, got str 'x'"),
        ({"tie_embeddings": 1}, TypeError, "tie_embeddings: expected bool, got int 1"),
        ({"eos_token_id": "end"}, TypeError, "eos_token_id: expected int"),
        ({"mixers": "gla"}, TypeError, "mixers: expected list"),
        ({"d_model": 0}, ValueError, "d_model must be at least 1"),
        ({"mixers": []}, ValueError, "1 to n_layers=4"),
        ({"mixers": ["gla"] * 5}, ValueError, "1 to n_layers=4 mixers, got 5"),
        ({"mixers": ["glaa"]}, ValueError, "no mixer named 'glaa' .did you mean 'gla'"),
        ({"mixers": [{"n_heads": 4}]}, TypeError, "mapping with 'name'"),
        ({"mixers": [3]}, TypeError, "a mixer is a name"),
        ({"mixers": [{"name": "gla", "nheads": 4}]}, ValueError, "did you mean 'n_heads'"),
        ({"mixers": [{"name": "gla", "n_heads": "4"}]}, TypeError, r"gla\.n_heads: expected int"),
        ({"mixers": [{"name": "gla", "backend": "cuda"}]}, TypeError, r"gla\.backend: expected"),
        ({"channel": "swigl"}, ValueError, "no channel mixer named 'swigl' .did you mean 'swiglu'"),
        ({"channel": {"name": "swiglu", "widht": 3}}, ValueError, "no setting 'widht'"),
    ],
)
def test_says_what_is_wrong(settings, error, words):
    with pytest.raises(error, match=words):
        StateZooConfig(**settings)


def test_checks_what_was_changed_later():
    config = StateZooConfig(d_model=32)
    config.mixers = ["nothing"]
    with pytest.raises(ValueError, match="no mixer named 'nothing'"):
        StateZooForCausalLM(config)


def test_whole_numbers_serve_as_floats():
    config = StateZooConfig(mixers=[{"name": "gla", "expand_k": 1}], norm_eps=1)
    assert isinstance(config.mixers[0]["expand_k"], float)
    assert isinstance(config.norm_eps, float)


@pytest.mark.parametrize(
    ("mixer", "words"),
    [
        ({"name": "gla", "n_heads": 3}, "multiples of n_heads=3"),
        ({"name": "gla", "n_heads": 4, "n_kv_heads": 3}, "multiple of n_kv_heads=3"),
        ({"name": "attention", "n_heads": 3}, "multiple of n_heads=3"),
        ({"name": "attention", "window": 0}, "window must be at least 1"),
        ({"name": "attention", "sinks": 2}, "with a window"),
        ({"name": "attention", "n_heads": 32}, "even head width"),
    ],
)
def test_sizes_must_fit(mixer, words):
    with pytest.raises(ValueError, match=words):
        StateZooForCausalLM(StateZooConfig(d_model=32, mixers=[mixer]))


@pytest.mark.parametrize(
    ("d_model", "settings", "inner"),
    [
        (1024, {}, 2816),  # 2/3 * 4 * D up to a multiple of 256, as published models have it
        (2048, {}, 5632),
        (96, {}, 256),
        (96, {"multiple_of": 32}, 256),
        (100, {"ratio": 2.0, "multiple_of": 10}, 200),
        (96, {"inner": 7}, 7),
    ],
)
def test_inner_width_of_swiglu(d_model, settings, inner):
    assert SwiGLU(d_model, **settings).up_proj.out_features == inner


def test_published_sizes():
    """Parameters of GLA with 24 layers and an untied head over 32000 tokens (specs/core.md 4)."""
    import torch

    for d_model, count in ((1024, 374_475_776), (2048, 1_365_514_240)):
        with torch.device("meta"):
            net = StateZooForCausalLM(
                StateZooConfig(vocab_size=32000, d_model=d_model, n_layers=24)
            )
        assert sum(p.numel() for p in net.parameters()) == count


def test_a_mixer_has_a_name_of_its_own():
    with pytest.raises(ValueError, match=r"which statezoo\.zoo\.gla\.GLA is: one Mixer a file"):

        class Other(Mixer, name="gla"):
            pass

    with pytest.raises(ValueError, match="no mixer named"):
        mixer_settings("glas")
