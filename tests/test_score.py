"""statezoo score: numbers against a plain loop over tokens, files, and what it refuses."""

import csv
import json
import math
import re
import tracemalloc

import numpy as np
import pytest
import torch

from statezoo import zoo
from statezoo.datamodules.dna.tokenizers import KMers, Nucleotides
from statezoo.datamodules.tokenizers import Bytes, train_bpe
from statezoo.evaluation import scoring
from statezoo.main import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
MIXERS = ["gla", {"name": "attention", "n_heads": 2}, {"name": "mamba2", "head_dim": 8}]
TEXTS = ["pay $x$", "", "or \u4f60\u597d, two lines\nof text", "a"]


def saved(folder, tokenizer, mixers=MIXERS, kind=zoo.StateZooForCausalLM, **settings):
    """A small random net with its tokenizer, as ``statezoo export`` writes it."""
    torch.manual_seed(0)
    sizes = {"vocab_size": tokenizer.vocab_size, "d_model": 16, "initializer_range": 0.3}
    net = kind(zoo.StateZooConfig(mixers=mixers, n_layers=len(mixers), **sizes, **settings))
    net.save_pretrained(folder)
    tokenizer.save(folder)
    return str(folder)


def told(arguments, capsys):
    """Run a command that must fail, and return what it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["score", *arguments])
    assert stop.value.code == 2
    return re.sub(r"\s+", " ", capsys.readouterr().err)


def loop(net, bos, ids):
    """Nats of each token, from all before it, one call each."""
    found = []
    for t, token in enumerate(ids):
        with torch.no_grad():
            logits = net(torch.tensor([[bos, *ids[:t]]])).logits[0, -1].double()
        found.append(-float(torch.log_softmax(logits, 0)[token]))
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("text"), Bytes())


@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_equal_a_loop_over_tokens(model, batch_size):
    """To 1e-4 nats over a text: float32 in another order."""
    scorer = scoring.open_scorer(model, batch_size=batch_size)
    for text, one in zip(TEXTS, scorer.score(TEXTS), strict=True):
        ids = list(text.encode())
        assert one.tokens == one.units == len(ids)
        assert one.nats == pytest.approx(sum(loop(scorer.net, 10, ids)), abs=1e-4)
    assert scorer.longest == len(TEXTS[2].encode())
    assert math.isnan(scorer.score([""])[0].bits)


def test_long_texts_go_piece_by_piece(model, monkeypatch):
    """Each call reads at most 64 tokens, and the state makes them one text."""
    scorer = scoring.open_scorer(model)
    texts = ["longer than a piece " * 12, "shorter"]
    whole = scorer.score(texts)
    monkeypatch.setattr(scoring, "LOGITS", 1)
    widths = []
    hook = scorer.net.register_forward_pre_hook(lambda net, args: widths.append(args[0].shape[1]))
    pieces = scorer.score(texts)
    hook.remove()
    assert widths == [64, 64, 64, 48]
    for one, other in zip(whole, pieces, strict=True):
        assert other.nats == pytest.approx(one.nats, abs=1e-4)


def test_bpe_counts_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("one two three two one " * 20, encoding="utf-8")
    tokenizer = train_bpe([tmp_path / "a.txt"], 270, tmp_path / "bpe")
    scorer = scoring.open_scorer(saved(tmp_path / "net", tokenizer, ["gla"]))
    (one,) = scorer.score(["one two \u4f60"])
    ids = tokenizer.encode("one two \u4f60")
    assert one.tokens == len(ids) < one.units == 11
    nats = sum(loop(scorer.net, tokenizer.bos_id, ids))
    assert one.nats == pytest.approx(nats, abs=1e-4)
    assert one.bits == pytest.approx(nats / math.log(2) / 11, abs=1e-5)


def test_dna_reads_n_and_scores_bases(tmp_path):
    scorer = scoring.open_scorer(saved(tmp_path, Nucleotides(), ["gla"]))
    (one,) = scorer.score(["acG NNT\n"])
    nats = loop(scorer.net, 1, [3, 4, 5, 7, 7, 6])
    assert one.tokens == one.units == 4
    assert one.nats == pytest.approx(sum(nats) - nats[3] - nats[4], abs=1e-4)
    with pytest.raises(ValueError, match="reads DNA, and the text has 'y' at character 2"):
        scorer.score(["ACyT"])
    words = scoring.open_scorer(saved(tmp_path / "k", KMers(3), ["gla"]))
    (one,) = words.score(["ACGTACGN"])
    assert (one.tokens, one.units) == (3, 7)  # ACG TAC G


def test_command_writes_a_row_per_text(model, tmp_path, capsys):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": x}) + "\n" for x in TEXTS), encoding="utf-8")
    out = tmp_path / "scores.csv"
    main(["score", str(file), "--model", model, "--out", str(out)])
    shown = capsys.readouterr()
    rows = list(csv.DictReader(out.read_text(encoding="utf-8").splitlines()))
    assert [row["text"] for row in rows] == ["1", "2", "3"]
    assert "empty text" in shown.err
    want = scoring.open_scorer(model).score([x for x in TEXTS if x])
    for row, one in zip(rows, want, strict=True):
        assert int(row["tokens"]) == int(row["bytes"]) == one.tokens
        assert float(row["nats"]) == pytest.approx(one.nats, abs=1e-4)
        assert float(row["bits_per_byte"]) == pytest.approx(one.bits, abs=1e-5)
    bits = sum(x.nats for x in want) / math.log(2) / sum(x.units for x in want)
    tokens = sum(x.tokens for x in want)
    line = f"3 texts, {tokens} tokens, {tokens} bytes: {bits:.4f} bits per byte"
    assert shown.out == f"{line}\nwrote {out}\n"


def test_lines_and_text(model, tmp_path, capsys):
    file = tmp_path / "a.txt"
    file.write_text("one\n\n two\r\n", encoding="utf-8")
    main(["score", str(file), "--lines", "--model", model])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[1:3]] == ["3", "4"]
    assert len(lines) == 4
    main(["score", "--text", "one", "--model", model])
    alone = capsys.readouterr().out.splitlines()[1].split()
    assert [float(x) for x in alone] == pytest.approx([float(x) for x in lines[1].split()])


def test_mistakes(model, tmp_path, capsys):
    needs = "score needs a file or --text, one of the two"
    assert needs in told(["--model", model], capsys)
    assert needs in told(["a.txt", "--text", "x", "--model", model], capsys)
    assert "there is no text in --text" in told(["--text", "", "--model", model], capsys)
    assert "No file or folder 'none.txt'" in told(["none.txt", "--model", model], capsys)
    far = ["--text", "x", "--model", model, "--out", str(tmp_path / "no/a.csv")]
    assert "there is no folder" in told(far, capsys)
    small = ["--text", "x", "--model", model, "--batch-size", "0"]
    assert "batch_size must be at least 1, got 0" in told(small, capsys)
    assert "there is no checkpoint" in told(["--text", "x", "--model", "no.ckpt"], capsys)
    assert "cannot run on device" in told(
        ["--text", "x", "--model", model, "--device", "gpu"], capsys
    )
    masked = saved(tmp_path / "m", Bytes(), ["gla"], zoo.StateZooForMaskedLM)
    assert "scoring needs a causal model" in told(["--text", "x", "--model", masked], capsys)


def test_long_text_runs_alone_and_is_the_same(model, tmp_path, monkeypatch, capsys):
    """In parts of at most 50 bytes, cut within characters too, to 1e-4 nats."""
    from statezoo.evaluation import documents, score

    text = "caf\u00e9 \u4f60\u597d " * 20
    file = tmp_path / "a.txt"
    file.write_text(text, encoding="utf-8")
    (want,) = scoring.open_scorer(model).score([text])
    monkeypatch.setattr(score, "SHORT", 100)
    monkeypatch.setattr(documents, "PART", 50)
    monkeypatch.setattr(scoring.Scorer, "score", lambda self, texts: [] if not texts else 1 / 0)
    for given in ([str(file)], ["--text", text]):
        main(["score", *given, "--model", model, "--out", str(tmp_path / "a.csv")])
        (row,) = csv.DictReader((tmp_path / "a.csv").read_text(encoding="utf-8").splitlines())
        assert int(row["tokens"]) == int(row["bytes"]) == len(text.encode())
        assert float(row["nats"]) == pytest.approx(want.nats, abs=1e-4)
    capsys.readouterr()


def test_fasta_is_scored_record_by_record(tmp_path, capsys):
    model = saved(tmp_path / "net", Nucleotides(), ["gla"])
    file = tmp_path / "a.fa"
    file.write_text(">one\nACGTTGCA\nACG\n>two\nggRcn\n", encoding="utf-8")
    main(["score", str(file), "--model", model, "--out", str(tmp_path / "a.csv")])
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text(encoding="utf-8").splitlines()))
    want = scoring.open_scorer(model).score(["ACGTTGCAACG", "GGNCN"])
    assert [int(row["bases"]) for row in rows] == [11, 3]
    for row, one in zip(rows, want, strict=True):
        assert float(row["nats"]) == pytest.approx(one.nats, abs=1e-4)
    capsys.readouterr()


def test_memory_does_not_grow_with_the_text(tmp_path):
    """Peak of live tensors and of Python's allocations, in 2,048 and in 8,192 tokens."""
    from statezoo.evaluation.documents import encode
    from statezoo.lightning_modules.memory import LiveBytes

    scorer = scoring.open_scorer(saved(tmp_path, Bytes(), MIXERS[::2]))
    weights = [*scorer.net.parameters(), *scorer.net.buffers()]
    peaks = []
    for n in (2048, 8192):
        counter = LiveBytes(weights)
        tracemalloc.start()
        with counter:
            scorer.score_pieces(encode(scorer.tokenizer, (b"0123456789abcdef" * 16,) * (n // 256)))
        peaks.append((counter.peak, tracemalloc.get_traced_memory()[1]))
        tracemalloc.stop()
    assert peaks[1][0] == peaks[0][0] > 0
    assert peaks[1][1] < peaks[0][1] + 50_000, peaks


def test_tokenizer_must_fit(model):
    net = scoring.open_scorer(model).net
    tokenizer = KMers(4)
    with pytest.raises(ValueError, match="the tokenizer has 264 symbols, the model 256"):
        scoring.Scorer(net, tokenizer)


def test_trained_length(model, tmp_path):
    assert scoring.trained_length(model) is None
    assert scoring.trained_length("org/name") is None
    run = tmp_path / "run"
    run.mkdir()
    (run / "best.ckpt").touch()
    (run / "config.yaml").write_text("data: {class_path: Text, init_args: {seq_len: 128}}\n")
    assert scoring.trained_length(str(run)) == 128
    assert scoring.trained_length(str(run / "best.ckpt")) == 128
    exported = run / "export"
    exported.mkdir()
    (exported / "config.json").touch()
    assert scoring.trained_length(str(exported)) == 128
    (exported / "metrics.json").write_text(json.dumps({"model": {"trained_length": 64}}))
    assert scoring.trained_length(str(exported)) == 64


def test_reading_is_of_each_token(model):
    scorer = scoring.open_scorer(model)
    ids = np.frombuffer(b"greedy", dtype=np.uint8)
    said, none = scorer.read([ids, ids[:0]])
    assert said.log_probs.shape == said.greedy.shape == (6,)
    assert none.log_probs.shape == (0,)
    with torch.no_grad():
        logits = scorer.net(torch.tensor([[10, *ids.tolist()]])).logits[0, :-1]
    assert said.greedy.tolist() == (logits.argmax(-1) == torch.tensor(ids.tolist())).tolist()
