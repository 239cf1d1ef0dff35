"""Shipped configurations have the sizes that they say, and the published patterns."""

import functools
import re
from pathlib import Path

import pytest
import torch
import yaml

from statezoo.listing import SIZE, read
from statezoo.zoo import MIXERS, StateZooConfig, StateZooForCausalLM

CONFIGS = Path(__file__).parents[2] / "configs"
PRESETS = {  # text of every shipped config of a model that is not a whole run
    file.stem: text
    for file in sorted(CONFIGS.rglob("*.yaml"))
    if (content := yaml.safe_load(text := file.read_text())) and content.keys() == {"model"}
}
WHERE = {"": "CPU in minutes", "tiny": "CPU in minutes", "small": "CPU in hours"}
NAMES = {mixer.__name__: name for name, mixer in MIXERS.items()} | {"Transformer": "attention"}


def vocabulary(name):
    said = re.search("with a vocabulary of ([0-9]+)", PRESETS[name].splitlines()[1])
    return said and int(said[1])


@functools.cache
def preset(name):
    """The network of a preset, without memory for its weights."""
    model = yaml.safe_load(PRESETS[name])["model"]
    given = {k: v for k, v in model["init_args"].items() if k != "optim"}
    common = {k: given.pop(k) for k in ("d_model", "n_layers", "channel") if k in given}
    mixers = given.pop("mixers", None) or [{"name": NAMES[model["class_path"]], **given}]
    vocab = vocabulary(name) or 256
    config = StateZooConfig(mixers=mixers, vocab_size=vocab, tie_embeddings=True, **common)
    with torch.device("meta"):
        return StateZooForCausalLM(config)


def size_of(name):
    found = SIZE.search(name)
    return found[1] if found else ""


def statement(name):
    """What the second line of a preset must say."""
    net, vocab, size = preset(name), vocabulary(name), size_of(name)
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    parameters = f"{millions:.1f}" if millions < 100 else f"{millions:.0f}"
    symbols = f"with a vocabulary of {vocab}" if vocab else "on bytes"
    first, later, much = (sum(b.mixer.state_size(T) for b in net.model.layers) for T in (0, 1, 101))
    assert much - later == 100 * (later - first), "constant, or linear in T"
    if first == later:
        state = f"{in_bytes(first)} of state a sequence"
    elif all(block.mixer.name == "attention" for block in net.model.layers):
        state = f"{in_bytes(later - first)} of state a token"
    else:
        state = f"{in_bytes(first)} of state + {in_bytes(later - first)} a token"
    where = WHERE.get(size, "one GPU")
    return f"# {parameters} million parameters {symbols}, {state}; {where}."


def in_bytes(n):
    return f"{n / 1e3:.3g} kB" if n < 1e6 else f"{n / 1e6:.3g} MB"


def pattern(name):
    """First letters of the mixers, a letter per layer: m(amba), a(ttention), b(ased), ..."""
    net = preset(name)
    return "".join({"base_conv": "c"}.get(b.mixer.name, b.mixer.name[0]) for b in net.model.layers)


@pytest.mark.parametrize("name", PRESETS)
def test_says_what_it_is(name):
    first, second, *more = PRESETS[name].splitlines()
    assert re.fullmatch(r"# .+, arXiv:\d{4}\.\d{5}\.", first)
    assert second == statement(name)
    assert f"#   statezoo fit --config {name}.yaml --data Text" in more
    shown = read(name, PRESETS[name])  # for statezoo list
    assert shown.paper in first
    assert shown.cells[3] in second
    millions, size = sum(p.numel() for p in preset(name).parameters()) / 1e6, size_of(name)
    low, high = {"": (0.3, 1.3), "tiny": (0.7, 1.3), "small": (12, 18)}.get(size, (0, 0))
    if not high:  # a size in the name
        low, high = (factor * int(size[:-1]) for factor in (0.92, 1.08))
    assert low < millions < high


def test_published_sizes_and_patterns():
    samba = preset("samba_421m")
    assert sum(p.numel() for p in samba.parameters()) == 421_793_280
    assert pattern("samba_421m") == "ma" * 6
    assert pattern("jamba_340m") == "mmmmammm" * 2
    assert pattern("gdn_hybrid_130m") == "ggga" * 3
    based = pattern("based_360m")
    assert [i for i, mixer in enumerate(based) if mixer == "b"] == [1, 6, 11, 16, 21]
    assert [i for i, mixer in enumerate(based) if mixer == "a"] == [2, 7, 12, 17, 22]
    assert based.count("c") == 17


def test_every_architecture_comes_in_all_sizes():
    sizes = {}
    for name in PRESETS:
        sizes.setdefault(read(name, PRESETS[name]).architecture, set()).add(size_of(name))
    assert sizes.pop("hybrid") == {""}  # an example of a list of mixers
    for architecture, found in sizes.items():
        assert {"", "tiny", "small", "130m"} <= found, architecture
        assert any(x[:-1].isdigit() and 340 <= int(x[:-1]) < 430 for x in found), architecture
    blocks = {b.mixer.name for name in PRESETS for b in preset(name).model.layers}
    own = {name for name, m in MIXERS.items() if m.__module__.startswith("statezoo.zoo.")}
    assert own <= blocks, "a mixer in no preset"
