"""The recipes of the shipped models: alike for all families of a corpus, and of like size."""

from importlib.resources import files

import pytest
import torch
import yaml

import statezoo.lightning_modules as modules

FAMILIES = ["deltaproduct", "gla", "hybrid", "mamba2", "mom", "transformer"]
VOCABULARY = {"text": 2048, "dna": 8, "music": 50}


def recipe(corpus, family):
    file = files("statezoo") / "configs" / "pretrain" / f"{corpus}_{family}.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def size(corpus, family):
    model = recipe(corpus, family)["model"]
    given = {k: v for k, v in model["init_args"].items() if k != "optim"}
    with torch.device("meta"):
        module = getattr(modules, model["class_path"])(vocab_size=VOCABULARY[corpus], **given)
    return sum(p.numel() for p in module.parameters())


def test_there_are_eighteen():
    found = sorted(file.name for file in (files("statezoo") / "configs" / "pretrain").iterdir())
    assert found == sorted(f"{c}_{f}.yaml" for c in VOCABULARY for f in FAMILIES)


@pytest.mark.parametrize("corpus", VOCABULARY)
def test_families_have_the_same_data_budget_and_rate(corpus):
    twin = recipe(corpus, "transformer")
    for family in FAMILIES:
        other = recipe(corpus, family)
        assert other["data"] == twin["data"]
        assert other["trainer"] == twin["trainer"]
        assert other["seed_everything"] == twin["seed_everything"]
        assert other["model"]["init_args"]["optim"] == twin["model"]["init_args"]["optim"]


@pytest.mark.parametrize("corpus", VOCABULARY)
@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_like_the_twins(corpus, family):
    twin, other = size(corpus, "transformer"), size(corpus, family)
    assert 0.9e6 < other < 3e6
    assert 0.8 < other / twin < 1.35
