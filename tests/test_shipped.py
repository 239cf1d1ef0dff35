"""Short names of shipped models, and the table of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import statezoo
from statezoo import shipped
from statezoo.datamodules.dna.tokenizers import Nucleotides, dna_tokenizer
from statezoo.datamodules.music.tokenizers import SatbGrid, music_tokenizer
from statezoo.datamodules.tokenizers import Bytes, load_tokenizer
from statezoo.generate import load
from statezoo.lightning_modules import GLA, load_network
from statezoo.listing import WIDTH
from statezoo.main import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def ship(root, name, tokenizer, **more):
    """Make the folder of a trained model."""
    torch.manual_seed(len(name))
    sizes = {"d_model": 16, "n_layers": 2, "vocab_size": tokenizer.vocab_size}
    net = statezoo.create_model("gla", n_heads=2, bos_token_id=tokenizer.bos_id, **sizes)
    net.save_pretrained(root / name)
    tokenizer.save(root / name)
    model = {"parameters": 1295840, "bytes": 2600000, "state_bytes": 12300, "state_bytes_at": 1024}
    said = {"name": name, "unit": "byte", "model": model, "data": {"name": "twelve novels"}}
    (root / name / "metrics.json").write_text(json.dumps(said | more))
    return net.eval()


@pytest.fixture(autouse=True)
def cards(tmp_path, monkeypatch):
    """Return a folder of shipped models, and begin in another."""
    root, here = tmp_path / "cards", tmp_path / "here"
    root.mkdir()
    here.mkdir()
    (root / "__init__.py").touch()
    monkeypatch.chdir(here)
    monkeypatch.setattr(shipped, "root", lambda: root)
    return root


def test_names_and_places(cards):
    assert shipped.names() == []
    ship(cards, "gla-novels", Bytes())
    (cards / "mom-bach").mkdir()
    (cards / "mom-bach" / "README.md").write_text("# MoM")
    assert shipped.names() == ["gla-novels", "mom-bach"]
    assert shipped.find("gla-novels") == str(cards / "gla-novels")
    assert shipped.find("mom-bach") == "statezoo/mom-bach"  # only its card is here
    assert shipped.find("gla-novel") is None
    assert shipped.near("GLA-novel") == " (did you mean gla-novels?)"
    Path("gla-novels").mkdir()
    assert shipped.resolve("gla-novels") == "gla-novels"  # the user's own
    assert shipped.resolve("mom-bach") == "statezoo/mom-bach"


def test_every_place_that_takes_a_model_takes_a_short_name(cards, capsys, tmp_path):
    net = ship(cards, "gla-novels", Bytes())
    ids = torch.arange(8)[None]
    found, tokenizer = load("gla-novels")
    for other in (statezoo.load("gla-novels"), load_network("gla-novels").eval(), found.eval()):
        assert torch.equal(other(ids).logits, net(ids).logits)
    assert tokenizer.kind == load_tokenizer("gla-novels").kind == "bytes"
    task = GLA(vocab_size=256, d_model=16, n_layers=2, n_heads=2, tie_embeddings=False,
               pretrained="gla-novels")  # fmt: skip
    assert torch.equal(task.eval().net(ids).logits, net(ids).logits)
    assert "tokenizer.json" in task.tokenizer_files
    assert task.base == "gla-novels"  # and no path of this machine
    main(["generate", "--model", "gla-novels", "--prompt", "It", "--max-new-tokens", "4"])
    assert capsys.readouterr().out.startswith("It")
    main(["explain", "--model", "gla-novels", "--text", "It was", "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "summary.csv").is_file()


def test_models_of_dna_and_music(cards):
    ship(cards, "gla-yeast", Nucleotides())
    ship(cards, "gla-bach", SatbGrid())
    assert isinstance(dna_tokenizer("gla-yeast"), Nucleotides)
    assert isinstance(music_tokenizer("gla-bach"), SatbGrid)
    main(["dna", "generate", "--model", "gla-yeast", "--tokens", "20", "--n", "1", "--out", "a.fa"])
    assert Path("a.fa").read_text().startswith(">")


MISTAKES = [
    (["generate", "--model", "gla-novel"], "model folder 'gla-novel' (did you mean gla-novels?)"),
    (["convert", "gla-novel", "x"], "(did you mean gla-novels?)"),
    (["export", "gla-novel", "x"], "no checkpoint 'gla-novel' (did you mean gla-novels?)"),
    (["export", "gla-novels", "x"], "--model.pretrained gla-novels starts from it"),
    (["convert", "gla-novels", "x"], "holds a statezoo model already"),
    (["list", "--pretrained", "gla-novel"], "(did you mean gla-novels?)"),
    (["list", "zz*"], "statezoo list --pretrained those of trained models"),
]


@pytest.mark.parametrize(("arguments", "answer"), MISTAKES, ids=lambda x: " ".join(x)[:40])
def test_mistakes_name_the_nearest(cards, capsys, arguments, answer):
    ship(cards, "gla-novels", Bytes())
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert answer in capsys.readouterr().err


def test_unknown_tokenizers_name_the_nearest(cards):
    ship(cards, "gla-novels", Bytes())
    for make in (load_tokenizer, dna_tokenizer, music_tokenizer):
        with pytest.raises(ValueError, match=r"\(did you mean gla-novels\?\)"):
            make("gla-novelz")


def test_the_table(cards, capsys):
    long = {"name": "twelve novels of the nineteenth century, in the public domain, as bytes"}
    ship(cards, "gla-novels", Bytes(), data=long,
         results={"val/nll": 9.0, "test/nll": 9.0, "test/bits_per_byte": 1.8432})  # fmt: skip
    ship(cards, "transformer-novels", Bytes(), results={"test/bits_per_byte": 1.75})
    ship(cards, "gla-bach", Bytes(), unit="token", results={"test/nll": 0.5})
    ship(cards, "mom-novels", Bytes())
    (cards / "mom-novels" / "metrics.json").write_text("[")
    main(["list", "--pretrained"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    rows = {line.split()[0]: line for line in lines if line}
    assert rows["gla-novels"].split("...")[1].split() == [
        "1.30", "M", "2.6", "MB", "1.843", "bits/byte", "1.750", "12.3", "kB",
    ]  # fmt: skip
    assert "1.750 bits/byte" in rows["transformer-novels"]
    assert "0.500 nats/token" in rows["gla-bach"]
    assert rows["mom-novels"].endswith("on the Hub")
    main(["list", "--pretrained", "*-bach"])
    out = capsys.readouterr().out
    assert "gla-bach" in out
    assert "gla-novels" not in out
    main(["list"])
    assert "statezoo list --pretrained shows the 4 trained models" in capsys.readouterr().out


def test_the_table_imports_nothing_heavy():
    code = (
        "import sys, time; from statezoo import listing, shipped; listing.headline({});"
        "shipped.names(); from statezoo import commands;"
        "heavy = {'torch', 'transformers', 'lightning'} & set(sys.modules);"
        "assert not heavy, heavy; assert time.process_time() < 2, time.process_time()"
    )  # 0.3 s on an idle machine
    subprocess.run([sys.executable, "-c", code], check=True)
