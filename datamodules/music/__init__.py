"""Scores and MIDI as batches of tokens."""
