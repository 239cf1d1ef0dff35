"""The recipes of the domains run as they are shipped, with any mixer."""

import numpy as np
import pytest

from statezoo.main import main
from statezoo.zoo import MIXERS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
SMALL = ["--model.d_model", "32", "--model.n_layers", "1", "--trainer.fast_dev_run", "true"]
OURS = sorted(name for name, kind in MIXERS.items() if kind.__module__ == f"statezoo.zoo.{name}")
FEW = ["gla", "mamba2", "gated_deltanet", "attention"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STATEZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def genome(folder):
    letters = np.random.default_rng(0).choice(list(b"ACGT"), 3000).astype(np.uint8).tobytes()
    (folder / "genome.fa").write_bytes(b">chr1\n" + letters + b"\n")
    return str(folder / "genome.fa")


@pytest.mark.parametrize("mixer", FEW)
def test_pretraining(mixer, genome, capsys):
    model = ["--model", "CausalLM", "--model.mixers", f"[{mixer}]"]
    data = ["--data.path", genome, "--data.seq_len", "32", "--data.val_context", "8"]
    main(["fit", "--config", "dna/pretrain", *model, *SMALL, *data])
    assert "parameters" in capsys.readouterr().out


@pytest.mark.parametrize("mixer", FEW)
@pytest.mark.parametrize("strands", ["augment", "average", "equivariant"])
def test_masked_bases(mixer, strands, genome):
    model = ["--model.mixers", f"[{mixer}]", "--model.reverse_complement", strands]
    main(["fit", "--config", "dna/mlm", *model, *SMALL, "--data.path", genome])


@pytest.mark.parametrize("mixer", OURS)
def test_classes(mixer, folder):
    rows = [f"{'ACGT' * 4}{'ACGT'[i % 4] * 4},{i % 2}" for i in range(12)]
    (folder / "table.csv").write_text("\n".join(["sequence,label", *rows]))
    model = ["--model.mixers", f"[{mixer}]", "--data.path", "table.csv"]
    main(["fit", "--config", "dna/classify", *model, *SMALL, "--data.batch_size", "4"])


@pytest.mark.slow
def test_finds_a_planted_word_in_ninety_seconds(folder, capsys):
    rng = np.random.default_rng(0)
    rows = ["sequence,label,split"]
    for i in range(4400):
        letters = rng.choice(list("ACGT"), 100)
        if i % 2:
            at = rng.integers(0, 92)
            letters[at : at + 8] = list("TATAATGC")
        rows.append(f"{''.join(letters)},{i % 2},{'test' if i >= 4000 else 'train'}")
    (folder / "planted.csv").write_text("\n".join(rows))
    data = ["--data", "LabelledDNA", "--data.path", "planted.csv"]
    model = ["--model", "SequenceClassifier", "--model.mixers", "[gated_deltanet]"]
    model += ["--model.d_model", "64", "--model.n_layers", "2", "--model.bidirectional", "true"]
    run = ["--trainer.max_steps", "200", "--name", "planted"]
    main(["fit", *data, "--data.batch_size", "32", *model, *run])
    capsys.readouterr()
    main(["test", *data, "--ckpt_path", "runs/planted"])
    found = [x for x in capsys.readouterr().out.splitlines() if "test/accuracy" in x]
    assert float(found[0].split("│")[2]) > 0.95
