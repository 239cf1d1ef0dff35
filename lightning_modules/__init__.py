"""Tasks as LightningModules, and each architecture under its own name.

>>> from statezoo.lightning_modules import GLA, load_checkpoint
"""

from typing import Any

from statezoo.lightning_modules import architectures as _architectures
from statezoo.lightning_modules.adapter import apply_adapter, save_adapter
from statezoo.lightning_modules.architectures import ARCHITECTURES, Hybrid, architecture
from statezoo.lightning_modules.causal_lm import CausalLM
from statezoo.lightning_modules.checkpoint import CheckpointError, load_checkpoint
from statezoo.lightning_modules.classify import MultiLabelClassifier, SequenceClassifier
from statezoo.lightning_modules.length_warmup import LengthWarmup
from statezoo.lightning_modules.linearize import Linearize
from statezoo.lightning_modules.masked_lm import MaskedLM
from statezoo.lightning_modules.micro_batches import MicroBatches
from statezoo.lightning_modules.network import export, export_checkpoint, load_network
from statezoo.lightning_modules.note_frames import NoteFrames
from statezoo.lightning_modules.optim import Optim
from statezoo.lightning_modules.regress import Regressor
from statezoo.lightning_modules.sequence_parallel import SequenceParallel
from statezoo.lightning_modules.sharding import FSDP2
from statezoo.lightning_modules.speed import ActivationCheckpointing, Compile
from statezoo.lightning_modules.tag import TokenClassifier
from statezoo.lightning_modules.task import Task
from statezoo.lightning_modules.throughput import Utilisation
from statezoo.lightning_modules.tuning import Adapter

__all__ = [
    "ARCHITECTURES",
    "FSDP2",
    "ActivationCheckpointing",
    "Adapter",
    "CausalLM",
    "CheckpointError",
    "Compile",
    "Hybrid",
    "LengthWarmup",
    "Linearize",
    "MaskedLM",
    "MicroBatches",
    "MultiLabelClassifier",
    "NoteFrames",
    "Optim",
    "Regressor",
    "SequenceClassifier",
    "SequenceParallel",
    "Task",
    "TokenClassifier",
    "Utilisation",
    "apply_adapter",
    "architecture",
    "export",
    "export_checkpoint",
    "load_checkpoint",
    "load_network",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    return getattr(_architectures, name)
