"""How much of what the devices can do is done: model FLOP utilisation."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from statezoo.lightning_modules.devices import DEVICES, find_device, measured_peak
from statezoo.lightning_modules.flops import count_flops
from statezoo.lightning_modules.task import Task
from statezoo.zoo.model import StateZooForCausalLM

__all__ = ["Utilisation"]

TOKENS = "train/tokens_per_second"


class Utilisation(Callback):
    """Log ``train/mfu``: FLOP/s of the model over the peak of all devices.

    The FLOPs are those that the model needs, see :func:`~statezoo.lightning_modules.flops.
    count_flops`: what is recomputed, padded or done for a chunk's sake does not count. Logged with
    ``train/tokens_per_second``, for language models all of whose weights are trained. On a
    processor it stays silent, unless it has a ``peak``.

    Lightning's ThroughputMonitor takes all batches to be equal, waits for the GPU after each, and
    knows peaks of sparse products for some cards; here windows may grow, and nothing waits.

    Args:
        peak: FLOP/s of one device; by default what is documented of the graphics card for the
            precision of the run; ``measured``, of matrix products before the first step.

    Raises:
        ValueError: If the peak is not above 0.

    Source: Chowdhery et al., PaLM, arXiv:2204.02311v5, appendix B.
    """

    def __init__(self, peak: float | Literal["measured"] | None = None) -> None:
        if not (peak in (None, "measured") or (isinstance(peak, float | int) and peak > 0)):
            raise ValueError(f"Utilisation needs peak above 0 FLOP/s or 'measured', got {peak!r}.")
        self.peak = peak
        self._peak: float | None = None
        self._per_token: dict[int, float] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the peak."""
        first = next(c for c in trainer.callbacks if isinstance(c, Utilisation))  # type: ignore[attr-defined]
        net = getattr(pl_module, "net", None)
        able = isinstance(pl_module, Task) and pl_module.tune == "full"
        if first is self and able and isinstance(net, StateZooForCausalLM):
            self._peak = self._find_peak(trainer, pl_module.device)

    def _find_peak(self, trainer: Trainer, device: torch.device) -> float | None:
        bf16 = str(trainer.precision).startswith(("bf16", "16"))
        if self.peak == "measured":
            return measured_peak(device, torch.bfloat16 if bf16 else torch.float32)
        if self.peak is not None:
            return float(self.peak)
        if device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(device)
        fast = torch.get_float32_matmul_precision() != "highest"
        kind = "bfloat16" if bf16 else "tf32" if fast else "float32"
        card = find_device(name)
        if card is None or kind not in card.peak:
            rank_zero_info(
                f"no train/mfu: the {kind} peak of {name} is not known, only those of "
                f"{', '.join(DEVICES)}: give Utilisation its peak in FLOP/s, or 'measured'"
            )
            return None
        return card.peak[kind]

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log, in the steps in which the tokens per second are."""
        every = max(1, getattr(trainer, "log_every_n_steps", 50))
        ends_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if self._peak is None or not ends_step or trainer.global_step % every:
            return
        speed = trainer.callback_metrics.get(TOKENS)
        if speed is not None:
            used = float(speed) * self._flops(pl_module, _length(batch))
            mfu = used / (self._peak * trainer.world_size)
            pl_module.log("train/mfu", mfu, rank_zero_only=True)

    def _flops(self, module: Any, length: int) -> float:
        if length not in self._per_token:
            self._per_token[length] = count_flops(module.net.config, length).training
        return self._per_token[length]


def _length(batch: Any) -> int:
    """Return the tokens of a window, or of a packed document in the mean over tokens."""
    bounds = batch.get("cu_seqlens")
    if bounds is None:
        return int(batch["tokens"].shape[1])
    lengths = bounds.diff().double()
    return max(1, round(float((lengths**2).sum() / lengths.sum().clamp(min=1))))
