"""The recipes of fine-tuning run as they are shipped, from a run's folder, on ten examples."""

import json
from pathlib import Path

import numpy as np
import pytest

from statezoo.lightning_modules import load_checkpoint
from statezoo.main import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
QUIET = ["--trainer.enable_progress_bar", "false"]
FEW = [*QUIET, "--trainer.max_steps", "4", "--trainer.val_check_interval", "2"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A tiny model of text, and one of DNA, as runs."""
    folder = tmp_path_factory.mktemp("bases")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("STATEZOO_CACHE", str(folder / "cache"))
        letters = np.random.default_rng(0).choice(list(b"ACGT"), 3000).astype(np.uint8)
        (folder / "genome.fa").write_bytes(b">chr1\n" + letters.tobytes() + b"\n")
        (folder / "text.txt").write_text("".join(f"Line {i} says {i}.\n\n" for i in range(60)))
        small = ["--model", "GLA", "--model.d_model", "16", "--model.n_layers", "1",
                 "--data.seq_len", "32", "--trainer.max_steps", "2", *QUIET]  # fmt: skip
        for kind, path in (("Text", "text.txt"), ("DNA", "genome.fa")):
            main(["fit", *small, "--data", kind, "--data.path", path, "--name", kind])
    return folder


@pytest.fixture
def folder(bases, monkeypatch):
    monkeypatch.chdir(bases)
    monkeypatch.setenv("STATEZOO_CACHE", str(bases / "cache"))
    texts = [f"{'good fine' if i % 2 else 'bad worse'} number {i}" for i in range(10)]
    Path("class.csv").write_text(
        "\n".join(["text,label", *(f"{t},{i % 2}" for i, t in enumerate(texts))])
    )
    Path("number.csv").write_text(
        "\n".join(["text,label", *(f"{t},{i}" for i, t in enumerate(texts))])
    )
    rows = [{"text": t, "label": ["odd"] if i % 2 else ["even", "x"]} for i, t in enumerate(texts)]
    Path("classes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"tokens": t.split(), "tags": ["W"] * (len(t.split()) - 1) + ["N"]} for t in texts]
    Path("tags.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [f"{'ACGT' * 3}{'ACGT'[i % 4] * 8},{i % 2}" for i in range(10)]
    Path("dna.csv").write_text("\n".join(["sequence,label", *rows]))
    return bases


RECIPES = {
    "causal": ("Text", "text.txt"),
    "masked": ("DNA", "genome.fa"),
    "classify": ("Text", "class.csv"),
    "multi_label": ("Text", "classes.jsonl"),
    "regress": ("Text", "number.csv"),
    "tags": ("Text", "tags.jsonl"),
    "dna_classify": ("DNA", "dna.csv"),
}


@pytest.mark.parametrize(("recipe", "given"), RECIPES.items(), ids=RECIPES)
def test_a_recipe_trains_and_reports(recipe, given, folder):
    base, path = given
    main(["fit", "--config", f"finetune/{recipe}", "--model.pretrained", f"runs/{base}",
          "--data.path", path, *FEW, "--name", recipe])  # fmt: skip
    run = max(Path("runs", recipe).glob("version_*"))
    assert (run / "best.ckpt").is_file()
    assert load_checkpoint(run / "best.ckpt").net.config.d_model == 16
    if recipe not in ("causal", "masked"):
        found = json.loads((run / "baselines.json").read_text())
        assert {"majority", "frozen probe"} < found.keys()
        names = [{*values} for values in found.values()]
        assert all(name == names[0] for name in names)


@pytest.mark.parametrize("tune", ["head", "lora", "state"])
def test_tune_is_one_flag(tune, folder):
    main(["fit", "--config", "finetune/dna_classify", "--model.pretrained", "runs/DNA",
          "--data.path", "dna.csv", "--model.tune", tune, *FEW,
          "--name", f"dna-{tune}"])  # fmt: skip
    assert Path("runs", f"dna-{tune}", "version_0", "adapter", "adapter.json").is_file()


def test_weights_must_be_named(folder, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "finetune/classify", "--data.path", "class.csv"])
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert "config 'classify' starts from pretrained weights and none are named: give" in told
