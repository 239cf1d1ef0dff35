"""`statezoo fit --model X --data Text` runs for every architecture, and for every small preset."""

import csv
import logging
from pathlib import Path

import lightning.pytorch  # noqa: F401  # with its log handlers, which _quiet drops
import pytest
import torch

from statezoo.lightning_modules import ARCHITECTURES
from statezoo.lightning_modules.architectures import OneMixer
from statezoo.listing import configs
from statezoo.main import main
from statezoo.zoo import mixer_settings
from tests.zoo.cases import SMALL

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
QUICK = [
    "--data", "Text", "--data.path", "text.txt", "--data.seq_len", "16", "--data.batch_size", "2",
    "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
    "--trainer.max_steps", "5", "--model.d_model", "16",
]  # fmt: skip
TINY = [p.name for p in configs()[0] if p.name.endswith("_tiny") and p.model == "Hybrid"]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """Work in an empty folder with a small text in it, without Lightning's log handlers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STATEZOO_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_text("".join(f"Line {i} says {i * i}.\n\n" for i in range(40)))
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()


def fitted(arguments):
    """Train for five steps, and look at what the run leaves."""
    main(["fit", *arguments, *QUICK])
    (last,) = Path("runs").rglob("last.ckpt")
    saved = torch.load(last, weights_only=True)
    assert saved["global_step"] == 5
    assert all(x.isfinite().all() for x in saved["state_dict"].values())
    with (last.parent / "metrics.csv").open(newline="") as file:
        (nll,) = [float(row["val/nll"]) for row in csv.DictReader(file) if row["val/nll"]]
    assert 0 < nll < 10


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_fits(name):
    cls = ARCHITECTURES[name]
    settings = {"n_layers": 4}
    if issubclass(cls, OneMixer):
        own = mixer_settings(cls.mixer)
        settings = {"n_layers": 2} | {k: size for k, size in SMALL.items() if k in own}
    fitted(["--model", name, *(f"--model.{key}={size}" for key, size in settings.items())])


@pytest.mark.parametrize("name", TINY)
def test_every_hybrid_preset_fits(name):
    fitted(["--config", name])
