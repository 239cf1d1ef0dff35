"""Tasks as LightningModules, and each architecture under its own name.

>>> from statezoo.lightning_modules import GLA, load_checkpoint
"""

from typing import Any

from statezoo.lightning_modules import architectures as _architectures
from statezoo.lightning_modules.architectures import ARCHITECTURES, Hybrid, architecture
from statezoo.lightning_modules.causal_lm import CausalLM
from statezoo.lightning_modules.checkpoint import CheckpointError, load_checkpoint
from statezoo.lightning_modules.network import export, export_checkpoint, load_network
from statezoo.lightning_modules.optim import Optim

__all__ = [
    "ARCHITECTURES",
    "CausalLM",
    "CheckpointError",
    "Hybrid",
    "Optim",
    "architecture",
    "export",
    "export_checkpoint",
    "load_checkpoint",
    "load_network",
]


def __getattr__(name: str) -> Any:
    return getattr(_architectures, name)
