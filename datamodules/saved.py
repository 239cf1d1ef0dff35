"""Where a saved tokenizer is: in a folder, in a model that statezoo ships, or on the Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from statezoo import safety, shipped

__all__ = ["fast_tokenizer", "place_of", "read_state"]

TOKENS_FILE = "tokenizer.json"
LARGEST = 256 * 2**20
"""Bytes of a tokenizer that are read at most."""


def place_of(source: str | Path) -> Path:
    """Return the file or folder that is meant; what is on the Hub is downloaded, if it can be.

    Args:
        source: Path, short name of a model that we ship, or a name on the Hub.

    Raises:
        ValueError: If there is no such thing; the message is the reason alone.
    """
    place = shipped.resolve(source)
    if Path(place).exists():
        return Path(place)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", place) or place.endswith((".ckpt", ".json")):
        raise ValueError("there is no such file or folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(place, allow_patterns=[*safety.TOKENIZER_FILES]))
    except (OSError, ValueError) as error:
        raise ValueError(str(error).strip().partition("\n")[0]) from error


def read_state(file: Path) -> dict[str, str]:
    """Read a ``tokenizer.json`` and the files beside it, as texts by name.

    Raises:
        ValueError: If one is too large, is somewhere else, or names code.
    """
    folder = file.parent
    names = [file.name, *(f.name for f in sorted(folder.glob("tokenizer_*.json")))]
    safety.check_links(folder, names)
    if file.stat().st_size > LARGEST:
        safety.refuse(file, f"it has more than {LARGEST:,} bytes")
    config = folder / safety.TOKENIZER
    if config.is_file():
        safety.check_tokenizer(safety.read_json(config), config)
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in names}
    texts[TOKENS_FILE] = texts.pop(file.name)
    return texts


def fast_tokenizer(folder: Path) -> Any:
    """Return what ``AutoTokenizer`` makes of a folder without running code from it.

    Raises:
        ValueError: If it cannot make a tokenizer of it; the message is the reason alone.
    """
    from transformers import AutoTokenizer

    safety.check_links(folder, safety.TOKENIZER_FILES)
    config = folder / safety.TOKENIZER
    if config.is_file():
        safety.check_tokenizer(safety.read_json(config), config)
    try:
        found = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # of many types, for the many formats that there are
        raise ValueError(str(error).strip().partition("\n")[0]) from error
    if getattr(found, "backend_tokenizer", None) is None:
        raise ValueError("it has no fast form, so byte counts are unknown: convert it")
    return found
