"""What a suite of probes says: tasks, and how models of each are made and trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

__all__ = ["Probe", "Settings", "Size", "Suite"]

Size = Literal["quick", "paper"]

Settings = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A task, and how models are trained on it.

    Attributes:
        task: ``name`` and settings of the synthetic task.
        lengths: Lengths of the test; the result is that of the longest.
        measure: The accuracy that is the result, one of ``measuring.MEASURES``.
        mixers: Settings of mixers by name, ``any`` for all who have them; ``--models`` wins.
        d_model: Widths of the stream; every model is trained with each.
        n_layers: Layers, of a hybrid at least one of each mixer.
        channel: Channel mixer; None for none.
        steps: Optimiser steps at most.
        batch_size: Problems of a step.
        train_examples: Problems of an epoch; None is as many as the steps read.
        lr: Learning rates; of several, the one that is best on validation problems counts.
        weight_decay: Of matrices.
        warmup_steps: Steps until the learning rate is reached.
        examples: Problems of validation and test at each length.
        precision: As ``Trainer`` has it.
        usual: Whether it is run where no tasks are named.
    """

    task: Mapping[str, Any]
    lengths: tuple[int, ...]
    measure: str = "tokens"
    mixers: Settings = field(default_factory=dict)
    d_model: tuple[int, ...] = (32,)
    n_layers: int = 1
    channel: str | None = "swiglu"
    steps: int
    batch_size: int = 64
    train_examples: int | None = None
    lr: tuple[float, ...] = (5e-3,)
    weight_decay: float = 0.0
    warmup_steps: int = 100
    examples: int = 200
    precision: str = "32-true"
    usual: bool = True

    def on(self, changes: Mapping[str, Any], **settings: Any) -> Probe:
        """Return this probe with other settings of its task, and of its own."""
        return replace(self, task={**self.task, **changes}, **settings)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Probes of one ability.

    Attributes:
        about: What they ask.
        models: Which are compared where none are named.
        quick: Probes that two CPU cores run in minutes, by name.
        paper: Probes as published, for a GPU, by name.
        frontier: Whether accuracy against bytes of state is drawn.
    """

    about: str
    models: str
    quick: Mapping[str, Probe]
    paper: Mapping[str, Probe]
    frontier: bool = False
