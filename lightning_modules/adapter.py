"""Adapters as folders: what a run has trained of a network, without the rest."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import statezoo
from statezoo.lightning_modules.lora import NAME, peft_config, projections
from statezoo.lightning_modules.network import NETWORKS
from statezoo.lightning_modules.task import Task
from statezoo.lightning_modules.tuning import learn_initial_states, own_head
from statezoo.zoo.tasks import TASKS, with_head

INFO, CONFIG, WEIGHTS = "adapter.json", "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before the names of tensors."""
LABELS = ("id2label", "problem_type", "label_scale")
CHANGES = ("bidirectional", "tie_directions", "complement", "pooling", "mixers", *LABELS)
"""Keys of the configuration that a run may set otherwise than its base."""
NEEDED = ("kind", "base", "base_fingerprint", "network", "config")
"""What ``adapter.json`` must say."""


def save_adapter(
    task: Task, folder: str | Path, weights: Mapping[str, Tensor] | None = None
) -> Path:
    """Write what a run with ``tune: head``, ``lora`` or ``state`` trains.

    ``adapter.json`` says the kind, the base and the sizes, ``adapter_model.safetensors`` has the
    tensors; of LoRA they are in peft's own format, with ``adapter_config.json`` beside.

    Args:
        task: The module.
        folder: Where to; made where it is missing.
        weights: State dict of its network, if not the present one.

    Returns:
        The folder.

    Raises:
        ValueError: If the module trains the whole network.
    """
    if task.tune == "full":
        raise ValueError("tune: full leaves no adapter: all weights have changed; export them.")
    folder, net = Path(folder), task.net
    folder.mkdir(parents=True, exist_ok=True)
    weights = net.state_dict() if weights is None else weights
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    tensors = {name: weights[name].detach().cpu().contiguous().clone() for name in names}
    if task.tune == "lora":
        tensors = {PREFIX + k.replace(f".{NAME}.", "."): x for k, x in tensors.items()}
        _write_peft(task, folder)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # safetensors writes for the owner alone
    rest = [p for p in net.parameters() if not p.requires_grad]
    config = net.config.to_dict()
    info = {
        "kind": task.tune,
        "base": task.base,
        "base_fingerprint": fingerprint(net),
        "base_bytes": sum(p.numel() * p.element_size() for p in rest),
        "network": type(net).__name__,
        "parameters": sum(x.numel() for x in tensors.values()),
        "bytes": sum(f.stat().st_size for f in folder.iterdir() if f.name != INFO),
        **task.adapter.plain(),
        "config": {key: config.get(key) for key in CHANGES},
        "statezoo": statezoo.__version__,
    }
    (folder / INFO).write_text(json.dumps(info, indent=2) + "\n")
    return folder


def _write_peft(task: Task, folder: Path) -> None:
    adapter = task.adapter
    config = peft_config(
        adapter.rank or 1, adapter.alpha or 0.0, adapter.dropout, [*_updated(task.net)]
    )
    config.base_model_name_or_path = task.base
    config.modules_to_save = ["score"] if hasattr(task.net, "score") else None
    config.inference_mode = True
    config.save_pretrained(str(folder))
    written = json.loads((folder / CONFIG).read_text())
    written["target_modules"].sort()  # a set, to peft
    (folder / CONFIG).write_text(json.dumps(written, indent=2) + "\n")


def _updated(net: Any) -> list[str]:
    """List the projections with an update, by the names that they have in a plain net."""
    names = (name for name, _ in net.named_parameters() if f".lora_A.{NAME}." in name)
    return [name.partition(".lora_A.")[0] for name in names]


def fingerprint(net: Any) -> str:
    """Tell a base from others: a hash of some weights that no adapter changes."""
    found = hashlib.sha256()
    for x in (net.model.embeddings.weight[:16], net.model.norm.weight):
        found.update(x.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def apply_adapter(net: Any, folder: str | Path) -> Any:
    """Return a copy of ``net`` with an adapter in it: a plain network, to use and to save.

    Updates of LoRA are merged into the weights, learnt initial states become part of the network.
    Where the adapter was trained for another task than ``net``'s, the result is for that task.

    Args:
        net: The adapter's base.
        folder: What a run wrote as ``adapter``.

    Raises:
        FileNotFoundError: If there is no adapter.
        ValueError: If it is not one for this network.
    """
    folder, info = Path(folder), read_info(folder)
    if info["network"] not in NETWORKS or fingerprint(net) != info["base_fingerprint"]:
        raise ValueError(
            f"{str(folder)!r} is an adapter for other weights than these: it was trained from "
            f"{info['base']!r}, for a {info['network']}."
        )
    net = _for_its_task(net, info)
    tensors = {name.removeprefix(PREFIX): x for name, x in load_file(folder / WEIGHTS).items()}
    if info["kind"] == "state":
        learn_initial_states(net, info["rank"])
    if info["kind"] == "head":
        net, _ = own_head(net)
    own = dict(net.named_parameters())
    with torch.no_grad():
        if info["kind"] == "lora":
            updated = [name for name in projections(net) if f"{name}.lora_A.weight" in tensors]
            for name in updated:
                A, B = (tensors.pop(f"{name}.lora_{side}.weight").double() for side in "AB")
                weight = own[f"{name}.weight"]
                weight += (info["alpha"] / info["rank"] * (B @ A)).to(weight)
        for name, x in tensors.items():
            own[name].copy_(x)
    return net


def base_of(folder: str | Path) -> str:
    """Return the name of an adapter's base: a checkpoint, a folder or a name on the Hub.

    Raises:
        FileNotFoundError: If there is no adapter.
        ValueError: If its ``adapter.json`` cannot be read.
    """
    return str(read_info(folder)["base"])


def read_info(folder: str | Path) -> dict[str, Any]:
    """Read what an adapter says of itself.

    Raises:
        FileNotFoundError: If there is no adapter.
        ValueError: If its ``adapter.json`` cannot be read, or lacks something.
    """
    file = Path(folder) / INFO
    if not file.is_file():
        raise FileNotFoundError(f"{str(folder)!r} is no adapter of ours: it has no {INFO}.")
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is not JSON: {error}") from error
    missing = [key for key in NEEDED if not isinstance(info, dict) or key not in info]
    if missing:
        raise ValueError(f"{str(file)!r} lacks {', '.join(missing)}.")
    found: dict[str, Any] = info
    return found


def _for_its_task(net: Any, info: Mapping[str, Any]) -> Any:
    """Return a copy of ``net`` with the head, and the ways of reading, of an adapter's network."""
    kind, wanted = NETWORKS[info["network"]], dict(info["config"])
    if wanted["id2label"] is not None:
        wanted["id2label"] = {int(number): label for number, label in wanted["id2label"].items()}
    has = net.config.to_dict()
    changes = {key: value for key, value in wanted.items() if value != has.get(key)}
    if type(net) is kind and not changes:
        return copy.deepcopy(net)
    if kind in (TASKS["causal"], TASKS["masked"]):
        changes = {k: v for k, v in changes.items() if k not in LABELS}
    labels = "id2label" in changes and type(net) is kind
    return with_head(net.model if labels else net, kind, **changes)[0]
