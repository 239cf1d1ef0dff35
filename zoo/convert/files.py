"""Reading a checkpoint's folder: configuration and tensors, and never code."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from statezoo import safety
from statezoo.safety import TOKENIZER_FILES as TOKENIZER

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in the order of preference


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json``.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no mapping.
    """
    safety.check_links(folder, [safety.CONFIG])
    return safety.read_json(folder / safety.CONFIG)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder, from one file or from shards.

    Raises:
        FileNotFoundError: If there are no weights, or a shard is missing.
        ValueError: If a file cannot be read without running code, or is not what its index says.
    """
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if index.exists():
            return _read_shards(folder, index)
        if (folder / name).exists():
            safety.check_links(folder, [name])
            return _read_file(folder / name)
    raise FileNotFoundError(f"{folder} has no {' nor '.join(WEIGHTS)}, nor shards of them.")


def copy_tokenizer(source: Path, folder: Path) -> list[str]:
    """Copy the files of a tokenizer, as they are; return their names."""
    names = [name for name in TOKENIZER if (source / name).is_file()]
    safety.check_links(source, names)
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return names


def _read_shards(folder: Path, index: Path) -> dict[str, Tensor]:
    places = safety.read_json(index, safety.LARGEST_HEADER).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} has no weight_map of tensors to files.")
    tensors: dict[str, Tensor] = {}
    for name in sorted({str(place) for place in places.values()}):
        safety.check_shard(index, name, ".safetensors", ".bin")
        shard = _read_file(folder / name)
        wrong = sorted(key for key in shard if places.get(key) != name)
        if wrong:
            raise ValueError(f"{name} holds {', '.join(wrong)}, which {index.name} has elsewhere.")
        tensors |= shard
    missing = sorted(places.keys() - tensors.keys())
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}, which {index.name} lists.")
    return tensors


def _read_file(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        safety.read_shapes(file)
        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a safetensors file: {error}") from error
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds more than tensors, or no tensors: it is refused, for reading it would "
            "run code from it. Ask for safetensors."
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise ValueError(f"{file} must map names to tensors.")
    return dict(content)
