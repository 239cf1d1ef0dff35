"""What is read of a folder or repository that anyone may have written: data, and never code.

A model's folder is looked through before anything is built or loaded from it: its JSON is plain and
small, its tensors are where their file says and nothing else is, and no file of it is somewhere
else. Knows no model and imports nothing heavy, so that every part of statezoo can ask it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

Shapes = dict[str, tuple[int, ...]]

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION, TOKENIZER = "generation_config.json", "tokenizer_config.json"
TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    TOKENIZER,
    "vocab.json",
    "vocab.txt",
)
LARGEST_JSON = 16 * 2**20
"""Bytes of a configuration or an index that are read at most."""
LARGEST_HEADER = 32 * 2**20
"""Bytes of names and shapes before the tensors that are read at most."""
LARGEST_NUMBER = 2**31
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "U16": 16, "I16": 16, "F16": 16,
    "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip
IMPORTS = ("auto_map", "custom_generate", "custom_pipelines", "trust_remote_code")
"""Keys that name code."""


class Refused(ValueError):
    """A file that is not taken, for what it says or where it is."""


def refuse(place: str | Path, reason: str) -> NoReturn:
    """Raise the error of a file that is not taken."""
    raise Refused(f"{place} is refused: {reason}.")


# --------------------------------------------------------------------------- JSON


def read_json(file: Path, largest: int = LARGEST_JSON) -> dict[str, Any]:
    """Read a mapping.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no mapping in JSON, too large or nested too deep.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}.")
    size = file.stat().st_size
    if size > largest:
        refuse(file, f"it has {size:,} bytes, and such a file at most {largest:,}")
    return parse(file.read_bytes(), file)


def parse(content: bytes | str, place: str | Path) -> dict[str, Any]:
    """Parse a mapping; the place is for messages.

    Raises:
        ValueError: If it is anything else.
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        found = json.loads(text)
    except RecursionError:
        refuse(place, "it is nested too deep")
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{place} must hold a mapping, got {type(found).__name__}.")
    return found


def check_numbers(config: Mapping[str, Any], tensors: int, place: str | Path) -> None:
    """Refuse sizes that no model has, before anything is counted or made by them.

    Args:
        config: What a configuration says, of whatever library.
        tensors: How many tensors the model has, which bounds its layers.
        place: Where it is, for messages.

    Raises:
        ValueError: If a number is absurd.
    """
    for key, value in numbers(config):
        if isinstance(value, int) and abs(value) >= LARGEST_NUMBER:
            refuse(place, f"{key} is {value}, beyond any model's")
    for key in ("n_layer", "n_layers", "num_layers", "num_hidden_layers"):
        layers = config.get(key)
        if isinstance(layers, int) and layers > tensors + 64:
            refuse(place, f"{key} is {layers}, and the weights have {tensors} tensors in all")


def numbers(part: Any, key: str = "a number") -> Iterator[tuple[str, int | float]]:
    """Yield all numbers in plain data, each after the nearest key."""
    if isinstance(part, Mapping):
        for name, value in part.items():
            yield from numbers(value, str(name))
    elif isinstance(part, list):
        for value in part:
            yield from numbers(value, key)
    elif isinstance(part, int | float):
        yield key, part


# ------------------------------------------------------------------------ tensors


def read_shapes(file: Path) -> Shapes:
    """Read names and shapes of a safetensors file, and nothing of the tensors themselves.

    Raises:
        ValueError: If the file was cut off, or its tensors are not where it says.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > size - 8:
            refuse(file, f"it is not a safetensors file, or was cut off: it has {size:,} bytes")
        if length > LARGEST_HEADER:
            refuse(file, f"its header has {length:,} bytes, and one has at most {LARGEST_HEADER:,}")
        header = parse(opened.read(length), file)
    header.pop("__metadata__", None)
    shapes, spans = {}, []
    for name, entry in header.items():
        shape, span = _tensor(file, name, entry)
        shapes[name] = shape
        spans.append(span)
    end = 0
    for first, last in sorted(spans):
        if first != end:
            refuse(file, "its tensors overlap, or there is something between them")
        end = last
    if end != size - 8 - length:
        refuse(file, f"its tensors end at byte {end:,} of {size - 8 - length:,}: download it again")
    return shapes


def _tensor(file: Path, name: str, entry: Any) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Return shape and place of a tensor, which must agree."""
    try:
        shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, first, last))
        if whole and math.prod(shape) * BITS[entry["dtype"]] == 8 * (last - first):
            return shape, (first, last)
    except (KeyError, TypeError, ValueError):
        pass
    refuse(file, f"what it says of tensor {name!r} is not true of any tensor")


def folder_shapes(folder: Path) -> Shapes:
    """Read names and shapes of a model's tensors, from one file or from shards.

    Raises:
        FileNotFoundError: If there are no safetensors, or a shard is missing.
        ValueError: If a file is damaged or is not what the index says.
    """
    if (folder / WEIGHTS).is_file():
        return read_shapes(folder / WEIGHTS)
    places = read_json(folder / INDEX, LARGEST_HEADER).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{folder / INDEX} has no weight_map of tensors to files.")
    shapes: Shapes = {}
    for name in sorted({str(place) for place in places.values()}):
        check_shard(folder / INDEX, name, ".safetensors")
        found = read_shapes(folder / name)
        if wrong := sorted(key for key in found if places.get(key) != name):
            raise ValueError(f"{name} holds {wrong[0]}, which {INDEX} has elsewhere.")
        shapes |= found
    if missing := sorted(places.keys() - shapes.keys()):
        raise ValueError(f"{folder} lacks {missing[0]}, which {INDEX} lists.")
    return shapes


def check_shard(index: Path, name: str, *endings: str) -> None:
    """Refuse a file that an index may not name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is outside the folder, or of another kind.
    """
    folder = index.parent
    if Path(name).name != name or "\\" in name:
        raise ValueError(f"{index} points outside its folder, to {name!r}.")
    if not name.endswith(endings):
        raise ValueError(f"{index} names {name!r}, and tensors are in {' or '.join(endings)}.")
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} has no {name}, which {index.name} names.")
    check_links(folder, [name])


# ------------------------------------------------------------------------- folders


def check_links(folder: Path, names: Iterable[str]) -> None:
    """Refuse files that are links to somewhere else; those of the Hub's cache lead to its blobs.

    Raises:
        ValueError: If one leads out of the folder.
    """
    homes = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        homes.append(folder.resolve().parents[1] / "blobs")
    for name in names:
        file = folder / name
        if file.is_symlink() and not any(file.resolve().is_relative_to(home) for home in homes):
            refuse(file, "it is a link to a file outside its folder; copy that file here")


def model_folder(folder: Path) -> tuple[dict[str, Any], Shapes]:
    """Look through the folder of a model of ours before it is loaded.

    Returns:
        What ``config.json`` says, and the shapes of the tensors.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is not what it should be, or leads elsewhere.
    """
    check_links(folder, [CONFIG, WEIGHTS, INDEX, GENERATION, *TOKENIZER_FILES])
    config = read_json(folder / CONFIG)
    sharded = not (folder / WEIGHTS).exists()
    if (folder / "adapter_config.json").exists():
        refuse(folder, "it has an adapter_config.json, which would load other weights than its own")
    if sharded and not (folder / INDEX).exists():
        raise FileNotFoundError(
            f"{folder} has no {WEIGHTS}: a model folder is what save_pretrained(folder) writes."
        )
    if (folder / GENERATION).exists():
        check_generation(read_json(folder / GENERATION), folder / GENERATION)
    if (folder / TOKENIZER).exists():
        check_tokenizer(read_json(folder / TOKENIZER), folder / TOKENIZER)
    return config, folder_shapes(folder)


def check_generation(config: Mapping[str, Any], place: str | Path) -> None:
    """Refuse settings of generation that are more than numbers and words.

    Raises:
        ValueError: If one names code, or is a mapping.
    """
    for key, value in config.items():
        named = key in IMPORTS or (isinstance(value, str) and ("/" in value or ":" in value))
        if named or isinstance(value, dict):
            refuse(place, f"{key} is {str(value)[:60]!r}, and nothing is loaded by such a name")


def check_tokenizer(config: Mapping[str, Any], place: str | Path) -> None:
    """Refuse a tokenizer that would be made by code of its own.

    Raises:
        ValueError: If a class is named that is none of the libraries'.
    """
    if "auto_map" in config:
        refuse(place, "auto_map names code in the repository, and none is run")
    named = config.get("tokenizer_class", "")
    if named is not None and not (isinstance(named, str) and re.fullmatch(r"\w*", named)):
        refuse(place, f"tokenizer_class is {str(named)[:60]!r}, which is no class of transformers")


def check_tokenizer_files(files: Any, place: str | Path) -> None:
    """Refuse files of a tokenizer, by name, that are none.

    Raises:
        ValueError: If a name leads out of the folder or is another's, or a content is not bytes.
    """
    if not isinstance(files, Mapping):
        refuse(place, f"its tokenizer is a {type(files).__name__}, not files by name")
    for name, content in files.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name) or ".." in name:
            refuse(place, f"it would write a file {str(name)[:60]!r} for its tokenizer")
        if name.startswith(("config", "model", "generation", "adapter", ".")):
            refuse(place, f"it would write {name!r}, which is no file of a tokenizer")
        if not isinstance(content, bytes):
            refuse(place, f"{name!r} of its tokenizer is a {type(content).__name__}, not bytes")
