"""The statezoo command: what it does, and what it answers to mistakes."""

import csv
import logging
import re
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch  # noqa: F401  # with its log handlers, which _quiet drops
import pytest
import torch
import yaml

from statezoo.main import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
SMALL = [
    "--data.path", "text.txt", "--data.seq_len", "16", "--data.batch_size", "2",
    "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
]  # fmt: skip
CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = sorted(f.relative_to(CONFIGS).as_posix() for f in CONFIGS.rglob("*.yaml"))
TINY = ["--model.d_model", "16", "--model.n_layers", "2"]


@pytest.fixture(autouse=True)
def _quiet():
    """Drop Lightning's log handlers: they write to what was standard error on import."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return an empty folder with a small text in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STATEZOO_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_text("".join(f"Line {i} says {i * i}.\n\n" for i in range(40)))
    return tmp_path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of one finished run of a GLA."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("STATEZOO_CACHE", str(folder / "cache"))
        Path("text.txt").write_text("".join(f"Line {i} says {i * i}.\n\n" for i in range(40)))
        main(["fit", "--model", "GLA", "--data", "Text", *SMALL, *TINY, "--trainer.max_steps", "4"])
    return folder / "runs" / "gla-text" / "version_0"


def told(arguments, capsys):
    """Run a command that must fail, and return what it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out = capsys.readouterr()
    assert stop.value.code == 2, out.err
    lines = [line for line in out.err.splitlines() if not line.startswith("Seed set")]
    assert len(lines) <= 3, out.err
    assert "Traceback" not in out.err
    return " ".join(lines)


# ------------------------------------------------------------------ light commands


def test_overview_and_list_are_light():
    code = (
        "import sys, time; t = time.perf_counter(); from statezoo.main import main; main([]); "
        "main(['list']); main(['list', 'gl*']); assert 'torch' not in sys.modules; "
        "sys.stderr.write(str(time.perf_counter() - t))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage: statezoo COMMAND" in done.stdout
    assert "Transformer" in done.stdout
    assert "gla_tiny" in done.stdout
    assert float(done.stderr) < 3  # 0.2 s on an idle machine


def test_list_shows_architectures_with_their_presets(capsys):
    from statezoo.lightning_modules import ARCHITECTURES

    main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    known = {line.split()[0] for line in lines if line}
    assert set(ARCHITECTURES) <= known
    assert {name.removesuffix(".yaml") for name in SHIPPED} <= known
    main(["list", "gla*"])
    text = capsys.readouterr().out
    assert "GLA  Gated linear attention, arXiv:2312.06635" in text
    (row,) = [line for line in text.splitlines() if "gla_130m" in line]
    assert re.split("  +", row.strip()) == ["gla_130m", "124 M", "50280", "3.54 MB", "one GPU"]
    assert not {"mamba", "Text", "demo"} & set(text.split())


@pytest.mark.parametrize("group", ["dna", "music", "probe", "tokenizer"])
def test_a_group_lists_its_commands(group, capsys):
    main([group])
    shown = capsys.readouterr().out
    rows = [line for line in shown.splitlines() if line.startswith(f"  statezoo {group} ")]
    *commands, last = rows
    assert all(len(row.split()) > 4 for row in commands), "each says what it does"
    assert commands
    assert last.split()[-2:] == ["COMMAND", "--help"]
    main([group, "--help"])
    assert capsys.readouterr().out == shown


def test_trains_a_tokenizer_of_bases(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STATEZOO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "g.fa").write_text(">a\n" + "ACGTTGCA" * 200 + "\n")
    main(["tokenizer", "train", str(tmp_path / "g.fa"), "--out", str(tmp_path / "t"),
          "--vocab-size", "20"])  # fmt: skip
    assert "20 symbols" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["tokenizer", "train", str(tmp_path / "g.fa"), "a.txt", "--out", str(tmp_path / "t")])
    assert "text or FASTA, not both" in capsys.readouterr().err


def test_console_script_and_module_are_the_same_command():
    script = Path(sys.executable).with_name("statezoo")
    commands = [[sys.executable, "-m", "statezoo"]] + ([[str(script)]] if script.exists() else [])
    outs = [
        subprocess.run([*command, "list", "h*"], capture_output=True, text=True, check=True).stdout
        for command in commands
    ]
    assert all("Hybrid" in out for out in outs)


def test_help_of_an_architecture_shows_each_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--model.help", "GLA"])
    assert not stop.value.code
    text = " ".join(capsys.readouterr().out.split())
    assert "--model.expand_k" in text
    assert "Width of all queries over" in text
    assert "--model.optim.warmup_steps" in text


# ------------------------------------------------------------------------ runs


def test_a_fit_leaves_everything_in_one_folder(run):
    names = {file.name for file in run.iterdir()}
    assert {"best.ckpt", "last.ckpt", "config.yaml", "metrics.csv", "loss.png", "export"} <= names
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert any(row["val/bits_per_byte"] for row in rows)
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == 4
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["seed_everything"] == 0
    assert "vocab_size" not in config["model"]["init_args"]  # comes from the data


def test_exported_folder_is_read_by_transformers(run):
    from transformers import AutoModelForCausalLM

    import statezoo.zoo  # noqa: F401
    from statezoo.datamodules.tokenizers import load_tokenizer
    from statezoo.lightning_modules import load_network

    net = AutoModelForCausalLM.from_pretrained(run / "export").eval()
    ids = torch.tensor([load_tokenizer(run / "export").encode("Line 3")])
    torch.testing.assert_close(net(ids).logits, load_network(run / "best.ckpt").eval()(ids).logits)


def test_saved_config_runs_again_and_tests_do_not_overwrite_it(run, folder, monkeypatch):
    Path("copy.yaml").write_text((run / "config.yaml").read_text())
    logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "runs",
              "--trainer.logger.name", "same", "--trainer.logger.version", ""]  # fmt: skip
    main(["fit", "--config", "copy.yaml", *logger])
    saved = Path("runs/same/config.yaml").read_text()
    main(["test", "--config", "copy.yaml", "--ckpt_path", "runs/same", *logger])
    assert Path("runs/same/config.yaml").read_text() == saved
    assert Path("runs/same/test.yaml").is_file()


def test_a_checkpoint_brings_its_model(run, folder, capsys):
    main(["test", "--ckpt_path", str(run / "best.ckpt"), "--data", "Text", *SMALL])
    assert "test/bits_per_byte" in capsys.readouterr().out
    main(["predict", "--ckpt_path", str(run), "--data", "Text", *SMALL])
    (found,) = Path("runs").rglob("predictions.csv")
    assert f"wrote {found}" in capsys.readouterr().out
    with found.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert all(float(row["nll_nats"]) > 0 for row in rows)


@pytest.mark.parametrize(
    "model",
    [
        ["--model", "Transformer"],
        ["--model", "Hybrid", "--model.mixers", "[gla, {name: attention, n_heads: 2}]"],
        ["--config", "hybrid.yaml", "--model.n_layers", "4"],
    ],
)
def test_other_architectures_fit(model, folder):
    size = ["--model.d_model", "16", "--trainer.max_steps", "1", "--model.n_layers"]
    main(["fit", *model, "--data", "Text", *SMALL, *size, "4"])
    (last,) = Path("runs").rglob("last.ckpt")
    from statezoo.lightning_modules import load_checkpoint

    assert load_checkpoint(last).hparams["d_model"] == 16


def test_generate_is_deterministic(run, capsys):
    arguments = ["generate", "--prompt", "Line 3", "--max-new-tokens", "8"]
    texts = []
    for more in (
        ["--ckpt", str(run / "best.ckpt"), "--seed", "1"],
        ["--ckpt", str(run), "--seed", "1"],
        ["--model", str(run / "export"), "--seed", "1"],
        ["--ckpt", str(run), "--seed", "2"],
    ):
        main([*arguments, *more])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2] != texts[3]
    assert texts[0].startswith("Line 3")
    main([*arguments, "--ckpt", str(run), "--temperature", "0", "--top-k", "3", "--n", "2"])
    assert capsys.readouterr().out.count("Line 3") == 2


def test_export_and_tokenizer_train(run, folder, capsys):
    main(["export", str(run), "out"])
    assert {"config.json", "model.safetensors"} <= {f.name for f in Path("out").iterdir()}
    main(["tokenizer", "train", "text.txt", "--out", "tokens", "--vocab-size", "300"])
    assert "symbols" in capsys.readouterr().out
    main(["fit", "--model", "GLA", "--data", "Text", "--data.tokenizer", "tokens", *SMALL, *TINY,
          "--trainer.max_steps", "1"])  # fmt: skip
    (exported,) = Path("runs").rglob("export/tokenizer.json")
    main(["generate", "--model", str(exported.parent), "--prompt", "Line", "--max-new-tokens", "4"])


# --------------------------------------------------------------------- settings


def printed(arguments, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert not stop.value.code
    return yaml.safe_load(capsys.readouterr().out)


def test_configs_compose_and_later_ones_win(folder, capsys):
    Path("a.yaml").write_text("model: {class_path: GLA, init_args: {d_model: 8, n_layers: 1}}\n")
    Path("b.yaml").write_text("model: {init_args: {d_model: 24}}\ndata: Text\n")
    config = printed(["fit", "--config", "a.yaml", "--config", "b.yaml"], capsys)
    assert (config["model"]["init_args"]["d_model"], config["model"]["init_args"]["n_layers"]) == (
        24,
        1,
    )
    config = printed(["fit", "--config", "gla.yaml", "--config", "b.yaml"], capsys)
    assert config["model"]["init_args"]["d_model"] == 24


def test_interpolation_follows_later_values(folder, capsys):
    Path("a.yaml").write_text(
        "vars: {width: 32}\n"
        "model: {class_path: GLA, init_args: {d_model: '${vars.width}'}}\n"
        "data: {class_path: Text, init_args: {seq_len: '${model.init_args.d_model}'}}\n"
    )
    main(["fit", "--config", "a.yaml", "--vars.width", "16", "--data.path", "text.txt",
          "--data.batch_size", "2", "--trainer.max_steps", "1", "--model.n_layers", "1",
          "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"])  # fmt: skip
    (saved,) = Path("runs").rglob("config.yaml")
    config = yaml.safe_load(saved.read_text())
    assert config["model"]["init_args"]["d_model"] == 16
    assert config["data"]["init_args"]["seq_len"] == 16


@pytest.mark.parametrize("name", ["gla.yaml", "transformer.yaml", "hybrid.yaml", "demo.yaml"])
def test_shipped_configs_parse(name, folder, capsys):
    config = printed(["fit", "--config", name, "--data", "Text"], capsys)
    assert config["model"]["class_path"].startswith("statezoo.lightning_modules.")


def test_settings_may_stand_before_their_class(folder, capsys):
    config = printed(["fit", "--model.d_model", "24", "--data.seq_len=8", "--data", "Text",
                      "--model=GLA", "--trainer.max_steps", "3"], capsys)  # fmt: skip
    assert config["model"]["init_args"]["d_model"] == 24
    assert config["data"]["init_args"]["seq_len"] == 8
    config = printed(
        ["fit", "--model.d_model", "24", "--config", "gla.yaml", "--data", "Text"], capsys
    )
    assert config["model"]["init_args"]["d_model"] == 24


# --------------------------------------------------------------------- mistakes

FIT = ["fit", "--model", "GLA", "--data", "Text"]
MISTAKES = [
    (["list", "zz*"], "nothing is called 'zz*'"),
    (["fitt"], "no command 'fitt' (did you mean fit?)"),
    (["fit", "--model", "GLAA", "--data", "Text"], "no class named 'GLAA' (did you mean GLA?)"),
    (["fit", "--model", "GLA", "--data", "Txt"], "no class named 'Txt' (did you mean Text?)"),
    (["fit", "--model.help", "gla"], "no class named 'gla' (did you mean GLA?)"),
    (["fit", "--model", "GLA"], "--data must be given"),
    (["fit"], "--data and --model must be given"),
    ([*FIT, "--model.d_modle", "64"], "no setting 'd_modle' (did you mean d_model?)"),
    ([*FIT, "--model.d_model", "abc"], "d_model: expected int, got abc"),
    ([*FIT, "--model.n_heads", "3"], "n_heads=3"),
    ([*FIT, "--model.optim.lrr", "1"], "no setting 'optim.lrr' (did you mean optim.lr?)"),
    ([*FIT, "--model.optim.schedule", "x"], "expected Literal['cosine', 'linear', 'constant']"),
    ([*FIT, "--model.optim.lr=-1"], "lr"),
    ([*FIT, "--trainer.max_step", "3"], "(did you mean trainer.max_steps?)"),
    ([*FIT, "--trainer.callbacks+=EarlyStoping"], "(did you mean EarlyStopping?)"),
    ([*FIT, "--data.seq_le", "3"], "no setting 'seq_le' (did you mean seq_len?)"),
    ([*FIT, "--data.path", "nowhere"], "No file or folder 'nowhere'"),
    ([*FIT, "--config", "nope.yaml"], "no config 'nope.yaml'"),
    ([*FIT, "--config", "gla_tini.yaml"], "(did you mean gla_tiny.yaml?)"),
    ([*FIT, "--ckpt_path", "nope.ckpt"], "there is no checkpoint 'nope.ckpt'"),
    ([*FIT, "--ckpt_path", "text.txt"], "'text.txt' is no checkpoint"),
    ([*FIT, "--model.pretrained", "nowhere"], "no checkpoint or model folder 'nowhere'"),
    ([*FIT, "--model.d_model", "${vars.x}"], "Interpolation key"),
    (["fit", "--model", "Hybrid", "--data", "Text", "--model.mixers", "[gla, atention]"],
     "did you mean 'attention'?"),
    (["fit", "--model", "Hybrid", "--data", "Text", "--model.mixers", "[GLA, gla]"],
     "did you mean 'gla'?"),
    (["fit", "--model", "Hybrid", "--data", "Text", "--model.mixers", "[{name: gla, n_head: 1}]"],
     "did you mean 'n_heads'?"),
    (["fit", "--config", "bad.yaml", "--data", "Text"], "no setting 'd_modle' (did you mean"),
    (["fit", "--model.d_modle", "64", *FIT[1:]], "no setting 'd_modle' (did you mean d_model?)"),
    (["fit", "--model.d_model", "64", "--data", "Text"], "--model must be given"),
    ([*FIT, "--model.optim", "AdamW"], "optim: expected settings, or a file of them, got 'AdamW'"),
    ([*FIT, "--trainer.precision", "bf17"], "expected int or Literal['"),
    ([*FIT, "--trainer.max_steps=-5"], "You passed in -5"),
    (["fit", "--model", "Transformer", "--data", "Text", "--model.window", "abc"],
     "window: expected int, got abc"),
    ([*FIT, "--data.tokenizer", "folder/a/b"], "No tokenizer 'folder/a/b': give bytes"),
    ([*FIT, "--config", "open.yaml"], "'open.yaml' is not YAML in line 2"),
    ([*FIT, "--config", "empty.yaml"], "'empty.yaml' holds no settings"),
    ([*FIT, "--trainer.default_root_dir", "text.txt"], "--trainer.default_root_dir"),
    (["export", "x"], "error: folder must be given"),
    (["convert", "nowhere", "x"], "nowhere is not a folder"),
    (["generate", "--promt", "x"], "no setting 'promt' (did you mean prompt?)"),
    (["generate", "--prompt", "x"], "needs --ckpt or --model"),
    (["generate", "--prompt", "x", "--ckpt", "nope.ckpt"], "there is no checkpoint 'nope.ckpt'"),
    (["generate", "--prompt", "x", "--model", "nowhere"], "model folder 'nowhere'"),
    (["generate", "--prompt", "x", "--ckpt", "text.txt", "--top-p", "2"], "top_p in (0, 1]"),
    (["export", "nope.ckpt", "out"], "there is no checkpoint"),
    (["tokenizer", "train", "nowhere", "--out", "x"], "No file or folder 'nowhere'"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "answer"), MISTAKES, ids=lambda x: " ".join(x)[:60])
def test_mistakes_are_answered_in_a_line_or_two(arguments, answer, folder, capsys):
    Path("bad.yaml").write_text("model: {class_path: GLA, init_args: {d_modle: 8}}\n")
    Path("open.yaml").write_text("model: {class_path: GLA\ndata: Text\n")
    Path("empty.yaml").write_text("")
    assert answer in told(arguments, capsys)


def test_checkpoints_of_other_models_are_told(run, folder, capsys):
    path = ["--ckpt_path", str(run / "last.ckpt"), "--data", "Text", *SMALL]
    text = told(["test", "--model", "Transformer", *path], capsys)
    assert "holds the architecture GLA, not Transformer" in text
    text = told(["test", "--model", "GLA", "--model.d_model", "32", *path], capsys)
    assert "has d_model 16, the model 32" in text
    text = told(["fit", "--model", "Transformer", "--data", "Text", *SMALL, "--model.pretrained",
                 str(run / "last.ckpt")], capsys)  # fmt: skip
    assert "of another architecture: its mixers are gla" in text


def test_settings_beside_a_checkpoint_do_not_hide_its_model(run, folder, capsys, caplog):
    path = ["--ckpt_path", str(run), "--data", "Text", *SMALL]
    assert "has n_heads 4, the model 2" in told(["fit", *path, "--model.n_heads", "2"], capsys)
    text = told(["test", *path, "--data.tokenizer", "characters"], capsys)
    assert f"--data.tokenizer {run / 'best.ckpt'}" in text
    main(["fit", *path, *TINY, "--trainer.max_steps", "4"])
    assert "nothing to do" in caplog.text


def test_a_run_is_a_source_of_weights(run, folder, caplog):
    main(["fit", "--model", "GLA", "--model.pretrained", str(run), "--data", "Text", *SMALL, *TINY,
          "--trainer.max_steps", "1", "--checkpoints.monitor", "val/nil"])  # fmt: skip
    assert "no best.ckpt: nothing logs 'val/nil'; there are" in caplog.text
    main(["test", "--model", "GLA", "--data", "Text", *SMALL, *TINY])
    assert "these are fresh weights" in caplog.text


def test_errors_come_soon():
    start = time.perf_counter()
    with pytest.raises(SystemExit):
        main(["fit", "--model", "GLA"])
    assert time.perf_counter() - start < 5  # 0.1 s on an idle machine
