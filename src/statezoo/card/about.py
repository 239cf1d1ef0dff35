"""What no run knows of itself: where its data came from, and what may be done with it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]

from statezoo.parser import nearest

__all__ = ["GAP", "About", "read_about"]

GAP = "TO BE FILLED IN"
"""Stands in a card where a fact is missing."""

LISTS = ("datasets", "prompts", "tags")


@dataclass(frozen=True)
class About:
    """The facts of an ABOUT.yaml; what is missing becomes a visible gap in the card.

    Attributes:
        title: What the data is, in a few words.
        license: Licence of the weights, by its name on the Hub, such as ``apache-2.0``.
        data_license: What may be done with the data, in a sentence.
        datasets: Names of the data sets, those of the Hub where they are there.
        attribution: Who made the data, and where it was had.
        language: Code of the language, such as ``en``; none where it is not text.
        test: What the test split is.
        contamination: What else the test may be in, and what of the training is like it.
        limits: What the model cannot do.
        use: What it is for.
        hardware: Where it was trained, for runs that did not write it down themselves.
        prompts: Texts that the sample continues; default from the test split.
        tags: Further tags for the Hub.
    """

    title: str | None = None
    license: str | None = None
    data_license: str | None = None
    datasets: tuple[str, ...] = ()
    attribution: str | None = None
    language: str | None = None
    test: str | None = None
    contamination: str | None = None
    limits: str | None = None
    use: str | None = None
    hardware: str | None = None
    prompts: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        """Return what is known as plain data."""
        return {k: list(v) if k in LISTS else v for k, v in asdict(self).items() if v}


def read_about(file: str) -> About:
    """Read an ABOUT.yaml.

    Raises:
        ValueError: If there is no such file, or it says something else; names the nearest key.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"there is no file {file!r} to say what the data is.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file!r} is not YAML: {' '.join(str(error).split())}") from error
    known = [field.name for field in fields(About)]
    if not isinstance(content, dict):
        raise ValueError(f"{file!r} must hold keys and values; keys are {', '.join(known)}.")
    for key, value in content.items():
        if key not in known:
            near = nearest(str(key), known)
            raise ValueError(f"{file!r} says {key!r}{near}; keys are {', '.join(known)}.")
        wanted = list if key in LISTS else str
        if value is not None and not isinstance(value, wanted):
            kind = "a list" if wanted is list else "text"
            raise ValueError(f"{file!r}: {key} must be {kind}, got {value!r}.")
    settled: dict[str, Any] = {
        key: tuple(map(str, value)) if key in LISTS else " ".join(value.split())
        for key, value in content.items()
        if value
    }
    return About(**settled)
