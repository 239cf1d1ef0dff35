"""Short names of the pretrained models that statezoo comes with; imports nothing heavy."""

from __future__ import annotations

from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

ORGANISATION = "statezoo"
"""Who has the models on the Hub, for installations without the weights."""
CARD, METRICS, WEIGHTS = "README.md", "metrics.json", "model.safetensors"


def root() -> Path:
    """Return the folder of the cards."""
    return Path(str(files("statezoo") / "hub_cards"))


def names() -> list[str]:
    """List the models that there are, by the folders of their cards."""
    folder = root()
    if not folder.is_dir():
        return []
    own = (CARD, METRICS, WEIGHTS)
    return sorted(x.name for x in folder.iterdir() if any((x / file).is_file() for file in own))


def find(name: str | Path) -> str | None:
    """Return where a shipped model is.

    Args:
        name: Its short name.

    Returns:
        Its folder, its name on the Hub where only the card is here, or None if there is none.
    """
    if str(name) not in names():
        return None
    folder = root() / name
    return str(folder) if (folder / WEIGHTS).is_file() else f"{ORGANISATION}/{name}"


def resolve(source: str | Path) -> str:
    """Return the place that is meant where a short name stands for one; else the source itself.

    What the user has in the working directory under that name is meant first.
    """
    given = str(source)
    return given if Path(given).exists() else find(given) or given


def near(source: str | Path) -> str:
    """Return ``" (did you mean x?)"`` where a short name is near, else nothing."""
    options = {name.lower(): name for name in names()}
    found = get_close_matches(str(source).lower(), options, 1)
    return f" (did you mean {options[found[0]]}?)" if found else ""
