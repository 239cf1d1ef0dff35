"""A loss or a gradient that is no number: seen before the step, told with the batch it is of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from statezoo.datamodules.batch import Batch

__all__ = ["FILE", "report", "unusable"]

FILE = "not_finite.pt"
"""What the run leaves of such a batch: ``step``, ``epoch`` and ``batches``, each with its ``batch``
(number in the epoch, from 0), ``windows`` where the loader knows them, ``tokens`` and ``targets``,
and ``text`` where the tokenizer can write it. ``torch.load(FILE, weights_only=True)`` reads it."""

Read = Sequence[tuple[int, Batch]]
"""Number in the epoch, and content, of each micro-batch of an optimiser step."""


def unusable(optimizer: Optimizer, scaler: Any = None) -> Tensor:
    """Return 1 if a gradient of this process is no number, else 0, without waiting for it.

    Args:
        optimizer: Whose parameters are looked at.
        scaler: Scaler of the loss in half precision, which leaves such steps out by itself.
    """
    found = {} if scaler is not None else _largest(optimizer)
    if not found:
        return torch.zeros((), dtype=torch.float64)
    device = next(iter(found.values())).device
    largest = torch.stack([x.to(device) for x in found.values()])
    return (~largest.isfinite().all()).double()


def _largest(optimizer: Optimizer) -> dict[int, Tensor]:
    """Return the largest entry of each gradient, by the parameter's ``id``."""
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            grad = parameter.grad
            grad = grad.to_local() if hasattr(grad, "to_local") else grad  # sharded: our part
            if grad is not None and grad.numel():
                found[id(parameter)] = grad.detach().abs().amax().float()
    return found


def report(
    module: LightningModule,
    optimizer: Optimizer,
    loss: float,
    window: Sequence[tuple[Tensor, Tensor]],
    read: Read,
) -> str:
    """Write the batches of a step that cannot be made to a file, and say what happened.

    Args:
        module: The module, before the step.
        optimizer: Has the gradients.
        loss: Sum of the loss over all processes.
        window: Summed loss and count of each micro-batch of this process.
        read: The micro-batches.

    Returns:
        What to tell the user: step, batch, parameters, and what to do.
    """
    trainer, step = module.trainer, module.trainer.global_step
    where = f"step {step} (epoch {trainer.current_epoch})"
    if torch.isfinite(torch.tensor(loss)):
        names = _parameters(module, optimizer)
        told = f"a gradient is inf or nan at {where}, of {names}, the loss is a number"
        bad = list(range(len(read)))
    else:
        told = f"the training loss is {loss} at {where}"
        bad = [i for i, (nats, _) in enumerate(window) if not torch.isfinite(nats)]
    rows = [_describe(module, read, i) for i in bad if i < len(read)]
    if rows:
        told += f", in {_listed(rows)}"
        told += f" (written to {_write(module, rows)})"
    elif trainer.world_size > 1:
        told += ", in a batch of another process"
    saved = getattr(trainer.checkpoint_callback, "last_model_path", "")
    return (
        f"{told}; the parameters are still those before this step. Lower optim.lr, raise "
        "optim.warmup_steps or use --trainer.precision 32-true"
        f"{f'; the last checkpoint is {saved}' if saved else ''}."
    )


def _parameters(module: LightningModule, optimizer: Optimizer) -> str:
    """Name the parameters whose gradients are no numbers."""
    wrong = {key for key, x in _largest(optimizer).items() if not torch.isfinite(x)}
    names = [name for name, parameter in module.named_parameters() if id(parameter) in wrong]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}" if names else "parameters of another process"


def _describe(module: LightningModule, read: Read, i: int) -> dict[str, Any]:
    """Return what is known of a micro-batch."""
    number, batch = read[i]
    row: dict[str, Any] = {"batch": number}
    loader: Any = module.trainer.train_dataloader
    if hasattr(loader, "index") and hasattr(loader, "done") and not hasattr(loader, "loaders"):
        shift, windows = loader.index(loader.done - len(read) + i)
        row |= {"windows": list(windows), "moved_by": int(shift)}
    row |= {key: x.cpu() for key, x in batch.items() if isinstance(x, Tensor)}
    tokenizer: Any = getattr(getattr(module.trainer, "datamodule", None), "tokenizer", None)
    if hasattr(tokenizer, "decode") and "tokens" in batch:
        row["text"] = [tokenizer.decode(ids) for ids in batch["tokens"].cpu().tolist()]
    return row


def _listed(rows: Iterable[dict[str, Any]]) -> str:
    told = []
    for row in rows:
        windows = row.get("windows")
        of = f" (windows {', '.join(map(str, windows[:8]))}" if windows else ""
        of += f", moved by {row['moved_by']})" if windows else ""
        told.append(f"batch {row['batch']}{of}")
    return " or ".join(told)


def _write(module: LightningModule, rows: list[dict[str, Any]]) -> str:
    """Write the batches, one file per process that has any."""
    trainer = module.trainer
    name = FILE if trainer.world_size == 1 else f"{trainer.global_rank}_{FILE}"
    saved = getattr(trainer.checkpoint_callback, "last_model_path", "")
    folder = Path(saved).parent if saved else Path(trainer.default_root_dir)
    for logger in trainer.loggers[:1]:
        folder = Path(getattr(logger, "log_dir", None) or folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(
            {"step": trainer.global_step, "epoch": trainer.current_epoch, "batches": rows},
            folder / name,
        )
    except (OSError, RuntimeError) as error:
        return f"no file: {error}"
    return str(folder / name)
