"""The log of a run as a CSV file that an interrupted run goes on with."""

from __future__ import annotations

import csv
import io
import logging
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

__all__ = ["RunLog"]

log = logging.getLogger(__name__)


class RunLog(CSVLogger):
    """Lightning's CSV logger that keeps the rows of a run that goes on in its folder.

    ``metrics.csv`` then reads as if the run had never stopped: the first row that is logged takes
    the place of those of its step and of later ones, which belong to work that was lost. A row is
    on disk as soon as it is logged. While the disk is full, rows wait in memory.
    """

    @property
    def experiment(self) -> Any:
        """The writer of the first process; others have one that writes nothing."""
        if self._experiment is None and getattr(rank_zero_only, "rank", 0) == 0:
            self._experiment = _Rows(self.log_dir)
        return super().experiment


class _Rows(ExperimentWriter):
    """Rows that are appended, after those of the part of the run that still counts."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.file = Path(self.metrics_file_path)
        self.begun, self.failed = False, False
        self.of_step: list[dict[str, float]] = []

    def _check_log_dir_exists(self) -> None:
        """Keep what is there."""

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """Take a row, unless it is one that this step has already."""
        super().log_metrics(metrics_dict, step)
        row = self.metrics[-1]
        if self.of_step and self.of_step[0]["step"] != row["step"]:
            self.of_step.clear()
        if row in self.of_step:
            self.metrics.pop()
        else:
            self.of_step.append(row)

    def save(self) -> None:
        """Write the rows that are not written yet."""
        if not self.metrics:
            return
        keys = {key for row in self.metrics for key in row}
        size = self.file.stat().st_size if self.file.is_file() else 0
        try:
            if self.begun and keys <= {*self.metrics_keys}:
                _append(self.file, self._text(self.metrics))
            else:
                self._rewrite(keys)
        except OSError as error:
            if self.begun and self.file.stat().st_size > size:
                os.truncate(self.file, size)
            if not self.failed:
                log.warning(f"{self.file} waits for its next rows to be written ({error.strerror})")
            self.failed = True
            return
        self.begun, self.failed, self.metrics = True, False, []

    def _rewrite(self, keys: set[str]) -> None:
        """Write the file again, with columns for more values, all at once."""
        old = self._old_rows()
        if not self.begun:
            old = [row for row in old if int(row["step"]) < self.metrics[0]["step"]]
        before, self.metrics_keys = self.metrics_keys, sorted(keys.union(self.metrics_keys, *old))
        draft = self.file.with_name(f"{self.file.name}.part")
        try:
            header = ",".join(self.metrics_keys) + "\r\n"
            draft.write_text(header + self._text([*old, *self.metrics]), newline="")
            draft.replace(self.file)
        except OSError:
            self.metrics_keys = before
            draft.unlink(missing_ok=True)
            raise

    def _old_rows(self) -> list[dict[str, Any]]:
        """Return the rows of the file that are whole: the last may have been cut off."""
        if not self.file.is_file():
            return []
        whole, _, _ = self.file.read_bytes().rpartition(b"\n")
        rows = csv.DictReader(io.StringIO(whole.decode(errors="replace"), newline=""))
        return [row for row in rows if None not in row and str(row.get("step")).isdigit()]

    def _text(self, rows: list[dict[str, Any]]) -> str:
        out = io.StringIO(newline="")
        csv.DictWriter(out, self.metrics_keys).writerows(rows)
        return out.getvalue()


def _append(file: Path, text: str) -> None:
    with file.open("a", newline="") as opened:
        opened.write(text)
