"""Loading of a model's folder, and before that whether its configuration is that of its tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights

from statezoo import safety
from statezoo.zoo.config import LABELS, StateZooConfig
from statezoo.zoo.model import StateZooModel, StateZooPreTrainedModel
from statezoo.zoo.tasks import TASKS

WRITTEN = {  # what transformers adds to a configuration when it writes one
    "_name_or_path",
    "architectures", "chunk_size_feed_forward", "dtype", "is_encoder_decoder", "model_type",
    "output_attentions", "output_hidden_states", "return_dict", "torch_dtype",
    "transformers_version",
}  # fmt: skip
DTYPES = ("float64", "float32", "float16", "bfloat16")
ELSEWHERE = (
    "adapter_kwargs", "allow_all_kernels", "attn_implementation", "code_revision", "gguf_file",
    "kernel_config", "subfolder", "trust_remote_code", "use_kernels", "variant",
)  # fmt: skip
"""Arguments of ``from_pretrained`` that would load code, or other files than are looked through."""
ROOM = 2**22
"""Numbers that a model may have beside those in its file, such as the constants of its parts."""


def load_folder(folder: Path, **kwargs: Any) -> StateZooPreTrainedModel:
    """Load a model of ours, of the class that its configuration names, once it is known to be safe.

    Args:
        folder: What ``save_pretrained`` wrote.
        **kwargs: Further arguments of ``from_pretrained``.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the folder is not one of such a model.
    """
    for key in ELSEWHERE:
        if kwargs.pop(key, None):
            raise ValueError(
                f"load executes no code from a checkpoint and reads one format; leave {key} out."
            )
    config, shapes = safety.model_folder(folder)
    kind = _class_of(config, folder)
    checked_config(config, shapes, kind, str(folder / safety.CONFIG))
    net: StateZooPreTrainedModel = kind.from_pretrained(str(folder), use_safetensors=True, **kwargs)
    return net


def _class_of(config: Mapping[str, Any], folder: Path) -> type[StateZooPreTrainedModel]:
    """Return the class that a configuration names; the causal one where it names none."""
    classes = {cls.__name__: cls for cls in [*TASKS.values(), StateZooModel]}
    named = config.get("architectures") or [TASKS["causal"].__name__]
    if not isinstance(named, list) or len(named) != 1 or named[0] not in [*classes]:
        raise ValueError(
            f"{folder}: config.json names the architectures {str(named)[:80]}; there are "
            f"{', '.join(classes)}."
        )
    return classes[named[0]]


def checked_config(
    config: Mapping[str, Any], shapes: safety.Shapes, kind: type[nn.Module], place: str
) -> StateZooConfig:
    """Make the configuration of a model that anyone may have written, once it is known to be one.

    Args:
        config: What the file says.
        shapes: Those of the tensors that belong to it.
        kind: Class of the model.
        place: Where it is, for messages.

    Raises:
        ValueError: If a key is unknown, a value has the wrong type or is out of range, or the model
            would be much larger than its tensors.
    """
    own = {*StateZooConfig.own_keys(), *LABELS}
    for key, value in config.items():
        if not isinstance(key, str) or key not in own | WRITTEN:
            safety.refuse(place, f"a model of statezoo has no key {key!r}")
        if key not in own and key != "architectures" and isinstance(value, dict | list):
            safety.refuse(place, f"{key} is {str(value)[:60]!r}, and should be a word or a number")
    for key in ("dtype", "torch_dtype"):
        if config.get(key) not in (None, *DTYPES):
            safety.refuse(place, f"{key} is {str(config[key])[:60]!r}, none of {', '.join(DTYPES)}")
    for key, number in safety.numbers(config):
        if not math.isfinite(number):
            safety.refuse(place, f"{key} is {number}, which is no number that can be used")
    safety.check_numbers(config, len(shapes), place)
    widest = max((max(shape, default=0) for shape in shapes.values()), default=0)
    labels = config.get("num_labels")
    if isinstance(labels, int) and labels > max(widest, 2):
        safety.refuse(place, f"num_labels is {labels}, wider than any tensor")
    try:
        made = StateZooConfig(**{key: x for key, x in config.items() if key in own})
        check_size(lambda: kind(made), shapes)
    except (AttributeError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{place}: {' '.join(str(error).split())}") from error
    return made


def check_size(build: Callable[[], object], shapes: safety.Shapes) -> None:
    """Build a model without its numbers, and stop where it has more of them than its file.

    Args:
        build: Makes it.
        shapes: Those of the tensors in the file.

    Raises:
        ValueError: If it would be much larger than its tensors.
    """
    numbers = sum(math.prod(shape) for shape in shapes.values())
    limit = _limit(2 * numbers + ROOM, 2 * len(shapes) + 1024)
    with limit, torch.device("meta"), no_init_weights():
        build()


@contextmanager
def _limit(numbers: int, tensors: int) -> Iterator[None]:
    """Stop while parameters or buffers are made that are too many, or too large."""
    left = [numbers, tensors]

    def count(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        if tensor is not None:
            left[0] -= tensor.numel()
            left[1] -= 1
        if min(left) < 0:
            raise ValueError(
                f"the model would be much larger than its weights, at {name!r} of a "
                f"{type(module).__name__}: its configuration is not that of this file."
            )

    registry = nn.modules.module
    hooks = [
        registry.register_module_parameter_registration_hook(count),
        registry.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
