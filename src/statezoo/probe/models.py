"""Models of probes as one writes them on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]

from statezoo.probe.base import Settings

__all__ = ["ALIASES", "Model", "parse_models", "placed"]

Model = tuple[dict[str, Any], ...]
"""Mixers of a model, cycled over its layers: each a ``name`` and the settings that were given."""

ALIASES = {"transformer": "attention", "hybrid": "gated_deltanet+attention"}


def parse_models(text: str | Sequence[str]) -> dict[str, Model]:
    """Read models, by what they are called in tables.

    Args:
        text: Models with commas between. A model is a mixer, or several, ``gla+attention``, which
            are cycled over the layers; a mixer may have settings,
            ``deltaproduct:n_householder=3:negative_eigenvalues=false``.

    Raises:
        ValueError: If there is no such mixer or setting, or nothing at all.
    """
    found: dict[str, Model] = {}
    for part in text.split(",") if isinstance(text, str) else text:
        if name := part.strip():
            found[name] = tuple(_mixer(one) for one in ALIASES.get(name, name).split("+"))
    if not found:
        raise ValueError("probe needs models, with commas between: --models deltanet,mamba2")
    return found


def _mixer(text: str) -> dict[str, Any]:
    """Read a mixer; settings that are its defaults are left out, so that equal ones are equal."""
    from statezoo.zoo.mixer import mixer_settings, resolve_mixer

    name, *settings = ALIASES.get(text, text).split(":")
    given: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(
                f"a setting of a mixer is written KEY=VALUE, got {setting!r} in {text!r}."
            )
        given[key] = yaml.safe_load(value)
    full = resolve_mixer({"name": name, **given})
    usual = mixer_settings(name)
    return {"name": name} | {
        key: value
        for key, value in sorted(full.items())
        if key in given and value != usual[key].default
    }


def placed(model: Model, settings: Settings) -> list[dict[str, Any]]:
    """Return the mixers of a model with the settings that a probe gives, where it gave none.

    Args:
        model: The model.
        settings: By the name of a mixer; those of ``any`` go to all mixers that have them.
    """
    from statezoo.zoo.mixer import mixer_settings

    found = []
    for mixer in model:
        known = mixer_settings(mixer["name"])
        usual = {key: value for key, value in settings.get("any", {}).items() if key in known}
        found.append({**usual, **settings.get(mixer["name"], {}), **mixer})
    return found
