"""Genomes as batches of bases, and labelled sequences."""
