"""Text, DNA, music and synthetic problems as batches of tokens; knows no model."""

from statezoo.datamodules.batch import IGNORE, Batch
from statezoo.datamodules.dna import DNA, LabelledDNA
from statezoo.datamodules.labelled_text import LabelledText
from statezoo.datamodules.music.data import Music
from statezoo.datamodules.music.frames import PianoFrames
from statezoo.datamodules.synthetic import Synthetic
from statezoo.datamodules.text import Text

__all__ = [
    "DNA",
    "IGNORE",
    "Batch",
    "LabelledDNA",
    "LabelledText",
    "Music",
    "PianoFrames",
    "Synthetic",
    "Text",
]
