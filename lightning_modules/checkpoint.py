"""What a checkpoint of ours holds beside Lightning's part, and how a module comes back from it."""

from __future__ import annotations

import importlib
import json
import random
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule

from statezoo.lightning_modules.lora import merge

TOKENS_FILE = "tokenizer.json"
KEY = "statezoo"
"""Where in the file: ``class_path``, ``network`` (its class), ``config``, ``tokenizer`` files,
``rng``; ``base``, ``tune`` and ``adapter`` of a run from pretrained weights."""


class CheckpointError(ValueError):
    """A file that cannot be read as a checkpoint, or not for what it was meant for."""


def read(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint without running code from it; tensors stay on disk until they are used.

    Raises:
        CheckpointError: If there is no such file, or it is no checkpoint of a Lightning module.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {str(path)!r}.")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{str(path)!r} is no checkpoint, or was cut off: take another of the run's."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many types here, none of which says which file
        reason = str(error).strip().partition("\n")[0][:120]
        raise CheckpointError(f"{str(path)!r} is no readable checkpoint ({reason}).") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CheckpointError(f"{str(path)!r} is no checkpoint of a Lightning module.")
    return content


def class_path(content: Mapping[str, Any], path: str | Path) -> str:
    """Return the import path of the module's class.

    Raises:
        CheckpointError: If the checkpoint is not one of ours.
    """
    found = content.get(KEY, {}).get("class_path")
    if not isinstance(found, str):
        raise CheckpointError(f"{str(path)!r} was not written by a module of statezoo.")
    return found


def load_checkpoint(path: str | Path, map_location: Any = None) -> LightningModule:
    """Return the module that wrote the checkpoint, with its weights, whatever its architecture.

    Args:
        path: A ``.ckpt`` file of ``statezoo fit`` or of a Trainer that fitted one of our modules.
        map_location: Device for the weights; default as they were saved.

    Raises:
        CheckpointError: If the file is missing, unreadable or not ours.
    """
    module, name = class_path(read(path), path).rsplit(".", 1)
    cls = getattr(importlib.import_module(module), name)
    loaded: LightningModule = cls.load_from_checkpoint(
        path, map_location=map_location, weights_only=True
    )
    return loaded


def module_weights(content: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the state dict of the module's ``net``, as it was trained."""
    return {
        name.removeprefix("net."): value
        for name, value in content["state_dict"].items()
        if name.startswith("net.")
    }


def network_weights(content: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the network's part of a checkpoint's weights, under the network's own names.

    Updates of LoRA are merged.
    """
    found = module_weights(content)
    adapter = content.get(KEY, {}).get("adapter", {})
    if content.get(KEY, {}).get("tune") != "lora":
        return found
    return merge(found, adapter["alpha"], adapter["rank"])


def tokenizer_files(data: object) -> dict[str, bytes]:
    """Return the files by which the data module's tokenizer can be had again; none has none."""
    tokenizer = getattr(data, "tokenizer", None)
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return {
            str(file.relative_to(folder)): file.read_bytes()
            for file in sorted(Path(folder).rglob("*"))
            if file.is_file()
        }


def pretrained_tokenizer(source: str | Path) -> dict[str, bytes]:
    """Return the tokenizer's files of a checkpoint or a model folder; none where they are not here.

    Raises:
        CheckpointError: If a checkpoint cannot be read.
    """
    path = Path(source)
    if path.suffix == ".ckpt":
        files: dict[str, bytes] = read(path).get(KEY, {}).get("tokenizer", {})
        return files
    found = path / TOKENS_FILE
    return {TOKENS_FILE: found.read_bytes()} if found.is_file() else {}


def check_same_tokenizer(of_weights: Mapping[str, bytes], of_data: Mapping[str, bytes]) -> None:
    """Compare the tokenizers of weights and data, where both are known.

    Raises:
        ValueError: If their symbols differ.
    """
    if TOKENS_FILE in of_weights and TOKENS_FILE in of_data:
        one, other = (
            json.loads(files[TOKENS_FILE]).get("model") for files in (of_weights, of_data)
        )
        if one != other:
            raise ValueError(
                "the weights were trained with another tokenizer than the data has, so its numbers "
                "mean other symbols: give the data the tokenizer of the weights, --data.tokenizer "
                "PATH (a checkpoint or model folder); language models can learn other symbols by "
                "--model.vocabulary new."
            )


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Write files, by names relative to ``folder``."""
    for name, content in files.items():
        target = (folder / name).resolve()
        if not target.is_relative_to(folder.resolve()):
            raise CheckpointError(f"a checkpoint may not write {name!r} outside {str(folder)!r}.")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def rng_state() -> dict[str, Any]:
    """Return the states of all random number generators as plain data and tensors."""
    _, key, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [torch.from_numpy(np.asarray(key).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the generators back; GPUs only where there are as many as before."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    key, position, has_gauss, cached = state["numpy"]
    np.random.set_state(
        ("MT19937", key.cpu().numpy().astype(np.uint32), position, has_gauss, cached)
    )
    torch.set_rng_state(state["torch"].cpu())
    cuda = state.get("cuda", [])
    if torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([part.cpu() for part in cuda])
