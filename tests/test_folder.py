"""What makes a folder unfit for publishing, each by its own sentence."""

import json
import math
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import statezoo
from statezoo.datamodules.tokenizers import Bytes
from statezoo.folder import check_folder, fixture_nll

TEXT = "To be"
IDS = [10, *TEXT.encode()]
CARD = """---
license: mit
library_name: statezoo
pipeline_tag: text-generation
datasets:
- org/text
model-index:
- name: tiny
  results:
  - task: {type: text-generation}
    dataset: {name: text, type: org/text}
    metrics:
    - {type: nll, name: test/nll, value: 5.123}
    - {type: bits_per_byte, value: 2.5}
---
# tiny
"""


def nll(net):
    """The same by the definition: each token from all before it, one at a time."""
    total = 0.0
    with torch.no_grad():
        for t in range(1, len(IDS)):
            logits = net.eval()(torch.tensor([IDS[:t]])).logits[0, -1].double()
            total -= float(logits[IDS[t]] - logits.logsumexp(0))
    return total / (len(IDS) - 1)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return statezoo.create_model("gla", vocab_size=256, d_model=16, n_layers=1, n_heads=2)


@pytest.fixture
def folder(tmp_path, net):
    """A folder that is fit."""
    net.save_pretrained(tmp_path)
    Bytes().save(tmp_path)
    (tmp_path / "README.md").write_text(CARD)
    results = {"val/nll": 4.0, "test/nll": 5.1234, "test/bits_per_byte": 2.5001}
    fixture = {"input": TEXT, "ids": IDS, "nll": nll(net)}
    (tmp_path / "metrics.json").write_text(json.dumps({"results": results, "fixture": fixture}))
    (tmp_path / "sample.txt").write_text("To be or not to be.")
    (tmp_path / ".gitattributes").write_text("*.safetensors filter=lfs")
    return tmp_path


def edit(folder, **changes):
    file = folder / "metrics.json"
    metrics = json.loads(file.read_text())
    metrics["fixture"] |= changes
    file.write_text(json.dumps(metrics))


def card(folder, old, new):
    text = (folder / "README.md").read_text()
    assert old in text
    (folder / "README.md").write_text(text.replace(old, new))


def test_a_fit_folder(folder, net):
    assert check_folder(folder) == []
    assert math.isclose(fixture_nll(net, IDS), nll(net), abs_tol=1e-5)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        check_folder(folder / "none")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("license: mit\n", "", "the metadata lacks license."),
        ("license: mit", "license: ''", "the metadata lacks license."),
        ("pipeline_tag: text-generation\n", "", "the metadata lacks pipeline_tag."),
        ("datasets:\n- org/text", "datasets: []", "the metadata lacks datasets."),
        ("- org/text", "- ", "the metadata lacks datasets."),
        ("library_name: statezoo", "library_name: transformers",
         "library_name must be statezoo, got 'transformers'."),
        ("value: 5.123", "value: 5.2", "model-index says test/nll is 5.2, metrics.json says "
                                       "5.1234."),
        ("value: 5.123", "value: good", "the value of test/nll in model-index must be a number, "
                                        "got 'good'."),
        ("type: bits_per_byte", "type: accuracy",
         "model-index says accuracy is 2.5, metrics.json says nothing of it."),
    ],
)  # fmt: skip
def test_cards(old, new, told, folder):
    card(folder, old, new)
    assert check_folder(folder) == [f"README.md: {told}"]


def test_cards_without_what_they_need(folder):
    text = (folder / "README.md").read_text()
    start = text.index("model-index")
    for cut, told in (
        (text[:start] + "---\n", "README.md: the metadata lacks model-index."),
        (text[:start] + "model-index: [{name: a, results: []}]\n---\n",
         "README.md: model-index must have at least one result with a metric."),
        (text[:start] + "model-index: [a]\n---\n", "README.md: model-index must list results, "
         "each with its metrics, each of which has a type and a value."),
        ("# tiny\n", "README.md has no metadata: it begins with a block between two ---."),
        ("---\nlicense: [\n---\n", "README.md: the metadata is no YAML in line 2: "),
        ("---\n- a\n---\n", "README.md: the metadata must map names to values."),
    ):  # fmt: skip
        (folder / "README.md").write_text(cut)
        (problem,) = check_folder(folder)
        assert problem.startswith(told)
    (folder / "README.md").unlink()
    (problem,) = check_folder(folder)
    assert problem.startswith("README.md is missing: `statezoo card RUN OUT --about ABOUT.yaml`")


class Bomb:
    """Says so where it is unpickled."""

    def __reduce__(self):
        return (Path("exploded").touch, ())


def test_pickles_by_name_and_by_content(folder, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    for protocol in range(6):
        (folder / f"vocab{protocol}.txt").write_bytes(pickle.dumps(Bomb(), protocol))
    torch.save({"a": torch.zeros(2)}, folder / "notes.md")
    with zipfile.ZipFile(folder / "data.json", "w") as archive:
        archive.writestr("a.txt", "text")
    for name in ("pytorch_model.bin", "a.pkl", "a.pt", "last.CKPT"):
        (folder / name).write_bytes(b"")
    wrong = sorted(
        [*(f"vocab{n}.txt" for n in range(6)), "notes.md", "data.json", "pytorch_model.bin",
         "a.pkl", "a.pt", "last.CKPT"]
    )  # fmt: skip
    end = "is or may hold a pickle, which runs code where it is read: remove it."
    assert check_folder(folder) == [f"{name} {end}" for name in wrong]
    assert not Path("exploded").exists()


def test_what_does_not_belong(folder, monkeypatch):
    (folder / "model.py").write_text("")
    (folder / "run").write_text("#!/bin/sh\n")
    (folder / ".env").write_text("HF_TOKEN=secret")
    (folder / "link.txt").symlink_to("/etc/hostname")
    for name in (".cache", "__pycache__", ".git"):
        (folder / name).mkdir()
        (folder / name / "a.py").write_text("")
    (folder / "extra").mkdir()
    (folder / "extra/b.py").write_text("")
    (folder / "outside").symlink_to("/usr")
    assert sorted(check_folder(folder)) == sorted([
        ".env is hidden, so it does not belong to a model: remove it.",
        *(f"{n} does not belong to a model: remove that folder."
          for n in (".cache", "__pycache__", ".git")),
        "extra/b.py is code, which no model needs: remove it.",
        "model.py is code, which no model needs: remove it.",
        "run is code, which no model needs: remove it.",
        "link.txt is a link: put the file itself there.",
        "outside is a link: put the file itself there.",
    ])  # fmt: skip
    for name in ("model.py", "run", ".env", "link.txt", "extra/b.py", "outside"):
        (folder / name).unlink()
    for name in (".cache", "__pycache__", ".git"):
        (folder / name / "a.py").unlink()
        (folder / name).rmdir()
    monkeypatch.setattr("statezoo.folder.LARGEST", 9_000)
    assert check_folder(folder) == [
        "model.safetensors has more than 9e-06 GB: save the weights in smaller shards."
    ]


def test_weights(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    tensors = load_file(file)
    names = sorted(tensors)[:2]
    tensors[names[0]].view(-1)[0] = math.nan
    tensors[names[1]].view(-1)[-1] = math.inf
    save_file(tensors, file, {"format": "pt"})
    assert check_folder(folder) == [
        f"model.safetensors: {', '.join(names)} hold NaN or infinite values."
    ]
    file.write_bytes(whole[:-5])
    (problem,) = check_folder(folder)
    assert problem.startswith("model.safetensors is no whole safetensors file: ")
    file.unlink()
    assert check_folder(folder) == ["model.safetensors is missing: there are no weights."]


def test_settings_of_other_weights(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layers": 2}))
    (problem,) = check_folder(folder)
    assert problem.startswith("config.json and the weights do not fit: ")
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    (problem,) = check_folder(folder)
    assert problem == (
        "config.json says model_type 'bert': only statezoo's own are published; statezoo convert "
        "makes one of others."
    )
    (folder / "config.json").unlink()
    assert check_folder(folder) == ["config.json is missing."]


def test_fixtures(folder, net):
    edit(folder, nll=nll(net) + 9e-4)
    assert check_folder(folder) == []
    edit(folder, nll=nll(net) + 2e-3)
    (problem,) = check_folder(folder)
    assert problem == (
        f"metrics.json: the fixture has {nll(net) + 2e-3:.4f} nats per token, the weights give "
        f"{nll(net):.4f}."
    )
    edit(folder, nll=nll(net), input="To go")
    assert check_folder(folder) == [
        "tokenizer.json makes other ids of the fixture's text than metrics.json has."
    ]
    edit(folder, input=TEXT)
    (folder / "tokenizer.json").unlink()
    assert check_folder(folder) == [
        "tokenizer.json is missing: the fixture has a text, so the model reads texts."
    ]
    edit(folder, input=None)  # of notes, say
    assert check_folder(folder) == []
    for wrong in ([1], [1, 256], "ab", [1.5, 2]):
        edit(folder, ids=wrong)
        assert check_folder(folder) == [
            "metrics.json: the fixture needs two or more ids below 256 and its nll, a number."
        ]


def test_metrics(folder):
    file = folder / "metrics.json"
    metrics = json.loads(file.read_text())
    file.write_text(json.dumps({"results": metrics["results"]}))
    assert check_folder(folder) == [
        "metrics.json has no fixture, by which it can be seen that the weights still work."
    ]
    metrics["results"]["val/nll"] = math.nan
    file.write_text(json.dumps(metrics))
    assert check_folder(folder) == ["metrics.json: val/nll is no finite number."]
    for text, told in (("{", "metrics.json is not JSON: "), ("{}", "metrics.json has no results.")):
        file.write_text(text)
        (problem,) = check_folder(folder)
        assert problem.startswith(told)
    file.unlink()
    assert check_folder(folder) == [
        "metrics.json is missing: it says where the numbers of the card are from."
    ]


def test_all_at_once(folder):
    card(folder, "license: mit\n", "")
    edit(folder, nll=1.0)
    (folder / "a.pt").write_bytes(b"")
    assert [problem.split()[0] for problem in check_folder(folder)] == [
        "a.pt", "README.md:", "metrics.json:",
    ]  # fmt: skip
