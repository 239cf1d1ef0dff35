"""`statezoo card`: what it measures is what comes back from the folder that it writes."""

import json
import logging
import re
import shutil
from pathlib import Path

import huggingface_hub
import lightning.pytorch  # noqa: F401  # with its log handlers, which _folder drops
import pytest
import torch
import yaml
from safetensors.torch import load_file

import statezoo
from statezoo.arguments import find_config
from statezoo.card.about import GAP
from statezoo.card.run import command_of, portable
from statezoo.datamodules.batch import IGNORE
from statezoo.main import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

FIT = [
    "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
    "--trainer.max_steps", "6", "--model.d_model", "16", "--model.n_layers", "2",
    "--data.batch_size", "2",
]  # fmt: skip
TEXT = ["--data", "Text", "--data.path", "books", "--data.seq_len", "32", *FIT]
ABOUT = {
    "title": "Lines about squares",
    "license": "apache-2.0",
    "data_license": "Made for a test.",
    "datasets": ["squares"],
    "attribution": "This test.",
    "language": "en",
    "test": "The last lines.",
    "contamination": "All lines are alike.",
    "limits": "It knows squares.",
    "use": "Tests.",
    "hardware": "a laptop",
    "prompts": ["Line 7", "Line"],
}


def fresh_logs():
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()


def failure(capsys, *arguments):
    """What the command says on standard error before it ends with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["card", *map(str, arguments)])
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run on text, its card `tiny`, and that of a second run, `twin`."""
    folder = tmp_path_factory.mktemp("card")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("STATEZOO_CACHE", str(folder / "cache"))
        patch.setattr("statezoo.card.measure.STEPS", 3)
        patch.setattr("statezoo.card.measure.DECODED", 5)
        patch.setattr("statezoo.card.samples.TOKENS", 12)
        fresh_logs()
        Path("books").mkdir()
        for split, first in (("train", 0), ("valid", 150), ("test", 200)):
            lines = [f"Line {i} says {i * i}, you know.\n" for i in range(first, first + 60)]
            Path(f"books/{split}_squares.txt").write_text("".join(lines) * (4 if not first else 1))
        Path("about.yaml").write_text(yaml.safe_dump(ABOUT))
        main(["fit", "--model", "GLA", *TEXT, "--name", "gla"])
        main(["fit", "--model", "Transformer", *TEXT, "--name", "twin"])
        main(["card", "runs/twin", "twin"])
        main(["card", "runs/gla", "tiny", "--about", "about.yaml", "--compare", "twin"])
    return folder


@pytest.fixture(autouse=True)
def _folder(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("STATEZOO_CACHE", str(place / "cache"))
    fresh_logs()


def metrics_of(card):
    return json.loads(Path(card, "metrics.json").read_text())


def tables(card):
    """Rows of all tables of a README, cells as text."""
    lines = Path(card, "README.md").read_text().splitlines()
    return [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]


def test_files_and_schema():
    metrics = metrics_of("tiny")
    assert {file.name for file in Path("tiny").iterdir()} == {
        "README.md", "config.json", "config.yaml", "generation_config.json", "metrics.json",
        "model.safetensors", "sample.txt", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert {"name", "statezoo", "torch", "unit", "train", "model", "data", "results", "baselines",
            "speed", "fixture"} <= metrics.keys()  # fmt: skip
    assert metrics["unit"] == "byte"
    assert json.loads(Path("tiny/config.json").read_text())["dtype"] == "float32"
    weights = load_file("tiny/model.safetensors")
    assert {x.dtype for x in weights.values()} == {torch.float16}
    assert metrics["model"]["bytes"] == Path("tiny/model.safetensors").stat().st_size
    net = statezoo.load("./tiny")
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert metrics["model"]["parameters"] == sum(p.numel() for p in net.parameters())
    # 2 layers of 4 heads, keys 8 / 4 and values 16 / 4 wide, in float32
    assert metrics["model"]["state_bytes"] == 2 * 4 * 2 * 4 * 4
    assert not metrics["model"]["state_grows"]
    assert metrics_of("twin")["model"]["state_grows"]


def test_stored_fixture_comes_back():
    fixture = metrics_of("tiny")["fixture"]
    net = statezoo.load("./tiny").eval()
    assert fixture["input"].encode() == bytes(fixture["ids"])
    assert fixture["input"] in Path("books/test_squares.txt").read_text()
    total, cache = 0.0, None
    with torch.no_grad():
        for token, after in zip(fixture["ids"], fixture["ids"][1:], strict=False):
            out = net(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            total -= float(out.logits[0, -1].log_softmax(-1)[after])
    assert total / (len(fixture["ids"]) - 1) == pytest.approx(fixture["nll"], abs=1e-3)


def test_results_are_those_of_the_stored_weights():
    from statezoo.datamodules import Text

    net, results = statezoo.load("./tiny").eval(), metrics_of("tiny")["results"]
    data = Text("books", seq_len=32, batch_size=2)
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in data.test_dataloader():
            said = net(batch["tokens"]).logits.log_softmax(-1)
            for row, targets in zip(said, batch["targets"], strict=True):
                for at, target in enumerate(targets.tolist()):
                    total -= 0.0 if target == IGNORE else float(row[at, target])
                    count += target != IGNORE
    assert count == len(Path("books/test_squares.txt").read_bytes())
    assert results["test/nll"] == pytest.approx(total / count, abs=1e-5)
    assert results["test/bits_per_byte"] == pytest.approx(total / count * 1.442695, abs=1e-5)


def test_command_of_the_results_gives_them(capsys):
    metrics = metrics_of("tiny")
    words = metrics["command"].replace("PATH", "books").split()
    main([*words[1:], "--trainer.logger", "false", "--trainer.accelerator", "cpu"])
    printed = re.search(r"test/nll\D+([\d.]+)", capsys.readouterr().out)
    assert float(printed[1]) == pytest.approx(metrics["results"]["test/nll"], abs=1e-5)


def test_table_says_what_metrics_say():
    own, twin = metrics_of("tiny"), metrics_of("twin")
    rows = {row[0].strip("*"): row[1:] for row in tables("tiny")}
    for metrics in (own, twin):
        nll, bits, parameters, state, train, decode = rows[metrics["name"]]
        assert nll == f"{metrics['results']['test/nll']:.4f}"
        assert bits == f"{metrics['results']['test/bits_per_byte']:.4f}"
        assert parameters.replace(",", "") == str(metrics["model"]["parameters"])
        assert state.split()[0].replace(",", "") == str(metrics["model"]["state_bytes"])
        assert float(train.replace(",", "")) == round(metrics["speed"]["train_tokens_per_second"])
        assert float(decode.replace(",", "")) == round(metrics["speed"]["decode_tokens_per_second"])
    baselines = {row[0]: row[2] for row in tables("tiny")[2:] if len(row) == 7 and not row[1]}
    known = sorted(f"{bits:.4f}" for bits in own["baselines"].values())
    assert sorted(baselines.values()) == known
    assert baselines["xz -9e"] == f"{own['baselines']['xz']:.4f}"
    assert baselines["Kneser-Ney, order 5"] == f"{own['baselines']['kneser_ney_5']:.4f}"
    assert rows["test/nll"] == [f"{own['results']['test/nll']:.4f}"]
    assert rows["tiny"][0] != rows["twin"][0]


def test_metadata():
    card = huggingface_hub.ModelCard.load("tiny/README.md").data
    assert (card.library_name, card.pipeline_tag) == ("statezoo", "text-generation")
    assert (card.license, card.language, card.datasets) == ("apache-2.0", "en", ["squares"])
    results = metrics_of("tiny")["results"]
    found = {result.metric_type: result for result in card.eval_results}
    assert found["nll"].metric_value == results["test/nll"]
    assert found["bits_per_byte"].metric_value == results["test/bits_per_byte"]
    assert found["nll"].dataset_split == "test"


def test_no_path_of_this_machine(place):
    for file in Path("tiny").iterdir():
        assert str(place).encode() not in file.read_bytes(), file
    assert GAP not in Path("tiny/README.md").read_text()
    assert GAP in Path("twin/README.md").read_text()


def test_code_of_the_card_runs():
    (code,) = re.findall(r"```python\n(.*?)```", Path("tiny/README.md").read_text(), re.DOTALL)
    assert code.startswith("import statezoo\n")
    names = {}
    exec(code, names)
    assert names["texts"][0].startswith("It was")


def test_training_is_told(capsys):
    train, run = metrics_of("tiny")["train"], Path("runs/gla/version_0")
    facts = json.loads((run / "train.json").read_text())
    assert train["steps"] == facts["steps"] == 6
    assert train["tokens"] == facts["tokens"] == 6 * 2 * 32
    assert train["seconds"] == facts["seconds"] > 0
    assert train["cpu_seconds"] == facts["cpu_seconds"] > 0
    assert facts["device"] in train["hardware"]
    assert train["command"] == "statezoo fit --config tiny/config.yaml --data.path books"
    from statezoo.card.run import open_run, training

    shutil.copytree("runs/gla", "runs/older", dirs_exist_ok=True)
    Path("runs/older/version_0/train.json").unlink()
    older = training(open_run("runs/older"), "older", "a laptop")
    assert older["tokens"] == 6 * 2 * 32  # read again
    assert (older["hardware"], older["seconds_by"]) == ("a laptop", "times of files")


def test_card_is_written_anew_without_measuring(capsys):
    shutil.copytree("tiny", "again/tiny")
    before = {file.name: file.read_bytes() for file in Path("again/tiny").iterdir()}
    other = metrics_of("twin") | {"name": "stranger"}
    other["data"] = other["data"] | {"fingerprint": "0" * 16}
    Path("again/stranger").mkdir()
    Path("again/stranger/metrics.json").write_text(json.dumps(other))
    main(["card", "again/tiny", "again/tiny", "--compare", "again/tiny", "again/stranger"])
    assert "left out stranger: tested on something else" in capsys.readouterr().out
    after = {file.name: file.read_bytes() for file in Path("again/tiny").iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"README.md"}
    assert "twin" not in after["README.md"].decode()
    main(["card", "again/tiny", "again/tiny", "--compare", "twin"])
    assert Path("again/tiny/README.md").read_bytes() == before["README.md"]


def test_recipe_is_recognised():
    config = yaml.safe_load(Path(find_config("pretrain/text_gla")).read_text())
    config["data"]["init_args"] |= {"path": "/far/away/novels", "tokenizer": "/my/bpe"}
    config["data"]["class_path"] = "statezoo.datamodules.Text"
    config["model"]["init_args"]["n_heads"] = 4  # what a run resolves beside
    want = "statezoo fit --config pretrain/text_gla --data.path novels"
    assert command_of(config, "gla-novels") == want
    shipped = portable(config, "gla-novels")["data"]["init_args"]
    assert (shipped["path"], shipped["tokenizer"]) == ("novels", "gla-novels")
    assert config["data"]["init_args"]["path"] == "/far/away/novels"
    config["model"]["init_args"]["d_model"] += 1
    assert command_of(config, "mine") == (
        "statezoo fit --config mine/config.yaml --data.path novels"
    )


# ------------------------------------------------------------------- other domains


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("statezoo.card.measure.STEPS", 3)
    monkeypatch.setattr("statezoo.card.measure.DECODED", 5)
    monkeypatch.setattr("statezoo.card.samples.BASES", 40)
    monkeypatch.setattr("statezoo.card.samples.BARS", 1)


def test_dna(quick):
    bases = torch.randint(4, (4, 900), generator=torch.manual_seed(0))
    rows = "".join(
        f">{name}\n{''.join('ACGT'[b] for b in row)}\n"
        for name, row in zip("abcd", bases.tolist(), strict=True)
    )
    Path("genome.fa").write_text(rows)
    data = ["--data", "DNA", "--data.path", "genome.fa", "--data.seq_len", "64"]
    data += ["--data.val_contigs", "[c]", "--data.test_contigs", "[d]"]
    main(["fit", "--model", "GatedDeltaNet", "--model.n_heads", "2", *data, *FIT, "--name", "dna"])
    main(["card", "runs/dna", "gdn-genome"])
    metrics = metrics_of("gdn-genome")
    assert metrics["unit"] == "base"
    assert metrics["results"]["test/bits_per_base"] == pytest.approx(2.5, abs=1)
    assert {"order_1", "mixture"} <= metrics["baselines"].keys()
    assert len(metrics["fixture"]["ids"]) == len(metrics["fixture"]["input"]) == 60
    assert metrics["fixture"]["input"] in rows.split(">d\n")[1]
    name, sequence = Path("gdn-genome/sample.fa").read_text().split()[0::3]
    assert name.startswith(">generated_1")
    assert not set(sequence) - set("ACGT")
    assert not list(Path("gdn-genome").glob("*.run.json"))


def test_music(quick):
    pytest.importorskip("symusic")
    random = torch.manual_seed(0)

    def piece():
        top = torch.randint(4, (40, 4), generator=random) + torch.tensor([72, 65, 58, 50])
        return top.repeat_interleave(2, 0).tolist()

    chorales = {"train": [piece() for _ in range(6)], "valid": [piece()], "test": [piece()]}
    Path("chorales.json").write_text(json.dumps(chorales))
    data = ["--data", "Music", "--data.path", "chorales.json", "--data.packing", "pieces"]
    main(["fit", "--model", "GLA", *data, "--data.seq_len", "512", *FIT, "--name", "music"])
    main(["card", "runs/music", "gla-chorales"])
    metrics = metrics_of("gla-chorales")
    results = metrics["results"]
    assert results["test/nats_per_frame"] == pytest.approx(4 * results["test/nll"])
    assert results["test/nats_per_quarter"] == pytest.approx(16 * results["test/nll"])
    assert {"repeat", "markov_1"} <= metrics["baselines"].keys()
    assert metrics["fixture"]["input"] is None
    assert {"sample.mid", "sample.png"} <= {file.name for file in Path("gla-chorales").iterdir()}
    assert "](sample.png)" in Path("gla-chorales/README.md").read_text()


# ------------------------------------------------------------------------ mistakes


def test_no_checkpoint(capsys):
    Path("empty").mkdir()
    assert "there is no .ckpt file in 'empty'" in failure(capsys, "empty", "out")
    assert not Path("out").exists()


def test_settings_are_gone(capsys):
    shutil.copytree("runs/gla/version_0", "unset")
    Path("unset/config.yaml").unlink()
    assert "there is no config.yaml beside 'unset/best.ckpt'" in failure(capsys, "unset", "out")


def test_data_has_moved(capsys):
    Path("books").rename("moved")
    try:
        said = failure(capsys, "runs/gla", "out")
    finally:
        Path("moved").rename("books")
    assert "the data of the run, 'books', is not there any more" in said
    assert "set data.path in 'runs/gla/version_0/config.yaml' to where it is now" in said
    assert not Path("out").exists()


def test_folders_of_other_things_are_left_alone(capsys):
    Path("mine").mkdir()
    Path("mine/README.md").write_text("my notes")
    said = failure(capsys, "runs/gla", "mine")
    assert "'mine' has files and is not a card: choose another folder" in said
    assert [f.name for f in Path("mine").iterdir()] == ["README.md"]
    Path("file").write_text("")
    assert "'file' is a file: card writes a folder" in failure(capsys, "runs/gla", "file")


def test_card_of_another_card(capsys):
    said = failure(capsys, "tiny", "elsewhere")
    assert "'tiny' is a card already: give it twice" in said


def test_rivals_are_cards(capsys):
    said = failure(capsys, "runs/gla", "out", "--compare", "books")
    assert "'books' is not a card: it has no metrics.json" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("licence: mit", "says 'licence' (did you mean license?)"),
        ("datasets: squares", "datasets must be a list, got 'squares'"),
        ("title: [a]", "title must be text, got ['a']"),
        ("- a", "must hold keys and values"),
    ],
)
def test_mistakes_in_what_is_said(capsys, text, message):
    Path("wrong.yaml").write_text(text)
    assert message in failure(capsys, "runs/gla", "out", "--about", "wrong.yaml")


def test_masked_models_are_refused(capsys):
    Path("short.fa").write_text(">a\n" + "ACGTTGCA" * 60)
    data = ["--data", "DNA", "--data.path", "short.fa", "--data.objective", "masked"]
    data += ["--data.seq_len", "32", "--model.mixers", "[gla]"]
    main(["fit", "--model", "MaskedLM", *data, *FIT, "--name", "masked"])
    said = failure(capsys, "runs/masked", "out")
    assert "card describes language models" in said
    assert "is a MaskedLM: statezoo export writes its folder" in said
