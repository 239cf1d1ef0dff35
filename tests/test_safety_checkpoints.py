"""Checkpoints made to do harm: refused, in a line, before anything is imported, built or run."""

import sys
import zipfile
from pathlib import Path

import pytest
import torch

from statezoo.datamodules.tokenizers import load_tokenizer
from statezoo.lightning_modules import GLA, load_checkpoint, load_network
from statezoo.lightning_modules import checkpoint as ckpt
from statezoo.lightning_modules.checkpoint import CheckpointError
from statezoo.main import main
from tests import test_safety as folders
from tests.test_safety import SIZES, Marks, _reached, refused

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
evil = folders.evil


class Own(GLA):
    """A task of a user."""


@pytest.fixture
def saved(tmp_path):
    """Return a function that writes a checkpoint, changed as it is told."""

    def save(change=lambda content: None, cls=GLA, name="a.ckpt"):
        module = cls(vocab_size=16, d_model=16, n_layers=2)
        content = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
        content |= {"pytorch-lightning_version": "2.6.0", "global_step": 1, "epoch": 0}
        content |= {"loops": {}, "optimizer_states": [], "lr_schedulers": []}
        module.on_save_checkpoint(content)
        change(content)
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


def test_a_whole_checkpoint_is_loaded(saved):
    assert type(load_checkpoint(saved())) is GLA
    assert type(load_checkpoint(saved(cls=Own))) is Own  # which this program has defined
    assert load_network(saved()).config.n_layers == 2


@pytest.mark.parametrize("named", ["evil.Evil", "evil", "os.system", "statezoo.__main__.Evil"])
def test_a_checkpoint_imports_nothing(saved, evil, monkeypatch, named):
    path = saved(lambda content: content[ckpt.KEY].update(class_path=named))
    monkeypatch.setattr("statezoo.main.main", _reached)  # what importing __main__ would call
    refused("is not one of statezoo's tasks", load_checkpoint, path)
    assert not evil.exists()
    assert "evil" not in sys.modules
    if named == "evil.Evil":
        __import__("evil")
        assert evil.exists()  # it would have been left
        refused("is not one of statezoo's tasks", load_checkpoint, path)


def test_the_command_line_imports_nothing(saved, evil, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("some text. " * 99)
    path = saved(lambda content: content[ckpt.KEY].update(class_path="evil.Evil"))
    with pytest.raises(SystemExit) as stop:
        main(["test", "--ckpt_path", str(path), "--data", "Text", "--data.path", "text.txt"])
    assert stop.value.code == 2
    assert "is not one of statezoo's tasks" in capsys.readouterr().err
    assert not evil.exists()


def test_a_checkpoint_is_not_unpickled(saved, tmp_path):
    mark = tmp_path / "was run"
    path = saved(lambda content: content.update(more=Marks(mark)))
    for load in (load_checkpoint, load_network, ckpt.read, load_tokenizer):
        refused("no readable checkpoint", load, path)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()


PARTS = [
    ({"n_layers": 10**9}, {}, "n_layers 1000000000, its network has 2"),
    ({"n_heads": 2**30}, {}, "n_heads"),
    ({"gate_rank": 2**30}, {}, "much larger than its weights"),
    ({"n_layers": 10**9}, {"n_layers": 10**9}, "n_layers is 1000000000, and the weights have"),
    ({"pretrained": "evil/model"}, {}, "name other weights, 'evil/model'"),
    ({"optim": {"class_path": "evil.Evil"}}, {}, "its settings say 'class_path'"),
    ({"channel": "${oc.env:HOME}"}, {}, "its settings say '.{oc.env:HOME}'"),
    ({"d_modell": 3}, {}, "d_modell"),
]


@pytest.mark.parametrize(("settings", "config", "words"), PARTS, ids=lambda x: str(x)[:30])
def test_settings_of_a_checkpoint_are_plain_and_those_of_its_weights(
    saved, settings, config, words
):
    def change(content):
        content["hyper_parameters"].update(settings)
        content[ckpt.KEY]["config"].update(config)

    refused(words, load_checkpoint, saved(change))


@pytest.mark.parametrize(("changes", "words"), SIZES[:7], ids=lambda x: str(x)[:40])
def test_the_network_of_a_checkpoint_is_that_of_its_weights(saved, changes, words):
    path = saved(lambda content: content[ckpt.KEY]["config"].update(changes))
    refused(words, load_network, path)


def test_tensors_of_a_checkpoint_are_no_larger_than_its_file(saved):
    def change(content):
        content["state_dict"]["net.lm_head.weight"] = torch.zeros(1, 1).expand(2**20, 2**20)

    for load in (load_checkpoint, load_network):
        refused("its tensors would take", load, saved(change))


def test_a_checkpoint_does_not_unpack_to_more_than_it_is(saved):
    path = saved()
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in parts.items():
            new.writestr(name, content)
        new.writestr("a/bomb", b"0" * 2**24)
    refused("would unpack to more than it is", load_checkpoint, path)


@pytest.mark.parametrize(
    "files",
    [
        {"../outside.json": b"{}"},
        {"/tmp/outside.json": b"{}"},
        {"a/b.json": b"{}"},
        {"config.json": b"{}"},
        {"model.safetensors": b""},
        {".bashrc": b""},
        {"tokenizer.json": "text"},
        {5: b""},
        [b""],
    ],
    ids=str,
)
def test_files_of_a_tokenizer_stay_in_their_folder(saved, tmp_path, files):
    path = saved(lambda content: content[ckpt.KEY].update(tokenizer=files))
    refused("tokenizer", load_checkpoint, path)
    refused("tokenizer", load_network, path)
    if isinstance(files, dict):
        out = tmp_path / "deep" / "out"
        out.mkdir(parents=True)
        refused("tokenizer", ckpt.write_files, {"tokenizer.json": b"{}"} | files, out)
        assert not [*out.iterdir()]  # not even the good ones


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"statezoo": [1]}, "its statezoo is no mapping"),
        ({"hyper_parameters": 3}, "its hyper_parameters is no mapping"),
        ({"state_dict": {"net.a": "x"}}, "its state_dict has more than tensors"),
        ({"state_dict": [1]}, "no checkpoint of a Lightning module"),
    ],
)
def test_parts_of_a_checkpoint_have_their_types(saved, changes, words):
    path = saved(lambda content: content.update(changes))
    for load in (load_checkpoint, load_network):
        refused(words, load, path, error=CheckpointError)
