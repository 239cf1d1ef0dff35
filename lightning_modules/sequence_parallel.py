"""Every sequence on several processes, a slice of its time on each, as a strategy of Lightning.

>>> Trainer(strategy="sequence_parallel", devices=4)  # doctest: +SKIP
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch import Tensor

from statezoo.datamodules.batch import IGNORE, Batch
from statezoo.kernels.sequence import Shard
from statezoo.lightning_modules.causal_lm import CausalLM
from statezoo.lightning_modules.length_warmup import LengthWarmup
from statezoo.lightning_modules.linearize import Linearize

__all__ = ["SequenceParallel", "cut"]

TIMEOUT = timedelta(minutes=30)
FILL = {"tokens": 0, "targets": IGNORE, "weights": 0}
"""What lies along time in a batch, and what it is filled up with."""


class SequenceParallel(DDPStrategy):
    """Cut every sequence into slices of its time and train on them in as many processes.

    ``devices x num_nodes`` processes are groups of ``sequence_size`` that come one after the other.
    Those of a group read the same windows and hold a slice each: states, the last inputs of
    convolutions, keys and values go from slice to slice (:mod:`statezoo.kernels.sequence`). Groups
    read different windows. Losses, gradients and validation are those of one process per group,
    and checkpoints fit any ``sequence_size``; ``data.batch_size`` is that of a group.

    Windows whose length is no multiple of ``sequence_size`` are filled up with tokens that are not
    scored and that no scored token sees; mixtures of memories count them in their balance loss.

    For causal language models: ``CausalLM`` and the architectures by their names.

    Args:
        sequence_size: Processes that share each sequence; default all.
        process_group_backend: What carries messages, ``nccl`` or ``gloo``; default by the device.
        timeout: How long a process waits for the others before it gives up.

    Raises:
        ValueError: If the processes cannot be grouped so; before training, if model or data cannot
            be cut.

    Source: Sun et al., LASP-2, arXiv:2502.07563, section 3.
    """

    def __init__(
        self,
        sequence_size: int | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = TIMEOUT,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self.sequence_size = sequence_size
        self.group: dist.ProcessGroup | None = None
        """Processes that share the sequences of this one."""

    @property
    def slices(self) -> int:
        """Slices of each sequence."""
        return self.sequence_size or self.num_nodes * self.num_processes

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Say which windows to read: all processes of a group the same."""
        processes = self.num_nodes * self.num_processes
        return {
            "num_replicas": processes // self.slices,
            "rank": self.global_rank // self.slices,
        }

    def _configure_launcher(self) -> None:
        processes, size = self.num_nodes * self.num_processes, self.sequence_size
        if size is not None and size < 2:
            raise ValueError(
                f"SequenceParallel needs sequence_size of at least 2, got {size}: with "
                "--trainer.strategy ddp every process reads whole sequences."
            )
        if processes < 2 or processes % self.slices:
            wanted = "at least 2" if size is None else f"a multiple of sequence_size={size}"
            raise ValueError(
                f"SequenceParallel needs {wanted} processes, got {processes}: set trainer.devices "
                "and trainer.num_nodes, of which they are the product."
            )
        assert self.cluster_environment is not None
        self._launcher = _CheckingLauncher(
            self.cluster_environment, self.num_processes, self.num_nodes
        )

    def check(self, trainer: Trainer, model: LightningModule, data: Any) -> None:
        """Refuse what cannot be cut into slices of time.

        Raises:
            ValueError: If that is so.
        """
        if not isinstance(model, CausalLM) or isinstance(model, Linearize):
            raise ValueError(
                f"SequenceParallel trains CausalLM and the architectures by their names, and "
                f"{type(model).__name__} needs whole sequences: use --trainer.strategy ddp."
            )
        if getattr(data, "carry", False):
            raise ValueError(
                "SequenceParallel runs the slices of a window side by side, and data.carry is to "
                "hand states from window to window: leave one of them out."
            )
        if trainer.state.fn == "predict":
            raise ValueError(
                "SequenceParallel has no process with a whole row of predictions: leave "
                "trainer.strategy out for predict."
            )
        shortest = getattr(data, "seq_len", self.slices)
        starts = [c.start for c in trainer.callbacks if isinstance(c, LengthWarmup)]  # type: ignore[attr-defined]
        _check_length(min([shortest, *starts]), self.slices)

    def setup_environment(self) -> None:
        """Join the processes, and those that share sequences."""
        super().setup_environment()
        if self.group is None:
            # Not the group of all, even where these are all: DDP sends gradients through that while
            # the backward pass of the slices is still under way.
            ranks = torch.arange(self.world_size).view(-1, self.slices).tolist()
            self.group, _ = dist.new_subgroups_by_enumeration(ranks, timeout=self._timeout)

    def batch_to_device(
        self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0
    ) -> Any:
        """Move this process's slice of a batch."""
        part = cut(batch, self.group)
        shard = part.pop("shard")
        return {**super().batch_to_device(part, device, dataloader_idx), "shard": shard}


class _CheckingLauncher(_SubprocessScriptLauncher):
    """Ask the strategy about model and data before there are other processes."""

    def launch(
        self, function: Any, *args: Any, trainer: Trainer | None = None, **kwargs: Any
    ) -> Any:
        """Check, and launch."""
        strategy, data = getattr(trainer, "strategy", None), None
        for given in args:
            data = given if isinstance(given, LightningDataModule) else data
        if trainer is not None and isinstance(strategy, SequenceParallel):
            strategy.check(trainer, trainer.lightning_module, data)
        return super().launch(function, *args, trainer=trainer, **kwargs)


def cut(batch: Batch, group: dist.ProcessGroup | None) -> Batch:
    """Return this process's slice of a batch, with the ``shard`` that says which it is.

    Bytes go to slices by their scored tokens.

    Args:
        batch: What all processes of the group read, alike.
        group: Processes in the order of their slices.

    Raises:
        ValueError: If there are fewer tokens than slices, or what cannot be cut.
    """
    if other := sorted(batch.keys() - {*FILL, "cu_seqlens", "n_bytes"}):
        raise ValueError(
            f"SequenceParallel cannot cut {', '.join(other)} of a batch into slices of time: use "
            "--trainer.strategy ddp."
        )
    given: dict[str, Any] = dict(batch)
    T, size = batch["tokens"].shape[1], dist.get_world_size(group)
    _check_length(T, size)
    missing, bounds = -T % size, given.get("cu_seqlens")
    if bounds is not None and missing:  # a document of its own
        bounds = torch.cat([bounds, bounds.new_tensor([T + missing])])
    shard = Shard(group, (T + missing) // size, bounds)
    part: dict[str, Any] = {"shard": shard}
    for key in FILL.keys() & given.keys():
        part[key] = shard.take(F.pad(given[key], (0, missing), value=FILL[key]))
    if shard.cu_seqlens is not None:
        part["cu_seqlens"] = shard.cu_seqlens
    if "n_bytes" in given:
        mine, scored = (_scored(x) for x in (part["targets"], given["targets"]))
        part["n_bytes"] = given["n_bytes"].double() * mine / scored.clamp(min=1)
    return part  # type: ignore[return-value]


def _scored(targets: Tensor) -> Tensor:
    return (targets != IGNORE).sum()


def _check_length(T: int, size: int) -> None:
    if size > T:
        raise ValueError(
            f"SequenceParallel needs at least a token for each of {size} slices, got windows of "
            f"{T}: raise data.seq_len, or lower sequence_size."
        )


StrategyRegistry.register(
    "sequence_parallel",
    SequenceParallel,
    description="A slice of the time of every sequence on each process",
)
