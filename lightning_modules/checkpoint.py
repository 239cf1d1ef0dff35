"""What a checkpoint of ours holds beside Lightning's part, and how a module comes back from it."""

from __future__ import annotations

import importlib
import json
import random
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule

from statezoo import safety, shipped
from statezoo.lightning_modules import shards
from statezoo.lightning_modules.lora import merge
from statezoo.zoo.loading import check_size

TOKENS_FILE = "tokenizer.json"
KEY = "statezoo"
"""Where in the file: ``class_path``, ``network`` (its class), ``config``, ``tokenizer`` files,
``rng``; ``base``, ``tune`` and ``adapter`` of a run from pretrained weights."""


RESUMES = ("last.ckpt", "previous.ckpt", "best.ckpt")
"""Checkpoints that a run leaves, in the order in which it goes on from one. The best comes last, as
a validation may fall between the micro-batches of a step, whose gradients no checkpoint holds."""


class CheckpointError(ValueError):
    """A file that cannot be read as a checkpoint, or not for what it was meant for."""


class RunStopped(RuntimeError):
    """What went wrong with a run that could not be helped; the run can go on from a checkpoint."""


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
        with zipfile.ZipFile(path) as opened:
            size = sum(part.file_size for part in opened.infolist())
        if size > path.stat().st_size:
            raise CheckpointError(
                f"{str(path)!r} would unpack to more than it is: torch never did."
            )
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch raises many types here, none of which says which file
        reason = str(error).strip().partition("\n")[0][:120]
        raise CheckpointError(f"{str(path)!r} is no readable checkpoint ({reason}).") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(f"{str(path)!r} is no checkpoint of a Lightning module.")
    _check_parts(content, path)
    with _shards():
        shards.attach(content, path)
    return content


@contextmanager
def _shards() -> Iterator[None]:
    """Say of what is wrong with shards that it is wrong with the checkpoint."""
    try:
        yield
    except shards.ShardError as error:
        raise CheckpointError(str(error)) from error


def read_whole(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint after a look at every byte of it.

    The file says what its parts must add up to, which torch writes and does not compare.

    Raises:
        CheckpointError: As :func:`read`, and if something was changed since it was written.
    """
    path = Path(path)
    if path.is_file() and zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as opened:
                damaged = opened.testzip()
        except Exception as error:  # of many types, for all that can be wrong with such a file
            raise CheckpointError(f"{str(path)!r} is damaged ({error}).") from error
        if damaged is not None:
            raise CheckpointError(
                f"{str(path)!r} is damaged: its part {damaged!r} is not what was written."
            )
    content = read(path)
    with _shards():
        shards.check(content)
    return content


def newest_whole(folder: str | Path) -> tuple[Path, dict[Path, str]]:
    """Return the checkpoint by which a run goes on: the first of ``RESUMES`` that can be read.

    Returns:
        The file, and what is wrong with those before it.

    Raises:
        CheckpointError: If none can be read; says why not.
    """
    wrong: dict[Path, str] = {}
    for path in (Path(folder, name) for name in RESUMES):
        if not path.exists():
            continue
        try:
            read_whole(path)
        except (ValueError, OSError) as error:
            wrong[path] = str(error)
        else:
            return path, wrong
    raise CheckpointError(
        f"no checkpoint of {str(folder)!r} can be read: "
        f"{' '.join(wrong.values()) or 'there is none.'} Put back a copy of one, or start a "
        "new run without --ckpt_path."
    )


def _check_parts(content: Mapping[str, Any], path: Path) -> None:
    """Raise where what we put into checkpoints is not what we put there."""
    for key in (KEY, "hyper_parameters"):
        if not isinstance(content.get(key, {}), Mapping):
            raise CheckpointError(f"{str(path)!r} is refused: its {key} is no mapping.")
    if not all(isinstance(x, torch.Tensor) for x in content["state_dict"].values()):
        raise CheckpointError(f"{str(path)!r} is refused: its state_dict has more than tensors.")
    tensors = sum(x.numel() * x.element_size() for x in content["state_dict"].values())
    if tensors > 2 * path.stat().st_size:  # twice: tied weights are there once
        raise CheckpointError(
            f"{str(path)!r} is refused: its tensors would take {tensors:,} bytes, the file has "
            f"{path.stat().st_size:,}."
        )
    safety.check_tokenizer_files(content.get(KEY, {}).get("tokenizer") or {}, path)


def class_path(content: Mapping[str, Any], path: str | Path) -> str:
    """Return the import path of the module's class.

    Raises:
        CheckpointError: If the checkpoint is not one of ours.
    """
    found = content.get(KEY, {}).get("class_path")
    if not isinstance(found, str):
        raise CheckpointError(f"{str(path)!r} was not written by a module of statezoo.")
    return found


def task_class(content: Mapping[str, Any], path: str | Path) -> type[LightningModule]:
    """Return the class of the module that wrote a checkpoint, and import nothing that is not ours.

    Raises:
        CheckpointError: If it is no task: one of ours, or one that the program has imported.
    """
    from statezoo.lightning_modules.task import Task

    named = class_path(content, path)
    module, _, name = named.rpartition(".")
    if _is_ours(named) and find_spec(module):
        importlib.import_module(module)
    found = getattr(sys.modules.get(module), name, None)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise CheckpointError(
            f"{str(path)!r} is of class {named!r}, which is not one of statezoo's tasks, and no "
            "file says what is imported: import that class first, or give it by --model."
        )
    return found


def settings(content: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """Return the arguments of the module that wrote a checkpoint, which are plain data.

    Raises:
        CheckpointError: If they name classes, variables or other weights, or say other sizes than
            the network has.
    """
    given = dict(content.get("hyper_parameters", {}))
    if named := next(_names(given), None):
        raise CheckpointError(
            f"{str(path)!r} is refused: its settings say {named[:60]!r}, and ours name no classes "
            "or variables."
        )
    if _is_ours(class_path(content, path)) and given.get("pretrained") is not None:
        raise CheckpointError(
            f"{str(path)!r} is refused: its settings name other weights, {given['pretrained']!r}."
        )
    config = content[KEY].get("config", {})
    for key in ("n_layers", "d_model", "vocab_size"):
        if given.get(key, 0) != config.get(key, 0) and key in given and key in config:
            raise CheckpointError(
                f"{str(path)!r} is refused: its settings have {key} {given[key]!r}, its network "
                f"has {config[key]!r}."
            )
    return given


def _names(part: Any) -> Iterator[str]:
    """Yield what in plain data could make something beside itself."""
    if isinstance(part, Mapping):
        yield from (str(key) for key in part if str(key) == "class_path")
    if isinstance(part, Mapping | list | tuple):
        for value in part.values() if isinstance(part, Mapping) else part:
            yield from _names(value)
    elif isinstance(part, str) and "${" in part:
        yield part


def _is_ours(named: str) -> bool:
    """Say whether a class path is one of this package."""
    return re.fullmatch(rf"{__package__}\.\w+\.\w+", named) is not None


def load_checkpoint(path: str | Path, map_location: Any = None) -> LightningModule:
    """Return the module that wrote the checkpoint, with its weights, whatever its architecture.

    Its class is one of ours, or one that the program has imported: nothing is imported because a
    file says so.

    Args:
        path: A ``.ckpt`` file of ``statezoo fit`` or of a Trainer that fitted one of our modules.
        map_location: Device for the weights; default as they were saved.

    Raises:
        CheckpointError: If the file is missing, unreadable or not ours.
    """
    content = read(path)
    cls, given = task_class(content, path), settings(content, path)
    shapes = {name: tuple(x.shape) for name, x in content["state_dict"].items()}
    try:
        safety.check_numbers(given, len(shapes), path)
        if _is_ours(class_path(content, path)):
            check_size(lambda: cls(**given), shapes)
        if shards.sharded(content):
            loaded = cls(**given)
            loaded.on_load_checkpoint(content)
            loaded.load_state_dict(content["state_dict"])
            return loaded.to(map_location or "cpu")
        loaded = cls.load_from_checkpoint(path, map_location=map_location, weights_only=True)
    except (TypeError, RuntimeError) as error:
        raise CheckpointError(f"{str(path)!r}: {' '.join(str(error).split())}") from error
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
    path = Path(shipped.resolve(source))
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
    """Write the files of a tokenizer, all or none.

    Raises:
        ValueError: If one of them is no such file.
    """
    safety.check_tokenizer_files(files, folder)
    for name, content in files.items():
        (folder / name).write_bytes(content)


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
