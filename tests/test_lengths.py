"""statezoo lengths: loss by position against a plain loop, what it chooses, and what it refuses."""

import csv
import json
import math
import re
from collections import defaultdict
from contextlib import ExitStack
from itertools import pairwise

import numpy as np
import pytest
import torch

from statezoo import zoo
from statezoo.datamodules.dna.tokenizers import Nucleotides
from statezoo.datamodules.music.satb import SatbGrid
from statezoo.datamodules.tokenizers import Bytes, train_bpe
from statezoo.evaluation import positions, scoring
from statezoo.main import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
MIXERS = ["gla", {"name": "attention", "n_heads": 2}, {"name": "mamba2", "head_dim": 8}]
TRAINED = 12


def saved(folder, tokenizer, mixers=MIXERS, kind=zoo.StateZooForCausalLM, trained=TRAINED):
    """A small random net with its tokenizer and the length it was trained on."""
    torch.manual_seed(0)
    sizes = {"vocab_size": tokenizer.vocab_size, "d_model": 16, "initializer_range": 0.3}
    net = kind(zoo.StateZooConfig(mixers=mixers, n_layers=len(mixers), **sizes))
    net.save_pretrained(folder)
    tokenizer.save(folder)
    if trained:
        metrics = {"model": {"trained_length": trained}}
        (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("text"), Bytes())


def letters(n, seed=0):
    """Text of ``n`` bytes in which some letters follow others."""
    rng = np.random.default_rng(seed)
    words = rng.choice(["to ", "be ", "or ", "not "], n)
    return "".join(words)[:n]


@pytest.fixture
def stored():
    """Documents as tokens in a file, closed after the test."""
    with ExitStack() as stack:

        def store_of(tokenizer, *texts):
            store = stack.enter_context(positions.Store())
            for text in texts:
                store.add([tokenizer.encode_document(text.encode())])
            return store

        yield store_of


def plain_loop(net, ids, starts, length, bos):
    """Nats of every token of every window, one full forward pass for each."""
    found = []
    for start in starts:
        before = ids[start - 1] if start else bos
        window = ids[start : start + length]
        inputs = torch.tensor([[before, *window[:-1]]])
        with torch.no_grad():
            log_probs = net(inputs).logits[0].log_softmax(-1)
        found.append([-float(log_probs[t, token]) for t, token in enumerate(window)])
    return found


def test_curves_equal_a_plain_loop_over_windows(model, monkeypatch, stored):
    """In float64 to 1e-9 nats; pieces of 64 tokens, so the state is handed on."""
    monkeypatch.setattr(scoring, "TOKENS", 64)
    scorer = scoring.open_scorer(model, batch_size=3)
    scorer.net = scorer.net.double()
    ids = list(letters(600).encode())
    store, times = stored(Bytes(), letters(600)), 8
    spans = [(0, True), (288, False)]
    curves = list(positions.measure(scorer, store, spans, TRAINED, times))
    assert [curve.length for curve in curves] == [12, 24, 48, 96]
    one = None
    for curve in curves:
        starts = [a for s, _ in spans for a in range(s, s + times * TRAINED, curve.length)]
        nats = plain_loop(scorer.net, ids, starts, curve.length, 10)
        assert curve.windows == len(starts)
        for part in curve.bins:
            rows = [row[part.start : part.stop] for row in nats]
            assert part.tokens == sum(map(len, rows))
            assert part.nll == pytest.approx(sum(map(sum, rows)) / part.tokens, abs=1e-9)
        flat = [x for row in nats for x in row]
        one = one or flat
        assert curve.whole.tokens == len(flat) == 192
        assert curve.whole.nll == pytest.approx(sum(flat) / len(flat), abs=1e-9)
        assert curve.change == pytest.approx((sum(flat) - sum(one)) / len(flat), abs=1e-9)
        assert curve.bits == pytest.approx(curve.whole.nll / math.log(2), abs=1e-9)
        pieces = [sum(flat[a : a + TRAINED]) / TRAINED for a in range(0, len(flat), TRAINED)]
        error = np.std(pieces, ddof=1) / math.sqrt(len(pieces))
        assert curve.whole.stderr == pytest.approx(error, abs=1e-9)
    bounds = [(part.start, part.stop) for part in curves[-1].bins]
    assert bounds[0] == (0, 1)
    assert all(a[1] == b[0] for a, b in pairwise(bounds))
    assert {12, 24, 48, 96} <= {b for _, b in bounds}


def test_standard_errors_of_bins_are_over_windows_and_trained_lengths(model, stored):
    """Bins beyond the trained length, of one window, still have one where they span several."""
    scorer = scoring.open_scorer(model)
    store = stored(Bytes(), letters(200))
    curve = list(positions.measure(scorer, store, [(0, True)], TRAINED, 16))[-1]
    for part in curve.bins:
        pieces = len(range(part.start // TRAINED, -(-part.stop // TRAINED)))
        assert math.isnan(part.stderr) == (pieces < 2), part


def test_standard_error_of_a_mean_of_unequal_clusters():
    """Against the spread of means over many draws of clusters, to a tenth."""
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(400):
        counts = rng.integers(1, 9, 60)
        sums = counts * rng.normal(2, 1, 60)
        _, mean, error = positions._mean(sums.astype(float), counts.astype(float))
        means.append(mean)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)
    assert np.mean(means) == pytest.approx(2, abs=0.03)


def test_the_state_is_empty_where_a_window_begins(model, stored):
    """What lies before a window changes its first token's loss alone, through the token read."""
    scorer = scoring.open_scorer(model)
    texts = [letters(48, 1)[:-1] + "X" + letters(48, 2), letters(48, 3)[:-1] + "X" + letters(48, 2)]
    found = [
        next(positions.measure(scorer, stored(Bytes(), text), [(48, False)], 48, 1)).bins
        for text in texts
    ]
    assert [part.nll for part in found[0]] == [part.nll for part in found[1]]


def test_spans_lie_within_documents_and_all_over_them():
    bounds = [0, 25, 27, 127]
    assert positions.choose_spans(bounds, 10, 99) == [
        (0, True), (10, False), (27, True), *((a, False) for a in range(37, 127, 10)),
    ]  # fmt: skip
    assert positions.choose_spans(bounds, 10, 3) == [(27, True), (67, False), (107, False)]
    assert positions.choose_spans(bounds, 50, 1) == [(77, False)]


@pytest.mark.parametrize("trained", [1, 5, 12, 1000, 1024])
def test_bins_are_spaced_evenly_on_a_logarithm(trained):
    edges = positions.bin_edges(trained, 64 * trained).tolist()
    assert edges == sorted({*edges})
    assert edges[0] == 0
    assert edges[-1] == 64 * trained
    assert {trained << k for k in range(7)} <= {*edges}
    assert all(b <= 1.5 * a + 1 for a, b in pairwise(edges[1:]))


def test_n_is_read_and_not_scored(tmp_path, stored):
    scorer = scoring.open_scorer(saved(tmp_path, Nucleotides(), ["gla"]))
    text = "ACGTNNNNACGTACGTACGTACGA"
    curves = list(positions.measure(scorer, stored(Nucleotides(), text), [(0, True)], 12, 2))
    assert [curve.whole.tokens for curve in curves] == [20, 20]
    want = scorer.score([text])[0]
    assert curves[1].whole.nll == pytest.approx(want.nats / 20, abs=1e-5)
    assert curves[1].bits == pytest.approx(want.bits, abs=1e-5)
    empty = [part for part in curves[0].bins if part.tokens == 1]
    assert all(math.isnan(part.stderr) for part in empty)


def test_bytes_of_byte_pair_encoding(tmp_path, stored):
    (tmp_path / "a.txt").write_text("one two three two one " * 20, encoding="utf-8")
    tokenizer = train_bpe([tmp_path / "a.txt"], 270, tmp_path / "bpe")
    scorer = scoring.open_scorer(saved(tmp_path / "net", tokenizer, ["gla"]))
    text = "one two \u4f60 three two one " * 4
    n = len(tokenizer.encode(text)) // 2
    (curve,) = positions.measure(scorer, stored(tokenizer, text), [(0, True)], 2 * n, 1)
    ids, sizes = tokenizer.encode_document(text.encode())
    want = scorer.read([ids[: 2 * n]])[0].log_probs.sum() / -math.log(2) / sizes[: 2 * n].sum()
    assert curve.bits == pytest.approx(float(want), rel=1e-4)


def run(arguments, capsys):
    capsys.readouterr()
    main(["lengths", *arguments])
    return capsys.readouterr()


def test_command_writes_table_csv_and_picture(model, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(letters(500), encoding="utf-8")
    (tmp_path / "b.txt").write_text(letters(20), encoding="utf-8")
    out = tmp_path / "curve.csv"
    shown = run([str(tmp_path), "--model", model, "--times", "4", "--out", str(out)], capsys)
    assert "10 spans of 48 tokens; 2 documents; 1 with 20 tokens are shorter and left out" in (
        shown.out
    )
    assert re.search(r"48 tokens need about [\d.]+ MB", shown.err)
    table = [line.split() for line in shown.out.splitlines()[2:5]]
    assert [row[:3] for row in table] == [
        ["12", "1x", "40"],
        ["24", "2x", "20"],
        ["48", "4x", "10"],
    ]
    rows = list(csv.DictReader(out.read_text(encoding="utf-8").splitlines()))
    assert [*rows[0]] == [
        "length", "position_from", "position_to", "tokens", "nll", "standard_error",
    ]  # fmt: skip
    means = defaultdict(float)
    for row in rows:
        means[row["length"]] += int(row["tokens"]) * float(row["nll"]) / 480
    for row in table:
        assert means[row[0]] == pytest.approx(float(row[3]), abs=1e-4)
    picture = (tmp_path / "curve.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5000
    assert shown.out.endswith(f"wrote {out}\nwrote {tmp_path / 'curve.png'}\n")


def test_windows_end_where_documents_do(tmp_path, capsys):
    model = saved(tmp_path / "net", Nucleotides(), ["gla"], trained=None)
    file = tmp_path / "a.fa"
    file.write_text(">a\n" + "ACGTTGCAAC\n" * 7 + ">b\nACG\n", encoding="utf-8")
    out = ["--out", str(tmp_path / "a.csv"), "--trained-length", "10"]
    shown = run([str(file), "--model", model, *out], capsys)
    assert "no document has 640 tokens (64x), the longest has 70: windows go up to 4x" in shown.out
    assert "bits/base" in shown.out
    assert not shown.err  # no attention, nothing to warn of


def test_music(tmp_path, capsys):
    tokenizer = SatbGrid()
    model = saved(tmp_path / "net", tokenizer, ["gla"])
    pitches = [[60, 55, 52, 48], [62, 55, 53, 50]] * 8
    chorales = {"train": [pitches], "valid": [], "test": []}
    (tmp_path / "jsb-16.json").write_text(json.dumps(chorales), encoding="utf-8")
    out = ["--out", str(tmp_path / "a.csv"), "--times", "4"]
    shown = run([str(tmp_path / "jsb-16.json"), "--model", model, *out], capsys)
    assert "bits/token" in shown.out
    assert re.search(r"48 +4x +1 ", shown.out)


def told(arguments, capsys):
    """Run a command that must fail, and return what it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["lengths", *arguments])
    assert stop.value.code == 2
    return re.sub(r"\s+", " ", capsys.readouterr().err)


def test_mistakes(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("too short", encoding="utf-8")
    text = ["a.txt", "--model", model]
    assert (
        "the longest document has 9 tokens, and a window of the trained length needs 12: give "
        "longer documents, or a lower --trained_length."
    ) in told(text, capsys)
    assert "No file or folder 'none.txt'" in told(["none.txt", "--model", model], capsys)
    assert "there is no checkpoint" in told(["a.txt", "--model", "no.ckpt"], capsys)
    assert "times must be a power of 2, from 1 on, got 3." in told([*text, "--times", "3"], capsys)
    assert "tokens must be at least 1, got 0." in told([*text, "--tokens", "0"], capsys)
    assert "out must end in .csv" in told([*text, "--out", "a.png"], capsys)
    assert "there is no folder 'no'" in told([*text, "--out", "no/a.csv"], capsys)
    assert "trained_length must be at least 1 token, got 0." in told(
        [*text, "--trained-length", "0"], capsys
    )
    unknown = saved(tmp_path / "u", Bytes(), ["gla"], trained=None)
    assert "give --trained_length TOKENS" in told(["a.txt", "--model", unknown], capsys)
    masked = saved(tmp_path / "m", Bytes(), ["gla"], zoo.StateZooForMaskedLM)
    assert "scoring needs a causal model" in told(["a.txt", "--model", masked], capsys)
    (tmp_path / "b.txt").write_text("\n", encoding="utf-8")
    assert "there is no text in b.txt. b.txt: empty" in told(["b.txt", "--model", model], capsys)
    dna = saved(tmp_path / "d", Nucleotides(), ["gla"])
    assert "the model reads DNA, and the text has 'o' at character 1" in told(
        ["a.txt", "--model", dna], capsys
    )


def test_memory_of_attention_is_told_and_of_a_recurrent_net_is_none(tmp_path):
    """Against the peak of live tensors of a window, which the estimate is above, at most twice."""
    from statezoo.lightning_modules.memory import LiveBytes

    net = scoring.open_scorer(saved(tmp_path / "a", Bytes(), MIXERS)).net
    assert positions.growing_bytes(scoring.open_scorer(
        saved(tmp_path / "g", Bytes(), ["gla"])).net, 1 << 20) == 0  # fmt: skip
    peaks = []
    for n in (2048, 8192):
        stream, counter = scoring.Stream(net, torch.zeros(1).long()), LiveBytes([*net.parameters()])
        with counter:
            stream.read(torch.zeros(1, n).long())
        peaks.append(counter.peak)
    more = positions.growing_bytes(net, 8192) - positions.growing_bytes(net, 2048)
    assert peaks[1] - peaks[0] <= 1.05 * more
    assert more <= 2 * (peaks[1] - peaks[0])
