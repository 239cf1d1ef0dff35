"""Genomes as batches of bases, and labelled sequences."""

from statezoo.datamodules.dna.data import DNA
from statezoo.datamodules.dna.labelled import LabelledDNA

__all__ = ["DNA", "LabelledDNA"]
