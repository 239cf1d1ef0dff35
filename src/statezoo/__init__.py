"""Sequence models with a fixed-size recurrent state, as PyTorch Lightning modules."""

from statezoo.hub import create_model, list_models, load

__all__ = ["create_model", "list_models", "load"]
__version__ = "0.1.0"
