"""One cell of a table of probes: a model trained on a task from one seed, and what it can do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import asdict, dataclass
from hashlib import sha256
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from statezoo.quiet import quiet

if TYPE_CHECKING:
    from statezoo.datamodules import Synthetic
    from statezoo.lightning_modules import CausalLM

__all__ = ["Cell", "begin_worker", "build", "run_cell"]

LONG = 2000
"""Cells of more steps keep checkpoints, and go on from them."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is trained and measured, whole: equal cells give equal numbers.

    Attributes:
        probe: Name of the task in its suite.
        model: Name of the model in the table.
        task: ``name`` and settings of the synthetic task.
        mixers: Mixers with their settings, cycled over the layers.
        d_model: Width of the stream.
        n_layers: Layers.
        channel: Channel mixer; None for none.
        steps: Optimiser steps, at most: training ends where all validation problems of the longest
            test length are solved.
        batch_size: Problems of a step.
        train_examples: Problems of an epoch.
        lr: Highest learning rate.
        weight_decay: Of matrices.
        warmup_steps: Steps until it is reached.
        lengths: Lengths of the test.
        examples: Problems of validation and of the test, each of every length.
        measure: Which of the measured accuracies is the result.
        seed: Draws the problems and the first weights.
        precision: As ``Trainer`` has it.
    """

    probe: str
    model: str
    task: dict[str, Any]
    mixers: list[dict[str, Any]]
    d_model: int
    n_layers: int
    channel: str | None
    steps: int
    batch_size: int
    train_examples: int
    lr: float
    weight_decay: float
    warmup_steps: int
    lengths: list[int]
    examples: int
    measure: str
    seed: int
    precision: str = "32-true"

    @property
    def name(self) -> str:
        """Name of what is kept of it: readable, and another for any other setting."""
        plain = json.dumps(asdict(self), sort_keys=True)
        readable = "".join(c if c.isalnum() or c in "_+=." else "-" for c in self.model)[:60]
        digest = sha256(plain.encode()).hexdigest()[:10]
        return f"{self.probe}-{readable}-{self.d_model}-{self.seed}-{digest}"


def build(cell: Cell) -> tuple[CausalLM, Synthetic]:
    """Return the model of a cell, with first weights of its seed, and its data.

    Raises:
        ValueError: If settings do not fit each other.
    """
    from lightning.pytorch import seed_everything

    from statezoo.datamodules import Synthetic
    from statezoo.lightning_modules import CausalLM
    from statezoo.lightning_modules.optim import Optim

    data = Synthetic(
        cell.task,
        batch_size=cell.batch_size,
        train_examples=cell.train_examples,
        val_examples=cell.examples,
        test_examples=cell.examples,
        test_lengths=cell.lengths,
        seed=cell.seed,
    )
    seed_everything(cell.seed, verbose=False)
    module = CausalLM(
        [*cell.mixers],
        vocab_size=data.vocab_size,
        d_model=cell.d_model,
        n_layers=cell.n_layers,
        channel=cell.channel,
        optim=Optim(
            lr=cell.lr, weight_decay=cell.weight_decay, warmup_steps=cell.warmup_steps,
        ),
    )  # fmt: skip
    return module, data


def begin_worker() -> None:
    """Let this process, one of several, use one thread, and end with and by the one above."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := parent_process():
        parent.join()
        os._exit(1)


def run_cell(cell: Cell, folder: Path, device: str = "cpu") -> str:
    """Train and measure a cell, and write ``NAME.json``.

    Args:
        cell: What to do.
        folder: Where results are, and checkpoints while a long cell is trained.
        device: Where to run: cpu, cuda, mps.

    Returns:
        What came out, in a line.
    """
    from statezoo.probe.measuring import measure

    module, data = build(cell)
    started = time.perf_counter()
    steps, diverged = _train(cell, module, data, folder / cell.name, device)
    seconds = time.perf_counter() - started
    net = module.to(device).net
    found = {split: measure(net, data, split) for split in ("val", "test")}
    value = found["test"][max(cell.lengths)][cell.measure]
    results = {
        "cell": asdict(cell),
        "steps": steps,
        "diverged": diverged,
        "seconds": round(seconds, 1),
        "device": device,
        "parameters": sum(p.numel() for p in module.net.parameters()),
        "state_bytes": _state_bytes(module, data),
        **found,
    }
    draft = folder / f"{cell.name}.json.part"
    draft.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draft.replace(folder / f"{cell.name}.json")
    end = ", DIVERGED" if diverged else ""
    return f"{cell.measure} {value:.3f} at {max(cell.lengths)}, {steps} steps, {seconds:.0f} s{end}"


def _train(
    cell: Cell, module: CausalLM, data: Synthetic, folder: Path, device: str
) -> tuple[int, bool]:
    """Train, going on where it was stopped.

    Returns:
        The steps that it took, and whether it ended in a loss or gradient that is no number.
    """
    from lightning.pytorch import Trainer

    from statezoo.lightning_modules.checkpoint import newest_whole
    from statezoo.lightning_modules.checkpoints import Checkpoints
    from statezoo.probe.stopping import StopWhenSolved

    callbacks: list[Any] = [StopWhenSolved(cell.measure, max(cell.steps // 20, 1))]
    path, diverged = None, False
    if cell.steps > LONG:
        callbacks.append(Checkpoints(every_n_steps=LONG // 4, folder=str(folder)))
        if folder.is_dir() and any(folder.glob("*.ckpt")):
            path = newest_whole(folder)[0]
    with quiet("statezoo.lightning_modules.checkpoints"):
        trainer = Trainer(
            default_root_dir=folder,
            accelerator="gpu" if device == "cuda" else device,
            devices=1,
            precision=cell.precision,  # type: ignore[arg-type]
            max_steps=cell.steps,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=cell.steps > LONG,
            callbacks=callbacks,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        try:
            trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
        except FloatingPointError:  # before the step: what was learnt until then is measured
            diverged = True
    shutil.rmtree(folder, ignore_errors=True)
    return int(trainer.global_step), diverged


def _state_bytes(module: CausalLM, data: Synthetic) -> int:
    """Count the bytes of state of a sequence after a problem of the longest training length."""
    task = data.task
    tokens = len(task.example(data.seed, "val", 0, task.max_length).tokens)
    return sum(mixer.state_size(tokens) for mixer in module.net.model.mixers())
