"""kNN-LM against a double loop in numpy, hand-worked numbers, and texts that repeat a corpus."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from statezoo import zoo
from statezoo.datamodules.dna.tokenizers import Nucleotides
from statezoo.datamodules.music.satb import SatbGrid
from statezoo.datamodules.tokenizers import Bytes
from statezoo.evaluation import knn, scoring
from statezoo.evaluation.knn import KNN, Datastore, Near, mix, tune
from statezoo.main import main
from tests.test_score import MIXERS, saved

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
CORPUS = ["one sea, two seas and a calm sea; ", "two calm days of one voyage on the sea. "]
TEXTS = ["two seas", "a calm day", "z"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("text"), Bytes())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Documents of different lengths."""
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [json.dumps({"text": text * (3 - i)}) + "\n" for i, text in enumerate(CORPUS)]
    file.write_text("".join(rows), encoding="utf-8")
    return str(file)


def contexts(net, bos, ids):
    """Keys and log-probabilities ``[T W]`` before each token, from one plain call, in float64.

    The key is the last norm before the end of the last block, read at that norm.
    """
    block, found = net.model.layers[-1], []
    norm = block.mixer_norm if block.channel is None else block.channel_norm
    hook = norm.register_forward_hook(lambda part, args, out: found.append(out))
    with torch.no_grad():
        logits = net(torch.tensor([[bos, *ids[:-1]]])).logits[0].double()
    hook.remove()
    return found[0][0].double().numpy(), logits.log_softmax(-1).numpy()


def neighbours(keys, values, query, k, temperature, size):
    """The neighbours' probabilities of one context, by loops."""
    distances = []
    for key in keys:
        total = 0.0
        for a, b in zip(key, query, strict=True):
            total += (a - b) ** 2
        distances.append(total)
    nearest = sorted(range(len(keys)), key=lambda i: distances[i])[:k]
    shares = np.zeros(size)
    for i in nearest:
        shares[values[i]] += math.exp(-distances[i] / temperature)
    return shares / shares.sum()


def expected(model, texts, weight, k, temperature, documents, bos=10):
    """Nats of each text, by loops over tokens, contexts and channels; and the likeliest tokens."""
    net = scoring.open_scorer(model).net
    read = [(list(text), contexts(net, bos, list(text))) for text in documents]
    keys = np.concatenate([said[0] for _, said in read])
    values = [i for ids, _ in read for i in ids]
    nats, greedy = [], []
    for text in texts:
        queries, log_probs = contexts(net, bos, list(text))
        mixed = [
            weight * neighbours(keys, values, query, k, temperature, log_probs.shape[1])
            + (1 - weight) * np.exp(said)
            for query, said in zip(queries, log_probs, strict=True)
        ]
        nats.append(-sum(math.log(p[i]) for p, i in zip(mixed, text, strict=True)))
        greedy.append([int(p.argmax()) for p in mixed])
    return nats, greedy


def documents():
    return [(text * (3 - i)).encode() for i, text in enumerate(CORPUS)]


@pytest.mark.parametrize("channel", [None, {"name": "swiglu"}])
def test_scores_equal_loops_in_numpy(tmp_path, corpus, channel, monkeypatch):
    """To 1e-4 nats over a text; blocks of the search, and batches, leave rests."""
    monkeypatch.setattr(knn, "QUERIES", 3)
    monkeypatch.setattr(knn, "KEYS", 50)
    model = saved(tmp_path, Bytes(), MIXERS[:2], channel=channel)
    want, greedy = expected(model, [x.encode() for x in TEXTS], 0.4, 7, 2.0, documents())
    settings = KNN(corpus, weight=0.4, temperature=2.0, neighbours=7)
    scorer = scoring.open_scorer(model, batch_size=2, knn=settings)
    assert [one.nats for one in scorer.score(TEXTS)] == pytest.approx(want, abs=1e-4)
    ids = [np.frombuffer(text.encode(), np.uint8) for text in TEXTS]
    for row, said, best in zip(ids, scorer.read(ids), greedy, strict=True):
        assert said.greedy.tolist() == [i == j for i, j in zip(row.tolist(), best, strict=True)]
    assert scorer.knn == {
        "corpus": corpus, "tokens": sum(map(len, documents())), "neighbours": 7, "weight": 0.4,
        "temperature": 2.0, "tuned": None,
    }  # fmt: skip


def test_search_is_exact(monkeypatch):
    """Distances to 1e-4 of float64's, in keys of a length that cancels; k beyond a block, and n."""
    monkeypatch.setattr(knn, "QUERIES", 4)
    monkeypatch.setattr(knn, "KEYS", 8)
    rng = np.random.default_rng(0)
    keys, queries = rng.normal(3, 1, (37, 6)), rng.normal(3, 1, (9, 6))
    values = rng.integers(0, 5, 37)
    for k in (1, 11, 37, 100):
        store = Datastore(torch.from_numpy(keys).float(), torch.from_numpy(values), k)
        found = store.nearest(torch.from_numpy(queries).float())
        assert found.distances.shape == (9, min(k, 37))
        for query, distances, tokens in zip(queries, *found, strict=True):
            want = sorted(
                (sum((a - b) ** 2 for a, b in zip(key, query, strict=True)), value)
                for key, value in zip(keys, values, strict=True)
            )[:k]
            got = sorted(zip(distances.tolist(), tokens.tolist(), strict=True))
            assert [x for x, _ in got] == pytest.approx([x for x, _ in want], abs=1e-4)
            assert sorted(x for _, x in got) == sorted(x for _, x in want)


def test_hand_worked():
    """Two neighbours of token 1 and one of token 2 at distances 0, 2 and 2, temperature 2."""
    store = Datastore(
        torch.tensor([[0.0, 0.0], [1.0, 1.0], [-1.0, 1.0], [9.0, 9.0]]),
        torch.tensor([1, 1, 2, 3]), 3,
    )  # fmt: skip
    near = store.nearest(torch.zeros(1, 2))
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    e = math.exp(-1)
    shares = torch.tensor([0, (1 + e) / (1 + 2 * e), e / (1 + 2 * e), 0])
    assert torch.allclose(mix(logits, near, 1, 2.0).exp()[0], shares)
    mixed = 0.75 * torch.tensor([0.1, 0.2, 0.3, 0.4]) + 0.25 * shares
    assert torch.allclose(mix(logits, near, 0.25, 2.0).exp()[0], mixed)
    histogram = torch.tensor([0, 2 / 3, 1 / 3, 0])
    for temperature in (1e9, math.inf):
        assert torch.allclose(mix(logits, near, 1, temperature).exp()[0], histogram)
    nearest = Datastore(store.keys, store.values, 1).nearest(torch.tensor([[8.0, 8.0]]))
    assert mix(logits, nearest, 1, 1.0).tolist() == [[-math.inf, -math.inf, -math.inf, 0]]


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("temperature", [1e-4, 1.0, 1e6])
def test_probabilities_sum_to_one(weight, temperature):
    """To 1e-5, float32; also where the logits are far apart."""
    torch.manual_seed(0)
    near = Near(torch.rand(5, 20) * 100, torch.randint(50, (5, 20)))
    mixed = mix(torch.randn(5, 50) * 30, near, weight, temperature)
    assert torch.allclose(mixed.exp().sum(1), torch.ones(5), atol=1e-5)


def test_weight_zero_is_the_model_to_the_bit(model, corpus):
    plain = scoring.open_scorer(model).score(TEXTS)
    settings = KNN(corpus, weight=0.0, temperature=1.0)
    assert scoring.open_scorer(model, knn=settings).score(TEXTS) == plain


def test_pieces_equal_one_pass(model, tmp_path, monkeypatch):
    """Corpus and text in pieces of 64 tokens, state carried on, to 1e-3 nats over 300 tokens."""
    file = tmp_path / "corpus.txt"
    file.write_text("".join(CORPUS) * 5, encoding="utf-8")
    settings, text = KNN(str(file), weight=0.5, temperature=1.0, neighbours=5), "two seas " * 33
    whole = scoring.open_scorer(model, knn=settings)
    (want,) = whole.score([text])
    monkeypatch.setattr(scoring, "LOGITS", 1)
    widths = []
    scorer = scoring.open_scorer(model)
    scorer.net.register_forward_pre_hook(lambda net, args: widths.append(args[0].shape[1]))
    knn.attach(scorer, settings)
    assert set(widths[:-1]) == {64}
    assert sum(widths) == 5 * len("".join(CORPUS))
    (one,) = scorer.score([text])
    assert one.nats == pytest.approx(want.nats, abs=1e-3)
    pieces = ((np.frombuffer(text[i : i + 50].encode(), np.uint8), None) for i in range(0, 297, 50))
    assert scorer.score_pieces(pieces).nats == pytest.approx(want.nats, abs=1e-3)


def test_tuning_is_the_best_of_the_grid_and_sees_no_held_out_text(model, corpus, monkeypatch):
    stores = []

    class Spy(Datastore):
        def __init__(self, keys, values, k):
            stores.append((keys, values))
            super().__init__(keys, values, k)

    monkeypatch.setattr(knn, "Datastore", Spy)
    scorer = scoring.open_scorer(model, knn=KNN(corpus))
    n = sum(map(len, documents()))
    held = n // 10
    assert [len(keys) for keys, _ in stores] == [n - held, n]
    every = np.concatenate([np.frombuffer(x, np.uint8) for x in documents()])
    assert stores[0][1].tolist() == every[: n - held].tolist()
    assert torch.equal(stores[1][0][: n - held], stores[0][0])
    net = scoring.open_scorer(model).net
    read = [contexts(net, 10, list(x)) for x in documents()]
    queries = np.concatenate([keys for keys, _ in read])
    said = np.concatenate([log_probs for _, log_probs in read])

    def nats(weight, temperature):
        total = 0.0
        for t in range(n - held, n):
            shares = neighbours(queries[: n - held], every, queries[t], 1024, temperature, 256)
            p = weight * shares[every[t]] + (1 - weight) * math.exp(said[t, every[t]])
            total -= math.log(p)
        return total / held

    found = scorer.knn["tuned"]
    best = found["weight"], found["temperature"]
    assert best == (scorer.knn["weight"], scorer.knn["temperature"])
    assert found["tokens"] == held
    assert found["nats"] == pytest.approx(nats(*best), abs=1e-4)
    assert found["model_nats"] == pytest.approx(nats(0, 1), abs=1e-4)
    assert found["nats"] < found["model_nats"]
    for other in ((best[0], best[1] * 2), (best[0], best[1] / 2), (best[0] - 0.05, best[1])):
        assert nats(*other) > found["nats"] - 1e-4


def test_tuning_keeps_what_is_given_and_may_find_zero():
    near = Near(torch.tensor([[1.0, 3.0]]), torch.tensor([[4, 5]]))
    log_probs = torch.tensor([math.log(0.5)])
    useless = tune(near, torch.tensor([6]), log_probs, None, None)
    assert (useless.weight, useless.nats) == (0, pytest.approx(math.log(2)))
    sure = tune(near, torch.tensor([4]), log_probs, None, 1.0)
    assert (sure.weight, sure.temperature) == (0.9, 1.0)
    first = 1 / (1 + math.exp(-2))
    assert sure.nats == pytest.approx(-math.log(0.1 * 0.5 + 0.9 * first))
    cold = tune(near, torch.tensor([4]), log_probs, 0.25, None)
    assert (cold.weight, cold.temperature) == (0.25, 0.00781)  # 2 / 2^8
    never = tune(near, torch.tensor([6]), log_probs, 1.0, None)
    assert never.nats == math.inf


def test_command_says_what_it_tuned_and_gives_it_again(model, corpus, tmp_path, capsys):
    shown = []
    given = ["score", "--text", "two calm seas", "--model", model, "--knn", corpus]
    main(given)
    shown.append(capsys.readouterr())
    line = shown[0].err.strip()
    n = sum(map(len, documents()))
    assert line.startswith(f"kNN: {n} tokens of {corpus}; tuned on the last {n // 10} of them")
    found = re.search(r"with (--knn_weight \S+ --knn_temperature \S+), which is used", line)
    main([*given, *found[1].split()])
    shown.append(capsys.readouterr())
    assert shown[0].out == shown[1].out
    assert shown[1].err == f"kNN: {n} tokens of {corpus}, weight {found[1].split()[1]}, " + (
        f"temperature {found[1].split()[3]}.\n"
    )
    main([*given, "--knn-tokens", "120", *found[1].split()])
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"kNN: the first 120 tokens of {corpus} are kept; --knn_tokens N keeps N."
    assert second.startswith(f"kNN: 120 tokens of {corpus}, weight")


def test_first_tokens_are_kept(model, corpus):
    settings = KNN(corpus, weight=0.5, temperature=1.0, tokens=120)
    (one,) = scoring.open_scorer(model, knn=settings).score(["two"])
    first, second = documents()
    cut = [first, second[: 120 - len(first)]]
    want, _ = expected(model, [b"two"], 0.5, 1024, 1.0, cut)
    assert one.nats == pytest.approx(want[0], abs=1e-4)


def test_dna_stores_no_n(tmp_path):
    model = saved(tmp_path / "net", Nucleotides(), ["gla"])
    file = tmp_path / "a.fa"
    file.write_text(">one\nACGNNNNTTGCA\n>two\nGGNC\n", encoding="utf-8")
    settings = KNN(str(file), weight=1.0, temperature=math.inf)
    scorer = scoring.open_scorer(model, knn=settings)
    assert scorer.knn["tokens"] == scorer.knn["neighbours"] == 11
    (one,) = scorer.score(["AN"])  # A: two of eleven
    assert one.nats == pytest.approx(-math.log(2 / 11), abs=1e-5)
    file.write_text(">one\nNNNN\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"has no token that is scored: N of DNA are not\."):
        scoring.open_scorer(model, knn=settings)


def test_music(tmp_path):
    tokenizer = SatbGrid()
    names = tokenizer.decode([3, 4, 5, 6, 3, 4, 5, 6])
    (tmp_path / "a.txt").write_text(names, encoding="utf-8")
    settings = KNN(str(tmp_path / "a.txt"), weight=1.0, temperature=math.inf)
    scorer = scoring.open_scorer(saved(tmp_path / "net", tokenizer, ["gla"]), knn=settings)
    (one,) = scorer.score([names])
    assert one.nats == pytest.approx(8 * math.log(4), abs=1e-4)  # each of 4 is a quarter


def test_lowers_the_surprise_of_a_shipped_model_by_tuned_settings(tmp_path):
    """Trained on novels, read on every other topic of Python's reference, asked on the others."""
    from pydoc_data.topics import topics

    parts = [list(dict.fromkeys(topics[x].split("\n\n"))) for x in sorted(topics)]
    corpus = "\n\n".join(x for part in parts[:12:2] for x in part)[:20_000]
    seen = set(corpus.split("\n\n"))
    text = "\n\n".join(x for part in parts[1:12:2] for x in part if x not in seen)[:4000]
    file = tmp_path / "python.txt"
    file.write_text(corpus, encoding="utf-8")
    (plain,) = scoring.open_scorer("gla-novels").score([text])
    scorer = scoring.open_scorer("gla-novels", knn=KNN(str(file), neighbours=128))
    (one,) = scorer.score([text])
    assert scorer.knn["tuned"]["nats"] < scorer.knn["tuned"]["model_nats"]
    assert 0 < scorer.knn["weight"] < 1
    assert one.bits < plain.bits - 0.3, (one.bits, plain.bits)


def requests(arguments):
    return [SimpleNamespace(args=one) for one in arguments]


def test_harness_reads_and_writes_with_neighbours(model, corpus):
    """Likelihoods equal the scorer's to 1e-4; greedy writing is the mixture's, padded or not."""
    from statezoo.evaluation.harness import Answers

    settings = KNN(corpus, weight=0.9, temperature=1.0, neighbours=4)
    scorer = scoring.open_scorer(model, batch_size=4, knn=settings)
    answers = Answers(scorer)
    pairs = [("two calm", " seas"), ("one", " voyage of two days"), ("", "a sea")]
    for (one, more), (found, _) in zip(pairs, answers.loglikelihood(requests(pairs)), strict=True):
        whole, before = scorer.score([one + more, one])
        assert found == pytest.approx(before.nats - whole.nats, abs=1e-4)
    prompts = ["two calm day", "se", "one voyage on the"]
    asked = [(prompt, {"until": ["\n"], "max_gen_toks": 3}) for prompt in prompts]
    written = answers.generate_until(requests(asked))
    for prompt, more in zip(prompts, written, strict=True):
        text = prompt.encode()
        for _ in range(3):
            _, (best,) = expected(model, [text + b"\0"], 0.9, 4, 1.0, documents())
            text += bytes([best[-1]])
        assert (prompt + more).encode() == text
    plain = Answers(scoring.open_scorer(model, batch_size=4)).generate_until(requests(asked))
    assert plain != written


def test_evaluate_records_neighbours(model, corpus, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    out = tmp_path / "r.json"
    given = ["evaluate", "--model", model, "--tasks", "statezoo_bytes", "--limit", "1"]
    main([*given, "--out", str(out), "--knn", corpus, "--knn-neighbours", "9"])
    shown = capsys.readouterr().out
    results = json.loads(out.read_text())
    n = sum(map(len, documents()))
    assert results["knn"]["tokens"] == n
    assert results["knn"]["neighbours"] == 9
    assert results["knn"]["tuned"]["tokens"] == n // 10
    assert results["notes"][0] in shown
    assert f"tuned on the last {n // 10} of them" in results["notes"][0]
    with_knn = results["results"]["statezoo_bytes"]
    main([*given, "--out", str(out)])
    plain = json.loads(out.read_text())
    assert plain["knn"] is None
    assert plain["results"]["statezoo_bytes"] != with_knn


def told(arguments, capsys, command="score"):
    """Run a command that must fail, and return what it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([command, *arguments])
    assert stop.value.code == 2
    return re.sub(r"\s+", " ", capsys.readouterr().err)


def test_mistakes(model, corpus, tmp_path, capsys):
    ours = ["--text", "x", "--model", model]
    error = "statezoo score: error: "
    for given, message in [
        (["--knn", corpus, "--knn_weight", "1.5"], "knn_weight must be from 0 to 1, got 1.5."),
        (["--knn", corpus, "--knn_weight", "-0.1"], "knn_weight must be from 0 to 1, got -0.1."),
        (["--knn", corpus, "--knn-temperature", "0"], "knn_temperature must be above 0, got 0."),
        (["--knn", corpus, "--knn_neighbours", "0"], "knn_neighbours must be at least 1, got 0."),
        (["--knn", corpus, "--knn_tokens", "-2"], "knn_tokens must be at least 1, got -2."),
        (["--knn_weight", "0.5"], "knn_weight needs a corpus: give --knn CORPUS as well."),
        (["--knn_tokens", "5"], "knn_tokens needs a corpus: give --knn CORPUS as well."),
    ]:
        assert told([*ours, *given], capsys).strip() == error + message
    for name in ("weight", "temperature"):
        with pytest.raises(ValueError, match=f"knn_{name} must be .*, got nan"):
            KNN(corpus, **{name: math.nan})
    assert "No file or folder 'none.txt'" in told([*ours, "--knn", "none.txt"], capsys)
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n', encoding="utf-8")
    message = told([*ours, "--knn", str(empty)], capsys)
    assert message.startswith(f"{error}there is no text in {empty} (--knn). ")
    assert "empty text" in message
    short = tmp_path / "short.txt"
    short.write_text("ninety tokens " * 6, encoding="utf-8")
    assert told([*ours, "--knn", str(short), "--knn-weight", "0.5"], capsys).strip() == (
        f"{error}tuning needs at least 100 tokens, a tenth of them held out, and {short} (--knn) "
        "has 84: give a longer one, or --knn_weight and --knn_temperature."
    )
    masked = saved(tmp_path / "m", Bytes(), ["gla"], zoo.StateZooForMaskedLM)
    assert "scoring needs a causal model" in told(
        ["--text", "x", "--model", masked, "--knn", corpus], capsys
    )
    pytest.importorskip("lm_eval")
    tasks = ["--model", model, "--tasks", "statezoo_bytes", "--knn_neighbours", "3"]
    assert told(tasks, capsys, "evaluate").strip() == (
        "statezoo evaluate: error: knn_neighbours needs a corpus: give --knn CORPUS as well."
    )
