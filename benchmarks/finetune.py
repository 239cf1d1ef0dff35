"""Times and scores ways to fine-tune a DNA model: python benchmarks/finetune.py BASE TABLE [...].

    python benchmarks/finetune.py gla-yeast splice.csv.gz --seeds 3 --out finetune.md

BASE is a short name, run, checkpoint or folder; TABLE has the columns sequence, label and split.
Each way of `tune` is one `statezoo fit --config finetune/dna_classify`, then `statezoo test` of its
best checkpoint, in processes of their own, so that the command beside a row is what was run. Over
seeds (of the training; the split stays) accuracies are means with the least and the most in
brackets; of one seed the brackets are a 95 % bootstrap interval over the sequences of the test.
Majority and frozen probe are those of the validation split, as the run prints them, as are the
values of the column `val`.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

TUNES = {"full": [], "head": [], "lora": ["--model.optim.lr", "4e-3"],
         "state": ["--model.optim.lr", "2e-2"]}  # fmt: skip
"""Further settings of each way: adapters learn at higher rates than weights."""


def call(words: list[str]) -> str:
    """Run statezoo, and return what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "statezoo", *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"statezoo {shlex.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout


def parts(run: Path) -> tuple[int, int]:
    """Return trained parameters, and bytes of the adapter (of the whole network where all is)."""
    from statezoo.lightning_modules import load_checkpoint

    net = load_checkpoint(run / "best.ckpt").net
    folder = run / ("adapter" if (run / "adapter").is_dir() else "export")
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return sum(p.numel() for p in net.parameters() if p.requires_grad), weights


def row(given: argparse.Namespace, tune: str) -> tuple[list[str], dict[str, dict[str, float]]]:
    """Train and test one way with every seed; return its row, and the baselines."""
    found, seconds, baselines = [], 0.0, {}
    for seed in range(given.seeds):
        name = f"finetune-{tune}-{seed}"
        root = Path(given.root)
        data = ["--data.path", given.table]
        fit = ["fit", "--config", "finetune/dna_classify", "--model.pretrained", given.base, *data]
        fit += ["--model.tune", tune, *TUNES[tune], *given.more]
        fit += ["--trainer.default_root_dir", given.root, "--seed_everything", str(seed)]
        start = time.perf_counter()
        call([*fit, "--name", name, "--trainer.enable_progress_bar", "false"])
        seconds += time.perf_counter() - start
        run = sorted((root / name).glob("version_*"), key=lambda x: int(x.name[8:]))[-1]
        baselines = json.loads((run / "baselines.json").read_text())
        call(["test", "--config", str(run / "config.yaml"), "--ckpt_path", str(run / "best.ckpt"),
              "--name", f"{name}-test", "--trainer.enable_progress_bar", "false"])  # fmt: skip
        tested = sorted((root / f"{name}-test").glob("version_*"), key=lambda x: int(x.name[8:]))
        score = json.loads((tested[-1] / "metrics.json").read_text())["test/accuracy"]
        found.append((score, baselines["SequenceClassifier"]["accuracy"]))
    tests = [score["value"] for score, _ in found]
    low, high = min(tests), max(tests)
    if len(tests) == 1:
        low, high = found[0][0]["low"], found[0][0]["high"]
    trained, size = parts(run)
    val = sum(value for _, value in found) / len(found)
    cells = [f"{val:.3f}", f"{sum(tests) / len(tests):.3f} [{low:.3f}, {high:.3f}]"]
    cells += [f"{trained:,}", f"{size:,}", f"{seconds / given.seeds:.0f}"]
    return [tune, *cells, f"`statezoo {shlex.join(fit)}`"], baselines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("base")
    parser.add_argument("table")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--tunes", nargs="+", default=list(TUNES), choices=list(TUNES))
    parser.add_argument("--root", default="runs", help="where the runs are written")
    parser.add_argument("--out", help="file for the table too")
    given, given.more = parser.parse_known_args()
    if given.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {given.seeds}")
    rows, baselines = [], {}
    for tune in given.tunes:
        cells, baselines = row(given, tune)
        rows.append(cells)
        sys.stderr.write(" | ".join(cells[:-1]) + "\n")
    for name in ("majority", "frozen probe"):
        accuracy = f"{baselines[name]['accuracy']:.3f}"
        rows.insert(0, [name, accuracy, "", "", "", "", "beside every fit"])
    head = ["tune", "val accuracy", "test accuracy", "trained parameters", "bytes", "s", "command"]
    lines = [head, ["---"] * len(head), *rows]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    sys.stdout.write(text)
    if given.out:
        Path(given.out).write_text(text)


if __name__ == "__main__":
    main()
