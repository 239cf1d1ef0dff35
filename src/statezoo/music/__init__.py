"""Commands on music: continue, infill, harmonise, evaluate, draw and render.

What is heavy is imported when one of the functions is first asked for.

Example:
    >>> from statezoo.music import Sampling, continue_piece
    >>> score, = continue_piece("runs/gla-music", "theme.mid", bars=8, sampling=Sampling(seed=1))
    >>> score.dump_midi("more.mid")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from statezoo.music.continuation import continue_piece
    from statezoo.music.decoding import Sampling
    from statezoo.music.harmony import harmonise, harmony_nll
    from statezoo.music.infilling import infill

__all__ = [
    "Sampling",
    "continue_piece",
    "harmonise",
    "harmony_nll",
    "infill",
]

_HOMES = {
    "Sampling": "decoding",
    "continue_piece": "continuation",
    "harmonise": "harmony",
    "harmony_nll": "harmony",
    "infill": "infilling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
