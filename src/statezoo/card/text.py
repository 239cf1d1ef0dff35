"""The README of a card, from its metrics.json and those of the cards it is compared with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from statezoo.card.about import GAP

__all__ = ["METRICS_FILE", "is_card", "read_metrics", "readme"]

METRICS_FILE = "metrics.json"
NEEDED = ("name", "unit", "train", "model", "data", "results", "baselines", "speed", "fixture")

BASELINES = {
    "unigram_entropy": "byte frequencies",
    "gzip": "gzip -9",
    "xz": "xz -9e",
    "xz_primed": "xz -9e, after reading the training text",
    "unigram": "token frequencies",
    "repeat": "every voice holds its note",
    "mixture": "mixture of many orders, both strands",
}
ORDERS = {"kneser_ney": "Kneser-Ney, order", "order": "order", "markov": "Markov chain, order"}


def is_card(folder: str | Path) -> bool:
    """Say whether a folder is one that ``statezoo card`` wrote."""
    try:
        return bool(read_metrics(folder))
    except ValueError:
        return False


def read_metrics(folder: str | Path) -> dict[str, Any]:
    """Return the numbers of a card.

    Raises:
        ValueError: If the folder has none, or they are not such.
    """
    file = Path(folder) / METRICS_FILE
    if not file.is_file():
        raise ValueError(f"{str(folder)!r} is not a card: it has no {METRICS_FILE}.")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is not JSON: {error}.") from error
    missing = [key for key in NEEDED if not isinstance(found, dict) or key not in found]
    if missing:
        raise ValueError(
            f"{str(file)!r} was not written by statezoo card: it lacks {', '.join(missing)}."
        )
    return dict(found)


def readme(metrics: Mapping[str, Any], others: Sequence[Mapping[str, Any]] = ()) -> str:
    """Compose a model card in the form of the Hub.

    Args:
        metrics: What was measured.
        others: The same of models that were tested on the same tokens.

    Raises:
        ValueError: If one of the others was tested on something else.
    """
    from huggingface_hub import ModelCard

    for other in others:
        if other["data"]["fingerprint"] != metrics["data"]["fingerprint"]:
            raise ValueError(
                f"{other['name']} was tested on other tokens than {metrics['name']}: numbers of "
                "different tests do not compare."
            )
    template = (files("statezoo.hub_cards") / "template.md").read_text(encoding="utf-8")
    split = _split(metrics)
    card = ModelCard.from_template(
        _metadata(metrics),
        template_str=template,
        m=metrics,
        about=metrics["data"],
        gap=f"**{GAP}**",
        split=split,
        split_name={"test": "test", "val": "validation"}[split],
        bits_name=_bits_name(metrics),
        results=[_row(metrics, own=True), *(_row(other) for other in others)],
        baselines=[(_baseline(k), f"{v:.4f}") for k, v in _sorted(metrics["baselines"])],
        more=[(k, f"{v:.4f}") for k, v in metrics["results"].items()],
        layers=_layers(metrics["model"]["layers"]),
        domain=_domain(metrics),
    )
    return str(card)


def _metadata(metrics: Mapping[str, Any]) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    about, split = metrics["data"], _split(metrics)
    title = about.get("name") or GAP
    datasets = about.get("datasets") or None
    dataset = {
        "task_type": "text-generation",
        "dataset_type": (datasets or ["-".join(title.lower().split())])[0],
        "dataset_name": title,
        "dataset_split": {"val": "validation"}.get(split, split),
    }
    measured = {"nll": "nats per token", _bits_name(metrics): _bits_name(metrics).replace("_", " ")}
    found = [
        EvalResult(
            metric_type=kind,
            metric_name=name,
            metric_value=metrics["results"][f"{split}/{kind}"],
            **dataset,
        )
        for kind, name in measured.items()
        if f"{split}/{kind}" in metrics["results"]
    ]
    mixers = [name.replace("_", "-") for name in dict.fromkeys(metrics["model"]["layers"])]
    return ModelCardData(
        library_name="statezoo",
        pipeline_tag="text-generation",
        license=about.get("weights_license"),
        language=about.get("language"),
        datasets=datasets,
        tags=["statezoo", *mixers, *about.get("tags", [])],
        model_name=metrics["name"],
        eval_results=found,
    )


def _split(metrics: Mapping[str, Any]) -> str:
    return "test" if "test/nll" in metrics["results"] else "val"


def _bits_name(metrics: Mapping[str, Any]) -> str:
    return f"bits_per_{metrics['unit']}"


def _row(metrics: Mapping[str, Any], own: bool = False) -> dict[str, str]:
    """Return the cells of a model's line, as text."""
    results, model, speed = metrics["results"], metrics["model"], metrics["speed"]
    split = _split(metrics)
    bits = results.get(f"{split}/{_bits_name(metrics)}")
    name = metrics["name"]
    return {
        "name": f"**{name}**" if own else name,
        "nll": f"{results[f'{split}/nll']:.4f}",
        "bits": "" if bits is None else f"{bits:.4f}",
        "parameters": f"{model['parameters']:,}",
        "state": f"{model['state_bytes']:,}{' and growing' if model['state_grows'] else ''}",
        "train": f"{speed['train_tokens_per_second']:,.0f}",
        "decode": f"{speed['decode_tokens_per_second']:,.0f}",
    }


def _baseline(name: str) -> str:
    """Return what a baseline is called in the table."""
    kind, _, order = name.rpartition("_")
    known = ORDERS.get(kind) if order.isdigit() else None
    return f"{known} {order}" if known else BASELINES.get(name, name)


def _sorted(baselines: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(baselines.items(), key=lambda item: item[1])


def _layers(names: Sequence[str]) -> str:
    """Write the layers in order, equal neighbours counted: ``3 gla, 1 attention``."""
    runs: list[list[str]] = []
    for name in names:
        if runs and runs[-1][0] == name:
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(f"{len(run)} {run[0]}" for run in runs)


def _domain(metrics: Mapping[str, Any]) -> str:
    """Return ``music``, ``dna`` or ``text``, by what the sample is."""
    ends = {Path(name).suffix for name in metrics["sample"]["files"]}
    return "music" if ".mid" in ends else "dna" if ".fa" in ends else "text"
