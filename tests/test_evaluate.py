"""statezoo evaluate: lm-evaluation-harness sees the same likelihoods that we do."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")

from statezoo import zoo
from statezoo.datamodules.dna.tokenizers import Nucleotides
from statezoo.datamodules.tokenizers import Bytes, train_bpe
from statezoo.evaluation import local_tasks, scoring
from statezoo.evaluation.harness import Answers, end_of_text, language_model
from statezoo.main import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
MIXERS = ["gla", {"name": "attention", "n_heads": 2}, {"name": "mamba2", "head_dim": 8}]
WORDS = ["the", "state", "of", "a", "recurrent", "net", "is", "read", "once", "and", "forked"]


def saved(folder, tokenizer, mixers=MIXERS, kind=zoo.StateZooForCausalLM):
    """A small random net with its tokenizer, as ``statezoo export`` writes it."""
    torch.manual_seed(0)
    sizes = {"vocab_size": tokenizer.vocab_size, "d_model": 16, "initializer_range": 0.3}
    net = kind(zoo.StateZooConfig(mixers=mixers, n_layers=len(mixers), **sizes))
    net.save_pretrained(folder)
    tokenizer.save(folder)
    return str(folder)


def strings(n):
    """Pairs of context and continuation of different lengths, an empty context among them."""
    rng = np.random.default_rng(0)
    draws = [" ".join(rng.choice(WORDS, rng.integers(1, 12))) for _ in range(2 * n)]
    pairs = list(zip(draws[::2], (f" {x}" for x in draws[1::2]), strict=True))
    return [("", "\nand so on"), ("ends in space ", "here"), *pairs[2:]]


def requests(arguments):
    return [SimpleNamespace(args=one) for one in arguments]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    (folder / "a.txt").write_text(" ".join(WORDS) * 30, encoding="utf-8")
    bpe = train_bpe([folder / "a.txt"], 300, folder / "bpe")
    return {
        "bytes": saved(folder / "bytes", Bytes()),
        "bpe": saved(folder / "net", bpe),
        "dna": saved(folder / "dna", Nucleotides(), ["gla"]),
    }


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_log_probabilities_equal_the_scorer(models, name, batch_size):
    """To 1e-4 nats: of 20 strings, as the difference of two whole texts that are scored alone."""
    scorer = scoring.open_scorer(models[name], batch_size=1)
    answers = Answers(scoring.open_scorer(models[name], batch_size=batch_size))
    pairs = strings(20)
    for (one, more), (found, greedy) in zip(
        pairs, answers.loglikelihood(requests(pairs)), strict=True
    ):
        whole, before = scorer.score([one + more, one.rstrip()])
        assert found == pytest.approx(before.nats - whole.nats, abs=1e-4)
        assert greedy in (True, False)
    texts = [one + more for one, more in pairs]
    rolling = answers.loglikelihood_rolling(requests([(text,) for text in texts]))
    assert rolling == pytest.approx([-x.nats for x in scorer.score(texts)], abs=1e-4)


@pytest.mark.filterwarnings("ignore")  # of the harness's own model, which is here to compare
@pytest.mark.parametrize("batch_size", [1, 8])
def test_log_probabilities_equal_the_harness_own_model(models, batch_size):
    """The harness's HFLM on the exported folder, told to begin with BOS, to 1e-4 nats."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    net = AutoModelForCausalLM.from_pretrained(models["bpe"])
    other = HFLM(
        pretrained=net, tokenizer=AutoTokenizer.from_pretrained(models["bpe"]),
        backend="causal", max_length=512, batch_size=batch_size, device="cpu",
        prefix_token_id=scoring.open_scorer(models["bpe"]).tokenizer.bos_id,
    )  # fmt: skip
    bos = other.tokenizer.bos_token
    pairs = strings(20)
    want = other.loglikelihood(
        [SimpleNamespace(args=(bos + one, more)) for one, more in pairs], disable_tqdm=True
    )
    found = Answers(scoring.open_scorer(models["bpe"], batch_size=batch_size)).loglikelihood(
        requests(pairs)
    )
    np.testing.assert_allclose([x[0] for x in found], [x[0] for x in want], atol=1e-4)
    assert [x[1] for x in found] == [x[1] for x in want]


def test_greedy_is_what_the_model_writes(models):
    answers = Answers(scoring.open_scorer(models["bytes"]))
    (text,) = answers.generate_until(requests([("go on", {"max_gen_toks": 6})]))
    assert "\ufffd" in text or len(text.encode()) == 6
    ids = answers.scorer.net.generate(
        torch.tensor([[10, *b"go on"]]), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    assert text == Bytes().decode(ids[0, 6:].tolist())


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_generate_until_is_the_same_in_a_batch(models, name):
    prompts = [one for one, _ in strings(8)]
    asked = [(p, {"until": ["e", "\n"], "max_gen_toks": 9 + i % 2}) for i, p in enumerate(prompts)]
    alone = Answers(scoring.open_scorer(models[name], batch_size=1)).generate_until(requests(asked))
    done = []
    answers = Answers(
        scoring.open_scorer(models[name], batch_size=4), lambda n, of: done.append((n, of))
    )
    assert answers.generate_until(requests(asked)) == alone
    assert done[-1] == (8, 8)
    assert len({*alone}) > 3
    assert not any("e" in text or "\n" in text for text in alone)


def test_stops_cut_the_text(models):
    scorer = scoring.open_scorer(models["bytes"])
    free = Answers(scorer).generate_until(requests([("a", {"max_gen_toks": 12})]))[0]
    stop = free[3]
    assert Answers(scorer).generate_until(
        requests([("a", {"max_gen_toks": 12, "until": stop})])
    ) == [free.partition(stop)[0]]


def test_text_ends_at_the_token_that_the_tokenizer_names(models):
    scorer = scoring.open_scorer(models["bpe"])
    assert end_of_text(scorer.net, scorer.tokenizer) == [0]
    dna = scoring.open_scorer(models["dna"])
    assert end_of_text(dna.net, dna.tokenizer) == []


def test_token_over_the_border_counts(tmp_path):
    """``ab`` is one token; the context ``a`` has none of it, so all of it is scored."""
    (tmp_path / "a.txt").write_text("ab " * 200, encoding="utf-8")
    tokenizer = train_bpe([tmp_path / "a.txt"], 259, tmp_path / "bpe")
    assert len(tokenizer.encode("ab")) == 1
    scorer = scoring.open_scorer(saved(tmp_path / "net", tokenizer, ["gla"]))
    ((found, _),) = Answers(scorer).loglikelihood(requests([("a", "b")]))
    assert found == pytest.approx(-scorer.score(["ab"])[0].nats, abs=1e-5)


def test_shipped_documents_are_what_their_makers_draw():
    recall, promoters = [*local_tasks.recall()], [*local_tasks.promoters()]
    assert local_tasks.documents("recall.jsonl")["test"].to_list() == recall
    assert local_tasks.documents("promoter.jsonl")["test"].to_list() == promoters
    for row in recall:
        *pairs, asked = row["text"].split()
        answer = dict(zip(pairs[::2], pairs[1::2], strict=True))[asked]
        assert row["choices"][row["label"]] == answer
    assert len(promoters) == 120
    assert sum(row["label"] for row in promoters) in range(45, 76)
    for row in promoters:
        one, other = row["choices"]
        assert one != other
        assert sorted(one) == sorted(other)


def test_shipped_tasks_run(models, tmp_path, capsys):
    """The table and the file say the same; bits per byte are the scorer's."""
    out = tmp_path / "results.json"
    ours = ["--model", models["bytes"], "--tasks", "statezoo", "--offline"]
    main(["evaluate", *ours, "--limit", "8", "--out", str(out)])
    shown = capsys.readouterr()
    assert shown.err == ""
    lines = [line.split() for line in shown.out.splitlines()]
    assert lines[0] == ["task", "n", "metric", "value", "stderr"]
    found = json.loads(out.read_text(encoding="utf-8"))
    rows = {(line[0], line[2]): line for line in lines[1:-1]}
    assert {task for task, _ in rows} == {f"statezoo_{x}" for x in ("recall", "bytes", "promoter")}
    for (task, metric), line in rows.items():
        assert f"{found['results'][task][f'{metric},none']:.4f}" == line[3]
    assert rows["statezoo_recall", "acc"][1] == "8"
    assert len(rows["statezoo_recall", "acc"]) == 5  # with its standard error
    texts = [row["text"] for row in local_tasks.documents("text.jsonl")["test"]]
    scores = scoring.open_scorer(models["bytes"]).score(texts)
    bits = sum(x.nats for x in scores) / sum(x.units for x in scores) / np.log(2)
    assert found["results"]["statezoo_bytes"]["bits_per_byte,none"] == pytest.approx(bits, abs=1e-5)
    assert found["longest"] == max(len(text.encode()) for text in texts)
    assert found["settings"]["limit"] == 8


TASK = """\
task: mine
custom_dataset: !function mine.documents
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
"""
CODE = """\
from datasets import Dataset
def documents(**_):
    rows = [{"question": f"{i} and 1 are", "answer": str(i + 1)} for i in range(6)]
    return {"test": Dataset.from_list(rows)}
"""


def write_task(folder, text=TASK):
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    (folder / "mine.py").write_text(CODE, encoding="utf-8")
    return ["--tasks", "mine", "--include-path", str(folder)]


def test_own_task_and_length_note(models, tmp_path, capsys):
    model = tmp_path / "run"
    scorer = scoring.open_scorer(models["bytes"])
    scorer.net.save_pretrained(model)
    Bytes().save(model)
    (model / "metrics.json").write_text(json.dumps({"model": {"trained_length": 20}}))
    capsys.readouterr()
    main(["evaluate", "--model", str(model), *write_task(tmp_path), "--num-fewshot", "2"])
    out = capsys.readouterr().out
    assert re.search(r"mine +6 +exact_match +0\.0000", out)
    found = re.search(r"the longest text has (\d+) tokens; the model was trained on 20\.", out)
    assert int(found[1]) > 2 * len("0 and 1 are 1")  # two examples come first


def told(arguments, capsys):
    """Run a command that must fail, and return what it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *arguments])
    assert stop.value.code == 2
    return re.sub(r"\s+", " ", capsys.readouterr().err)


def test_mistakes(models, tmp_path, capsys, monkeypatch):
    model = ["--model", models["bytes"]]
    ours = [*model, "--tasks", "statezoo_recall"]
    assert "needs the names of tasks" in told([*model, "--tasks", ","], capsys)
    assert "limit must be at least 1 document, got 0" in told([*ours, "--limit", "0"], capsys)
    assert "num_fewshot must be at least 0" in told([*ours, "--num-fewshot", "-1"], capsys)
    assert "batch_size must be at least 1" in told([*ours, "--batch-size", "0"], capsys)
    assert "no folder 'nowhere' with tasks" in told([*ours, "--include-path", "nowhere"], capsys)
    assert "cannot write" in told([*ours, "--out", str(tmp_path / "no/r.json")], capsys)
    assert "there is no checkpoint" in told(["--model", "no.ckpt", "--tasks", "statezoo"], capsys)
    dna = told(["--model", models["dna"], "--tasks", "statezoo_recall"], capsys)
    assert "reads DNA" in dna
    assert "statezoo_promoter" in dna
    with monkeypatch.context() as patch:
        patch.setattr("statezoo.evaluation.evaluate.find_spec", lambda name: None)
        assert 'pip install "statezoo[eval]"' in told(ours, capsys)
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        assert "set HF_HUB_OFFLINE=1" in told([*ours, "--offline"], capsys)


def test_mistakes_in_tasks(models, tmp_path, capsys, monkeypatch):
    """The harness's own index is left out: it takes ten seconds, and a test of its own below."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager",
        lambda include_path, include_defaults: TaskManager(
            include_path=include_path, include_defaults=False
        ),
    )
    model = ["--model", models["bytes"]]
    near = told([*model, "--tasks", "statezoo_recal"], capsys)
    assert "no task 'statezoo_recal' (did you mean statezoo_recall?)" in near
    broken = told([*model, *write_task(tmp_path, "task: [mine")], capsys)
    assert "mine.yaml cannot be read: ParserError" in broken
    nameless = told([*model, *write_task(tmp_path, "name: mine")], capsys)
    assert "mine.yaml names no task: write task: NAME" in nameless
    field = TASK.replace("{{question}}", "{{questions}}")
    assert "'questions' is undefined" in told([*model, *write_task(tmp_path, field)], capsys)
    data = "\n".join(
        f"dataset_path: {tmp_path / 'nothing'}" if "custom" in line else line
        for line in TASK.splitlines()
    )
    gone = told([*model, *write_task(tmp_path, data)], capsys)
    assert "task 'mine' cannot be loaded" in gone
    assert "must be in the cache of Hugging Face" in gone


def test_is_a_model_of_the_harness(models):
    from lm_eval.api.model import LM

    assert isinstance(language_model(scoring.open_scorer(models["bytes"])), LM)


@pytest.mark.slow
def test_nearest_of_all_tasks(models, capsys):
    shown = told(["--model", models["bytes"], "--tasks", "hellaswa"], capsys)
    assert "no task 'hellaswa' (did you mean hellaswag?)" in shown
