"""Compares ways to cut documents for training at equal tokens: python benchmarks/decomposition.py.

    python benchmarks/decomposition.py --seq_len 2048 --steps 40
    python benchmarks/decomposition.py --path books/ --mixers gla attention --out decomposition.md

`stream` is concat-and-chunk with a state that runs on between documents, `documents` the same with
the state reset at joins, `decomposed` pieces of documents of power-of-two length. All see as many
tokens in as many steps, and are validated alike: every document from its beginning, in windows of
`seq_len`. Seconds are those of the training steps alone, of the processor (all threads) and of the
clock; the longest and the mean length say what a token of a batch could look back on.
"""

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from statezoo.datamodules import Text
from statezoo.datamodules.decomposition import Decomposition
from statezoo.lightning_modules import CausalLM

PACKINGS = ("stream", "documents", "decomposed")
HEAD = "| packing | tokens | val bits per byte | processor s | clock s | mean length of a row |"


class Watch(Callback):
    """Times the steps, and counts their tokens and rows."""

    def __init__(self) -> None:
        self.clock = self.processor = 0.0
        self.tokens = self.rows = 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clocks."""
        self.tokens += batch["tokens"].numel()
        packed = batch.get("cu_seqlens")
        self.rows += len(batch["tokens"]) if packed is None else len(packed) - 1
        self.begun = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop them."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.clock += time.perf_counter() - self.begun[0]
        self.processor += time.process_time() - self.begun[1]


def data(given: argparse.Namespace, packing: str) -> Text:
    """Return the text, cut so."""
    return Text(
        given.path,
        packing=packing,  # type: ignore[arg-type]
        seq_len=given.seq_len,
        batch_size=given.batch_size,
        decomposition=Decomposition(given.shortest, given.odds, given.cycles),
        seed=given.seed,
    )


def row(given: argparse.Namespace, packing: str) -> str:
    """Train and validate one way."""
    torch.manual_seed(given.seed)
    text, watch = data(given, packing), Watch()
    model = CausalLM(
        given.mixers, vocab_size=text.vocab_size, d_model=given.d_model, n_layers=given.n_layers
    )
    trainer = Trainer(
        max_steps=given.steps,
        callbacks=[watch],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=text)
    quiet: Any = Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False)
    found = quiet.validate(model, datamodule=data(given, "documents"), verbose=False)[0]
    return (
        f"| {packing} | {watch.tokens:,} | {found['val/bits_per_byte']:.3f} "
        f"| {watch.processor:.1f} | {watch.clock:.1f} | {watch.tokens / watch.rows:.0f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--path", help="text; default the Python language reference")
    parser.add_argument("--mixers", nargs="+", default=["gla", "attention"])
    parser.add_argument("--packings", nargs="+", default=PACKINGS, choices=PACKINGS)
    settings = {"seq_len": 2048, "batch_size": 2, "steps": 40, "d_model": 64, "n_layers": 2,
                "shortest": 64, "cycles": 8, "seed": 0}  # fmt: skip
    for name, default in settings.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--odds", type=float, default=2.0)
    parser.add_argument("--out", help="file to write the table to")
    given = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    lines = [HEAD, "|---|---|---|---|---|---|"]
    for packing in given.packings:
        lines.append(row(given, packing))
        sys.stdout.write(lines[-1] + "\n")
        sys.stdout.flush()
    if given.out:
        Path(given.out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
