"""statezoo.create_model, list_models and load."""

import json
import subprocess
import sys

import pytest
import torch
from tests.zoo.cases import make, tokens

import statezoo


def test_importing_statezoo_and_listing_models_import_no_torch():
    code = (
        "import sys, statezoo; names = statezoo.list_models(); assert 'gla' in names, names;"
        "heavy = {'torch', 'transformers', 'lightning', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_list_models():
    names = statezoo.list_models()
    assert {"gla", "transformer", "hybrid"} <= set(names)
    assert names == sorted(names)
    assert "attention" not in names
    assert statezoo.list_models("gl*") == ["gla"]
    assert statezoo.list_models("nothing*") == []


def test_create_model():
    net = statezoo.create_model("gla", d_model=32, n_layers=3, vocab_size=9, n_heads=2)
    assert len(net.model.layers) == 3
    assert net.config.mixers[0]["n_heads"] == 2
    assert net(tokens(1, 4).clamp(max=8)).logits.shape == (1, 4, 9)
    net = statezoo.create_model("transformer", d_model=32, window=4, channel=None)
    assert net.config.mixers[0]["name"] == "attention"
    mixers = ["gla", "gla", {"name": "attention", "window": 4}]
    net = statezoo.create_model("hybrid", d_model=32, n_layers=6, mixers=mixers)
    assert [block.mixer.name for block in net.model.layers] == ["gla", "gla", "attention"] * 2


@pytest.mark.parametrize(
    ("name", "settings", "error", "words"),
    [
        ("glaa", {}, ValueError, "no model named 'glaa' .did you mean 'gla'"),
        ("gla", {"nheads": 2}, ValueError, "gla has no setting 'nheads' .did you mean 'n_heads'"),
        ("gla", {"d_modell": 2}, ValueError, "did you mean 'd_model'"),
        ("gla", {"mixers": ["gla"]}, ValueError, "gla has no setting 'mixers'"),
        ("gla", {"n_heads": 2.5}, TypeError, "gla.n_heads: expected int"),
        ("hybrid", {"d_model": 32}, ValueError, "needs its mixers"),
        ("hybrid", {"mixers": ["gla"], "n_heads": 2}, ValueError, "no key 'n_heads'"),
    ],
)
def test_create_model_says_what_is_wrong(name, settings, error, words):
    with pytest.raises(error, match=words):
        statezoo.create_model(name, **settings)


def test_load(tmp_path):
    net = make("hybrid", torch.float32)
    net.save_pretrained(tmp_path)
    again = statezoo.load(tmp_path)
    assert torch.equal(again(tokens(1, 4)).logits, net(tokens(1, 4)).logits)
    assert not again.training
    assert statezoo.load(str(tmp_path), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_load_takes_safetensors_alone(tmp_path):
    net = make("gla", torch.float32)
    net.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        statezoo.load(tmp_path)


def test_load_runs_no_code(tmp_path):
    make("gla", torch.float32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Config"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('code of the checkpoint was run')")
    with pytest.raises(ValueError, match="no key 'auto_map'"):
        statezoo.load(tmp_path)
    with pytest.raises(ValueError, match="no code"):
        statezoo.load(tmp_path, trust_remote_code=True)


@pytest.mark.parametrize("place", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/model"])
def test_load_says_that_a_folder_is_missing(place):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        statezoo.load(place)


def test_load_says_what_is_not_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        statezoo.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="type 'gpt2', not 'statezoo'"):
        statezoo.load(tmp_path)
