"""The tasks on the command line: fit, resume, predict, and answers to mistakes."""

import csv
import logging
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch  # noqa: F401  # with its log handlers, which _quiet drops
import pytest
import torch
import yaml

from statezoo.main import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
DATA = ["--data", "tests.lightning_modules.motifs.Motifs", "--trainer.accelerator", "cpu",
        "--trainer.enable_progress_bar", "false"]  # fmt: skip
TINY = ["--model.mixers", "[gla]", "--model.d_model", "16", "--model.n_layers", "1"]
CLASSIFY = ["--model", "SequenceClassifier", *TINY, *DATA]
MASKED = ["--model", "MaskedLM", *TINY, *DATA, "--data.objective", "masked"]
KEEP_ALL = """
from lightning.pytorch import Callback

class KeepAll(Callback):
    step = 0
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step != self.step:
            self.step = trainer.global_step
            trainer.save_checkpoint(f"at-{self.step}.ckpt", weights_only=False)
"""


@pytest.fixture(autouse=True)
def _quiet():
    """Drop Lightning's log handlers: they write to what was standard error on import."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return an empty folder, with a callback to import."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("STATEZOO_CACHE", str(tmp_path / "cache"))
    Path("keeping.py").write_text(KEEP_ALL)
    yield tmp_path
    sys.modules.pop("keeping", None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of one finished run of a classifier."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["fit", *CLASSIFY, "--trainer.max_steps", "3", "--model.class_weights", "balanced"])
    return folder / "runs" / "sequenceclassifier-motifs" / "version_0"


def told(arguments, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2, err
    assert "Traceback" not in err
    return " ".join(err.split())


def test_a_fit_of_a_classifier_leaves_everything_in_one_folder(run, capsys):
    names = {file.name for file in run.iterdir()}
    assert {"best.ckpt", "last.ckpt", "confusion.csv", "confusion.png", "loss.png"} <= names
    config = yaml.safe_load((run / "config.yaml").read_text())
    settings = config["model"]["init_args"]
    assert settings["class_weights"] == "balanced"
    assert not {"vocab_size", "class_names", "complement"} & settings.keys()  # of the data
    with (run / "metrics.csv").open(newline="") as file:
        (row,) = [row for row in csv.DictReader(file) if row["val/nll"]]
    assert {"val/accuracy", "val/mcc", "val/auroc", "train/nll"} <= row.keys()
    saved = torch.load(run / "best.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["class_names"] == ["background", "motif"]
    assert (run / "export" / "model.safetensors").is_file()


def test_a_classifier_predicts(run, folder, capsys):
    main(["predict", "--ckpt_path", str(run), *DATA, "--out", "out/named.csv"])
    assert f"wrote {Path('out/named.csv')}\n" in capsys.readouterr().out
    main(["predict", "--ckpt_path", str(run), *DATA, "--data.names", "[]"])  # classes unknown
    (unnamed,) = Path("runs").rglob("predictions.csv")
    tables = []
    for path in (Path("out/named.csv"), unnamed):
        with path.open(newline="") as file:
            tables.append(list(csv.DictReader(file)))
    assert [row["id"] for row in tables[0]] == [f"s{i}" for i in range(31)]
    for row in tables[0]:
        assert row.pop("label") in ("background", "motif")
    assert tables[0] == tables[1]


def test_a_test_takes_the_model_from_the_checkpoint(run, folder, capsys):
    main(["test", "--ckpt_path", str(run), *DATA])
    text = capsys.readouterr().out
    assert all(f"test/{name}" in text for name in ("accuracy", "mcc", "auroc", "nll"))


def test_fine_tuning_says_in_a_line_what_was_kept(run, folder, capsys, caplog):
    main(["fit", *MASKED, "--model.pretrained", str(run), "--trainer.max_steps", "1",
          "--model.reverse_complement", "equivariant"])  # fmt: skip
    (line,) = [x for x in caplog.messages if x.startswith("from ")]
    assert line.endswith(
        "best.ckpt: kept the embedding and 1 layer (gla), now reading both ways with the same "
        "weights, now reading both strands with the same weights; new: the head"
    )
    out = capsys.readouterr().out
    assert "try  statezoo predict --ckpt_path runs/maskedlm-motifs/version_0 --data Motifs" in out


def test_names_of_tasks_are_known(capsys, folder):
    main(["list", "*classifier"])
    said = " ".join(capsys.readouterr().out.split())
    assert "SequenceClassifier Train a network to say the class" in said
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--model.help", "SequenceClassifier"])
    assert not stop.value.code
    assert "--model.class_weights" in capsys.readouterr().out
    assert "(did you mean MaskedLM?)" in told(["fit", "--model", "MaskdLM", *DATA], capsys)


def test_other_classes_are_told(run, folder, capsys):
    other = ["--ckpt_path", str(run), *DATA, "--data.names", "[a, b]"]
    text = told(["test", *other], capsys)
    assert "tells the classes ['background', 'motif'] apart, the data has ['a', 'b']" in text


MISTAKES = [
    (["--model", "SequenceClassifier", "--data", "Text"], "needs data with classes"),
    (["--model", "MaskedLM", "--data", "Text"], "MaskedLM needs data made for the masked obj"),
    (["--model", "MaskedLM", "--data", "Text", "--model.reverse_complement", "equivariant"],
     "needs data that says the complement of each symbol"),
    (["--model", "GLA", *DATA, "--data.objective", "masked"], "set --data.objective causal"),
    ([*CLASSIFY, "--model.reverse_complement", "both"], "expected Literal['none', 'augment'"),
    ([*CLASSIFY, "--model.class_weights", "equal"], "class_weights"),
    ([*CLASSIFY, "--model.mixers", "[mamba5]"], "did you mean 'mamba'?"),
    ([*CLASSIFY, "--model.pretrained", "nowhere"], "no checkpoint or model folder 'nowhere'"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "answer"), MISTAKES, ids=lambda x: " ".join(x)[:70])
def test_mistakes_are_answered(arguments, answer, folder, capsys):
    Path("text.txt").write_text("".join(f"Line {i} says {i * i}.\n\n" for i in range(40)))
    if "Text" in arguments:
        arguments = [*arguments, "--data.path", "text.txt"]
    assert answer in told(["fit", *arguments], capsys)


def test_generate_refuses_what_does_not_continue(run, folder, capsys):
    answer = told(["generate", "--ckpt", str(run), "--prompt", "AC"], capsys)
    assert "is a StateZooForSequenceClassification, which does not continue texts" in answer


def test_links_leave_modules_of_users_alone(folder, capsys):
    Path("mine.py").write_text(
        "import torch\nfrom lightning.pytorch import LightningModule\n"
        "class Mine(LightningModule):\n"
        "    def __init__(self, vocab_size: int = 3):\n"
        "        super().__init__()\n        self.part = torch.nn.Embedding(vocab_size, 2)\n"
        "    def training_step(self, batch, _):\n"
        "        return self.part(batch['tokens']).square().mean()\n"
        "    validation_step = training_step\n"
        "    def configure_optimizers(self):\n"
        "        return torch.optim.SGD(self.parameters(), 0.1)\n"
    )
    main(["fit", "--model", "mine.Mine", *DATA, "--trainer.max_steps", "1",
          "--trainer.limit_val_batches", "0"])  # fmt: skip
    sys.modules.pop("mine", None)
    (saved,) = Path("runs").rglob("last.ckpt")
    assert torch.load(saved, weights_only=True)["state_dict"]["part.weight"].shape == (8, 2)


@pytest.mark.parametrize("model", [CLASSIFY, MASKED], ids=["classifier", "masked"])
def test_a_resumed_run_is_the_same_run(model, folder):
    settings = ["--trainer.max_steps", "7", "--trainer.accumulate_grad_batches", "2",
                "--trainer.val_check_interval", "6", "--data.n", "24",
                "--data.objective" if model is MASKED else "--trainer.log_every_n_steps",
                "masked" if model is MASKED else "1"]  # fmt: skip
    main(["fit", *model, *settings, "--name", "whole", "--trainer.callbacks+=keeping.KeepAll"])
    whole = torch.load("at-7.ckpt", weights_only=True)
    for step in (2, 5):  # in the first epoch of three steps, and in the second
        main(["fit", *DATA, *settings, "--ckpt_path", f"at-{step}.ckpt", "--name", f"r{step}"])
        again = torch.load(f"runs/r{step}/version_0/last.ckpt", weights_only=True)
        assert again["global_step"] == 7
        for name, value in whole["state_dict"].items():
            assert torch.equal(again["state_dict"][name], value), f"{name} from step {step}"


@pytest.mark.slow
def test_two_processes_measure_what_one_does(folder):
    done = subprocess.run(
        [sys.executable, "-m", "statezoo", "fit", "--model", "SequenceClassifier", *TINY, "--data",
         "LabelledDNA", *DATA[2:], "--trainer.max_steps", "3", "--trainer.strategy", "ddp",
         "--trainer.devices", "2"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first = Path("runs/sequenceclassifier-labelleddna/version_0")
    main(["validate", "--ckpt_path", str(first / "last.ckpt"), "--data", "LabelledDNA", *DATA[2:]])
    found = []
    for version in (first, first.with_name("version_1")):
        text = (version / "metrics.csv").read_text().splitlines()
        found.append([row for row in csv.DictReader(text) if row["val/nll"]][-1])
    two, one = found
    for name in ("val/nll", "val/accuracy", "val/mcc", "val/auroc"):
        assert float(two[name]) == pytest.approx(float(one[name]), rel=1e-4)
    with (first / "confusion.csv").open(newline="") as file:
        (_, *rows) = csv.reader(file)
    counted = sum(int(n) for row in rows for n in row[1:])
    right = sum(int(row[1 + i]) for i, row in enumerate(rows))
    assert right / counted == pytest.approx(float(one["val/accuracy"]), rel=1e-5)
