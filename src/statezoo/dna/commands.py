"""The ``statezoo dna`` commands; they import torch only where they need it."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["COMMANDS"]

COMMANDS: dict[str, Callable[..., None]] = {}
