"""Less memory, or less time, for the same training: recomputed activations, compiled networks."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from transformers.modeling_layers import GradientCheckpointingLayer

__all__ = ["ActivationCheckpointing", "Compile", "recompute_blocks"]


class ActivationCheckpointing(Callback):
    """Keep only the stream between the blocks for the backward pass, and compute the rest anew.

    The numbers stay the same. A step runs the blocks forward twice; the memory for activations is
    that of one block and of the streams between blocks.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Switch it on in every block.

        Raises:
            ValueError: If the network has no blocks.
        """
        if stage == "fit":
            recompute_blocks(_network(pl_module, "ActivationCheckpointing"))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Switch it off again."""
        if stage == "fit":
            net: Any = pl_module.net
            disable = getattr(net, "activation_checkpointing_disable", None)
            (net.gradient_checkpointing_disable if disable is None else disable)()


def recompute_blocks(net: Any) -> None:
    """Let a network keep only what is between its blocks for the backward pass."""
    enable = getattr(net, "activation_checkpointing_enable", None)
    if enable is None:  # its name up to transformers 5.22
        enable = net.gradient_checkpointing_enable
    enable({"use_reentrant": False})


class Compile(Callback):
    """Compile the network with ``torch.compile`` before the first step.

    No architecture has graph breaks, recurrent ones on packed batches neither; attention on those
    has one a layer, and padded batches have one where the padding is taken out. The first steps
    wait for the compiler, as does the first validation. Checkpoints and exported weights do not
    change.

    Args:
        backend: ``inductor`` fuses and needs a C++ compiler or Triton; ``aot_eager`` only traces.
        mode: What ``inductor`` optimises for, default its own balance.
        dynamic: Whether sizes are left open from the beginning; default from the second size on.
    """

    def __init__(
        self,
        backend: Literal["inductor", "aot_eager", "eager"] = "inductor",
        mode: Literal["default", "reduce-overhead", "max-autotune"] | None = None,
        dynamic: bool | None = None,
    ) -> None:
        if mode is not None and backend != "inductor":
            raise ValueError(f"Compile: mode={mode!r} is of backend inductor, not of {backend}.")
        self.settings = {"backend": backend, "mode": mode, "dynamic": dynamic}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Mark the body for compilation, which its first call brings about.

        Raises:
            ValueError: If the module has no network of ours.
        """
        if stage == "fit":
            _network(pl_module, "Compile").model.compile(**self.settings)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the network run as it is written again."""
        if stage == "fit":
            pl_module.net.model._compiled_call_impl = None  # type: ignore[union-attr]


def _network(module: LightningModule, name: str) -> Any:
    """Return the network of a task, if it is made of blocks."""
    net: Any = getattr(module, "net", None)
    if net is None or not any(isinstance(m, GradientCheckpointingLayer) for m in net.modules()):
        raise ValueError(
            f"{name} needs a task with a network of blocks, as CausalLM is; got "
            f"{type(module).__name__}: leave the callback out."
        )
    return net
