"""The shipped models: fit to be published, small, as their recipes say, and at work at once."""

import json

import pytest
import yaml

import statezoo
from statezoo import shipped
from statezoo.card.text import readme
from statezoo.folder import check_folder
from statezoo.main import main

# Lightning calls names that jsonargparse has deprecated
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
ROOT = shipped.root()
NAMES = shipped.names()
CORPORA = {"bach": "music", "novels": "text", "yeast": "dna"}
"""Where the recipes of each corpus are."""
FAMILIES = ("deltaproduct", "gla", "hybrid", "mamba2", "mom", "transformer")
MB = 10**6


def metrics(name):
    return json.loads((ROOT / name / "metrics.json").read_text(encoding="utf-8"))


def test_every_family_has_read_every_corpus():
    assert sorted(NAMES) == sorted(
        f"{family}-{corpus}" for family in FAMILIES for corpus in CORPORA
    )


def test_they_are_small():
    sizes = {n: sum(f.stat().st_size for f in (ROOT / n).rglob("*") if f.is_file()) for n in NAMES}
    assert max(sizes.values()) < 6 * MB
    assert sum(sizes.values()) < 60 * MB


@pytest.mark.parametrize("name", NAMES)
def test_publish_would_take_it(name):
    assert (
        check_folder(ROOT / name) == []
    )  # the card's fields, and the stored fixture again to 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_card_is_what_its_numbers_give(name):
    corpus = name.partition("-")[2]
    others = [metrics(other) for other in NAMES if other.endswith(f"-{corpus}") and other != name]
    text = (ROOT / name / "README.md").read_text(encoding="utf-8")
    assert text == readme(metrics(name), sorted(others, key=lambda m: m["name"]))
    assert all(
        other["data"]["fingerprint"] == metrics(name)["data"]["fingerprint"] for other in others
    )


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_those_of_its_recipe(name):
    family, _, corpus = name.partition("-")
    recipe = ROOT.parent / "configs" / "pretrain" / f"{CORPORA[corpus]}_{family}.yaml"
    wanted = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    used = yaml.safe_load((ROOT / name / "config.yaml").read_text(encoding="utf-8"))
    for part in ("model", "data"):
        left_open = {"path", "tokenizer"}  # files of the machine that trained
        settings = {k: v for k, v in wanted[part]["init_args"].items() if k not in left_open}
        for key, value in settings.items():
            got = used[part]["init_args"][key]
            got = {k: got[k] for k in value} if isinstance(value, dict) else got
            assert got == value, key
    assert used["trainer"].items() >= wanted["trainer"].items()
    assert metrics(name)["train"]["command"].startswith(
        f"statezoo fit --config pretrain/{recipe.stem}"
    )
    assert metrics(name)["model"]["parameters"] == statezoo.load(name).num_parameters()


@pytest.mark.parametrize("corpus", CORPORA)
def test_all_beat_what_counting_does_cheaply(corpus):
    weak = {"bach": "repeat", "novels": "xz", "yeast": "order_1"}[corpus]
    for family in FAMILIES:
        said = metrics(f"{family}-{corpus}")
        assert said["results"][f"test/bits_per_{said['unit']}"] < said["baselines"][weak]


def test_text_without_training(capsys):
    main(["generate", "--model", "gla-novels", "--prompt", "It was", "--max-new-tokens", "12"])
    assert capsys.readouterr().out.startswith("It was")


def test_bases_without_training(tmp_path):
    out = tmp_path / "new.fa"
    given = ["--prompt", "ATG", "--tokens", "30", "--out", str(out)]
    main(["dna", "generate", "--model", "gla-yeast", *given])
    assert "ATG" in out.read_text()


def test_music_without_training(tmp_path):
    pytest.importorskip("symusic")
    prompt = ["--prompt", str(ROOT / "gla-bach" / "sample.mid"), "--prompt-bars", "2"]
    given = [*prompt, "--bars", "1", "--out-dir", str(tmp_path)]
    main(["music", "continue", "--model", "gla-bach", *given])
    assert (tmp_path / "1.mid").stat().st_size > 0
