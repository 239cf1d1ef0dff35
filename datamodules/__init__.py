"""Text, and later DNA and music, as batches of tokens; knows no model."""

from statezoo.datamodules.batch import IGNORE, Batch
from statezoo.datamodules.text import Text

__all__ = ["IGNORE", "Batch", "Text"]
