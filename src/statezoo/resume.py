"""With what a fit goes on, and where it writes then: in the folder of the run it continues."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from statezoo import arguments
from statezoo.lightning_modules import checkpoint as ckpt

log = logging.getLogger(__name__)

LAST = "last"
"""Value of ``ckpt_path`` for the last run of the same name, if there is one."""


class Resumed(NamedTuple):
    """What a fit begins with.

    Attributes:
        checkpoint: What it goes on from; None where it begins.
        folder: The run that it goes on with and writes into; None for a new one.
    """

    checkpoint: str | None = None
    folder: Path | None = None


def resume(asked: str | None, runs: Path, named: bool) -> Resumed:
    """Find out what ``fit --ckpt_path`` means.

    A run's folder is gone on with, in that folder, from its newest checkpoint that can be read. A
    file begins a new run where that one was. ``last`` is the last run of this name, begun if it has
    no checkpoint yet: the same command then starts a run and goes on with it, however often.

    Args:
        asked: What was given.
        runs: Folder of the runs of this name.
        named: Whether the name was chosen; a folder of another name then gives a new run.

    Raises:
        ValueError: If no checkpoint can be read.
    """
    if asked == LAST:
        return _last_run(runs)
    if asked is None or asked in arguments.KEYWORDS:
        return Resumed(asked)
    path = arguments.find_checkpoint(asked, LAST)
    folder = path.parent
    if not Path(asked).is_dir():
        return Resumed(str(_checked(path)))
    goes_on = (folder / "config.yaml").is_file() and not (
        named and folder.parent.resolve() != runs.resolve()
    )
    return Resumed(_newest(folder, goes_on), folder if goes_on else None)


def _last_run(runs: Path) -> Resumed:
    found = [p for p in runs.glob("version_*") if re.fullmatch(r"version_\d+", p.name)]
    if not found:
        return Resumed()
    folder = max(found, key=lambda path: int(path.name.partition("_")[2]))
    if any((folder / name).exists() for name in ckpt.RESUMES):
        return Resumed(_newest(folder, True), folder)
    rank_zero_info(f"{folder} has no checkpoint yet: it begins again")
    return Resumed(None, folder)


def _checked(path: Path) -> Path:
    """Return the path, if all of the file is as it was written."""
    try:
        ckpt.read_whole(path)
    except ckpt.CheckpointError as error:
        others = [name for name in ckpt.RESUMES if name != path.name]
        if not any((path.parent / name).exists() for name in others):
            raise
        raise ckpt.CheckpointError(
            f"{error} Give the run's folder, --ckpt_path {path.parent}, and it goes on from the "
            "newest checkpoint that can be read."
        ) from error
    return path


def _newest(folder: Path, goes_on: bool) -> str:
    """Return the newest whole checkpoint; put damaged ones aside where the run goes on there."""
    found, wrong = ckpt.newest_whole(folder)
    if getattr(rank_zero_only, "rank", 0) == 0:
        for path, reason in wrong.items():
            log.warning(f"{reason} Going on from {found.name} instead.")
            if goes_on:
                os.replace(path, f"{path}.damaged")
    return str(found)
