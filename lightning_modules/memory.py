"""How much memory training will need, from three steps with little: before any long one."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from statezoo.datamodules.batch import Batch
from statezoo.lightning_modules import checkpoint as ckpt
from statezoo.lightning_modules.task import Task
from statezoo.zoo.auxiliary import auxiliary_loss

__all__ = ["Footprint", "available_bytes", "gigabytes", "gradients_dropped", "measure", "peak"]

MARGIN = 1.3
"""What the peak of live tensors is multiplied by, for what no one sees: working space within
operations and gaps between allocated blocks. Processes on a CPU took 1.05 to 1.45 times the live
tensors (glibc, GLA, Mamba, Gated DeltaNet and attention of 100 MB to 1 GB)."""


class Footprint(NamedTuple):
    """Bytes of training as a function of what a batch is.

    A batch of ``B`` windows of ``T`` tokens needs ``held + more`` and, at the end of the forward or
    within the backward pass, ``MARGIN * (fixed + B * (linear * T + quadratic * T**2))``.

    Attributes:
        held: Parameters and buffers, which are there already.
        more: Gradients and the two averages of AdamW, which the first step allocates.
        fixed: What a step needs for a batch of any size.
        linear: And for each token.
        quadratic: And for each pair of tokens of a window, in attention that keeps its weights.
    """

    held: int
    more: int
    fixed: float
    linear: float
    quadratic: float

    def peak(self, rows: int, length: int) -> float:
        """Bytes for ``rows`` windows of ``length`` tokens; gradients count from the beginning."""
        activations = rows * (self.linear * length + self.quadratic * length**2)
        return self.held + self.more + MARGIN * (self.fixed + activations)


class LiveBytes(TorchDispatchMode):
    """Count the bytes of tensors that are made within, while they live.

    Args:
        known: Tensors that are there already and do not count.
    """

    supports_higher_order_operators = True

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation and look at what it returns."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._seen:
            self._seen.add(key)
            weakref.finalize(storage, self._gone, key, storage.nbytes())
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def measure(
    module: Task, trainer: Trainer, batch_at: Callable[[int, int], Batch], length: int
) -> Footprint:
    """Run the loss forward and back on ``1 x length``, ``2 x length`` and ``1 x 2 length`` tokens.

    Leaves no gradient behind and puts the random numbers back.

    Args:
        module: The module, on its device.
        trainer: Its trainer, for precision and transfer.
        batch_at: Makes a batch of so many windows of so many tokens.
        length: Tokens of the short window.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    held = sum(_bytes(t) for t in {*module.parameters(), *module.buffers()})
    gradients = sum(_bytes(p) for p in trained)
    rng, was = ckpt.rng_state(), module.training
    module.train()
    try:
        with gradients_dropped(trained):
            one, two, longer = (
                peak(module, trainer, batch_at(rows, tokens))
                for rows, tokens in ((1, length), (2, length), (1, 2 * length))
            )
    finally:
        module.train(was)
        ckpt.set_rng_state(rng)
    per_row, fixed = two - one, max(0, 2 * one - two)
    short, long = per_row / length, (longer - fixed) / (2 * length)
    quadratic = max(0.0, (long - short) / length)
    linear = max(short, long) if quadratic == 0 else max(0.0, short - quadratic * length)
    return Footprint(held, 3 * gradients, fixed, linear, quadratic)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def gradients_dropped(parameters: Sequence[nn.Parameter]) -> Any:
    """Let go of each gradient as soon as it is whole: their bytes are known without measuring."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(drop) for p in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def peak(module: Task, trainer: Trainer, batch: Batch) -> int:
    """Bytes of the tensors of one step, at the moment when they are most."""
    batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
    given = [x for x in batch.values() if isinstance(x, Tensor)]
    counter = LiveBytes([*module.parameters(), *module.buffers(), *given])
    with torch.enable_grad(), counter:
        with trainer.precision_plugin.train_step_context():
            loss = module.training_loss(batch)
            more = auxiliary_loss(loss["auxiliary"])
            total = loss["nats"] if more is None else loss["nats"] + more * loss["count"]
        total.backward()
    module.on_after_backward()
    return counter.peak


def available_bytes(device: torch.device) -> int:
    """Memory that this process could still get: free on the GPU, available on the machine.

    On Linux what the kernel calls available, or what the control group leaves where that is less;
    elsewhere all memory of the machine.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable"))
        found = int(kilobytes) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return min(found, limit - int(stat["anon"]))
    except (OSError, ValueError, KeyError):
        return found


def gigabytes(size: float) -> str:
    """Write a number of bytes for people: in GB of 1e9 bytes, small ones in MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
