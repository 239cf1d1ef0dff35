"""Architectures: one skeleton, and one mixer per file.

Importing this registers the models with transformers' ``AutoConfig`` and ``AutoModel`` classes.
"""

import importlib
import pkgutil

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from statezoo.zoo.cache import cache_from_tensors, cache_to_tensors, detach, fork
from statezoo.zoo.config import StateZooConfig
from statezoo.zoo.mixer import MIXERS, Mixer, build_mixer, mixer_settings
from statezoo.zoo.model import StateZooForCausalLM, StateZooModel
from statezoo.zoo.pooling import pool
from statezoo.zoo.tagging import StateZooForTokenClassification
from statezoo.zoo.tasks import (
    StateZooForMaskedLM,
    StateZooForSequenceClassification,
    with_head,
)

__all__ = [
    "MIXERS",
    "Mixer",
    "StateZooConfig",
    "StateZooForCausalLM",
    "StateZooForMaskedLM",
    "StateZooForSequenceClassification",
    "StateZooForTokenClassification",
    "StateZooModel",
    "build_mixer",
    "cache_from_tensors",
    "cache_to_tensors",
    "detach",
    "fork",
    "mixer_settings",
    "pool",
    "with_head",
]

# every file that is there: mixers register themselves
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

AutoConfig.register("statezoo", StateZooConfig, exist_ok=True)
AutoModel.register(StateZooConfig, StateZooModel, exist_ok=True)
AutoModelForCausalLM.register(StateZooConfig, StateZooForCausalLM, exist_ok=True)
AutoModelForMaskedLM.register(StateZooConfig, StateZooForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    StateZooConfig, StateZooForSequenceClassification, exist_ok=True
)
AutoModelForTokenClassification.register(
    StateZooConfig, StateZooForTokenClassification, exist_ok=True
)
