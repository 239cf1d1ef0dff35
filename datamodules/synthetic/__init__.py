"""Problems drawn from rules, whose answers are known."""

from statezoo.datamodules.synthetic.base import Example, SyntheticTask
from statezoo.datamodules.synthetic.data import TASKS, Synthetic, make_task

__all__ = ["TASKS", "Example", "Synthetic", "SyntheticTask", "make_task"]
