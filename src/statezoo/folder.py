"""What makes the folder of a model unfit to be published."""

from __future__ import annotations

import io
import json
import math
import os
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]

from statezoo import safety
from statezoo.download import is_adapter, is_name

CARD, METRICS = "README.md", "metrics.json"
FIELDS = ("license", "library_name", "pipeline_tag", "datasets", "model-index")
"""What a card's metadata must say of a model."""
ADAPTER_FIELDS = ("license", "library_name", "base_model")
"""The same of an adapter."""
PICKLES = (".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth")
CODE = (".bat", ".dll", ".dylib", ".exe", ".ipynb", ".js", ".py", ".pyc", ".pyd", ".sh", ".so")
CACHES = ("__pycache__", "cache", "lightning_logs", "runs", "wandb")
LARGEST = 5_000_000_000
"""Bytes of one file."""
READ_FOR_PICKLES = 64_000_000
"""Bytes up to which a file of no known kind is read as a pickle would be."""
NLL_TOLERANCE = 1e-3
"""Nats per token between the stored fixture and what the weights give."""
CARD_TOLERANCE = 1e-3
"""Between a number in the card and in metrics.json, relative: cards round."""


def check_folder(folder: str | Path) -> list[str]:
    """Return all that must change before a model's folder is published, a sentence each.

    The card's metadata must be whole, and its numbers those of ``metrics.json``; the weights must
    be finite, fit ``config.json`` and give the stored fixture again; and nothing may be there that
    runs code, or does not belong. Of an adapter, the card and the tensors are looked at, and that
    its base has a name.

    Args:
        folder: Folder of a model, or of an adapter.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}.")
    problems = [*_files(folder)]
    if is_adapter(folder):
        return [*problems, *_card(folder, ADAPTER_FIELDS), *_adapter(folder)]
    metrics, unreadable = _metrics(folder)
    problems += [*_card(folder, FIELDS, metrics), *unreadable]
    return [*problems, *_model(folder, metrics)]


def files_of(folder: Path) -> list[Path]:
    """List the files of a folder, in the order of their names."""
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _files(folder: Path) -> Iterator[str]:
    """Find what does not belong into a model's folder."""
    for place, folders, names in os.walk(folder):
        here = Path(place).relative_to(folder)
        for name in sorted(folders):
            if name.startswith(".") or name.lower() in CACHES:
                yield f"{here / name} does not belong to a model: remove that folder."
        folders[:] = [n for n in folders if not n.startswith(".") and n.lower() not in CACHES]
        for name in sorted({*names, *(n for n in folders if Path(place, n).is_symlink())}):
            if found := _file(Path(place, name)):
                yield f"{here / name} {found}"


def _file(file: Path) -> str | None:
    """Say what is wrong with a file, if anything is."""
    if file.is_symlink():
        return "is a link: put the file itself there."
    if file.name.startswith(".") and file.name != ".gitattributes":
        return "is hidden, so it does not belong to a model: remove it."
    if file.stat().st_size > LARGEST:
        return f"has more than {LARGEST / 1e9:g} GB: save the weights in smaller shards."
    with file.open("rb") as opened:
        start = opened.read(8)
    if file.suffix.lower() in CODE or start[:2] in (b"#!", b"MZ") or start[:4] == b"\x7fELF":
        return "is code, which no model needs: remove it."
    if file.suffix.lower() in PICKLES or _is_pickle(file, start):
        return "is or may hold a pickle, which runs code where it is read: remove it."
    return None


def _is_pickle(file: Path, start: bytes) -> bool:
    """Tell a pickle, or an archive that may hold one, by its content, running nothing of it."""
    if start[:4] == b"PK\x03\x04" or zipfile.is_zipfile(file):
        return True
    if file.suffix == ".safetensors" or file.stat().st_size > READ_FOR_PICKLES:
        return False
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return True
    try:
        pickletools.dis(file.read_bytes(), out=io.StringIO())
    except Exception:  # whatever it stumbles over, it is no pickle
        return False
    return True


def read_card(file: Path) -> dict[str, Any]:
    """Return the metadata of a card.

    Raises:
        ValueError: If there is none, or it is no mapping in YAML.
    """
    if not file.is_file():
        raise ValueError(f"{file.name} is missing: `statezoo card RUN OUT --about ABOUT.yaml` "
                         "writes it.")  # fmt: skip
    text = file.read_text(encoding="utf-8", errors="replace")
    found = re.match(r"---\r?\n(.*?)\r?\n---\r?(\n|$)", text, re.DOTALL)
    if not found:
        raise ValueError(f"{file.name} has no metadata: it begins with a block between two ---.")
    try:
        card = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 2}" if mark else ""
        reason = getattr(error, "problem", None) or "it cannot be read"
        raise ValueError(f"{file.name}: the metadata is no YAML{line}: {reason}.") from error
    if not isinstance(card, dict):
        raise ValueError(f"{file.name}: the metadata must map names to values.")
    return card


def _card(
    folder: Path, fields: Sequence[str], metrics: Mapping[str, Any] | None = None
) -> Iterator[str]:
    """Check the metadata of a card, and its numbers."""
    try:
        card = read_card(folder / CARD)
    except ValueError as error:
        yield str(error)
        return
    for key in fields:
        if _empty(card.get(key)):
            yield f"{CARD}: the metadata lacks {key}."
    library = card.get("library_name")
    if not _empty(library) and library != "statezoo":
        yield f"{CARD}: library_name must be statezoo, got {library!r}."
    if "model-index" in fields and not _empty(card.get("model-index")):
        yield from _numbers(card["model-index"], metrics)


def _empty(value: Any) -> bool:
    """Say whether a field holds nothing."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, list):
        return all(map(_empty, value))
    return value is None or value == {}


def _numbers(index: Any, metrics: Mapping[str, Any] | None) -> Iterator[str]:
    """Compare the numbers of a card's ``model-index`` with those of ``metrics.json``."""
    try:
        found = [m for entry in index for r in entry["results"] for m in r["metrics"]]
        values = [(str(m.get("name") or m["type"]), str(m["type"]), m["value"]) for m in found]
    except (KeyError, TypeError, AttributeError):
        yield (
            f"{CARD}: model-index must list results, each with its metrics, each of which has a "
            "type and a value."
        )
        return
    if not values:
        yield f"{CARD}: model-index must have at least one result with a metric."
    known = (metrics or {}).get("results") or {}
    for name, kind, value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            yield f"{CARD}: the value of {name} in model-index must be a number, got {value!r}."
        elif known and not any(_same(value, x) for x in _named(known, name, kind)):
            there = " or ".join(f"{x:.6g}" for x in _named(known, name, kind)) or "nothing of it"
            yield f"{CARD}: model-index says {name} is {value:g}, {METRICS} says {there}."


def _named(known: Mapping[str, Any], name: str, kind: str) -> list[float]:
    """Return the results of this name, or whose name ends on it."""
    for word in (name, kind):
        found = [x for k, x in known.items() if word in (k, k.rpartition("/")[2]) and _number(x)]
        if found:
            return found
    return []


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=CARD_TOLERANCE)


def _metrics(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Read ``metrics.json``, and say what is wrong with it."""
    file = folder / METRICS
    if not file.is_file():
        return None, [f"{METRICS} is missing: it says where the numbers of the card are from."]
    try:
        metrics = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        return None, [f"{METRICS} is not JSON: {error}."]
    results = metrics.get("results") if isinstance(metrics, dict) else None
    if not isinstance(results, dict) or not results:
        return None, [f"{METRICS} has no results."]
    wrong = [name for name, value in results.items() if not _number(value)]
    return metrics, [f"{METRICS}: {name} is no finite number." for name in wrong]


def _weights(folder: Path) -> Iterator[str]:
    """Check that all weights can be read, and are finite."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        yield "model.safetensors is missing: there are no weights."
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                names = [*opened.keys()]
                wrong = [name for name in names if not _finite(opened.get_tensor(name))]
        except SafetensorError as error:
            yield f"{file.name} is no whole safetensors file: {error}."
            continue
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            yield f"{file.name}: {', '.join(wrong[:3])}{more} hold NaN or infinite values."


def _finite(tensor: Any) -> bool:
    return not tensor.is_floating_point() or bool(tensor.float().isfinite().all())


def _adapter(folder: Path) -> Iterator[str]:
    """Check the tensors of an adapter, and that its base can be found from everywhere."""
    from statezoo.lightning_modules.adapter import CONFIG, read_info

    yield from _weights(folder)
    try:
        info = read_info(folder)
    except ValueError as error:
        yield f"{error}"
        return
    if not is_name(info["base"]) or Path(info["base"]).exists():
        yield (
            f"adapter.json names as base {info['base']!r}, which is on this machine alone: publish "
            "the base, and write its name there, under base."
        )
    if info["kind"] == "lora" and not (folder / CONFIG).is_file():
        yield f"{CONFIG} is missing, without which peft does not read the adapter."


def _model(folder: Path, metrics: Mapping[str, Any] | None) -> Iterator[str]:
    """Check weights, settings and fixture."""
    from statezoo.lightning_modules.network import load_network

    broken = [*_weights(folder)]
    yield from broken
    if not (folder / "config.json").is_file():
        yield "config.json is missing."
        return
    if any("safetensors file" in line or "no weights" in line for line in broken):
        return
    try:
        kind = safety.read_json(folder / "config.json").get("model_type")
        if kind != "statezoo":
            yield (
                f"config.json says model_type {kind!r}: only statezoo's own are published; "
                "statezoo convert makes one of others."
            )
            return
        net: Any = load_network(folder)
        net.float()
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0].replace(f"{folder}", folder.name)
        yield f"config.json and the weights do not fit: {reason.rstrip('.')}."
        return
    if broken or metrics is None or not net.can_generate():
        return
    fixture = metrics.get("fixture")
    if not isinstance(fixture, dict) or not {"ids", "nll"} <= fixture.keys():
        yield f"{METRICS} has no fixture, by which it can be seen that the weights still work."
        return
    yield from _fixture(folder, net, fixture)


def _fixture(folder: Path, net: Any, fixture: Mapping[str, Any]) -> Iterator[str]:
    """Compute the fixture's NLL again, and its ids from its text."""
    text, ids, stored = fixture.get("input"), fixture["ids"], fixture["nll"]
    size = net.config.vocab_size
    whole = isinstance(ids, list) and all(type(i) is int and 0 <= i < size for i in ids)
    if not whole or len(ids) < 2 or not _number(stored):
        yield f"{METRICS}: the fixture needs two or more ids below {size} and its nll, a number."
        return
    if text is not None:
        yield from _text(folder, text, ids)
    found = fixture_nll(net, ids)
    if not abs(found - stored) <= NLL_TOLERANCE:
        yield (
            f"{METRICS}: the fixture has {stored:.4f} nats per token, the weights give {found:.4f}."
        )


def _text(folder: Path, text: Any, ids: list[int]) -> Iterator[str]:
    """Check that the tokenizer makes the fixture's ids of its text."""
    from statezoo.datamodules.tokenizers import load_tokenizer

    if not (folder / "tokenizer.json").is_file():
        yield "tokenizer.json is missing: the fixture has a text, so the model reads texts."
        return
    try:
        tokenizer = load_tokenizer(folder)
        made = [*map(int, tokenizer.encode(str(text)))]
    except (ValueError, OSError) as error:
        yield f"tokenizer.json cannot be used: {str(error).rstrip('.')}."
        return
    if ids not in (made, [tokenizer.bos_id, *made]):
        yield "tokenizer.json makes other ids of the fixture's text than metrics.json has."


def fixture_nll(net: Any, ids: Sequence[int]) -> float:
    """Return nats per token of ``ids[1:]``, each given those before it.

    Args:
        net: A causal model.
        ids: Two tokens or more.
    """
    import torch
    from torch.nn.functional import cross_entropy

    tokens = torch.tensor([[*ids]])
    with torch.no_grad():
        logits = net.eval()(tokens).logits.float()
    return float(cross_entropy(logits[0, :-1], tokens[0, 1:]))
