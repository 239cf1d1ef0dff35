"""statezoo explain: pictures with their numbers, of text, DNA and music, for any kind of net."""

import csv
import re

import numpy as np
import pytest
import torch

from statezoo import zoo
from statezoo.datamodules.dna.tokenizers import Nucleotides
from statezoo.datamodules.tokenizers import Bytes
from statezoo.main import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STATEZOO_CACHE", str(tmp_path / "cache"))


def saved(folder, mixers, tokenizer, kind=zoo.StateZooForCausalLM, **settings):
    """A small random net with its tokenizer, as ``statezoo export`` writes it."""
    torch.manual_seed(0)
    sizes = {"vocab_size": tokenizer.vocab_size, "d_model": 16, "initializer_range": 0.3}
    net = kind(zoo.StateZooConfig(mixers=mixers, n_layers=len(mixers), **sizes, **settings))
    net.save_pretrained(folder)
    tokenizer.save(folder)
    return str(folder), net.eval()


def explain(model, out, *more):
    main(["explain", "--model", model, "--out", str(out), *more])
    found = {}
    for file in out.glob("*.npz"):
        with np.load(file) as arrays:  # no pickle in them
            found[file.stem] = dict(arrays)
    for name in found:
        picture = (out / f"{name}.png").read_bytes()
        assert picture.startswith(PNG)
        assert len(picture) > 3000
    assert {file.stem for file in out.glob("*.png")} == set(found)
    text = (out / "summary.csv").read_text(encoding="utf-8")
    return found, list(csv.DictReader(text.splitlines()))


def told(arguments, capsys):
    """Run a command that must fail, and return what it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["explain", *arguments])
    assert stop.value.code == 2
    return re.sub(r"\s+", " ", capsys.readouterr().err)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    mixers = [
        {"name": "mom", "inner_settings": {"n_heads": 2, "head_dim": 4}},
        {"name": "attention", "n_heads": 2, "window": 3},
        {"name": "gla", "n_heads": 4},
    ]
    return saved(tmp_path_factory.mktemp("text"), mixers, Bytes())


def test_text(text_model, tmp_path, capsys):
    """Every picture there is, of a hybrid of memories, attention and GLA."""
    model, net = text_model
    (tmp_path / "a.txt").write_text("pay $x$ or \u4f60", encoding="utf-8")
    found, _ = explain(model, tmp_path / "out", "--input", str(tmp_path / "a.txt"))
    assert set(found) == {"decay", "write", "memory", "router", "attention"}
    T = 1 + 11 + 3  # BOS, and bytes
    decay = found["decay"]
    assert decay["decay"].shape == (2, 10, T)
    assert decay["layers"].tolist() == [0, 2]
    assert decay["mixers"].tolist() == ["mom", "gla"]
    assert decay["memories"].tolist() == [5, 1]
    assert "".join(decay["symbols"][:6]) == "\u21b5pay\u2423$"
    assert np.isnan(decay["decay"][1, 4:]).all()  # GLA has 4 heads
    known = decay["decay"][~np.isnan(decay["decay"])]
    assert len(known) == (10 + 4) * T
    assert known.min() >= 0
    assert known.max() <= 1
    assert found["router"]["router"].shape == (1, 4, T)
    np.testing.assert_allclose(found["router"]["router"].sum(1), 1, atol=1e-6)
    weights = found["attention"]["attention"]
    assert weights.shape == (1, 2, T, T)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    assert (np.triu(weights, 1) == 0).all()
    assert (np.tril(weights, -3) == 0).all()  # its window
    assert found["write"]["write_is"].tolist() == ["beta", "norm"]
    assert (found["memory"]["longest"] >= found["memory"]["memory"])[1, :4].all()
    assert "wrote" in capsys.readouterr().out
    with torch.no_grad():  # the first layer's always-on memory, from its weights
        ids = torch.tensor([[10, *"pay $x$ or \u4f60".encode()]])
        block = net.model.layers[0]
        x, inner = block.mixer_norm(net.model.embeddings(ids))[0], block.mixer.inner
        a = x @ inner.a_proj.weight[:2].T
        g = -inner.A_log.exp() * torch.nn.functional.softplus(a + inner.dt_bias)
    np.testing.assert_allclose(decay["decay"][0, :2], g.exp().T, atol=1e-5)


def test_summary(text_model, tmp_path):
    """A row for each head, the means of what the arrays have."""
    found, rows = explain(text_model[0], tmp_path, "--text", "abcdef")
    assert [row["layer"] for row in rows] == ["0"] * 10 + ["1"] * 2 + ["2"] * 4
    head = rows[-1]
    assert (head["mixer"], head["head"], head["write_is"]) == ("gla", "3", "norm")
    arrays = {name: found[name][name][1, 3] for name in ("decay", "write", "memory")}
    assert float(head["mean_decay"]) == pytest.approx(arrays["decay"].mean(), rel=1e-4)
    assert float(head["mean_write"]) == pytest.approx(arrays["write"].mean(), rel=1e-4)
    assert float(head["median_memory"]) == pytest.approx(np.median(arrays["memory"]), rel=1e-4)
    assert [rows[i]["memory"] for i in (0, 2, 9)] == ["0", "1", "4"]
    assert rows[0]["mean_router_share"] == "always"
    share = found["router"]["router"][0, 0].mean()
    assert float(rows[2]["mean_router_share"]) == pytest.approx(share, rel=1e-4)
    t = np.arange(7)
    far = (found["attention"]["attention"][0, 1] * np.abs(t[:, None] - t)).sum(-1).mean()
    assert float(rows[11]["mean_attention_distance"]) == pytest.approx(far, rel=1e-4)


def test_long_inputs_are_cut_and_say_so(text_model, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("word " * 1000)
    found, _ = explain(
        text_model[0], tmp_path / "o", "--input", str(tmp_path / "a.txt"), "--max-positions", "170"
    )
    assert found["decay"]["decay"].shape[-1] == 170
    assert "showing the first 170 tokens of the input" in capsys.readouterr().out


def test_dna_in_both_directions_on_both_strands(tmp_path):
    tokenizer = Nucleotides()
    model, _ = saved(
        tmp_path / "m", ["linear_attention"], tokenizer, zoo.StateZooForMaskedLM,
        bidirectional=True, complement=tokenizer.complement,
    )  # fmt: skip
    fasta = tmp_path / "g.fa"
    fasta.write_text(">one\nACGT\n>two\nTTGACCNA\n")
    more = ("--record", "two", "--start", "1", "--end", "7")
    found, _ = explain(model, tmp_path / "o", "--input", str(fasta), *more)
    assert "".join(found["decay"]["symbols"]) == "TGACCN"  # and no BOS in a masked model
    views = ["", "other strand", "backward", "other strand, backward"]
    assert found["decay"]["views"].tolist() == views
    assert (found["decay"]["decay"] == 1).all()  # without decay, and for ever
    assert np.isinf(found["memory"]["memory"]).all()
    found, _ = explain(model, tmp_path / "o", "--input", str(fasta))
    assert "".join(found["decay"]["symbols"]) == "ACGT"


def test_classifier(tmp_path):
    """Many heads are drawn by memory length; their numbers stay in order."""
    kind, mixer = zoo.StateZooForSequenceClassification, {"name": "mamba", "expand": 5.0}
    model, net = saved(tmp_path / "m", [mixer], Nucleotides(), kind)
    found, _ = explain(model, tmp_path / "o", "--text", "ACGTTA")
    assert found["decay"]["decay"].shape == (1, 80, 6)
    block, ids = net.model.layers[0], torch.tensor([[3, 4, 5, 6, 6, 3]])
    with torch.no_grad():
        mixer, x = block.mixer, block.mixer_norm(net.model.embeddings(ids))
        u, _ = mixer.conv1d(mixer.in_proj(x).chunk(2, -1)[0])
        dt = torch.nn.functional.softplus(mixer.dt_proj(mixer.x_proj(u)[0, :, :1]))
        decay = (-dt[..., None] * mixer.A_log.exp()).exp().mean(-1).T
    np.testing.assert_allclose(found["decay"]["decay"][0], decay, atol=1e-5)


def test_music(tmp_path):
    pytest.importorskip("miditok")
    symusic = pytest.importorskip("symusic")
    from statezoo.datamodules.music.tokenizers import music_tokenizer

    tokenizer = music_tokenizer("remi")
    model, _ = saved(tmp_path / "m", [{"name": "retnet", "n_heads": 2}], tokenizer)
    score, track = symusic.Score(480), symusic.Track("piano", 0)
    for bar in range(3):
        track.notes.append(symusic.Note(1920 * bar, 480, 60 + bar, 80))
    score.tracks.append(track)
    score.dump_midi(tmp_path / "a.mid")
    found, _ = explain(model, tmp_path / "o", "--input", str(tmp_path / "a.mid"))
    symbols = found["decay"]["symbols"].tolist()
    assert symbols[0] == "BOS_None"
    assert sum(symbol.startswith("Bar_") for symbol in symbols) == 3
    np.testing.assert_allclose(found["decay"]["decay"][0, :, 0], [31 / 32, 63 / 64], rtol=1e-6)


def test_mistakes(text_model, tmp_path, capsys):
    start = ["--model", text_model[0], "--out", str(tmp_path / "o")]
    one = "explain needs --input FILE or --text TEXT, one of the two."
    assert one in told(start, capsys)
    assert one in told([*start, "--text", "a", "--input", "b"], capsys)
    assert "max_positions of at least 1, got 0" in told(
        [*start, "--text", "a", "--max-positions", "0"], capsys
    )
    (tmp_path / "g.fa").write_text(">a\nACGT\n")
    fasta = told([*start, "--input", str(tmp_path / "g.fa")], capsys)
    assert "g.fa is DNA, but the model reads text (bytes)." in fasta
    midi = told([*start, "--input", "a.mid"], capsys)
    assert "a.mid is music, but the model reads text (bytes)." in midi
    region = "--record, --start and --end choose bases of a FASTA"
    assert region in told([*start, "--text", "a", "--start", "3"], capsys)
    (tmp_path / "a.txt").write_text("text")
    assert region in told([*start, "--input", str(tmp_path / "a.txt"), "--end", "3"], capsys)
    assert "No such file" in told([*start, "--input", str(tmp_path / "none.txt")], capsys)
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe\x00")
    assert "b.bin is not UTF-8 text" in told([*start, "--input", str(tmp_path / "b.bin")], capsys)
    assert "there is no token in the input" in told([*start, "--text", ""], capsys)
    assert not (tmp_path / "o").exists()


def test_a_model_with_nothing_to_show(tmp_path, capsys):
    model, _ = saved(tmp_path / "m", ["base_conv"], Bytes())
    message = told(["--model", model, "--out", str(tmp_path / "o"), "--text", "abc"], capsys)
    assert "has nothing to show: base_conv calls no recurrence or attention" in message
