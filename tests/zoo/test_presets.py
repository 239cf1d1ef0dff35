"""Shipped configurations have the sizes that they say, and the published patterns."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from statezoo.zoo import MIXERS, StateZooConfig, StateZooForCausalLM

CONFIGS = Path(__file__).parents[2] / "configs"
SIZE = re.compile(r"# ([\d.]+) million parameters (?:on bytes|with a vocabulary of (\d+))")
SIZES = {
    file.stem: found for file in CONFIGS.glob("*.yaml") if (found := SIZE.search(file.read_text()))
}
NAMES = {mixer.__name__: name for name, mixer in MIXERS.items()} | {"Transformer": "attention"}


def preset(name):
    """The network of a preset, without memory for its weights."""
    model = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]
    given = {k: v for k, v in model["init_args"].items() if k != "optim"}
    common = {k: given.pop(k) for k in ("d_model", "n_layers", "channel") if k in given}
    mixers = given.pop("mixers", None) or [{"name": NAMES[model["class_path"]], **given}]
    vocab = int(SIZES[name][2] or 256)
    config = StateZooConfig(mixers=mixers, vocab_size=vocab, tie_embeddings=True, **common)
    with torch.device("meta"):
        return StateZooForCausalLM(config)


def pattern(name):
    """First letters of the mixers, a letter per layer: m(amba), a(ttention), b(ased), ..."""
    net = preset(name)
    return "".join({"base_conv": "c"}.get(b.mixer.name, b.mixer.name[0]) for b in net.model.layers)


@pytest.mark.parametrize("name", sorted(SIZES))
def test_has_the_size_it_says(name):
    said = SIZES[name][1]
    millions = sum(p.numel() for p in preset(name).parameters()) / 1e6
    assert said == (f"{millions:.1f}" if millions < 100 else f"{millions:.0f}")
    size = re.search(r"_(tiny|small|\d+m)$", name)
    if size:
        low, high = {"tiny": (0.7, 1.3), "small": (12, 18)}.get(size[1], (0, 0))
        if not high:
            low, high = (factor * int(size[1][:-1]) for factor in (0.8, 1.2))
        assert low < millions < high


def test_published_sizes_and_patterns():
    samba = preset("samba_421m")
    assert sum(p.numel() for p in samba.parameters()) == 421_793_280
    assert pattern("samba_421m") == "ma" * 6
    assert pattern("jamba_370m") == "mmmmammm" * 2
    assert pattern("gdn_hybrid_130m") == "ggga" * 3
    based = pattern("based_360m")
    assert [i for i, mixer in enumerate(based) if mixer == "b"] == [1, 6, 11, 16, 21]
    assert [i for i, mixer in enumerate(based) if mixer == "a"] == [2, 7, 12, 17, 22]
    assert based.count("c") == 17


def test_every_architecture_here_comes_in_all_sizes():
    mamba = ("mamba", "mamba2", "mamba3", "based", "liger", "samba", "jamba", "gdn_hybrid")
    linear = ("linear_attention", "retnet", "hgrn2", "gla")
    delta = ("deltanet", "gated_deltanet", "deltaproduct", "kda")
    for name in (*mamba, *linear, *delta):
        assert (CONFIGS / f"{name}.yaml").exists()
        assert {f"{name}_tiny", f"{name}_small", f"{name}_130m"} <= SIZES.keys()
        assert any(re.fullmatch(rf"{name}_(34|36|37|42)\dm", other) for other in SIZES)
