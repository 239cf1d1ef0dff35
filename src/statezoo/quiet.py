"""Trainings that are parts of something larger, without what Lightning says of each."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet"]


@contextmanager
def quiet(*more: str) -> Iterator[None]:
    """Keep away Lightning's lines about devices and workers.

    Args:
        more: Names of loggers that have been heard, or do not matter here.
    """
    names = ("lightning.pytorch", "lightning.fabric", *more)
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in (".*does not have many workers.*", ".*LeafSpec.*", ".*GPU available.*"):
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
