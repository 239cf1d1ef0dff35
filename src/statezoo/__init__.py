"""Sequence models with a fixed-size recurrent state, as PyTorch Lightning modules."""
