"""What a net is not to be called with."""

from typing import Any

from statezoo.zoo.config import StateZooConfig

IGNORED = {"cache_position", "output_attentions", "position_ids", "token_type_ids"}


def check_causal(config: StateZooConfig) -> None:
    """Refuse to hand on states of a net that has none.

    Raises:
        ValueError: If it is bidirectional or reads both strands.
    """
    if not config.is_causal:
        raise ValueError(
            "a net that is bidirectional or reads both strands has no state to hand on: call "
            "it on whole sequences, without use_cache and past_key_values."
        )


def check_unknown(kwargs: dict[str, Any]) -> None:
    """Refuse arguments that would otherwise go unnoticed.

    Raises:
        TypeError: If one is neither ``None`` nor known to be without meaning here.
    """
    for key, value in kwargs.items():
        if value is not None and key not in IGNORED:
            raise TypeError(f"forward() got an unknown argument {key!r}.")
