"""``statezoo card``: a finished run as a Hub repository in waiting."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]

from statezoo.card.about import About, read_about
from statezoo.card.text import METRICS_FILE, is_card, read_metrics, readme

__all__ = ["card"]


def card(
    run: str,
    out: str,
    *,
    about: str | None = None,
    compare: list[str] | None = None,
    name: str | None = None,
) -> None:
    """Make a finished run a folder for the Hub: weights, numbers, sample and model card.

    All numbers are measured on the weights as they are written. The folder of a card as RUN and as
    OUT writes its README.md anew from the numbers that are there.

    Args:
        run: Folder of a run of a language model, or a card.
        out: Folder to write; files of an older card there are replaced.
        about: YAML file that says what the data is, its licence, and what the model is for.
        compare: Cards to show in the table; those of other tests are left out.
        name: Name of the model; default that of the folder.
    """
    target = Path(out)
    _check_target(target)
    facts = read_about(about) if about else None
    rivals = _rivals(compare or [], target)
    if is_card(run):
        if Path(run).resolve() != target.resolve():
            raise ValueError(
                f"{run!r} is a card already: give it twice to write its README.md anew, or the "
                "folder of a run."
            )
        metrics = read_metrics(run)
        metrics["name"] = name or metrics["name"]
    else:
        metrics = _measured(run, target, facts or About(), name or target.resolve().name)
    if facts:
        metrics["data"] |= _said(facts)
    _write(target, metrics, rivals)
    sys.stdout.write(f"wrote {out}: {', '.join(sorted(f.name for f in target.iterdir()))}\n")
    _warn(target)


def _check_target(target: Path) -> None:
    """Raise where something of the user's would be lost."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{str(target)!r} is a file: card writes a folder.")
    if target.is_dir() and any(target.iterdir()) and not is_card(target):
        raise ValueError(
            f"{str(target)!r} has files and is not a card: choose another folder, so that nothing "
            "is lost."
        )


def _rivals(folders: list[str], target: Path) -> list[dict[str, Any]]:
    """Return the numbers of other cards."""
    others = [Path(f) for f in folders if Path(f).resolve() != target.resolve()]
    return [read_metrics(folder) for folder in others]


def _measured(run: str, target: Path, about: About, name: str) -> dict[str, Any]:
    """Write everything but numbers and card, and return the numbers."""
    import torch

    import statezoo
    from statezoo.card import measure
    from statezoo.card.run import open_run, portable, training
    from statezoo.card.samples import write_sample
    from statezoo.cli import quiet
    from statezoo.lightning_modules.network import export, load_network

    quiet()
    opened = open_run(run)
    metrics: dict[str, Any] = {
        "name": name,
        "statezoo": statezoo.__version__,
        "torch": torch.__version__,
        "train": training(opened, name, about.hardware),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".card-") as place:
        folder = Path(place)
        dtype = measure.lightest(opened)
        net: Any = load_network(opened.checkpoint)
        export(net.to(dtype), folder, opened.module.tokenizer_files or _tokenizer(opened))
        _load_as_float32(folder / "config.json")
        settings = yaml.safe_dump(portable(opened.config, name), sort_keys=False)
        (folder / "config.yaml").write_text(settings, encoding="utf-8")
        net = load_network(folder)
        opened.module.net = net
        metrics |= _numbers(measure, opened, net, name)
        metrics["model"] |= {
            "bytes": (folder / "model.safetensors").stat().st_size,
            "dtype": str(dtype).removeprefix("torch."),
        }
        metrics["sample"] = write_sample(opened, folder, about.prompts)
        target.mkdir(exist_ok=True)
        for file in folder.iterdir():
            os.replace(file, target / file.name)
    return metrics


def _numbers(measure: Any, run: Any, net: Any, name: str) -> dict[str, Any]:
    """Measure a network as it is loaded from its card."""
    length = int(run.data.seq_len)
    test = f"statezoo test --config {name}/config.yaml --model.pretrained {name}"
    return {
        "results": _told("validation and test", measure.results, run),
        "unit": run.module.unit,
        "model": measure.describe(net, length),
        "data": {
            "name": f"{type(run.data).__name__} {Path(run.data.path or 'default').name}",
            "fingerprint": measure.fingerprint(run),
        },
        "baselines": _told("baselines", measure.baselines, run),
        "fixture": measure.fixture(run, net),
        "speed": _told("speed", measure.speed, run, f"statezoo card RUN {name}"),
        "command": f"{test} --trainer.precision 32-true --data.path PATH",
    }


def _told(what: str, measure: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Measure, and say what while it takes its time."""
    sys.stdout.write(f"measuring {what}\n")
    sys.stdout.flush()
    return measure(*args)


def _tokenizer(run: Any) -> dict[str, bytes]:
    from statezoo.lightning_modules import checkpoint as ckpt

    return ckpt.tokenizer_files(run.data)


def _load_as_float32(file: Path) -> None:
    """Let narrow weights be computed with in float32."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _said(about: About) -> dict[str, Any]:
    """Return what is said of the data, under the names that metrics.json has."""
    names = {"title": "name", "license": "weights_license", "data_license": "license"}
    return {
        names.get(k, k): v for k, v in about.plain().items() if k not in ("hardware", "prompts")
    }


def _write(target: Path, metrics: dict[str, Any], rivals: list[dict[str, Any]]) -> None:
    """Write numbers and card; rivals that were tested on something else are left out."""
    own = metrics["data"]["fingerprint"]
    same = [rival for rival in rivals if rival["data"]["fingerprint"] == own]
    others = sorted({rival["name"] for rival in rivals if rival not in same})
    if others:
        sys.stdout.write(f"left out {', '.join(others)}: tested on something else\n")
    text = readme(metrics, same)
    (target / METRICS_FILE).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    (target / "README.md").write_text(text, encoding="utf-8")


def _warn(target: Path) -> None:
    """Say what ``statezoo publish`` would refuse."""
    from statezoo.folder import check_folder

    for line in check_folder(target):
        sys.stdout.write(f"publish would refuse: {line}\n")
