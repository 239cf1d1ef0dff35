"""FSDP2: weights, gradients and optimiser states spread over all processes."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from statezoo.lightning_modules import shards
from statezoo.zoo.model import Block

__all__ = ["FSDP2", "shard"]

STEPS = ("training_step", "validation_step", "test_step", "predict_step")
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
TIMEOUT = timedelta(minutes=30)


class FSDP2(ModelParallelStrategy):
    """Spread weights, gradients and optimiser states over all processes, block by block.

    ``--trainer.strategy fsdp2``. Every process holds its part of each tensor, and gathers the
    weights of one block while it computes with them. The steps are those of ``ddp``: gradients are
    averaged, and the module's exact means undo that.

    Checkpoints are sharded, see :mod:`statezoo.lightning_modules.shards`: they resume on any number
    of processes and with any strategy, and checkpoints of other strategies resume with this one.

    Args:
        process_group_backend: What processes talk by; default ``nccl`` on GPUs, ``gloo`` on CPUs.
        timeout: How long a process waits for the others before it gives up.

    Raises:
        ValueError: If the precision scales losses, ``16-mixed``.

    Source: Zhao et al., PyTorch FSDP, arXiv:2304.11277v2; the per-parameter form of torch 2.6.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta = TIMEOUT
    ) -> None:
        super().__init__(
            tensor_parallel_size=1, process_group_backend=process_group_backend, timeout=timeout
        )
        self._shards: shards.Shards | None = None
        self._folder: Path | None = None

    @property
    def module(self) -> LightningModule:
        """The module that is trained, while there is one."""
        return cast(LightningModule, self.lightning_module)

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Say that weights are read before they are spread: checkpoints may add parameters."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Say that :meth:`load_optimizer_state_dict` does it."""
        return True

    def setup_environment(self) -> None:
        """Make one mesh of all processes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Spread the module, and make its optimisers."""
        if self.precision_plugin.precision not in PRECISIONS:
            raise ValueError(
                f"fsdp2 needs a precision of {', '.join(PRECISIONS)}, got "
                f"{self.precision_plugin.precision}: set --trainer.precision."
            )
        cast(Accelerator, self.accelerator).setup(trainer)
        module = self.module
        if not isinstance(module, FSDPModule):
            self.precision_plugin.convert_module(module)
            shard(module, self.device_mesh["data_parallel"])
        self.model_to_device()
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    # ------------------------------------------------------------- checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return this process's part of the weights."""
        return self.module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return this process's part of an optimiser's state, under the numbers of parameters."""
        return Strategy.optimizer_state(self, optimizer)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Write all shards, then the file that names them.

        Raises:
            OSError: If a process cannot write its shard; on all of them.
        """
        path = Path(self.broadcast(filepath))
        self._folder = path.parent
        self._clean()
        step = int(checkpoint.get("global_step", 0))
        name = self.broadcast(f"{step:08d}-{secrets.token_hex(4)}")
        same = shards.named(self.module)
        try:
            tensors = shards.take(checkpoint, same)
            folder = path.parent / shards.KEY / name
            checkpoint[shards.KEY] = shards.write(tensors, folder, same)
        except OSError:
            self._clean()
            raise
        Strategy.save_checkpoint(self, checkpoint, path, storage_options)

    def _clean(self) -> None:
        """Delete shards that no checkpoint names."""
        if self.is_global_zero and self._folder is not None:
            shards.clean(self._folder)

    def teardown(self) -> None:
        """Leave no shards without a checkpoint."""
        self._clean()
        super().teardown()

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Delete a checkpoint and its shards."""
        Strategy.remove_checkpoint(self, filepath)
        self._clean()

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint of this strategy or another, optimiser states later."""
        path = Path(self.broadcast(checkpoint_path))
        content = Strategy.load_checkpoint(self, path, weights_only)
        self._shards = shards.attach(content, path)
        return content

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give the module its weights, before or after it was spread."""
        state, now = dict(checkpoint["state_dict"]), self.module.state_dict()
        for name in state.keys() & now.keys():
            state[name] = _part(state[name], now[name])
        self.module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give optimisers their states, of which every process reads its part."""
        for i, optimizer in enumerate(self.optimizers):
            saved = checkpoint["optimizer_states"][i]
            of = dict(enumerate(p for g in optimizer.param_groups for p in g["params"]))
            if self._shards is not None:
                read_states(self._shards, i, saved, of)
            for number, values in saved["state"].items():
                for key, x in values.items():
                    if isinstance(x, Tensor) and x.shape == of[number].shape:
                        values[key] = _part(x, of[number])
            optimizer.load_state_dict(saved)
        self._shards = None


def read_states(
    found: shards.Shards, i: int, saved: dict[str, Any], of: Mapping[int, nn.Parameter]
) -> None:
    """Read an optimiser's states from shards, those of spread parameters in parts.

    Args:
        found: The shards.
        i: Number of the optimiser.
        saved: Its state, completed in place.
        of: Its parameters by number.
    """
    prefix, wanted = f"{shards.STATES}.{i}.", {}
    for name, (shape, dtype) in found.shapes.items():
        if name.startswith(prefix):
            number, _, key = name.removeprefix(prefix).partition(".")
            parameter = of[int(number)]
            empty = torch.empty(shape, dtype=dtype)
            if parameter.shape == shape:
                empty = torch.empty_like(parameter.detach(), dtype=dtype)
            wanted[name] = saved["state"][int(number)][key] = empty
    found.read(wanted)


def _part(whole: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a tensor, spread as another one is."""
    if not isinstance(like, DTensor) or isinstance(whole, DTensor):
        return whole
    whole = whole.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def shard(module: LightningModule, mesh: DeviceMesh) -> None:
    """Spread a module in place: each block by itself, and what is around them together.

    Args:
        module: Any whose network is made of our blocks.
        mesh: Processes, in one dimension.
    """
    for part in list(module.modules()):
        if isinstance(part, Block):
            fully_shard(part, mesh=mesh)
    cls = type(module)
    fully_shard(module, mesh=mesh)
    for name in ("__name__", "__qualname__", "__module__"):  # torch has put a class before it
        setattr(type(module), name, getattr(cls, name))
    for step in STEPS:
        register_fsdp_forward_method(module, step)


StrategyRegistry.register("fsdp2", FSDP2, description=(FSDP2.__doc__ or "").partition("\n")[0])
