"""A trained softmax decoder as a liger model: the same tensors, read in another way."""

import re
from typing import Any

from statezoo.zoo.attention import Attention
from statezoo.zoo.config import StateZooConfig
from statezoo.zoo.liger import Arm, Recurrence
from statezoo.zoo.mixer import mixer_settings
from statezoo.zoo.model import StateZooForCausalLM


def plan_layers(plan: str, n_layers: int) -> list[int]:
    """Return the layers that a plan linearises; the others stay softmax attention.

    Args:
        plan: ``all``; ``keep:N``, where every N-th stays (layers N-1, 2N-1, ..); or numbers and
            ranges from 0, such as ``0,1,4-7``.
        n_layers: How many layers there are.

    Raises:
        ValueError: If the plan cannot be read, names no layer, or one that is not there.
    """
    if plan == "all":
        return [*range(n_layers)]
    if kept := re.fullmatch(r"keep:(\d+)", plan):
        n = int(kept[1])
        layers = {i for i in range(n_layers) if n and (i + 1) % n}
    elif re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", plan):
        ends = [part.split("-") for part in plan.split(",")]
        layers = {i for end in ends for i in range(int(end[0]), int(end[-1]) + 1)}
    else:
        raise ValueError(
            f"layers must be all, keep:N (every N-th layer stays attention) or numbers such as "
            f"0,1,4-7; got {plan!r}."
        )
    if not layers or max(layers) >= n_layers:
        raise ValueError(
            f"layers {plan!r} must name some of the layers 0 to {n_layers - 1} of the teacher."
        )
    return sorted(layers)


def linearize(
    teacher: StateZooForCausalLM,
    recurrence: Recurrence = "gla",
    window: int = 64,
    layers: str = "all",
    arm: Arm = "both",
) -> StateZooForCausalLM:
    """Return a model whose attention is half gated recurrence, half window, without new weights.

    Args:
        teacher: A causal model with softmax attention in the chosen layers; its tensors are shared.
        recurrence: Which recurrence, see :class:`~statezoo.zoo.liger.Liger`.
        window: How many last tokens the attention half sees, itself included; where the teacher's
            attention has a shorter window, that one.
        layers: Which layers, see :func:`plan_layers`.
        arm: Both halves, or one of them alone.

    Raises:
        ValueError: If a chosen layer is no attention, or one that cannot be read so.
        TypeError: If the teacher is no causal model.
    """
    if not isinstance(teacher, StateZooForCausalLM):
        raise TypeError(f"a teacher is a causal language model, not a {type(teacher).__name__}.")
    chosen = plan_layers(layers, teacher.config.n_layers)
    mixers = teacher.config.layer_mixers
    for i in chosen:
        mixers[i] = _liger(mixers[i], i) | {"recurrence": recurrence, "arm": arm}
        mixers[i]["window"] = min(window, mixers[i]["window"] or window)
    alike = all(mixer == mixers[0] for mixer in mixers)
    settings = {key: getattr(teacher.config, key) for key in StateZooConfig.own_keys()}
    config = StateZooConfig(**settings | {"mixers": mixers[:1] if alike else mixers})
    student: StateZooForCausalLM = StateZooForCausalLM.from_pretrained(
        None, config=config, state_dict=teacher.state_dict(), dtype=teacher.dtype
    )
    student.train(teacher.training)
    return student


def _liger(attention: dict[str, Any], layer: int) -> dict[str, Any]:
    """Return the settings of liger that an attention layer's weights fit into."""
    if attention["name"] != Attention.name:
        raise ValueError(
            f"layer {layer} of the teacher is {attention['name']}, which is recurrent already: "
            "choose the attention layers with layers, such as 0,1,4-7."
        )
    if attention["sinks"]:
        raise ValueError(
            f"layer {layer} of the teacher has attention sinks, which liger has not: leave it as "
            "it is with layers."
        )
    own = mixer_settings("liger")
    return {key: value for key, value in attention.items() if key in own} | {"name": "liger"}
