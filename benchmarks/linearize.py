"""What is left of a teacher's loss after linearisation, before and after LoRA, arm by arm.

    python benchmarks/linearize.py --teacher runs/teacher/version_0 --data TEXT --seq-len 512

The teacher is a Transformer of ours or a public decoder: a run, checkpoint, folder or name. For
each recurrence and arm it is linearised (`statezoo linearize`), scored, trained with LoRA on
queries, keys and values (`statezoo fit --config linearize`) and scored again, on the validation
split of the text. Prints a Markdown table and the commands that do the same one by one. The window
alone has no recurrence, so it is trained once.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer, seed_everything

from statezoo.arguments import find_weights
from statezoo.datamodules import Text
from statezoo.lightning_modules import CausalLM, Linearize, export
from statezoo.lightning_modules.optim import Optim
from statezoo.linearize import read_teacher
from statezoo.zoo.convert.linearize import linearize

QUIET = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "num_sanity_val_steps": 0,
}  # fmt: skip


def make_trainer(given: argparse.Namespace, **settings) -> Trainer:
    """Make a trainer that writes nothing."""
    limit = given.val_batches or 1.0
    device = given.accelerator
    return Trainer(accelerator=device, devices=1, limit_val_batches=limit, **QUIET, **settings)


def score(module: LightningModule, data: Text, given: argparse.Namespace) -> float:
    """Nats per token on the validation split."""
    return make_trainer(given).validate(module, data, verbose=False)[0]["val/nll"]


def train(folder: Path, data: Text, given: argparse.Namespace) -> tuple[float, int, float]:
    """Return nats after training, the number of trained parameters, and minutes."""
    seed_everything(given.seed, verbose=False)
    module = Linearize(
        pretrained=str(folder), vocab_size=data.vocab_size,
        teacher=str(find_weights(given.teacher)), attention_transfer=given.attention_transfer,
        distillation=given.distillation, optim=Optim(lr=given.lr, weight_decay=0.0),
    )  # fmt: skip
    start = time.perf_counter()
    fit = make_trainer(given, max_steps=given.steps, val_check_interval=given.steps + 1,
                       check_val_every_n_epoch=None)  # fmt: skip
    fit.fit(module, data)
    minutes = (time.perf_counter() - start) / 60
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return score(module, data, given), trained, minutes


def cases(mixers: list[str]) -> list[tuple[str, str]]:
    """List recurrence and arm of each run."""
    return [(mixer, arm) for mixer in mixers for arm in ("both", "recurrence")] + [
        (mixers[0], "window")
    ]


def main(arguments: list[str] | None = None) -> None:
    """Print the table, a row as soon as it is known, and the commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", required=True, help="text, as --data.path of Text")
    parser.add_argument("--tokenizer", help="default: the teacher's")
    parser.add_argument("--mixers", default="gla,gated_deltanet,mamba2")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--layers", default="all")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--val-context", type=int, default=0)
    parser.add_argument("--val-batches", type=int, help="default: all")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--attention-transfer", type=float, default=0.0)
    parser.add_argument("--distillation", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accelerator", default="cpu")
    given = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    teacher = find_weights(given.teacher)
    data = Text(
        given.data, given.tokenizer or teacher, seq_len=given.seq_len,
        batch_size=given.batch_size, val_context=given.val_context,
    )  # fmt: skip
    _, net, _ = read_teacher(given.teacher)
    known = score(CausalLM(pretrained=teacher, vocab_size=data.vocab_size), data, given)
    print("| recurrence | arm | before | after | of the teacher | trained | minutes |")
    print("|---|---|---|---|---|---|---|")
    print(f"| teacher | | {known:.4f} | {known:.4f} | +0.0 % | | |", flush=True)
    commands = []
    with tempfile.TemporaryDirectory() as place:
        for mixer, arm in cases(given.mixers.split(",")):
            folder = Path(place) / f"{mixer}-{arm}"
            export(linearize(net, mixer, given.window, given.layers, arm), folder)
            fresh = CausalLM(pretrained=str(folder), vocab_size=data.vocab_size)
            before = score(fresh, data, given)
            after, trained, minutes = train(folder, data, given)
            print(
                f"| {'' if arm == 'window' else mixer} | {arm} | {before:.4f} | {after:.4f} | "
                f"{100 * (after / known - 1):+.1f} % | {trained:,} | {minutes:.1f} |",
                flush=True,
            )
            commands += commands_of(given, mixer, arm)
    print("\n" + "\n".join(commands))


def commands_of(given: argparse.Namespace, mixer: str, arm: str) -> list[str]:
    """Return the commands for one row."""
    name = f"{mixer}-{arm}"
    return [
        f"statezoo linearize --teacher {given.teacher} --mixer {mixer} --arm {arm} "
        f"--window {given.window} --layers {given.layers} --out {name}",
        f"statezoo fit --config linearize --model.pretrained {name} --model.teacher "
        f"{given.teacher} --model.attention_transfer {given.attention_transfer} "
        f"--model.distillation {given.distillation} --model.optim.lr {given.lr} "
        f"--data.path {given.data} --data.tokenizer {given.tokenizer or given.teacher} "
        f"--data.seq_len {given.seq_len} --data.batch_size {given.batch_size} "
        f"--data.val_context {given.val_context} --trainer.max_steps {given.steps} --name {name}",
    ]


if __name__ == "__main__":
    main()
