"""Folders and checkpoints made to do harm: refused, in a line, before anything is built or run."""

import json
import os
import resource
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import statezoo
from statezoo import safety
from statezoo.datamodules.tokenizers import Bytes, load_tokenizer
from statezoo.lightning_modules import load_network
from statezoo.zoo.model import StateZooPreTrainedModel
from tests.zoo.cases import make, tokens

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
MEGABYTES = 200
"""Memory that looking may take at most; what is refused below would take gigabytes."""


@pytest.fixture
def model(tmp_path):
    """Return the folder of a small model."""
    folder = tmp_path / "model"
    make("gla", torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """Return the mark that code of the module ``evil`` leaves; it can be imported."""
    mark, place = tmp_path / "was run", tmp_path / "code"
    place.mkdir()
    (place / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Evil:\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    return mark


class Marks:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def say(folder, file="config.json", **changes):
    """Change what a file of a folder says."""
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


def refused(words, load, *arguments, error=ValueError):
    """Call what must refuse in a line, without loading and without memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StateZooPreTrainedModel, "from_pretrained", _reached)
        with pytest.raises(error, match=words) as caught:
            load(*arguments)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) / 1024 < MEGABYTES
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert "reached" not in str(caught.value)


def _reached(*_args, **_kwargs):
    raise AssertionError("loading was reached")


# ------------------------------------------------------------------- config.json

CODE = [
    {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}},
    {"custom_generate": "evil/generate"},
    {"_attn_implementation": "evil/kernel"},
    {"attn_implementation": "evil/kernel"},
    {"_experts_implementation": "evil/kernel"},
    {"quantization_config": {"quant_method": "bitsandbytes"}},
    {"transformers_weights": "../evil.bin"},
    {"base_model_name_or_path": "evil/model"},
    {"trust_remote_code": True},
]
SIZES = [
    ({"n_layers": 10**9}, "n_layers is 1000000000, and the weights have"),
    ({"n_layers": 10**300}, "beyond any model's"),
    ({"d_model": 2**40}, "d_model is 1099511627776, beyond any model's"),
    ({"d_model": 2**20}, "much larger than its weights"),
    ({"vocab_size": 2**30}, "much larger than its weights"),
    ({"num_labels": 10**9}, "num_labels is 1000000000, wider than any tensor"),
    ({"mixers": [{"name": "gla", "gate_rank": 2**30}]}, "much larger than its weights"),
    ({"mixers": [{"name": "mom", "inner": "gated_deltanet", "n_memories": 2**30}]}, "larger"),
    ({"channel": {"name": "swiglu", "inner": 2**30}}, "much larger than its weights"),
    ({"n_layers": 60}, "does not fit|much larger"),
]
TYPES = [
    ({"n_layers": "2"}, "n_layers: expected int, got str '2'"),
    ({"n_layers": None}, "n_layers: expected int"),
    ({"d_model": True}, "d_model: expected int"),
    ({"d_model": -4}, "d_model must be at least 1"),
    ({"mixers": "gla"}, "mixers: expected"),
    ({"mixers": {"name": "gla"}}, "mixers: expected"),
    ({"mixers": [["gla"]]}, "a mixer is a name"),
    ({"mixers": [{"name": "os.system"}]}, "no mixer named 'os.system'"),
    ({"mixers": [{"name": "gla", "class_path": "os.system"}]}, "has no setting 'class_path'"),
    ({"channel": "os.system"}, "no channel mixer named 'os.system'"),
    ({"architectures": ["os.system"]}, "names the architectures"),
    ({"architectures": "StateZooModel"}, "names the architectures"),
    ({"architectures": [["StateZooModel"]]}, "names the architectures"),
    ({"dtype": "load"}, "dtype is 'load', none of float64"),
    ({"dtype": {"": "float16"}}, "dtype is"),
    ({"transformers_version": ["5"]}, "transformers_version is"),
    ({"norm_eps": float("nan")}, "norm_eps is nan, which is no number"),
    ({"initializer_range": float("inf")}, "initializer_range is inf"),
    ({"id2label": ["a", "b"]}, "config.json"),
    ({"complement": [0.5]}, "complement"),
]


@pytest.mark.parametrize("changes", CODE, ids=lambda x: next(iter(x)))
def test_a_config_names_no_code(model, evil, changes):
    say(model, **changes)
    (model / "evil.py").write_text((evil.parent / "code" / "evil.py").read_text())
    refused(f"no key '{next(iter(changes))}'", statezoo.load, model)
    assert not evil.exists()


@pytest.mark.parametrize(("changes", "words"), SIZES + TYPES, ids=lambda x: str(x)[:40])
def test_a_config_is_that_of_its_weights(model, changes, words):
    if changes == {"n_layers": 60}:  # little, and told by its tensors, as ever
        say(model, **changes)
        with pytest.raises(ValueError, match=words):
            statezoo.load(model)
        return
    say(model, **changes)
    refused(words, statezoo.load, model)
    refused(words, load_network, model)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"n_layers": ' + "[" * 200_000, "nested too deep|is not JSON"),
        ('{"n_layers": ' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deep"),
        ('{"a": "' + "x" * safety.LARGEST_JSON + '"}', "and such a file at most"),
        ("[1, 2]", "must hold a mapping"),
        ('{"model_type": "statezoo"', "is not JSON"),
        ('{"n_layers": ' + "9" * 5000 + "}", "is not JSON"),
        ("\udcff", "is not JSON"),
    ],
    ids=lambda x: x[:14],
)
def test_a_config_is_a_small_mapping(model, text, words):
    (model / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(words, statezoo.load, model)


def test_arguments_that_lead_elsewhere_are_refused(model):
    for key in ("trust_remote_code", "subfolder", "variant", "gguf_file", "use_kernels"):
        with pytest.raises(ValueError, match=f"leave {key} out"):
            statezoo.load(model, **{key: "x"})


@pytest.mark.parametrize(
    "changes",
    [
        {"custom_generate": "evil"},
        {"cache_implementation": "evil/kernel"},
        {"compile_config": {"backend": "evil:backend"}},
        {"watermarking_config": {"a": 1}},
    ],
    ids=lambda x: next(iter(x)),
)
def test_generation_settings_name_no_code(model, changes):
    say(model, "generation_config.json", **changes)
    refused("nothing is loaded by such a name", statezoo.load, model)


def test_an_adapter_beside_a_model_does_not_bring_other_weights(model, tmp_path):
    make("gla", torch.float64).save_pretrained(tmp_path / "other")
    say(model, "adapter_config.json", base_model_name_or_path=str(tmp_path / "other"))
    refused("would load other weights than its own", statezoo.load, model)


# ----------------------------------------------------------------------- weights


def header(tensors, more=b""):
    """Write a safetensors file by hand."""
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + more


def entry(shape, first, last, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "was cut off"),
        (b"1234", "was cut off"),
        (struct.pack("<Q", 2**62) + b"{}", "was cut off"),
        (struct.pack("<Q", 2), "was cut off"),
        (struct.pack("<Q", 2) + b"[]", "must hold a mapping"),
        (struct.pack("<Q", 2) + b"{x", "is not JSON"),
        (header({"a": entry([2], 0, 8)}, b"1234"), "tensors end at byte 8 of 4"),
        (header({"a": entry([1], 0, 4)}, b"12345678"), "tensors end at byte 4 of 8"),
        (header({"a": entry([2**40], 0, 4)}, b"1234"), "tensor 'a' is not true"),
        (header({"a": entry([-1], 0, 4)}, b"1234"), "tensor 'a' is not true"),
        (header({"a": entry([1.0], 0, 4)}, b"1234"), "tensor 'a' is not true"),
        (header({"a": entry([1], 0, 4, "PICKLE")}, b"1234"), "tensor 'a' is not true"),
        (header({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"1234"), "overlap"),
        (header({"a": "x"}), "tensor 'a' is not true"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_weights_are_where_their_file_says(model, content, words):
    (model / "model.safetensors").write_bytes(content)
    refused(words, statezoo.load, model)


def test_weights_that_were_cut_off_are_refused_as_a_whole(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused("tensors end at byte", statezoo.load, model)


def test_shapes_are_read_as_the_library_reads_them(model):
    want = {name: tuple(x.shape) for name, x in load_file(model / "model.safetensors").items()}
    assert safety.read_shapes(model / "model.safetensors") == want


def sharded(model, place="model-1.safetensors"):
    """Turn the model into one of one shard, said to be at ``place``."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, place)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_are_read(model):
    want = statezoo.load(model)(tokens(1, 4)).logits
    sharded(model)
    assert torch.equal(statezoo.load(model)(tokens(1, 4)).logits, want)


@pytest.mark.parametrize(
    ("place", "words", "error"),
    [
        ("../other/model.safetensors", "points outside its folder", ValueError),
        ("/etc/model.safetensors", "points outside its folder", ValueError),
        ("..\\model.safetensors", "points outside its folder", ValueError),
        ("pytorch_model.bin", "names 'pytorch_model.bin', and tensors are in", ValueError),
        ("model-2.safetensors", "has no model-2.safetensors", FileNotFoundError),
    ],
)
def test_an_index_names_tensors_of_its_folder(model, tmp_path, place, words, error):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").symlink_to(model / "model-1.safetensors")
    torch.save({"x": Marks(tmp_path / "was run")}, model / "pytorch_model.bin")
    sharded(model, place)
    refused(words, statezoo.load, model, error=error)
    assert not (tmp_path / "was run").exists()


def test_pickles_alone_are_no_model(model, tmp_path):
    mark = tmp_path / "was run"
    (model / "model.safetensors").unlink()
    torch.save({"x": Marks(mark)}, model / "pytorch_model.bin")
    refused(r"has no model\.safetensors", statezoo.load, model, error=FileNotFoundError)
    assert not mark.exists()
    torch.load(model / "pytorch_model.bin", weights_only=False)
    assert mark.exists()  # the file does harm where it is let


# ------------------------------------------------------------------------- links


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_links_out_of_the_folder_are_refused(model, tmp_path, name):
    Bytes().save(model)
    secret = tmp_path / "secret"
    (model / name).rename(secret)
    (model / name).symlink_to(secret)
    refused("is a link to a file outside its folder", statezoo.load, model)


def test_a_tokenizer_is_no_link_out_of_its_folder(tmp_path):
    Bytes().save(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").rename(tmp_path / "secret")
    (tmp_path / "a" / "tokenizer.json").symlink_to(tmp_path / "secret")
    refused("is a link to a file outside its folder", load_tokenizer, tmp_path / "a")


def test_links_of_the_cache_of_the_hub_are_followed(model, tmp_path):
    root = tmp_path / "models--a--b"
    snapshot, blobs = root / "snapshots" / "0123", root / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert statezoo.load(snapshot)(tokens(1, 4)).logits.shape[:2] == (1, 4)
    blob = (snapshot / "model.safetensors").resolve()
    blob.rename(tmp_path / "secret")
    blob.symlink_to(tmp_path / "secret")
    refused("is a link to a file outside its folder", statezoo.load, snapshot)


# --------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}, "auto_map names code"),
        ({"tokenizer_class": "evil.Evil"}, "no class of transformers"),
        ({"tokenizer_class": {"a": 1}}, "no class of transformers"),
    ],
)
def test_a_tokenizer_runs_no_code(model, evil, changes, words, fast):
    Bytes().save(model)
    say(model, "tokenizer_config.json", **changes)
    (model / "evil.py").write_text((evil.parent / "code" / "evil.py").read_text())
    if not fast:
        (model / "tokenizer.json").unlink()
    refused(words, load_tokenizer, model)
    refused(words, statezoo.load, model)
    assert not evil.exists()


# -------------------------------------------------------------------------- dtype


def test_weights_in_half_precision_compute_as_their_config_says(model):
    file = model / "model.safetensors"
    whole = load_file(file)
    save_file({name: x.half() for name, x in whole.items()}, file, metadata={"format": "pt"})
    say(model, dtype="float32")
    net = statezoo.load(model)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    own = dict(net.named_parameters())
    assert all(torch.equal(own[name], x.half().float()) for name, x in whole.items())
    again = statezoo.load(model, dtype=torch.bfloat16)
    assert again.lm_head.weight.dtype == torch.bfloat16
    assert load_network(model).lm_head.weight.dtype == torch.float32
