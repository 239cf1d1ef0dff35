"""Kill a run again and again, go on with it each time, and compare it with one that ran through.

``python benchmarks/fifty_kills.py`` prints a line for every kill: when it came, what was on the
disk, and from which checkpoint the run then went on; and at the end what was compared. A third of
the kills falls into the writing of a checkpoint, which is made slow for that from outside.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import torch

from statezoo.lightning_modules import checkpoint as ckpt
from statezoo.main import main

CONFIG = """
model: {{class_path: GLA, init_args: {{d_model: 16, n_layers: 1}}}}
data: {{class_path: Text, init_args: {{path: text.txt, seq_len: 16, batch_size: 2}}}}
trainer:
  accelerator: cpu
  devices: 1
  max_steps: {steps}
  accumulate_grad_batches: 2
  val_check_interval: 26
  log_every_n_steps: 1
  enable_progress_bar: false
checkpoints: {{every_n_steps: 4}}
"""
SLOW = 0.08
"""Seconds for which the writing of a checkpoint stands still: in its middle, before it is on the
disk, and before and after each change of a name."""
LONGEST = 1200
"""Seconds that a life may take, on a machine that is busy."""
START = 8.0
"""Seconds that a process may take to begin: a kill at the start comes within."""
KINDS = ("starting", "training", "training", "writing", "writing", "validating")
OF_THE_CLOCK = {"train/tokens_per_second"}


def slow_down() -> None:
    """Let checkpoints be written slowly, in pieces, so that kills fall into it."""
    save, fsync, replace = torch.save, os.fsync, Path.replace

    def save_slowly(content: object, file: io.BufferedWriter) -> None:
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        time.sleep(SLOW)
        file.write(whole.getvalue()[whole.tell() // 2 :])

    def replace_slowly(self: Path, target: Path) -> Path:
        if ".ckpt" in self.name:
            time.sleep(SLOW)
            moved = replace(self, target)
            time.sleep(SLOW)
            return moved
        return replace(self, target)

    def fsync_slowly(handle: int) -> None:
        time.sleep(SLOW)
        fsync(handle)

    torch.save, os.fsync, Path.replace = save_slowly, fsync_slowly, replace_slowly  # type: ignore


class Life:
    """A process that trains, until it is killed or done.

    Args:
        arguments: Of the command ``statezoo``.
        output: File for what it says.
        fork: Take a copy of this process, which has imported everything, instead of a new one.
    """

    def __init__(self, arguments: list[str], output: Path, *, fork: bool) -> None:
        self.output, self.begin = output, time.monotonic()
        self.code: int | None = None
        self.pid = self._fork(arguments) if fork else self._start(arguments)

    def _start(self, arguments: list[str]) -> int:
        with self.output.open("w") as out:
            command = [sys.executable, __file__, "--run", *arguments]
            return subprocess.Popen(command, stdout=out, stderr=out).pid

    def _fork(self, arguments: list[str]) -> int:
        pid = os.fork()
        if pid:
            return pid
        handle = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        code = 1
        try:
            run(arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def ended(self) -> bool:
        """Say whether it is over, and keep its exit code."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def wait(self, until: Callable[[], bool], pause: float = 0.02) -> bool:
        """Wait for something, or for the end; say whether it came."""
        while not (come := until()) and not self.ended():
            if time.monotonic() - self.begin > LONGEST:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError(f"nothing for {LONGEST} s:\n{self.output.read_text()}")
            time.sleep(pause)
        return come

    def kill(self) -> None:
        """Kill it as the machine would."""
        if not self.ended():
            os.kill(self.pid, signal.SIGKILL)
            self.wait(self.ended)

    def source(self) -> str:
        """Say from which checkpoint it went on, as it told."""
        said = [line for line in self.output.read_text().splitlines() if "Restored all" in line]
        return said[0].rpartition("/")[2] if said else ""


def run(arguments: list[str]) -> None:
    """Do what ``statezoo`` does, with slow checkpoints."""
    slow_down()
    main(arguments)


def rows(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a run's log, without what the clock says."""
    file = folder / "metrics.csv"
    if not file.is_file():
        return []
    with file.open(newline="") as opened:
        found = list(csv.DictReader(opened))
    return [{k: v for k, v in row.items() if k not in OF_THE_CLOCK} for row in found]


def step(folder: Path) -> int:
    """Return how many steps the log has."""
    return max((int(r["step"]) + 1 for r in rows(folder) if (r["step"] or "").isdigit()), default=0)


def states(folder: Path) -> tuple[str, dict[str, int]]:
    """Describe the checkpoints on the disk, and return the step of each whole one."""
    told, steps = [], {}
    for file in sorted(folder.glob("*.ckpt*")):
        try:
            at = int(ckpt.read_whole(file)["global_step"])
            told.append(f"{file.name} {at}")
            steps |= {file.name: at} if file.suffix == ".ckpt" else {}
        except ckpt.CheckpointError:
            told.append(f"{file.name} cut off at {file.stat().st_size:,} bytes")
    return ", ".join(told) or "none", steps


def newest(saved: dict[str, int]) -> int:
    """Return the step from which the run goes on."""
    return saved.get("last.ckpt", saved.get("previous.ckpt", 0))


def moment(life: Life, kind: str, folder: Path, target: int, draw: random.Random) -> None:
    """Wait for a random moment of a kind."""
    if kind == "starting":
        end = life.begin + draw.uniform(0, START)
        life.wait(lambda: time.monotonic() > end)
        return
    size = len(rows(folder))
    life.wait(lambda: step(folder) >= target and len(rows(folder)) > size)
    if kind == "writing":
        life.wait(lambda: any(folder.glob("*.part")), pause=0.002)
        time.sleep(draw.uniform(0, 7 * SLOW))
    elif kind == "validating":
        seen = len(rows(folder))
        life.wait(lambda: any(r.get("val/nll") for r in rows(folder)[seen:]))
        time.sleep(draw.uniform(0, 2 * SLOW))
    else:
        time.sleep(draw.uniform(0, 4 * SLOW))


def check(part: str, same: bool) -> str:
    """Describe what was compared.

    Raises:
        SystemExit: If it differs.
    """
    if not same:
        raise SystemExit(f"DIFFERENT: {part}")
    return part


def compare(whole: Path, killed: Path) -> list[str]:
    """Compare a run that was killed with one that was not, part by part."""
    found = []
    for name in ("last.ckpt", "best.ckpt"):
        one, other = (ckpt.read_whole(folder / name) for folder in (whole, killed))
        equal = one["state_dict"].keys() == other["state_dict"].keys() and all(
            torch.equal(x, other["state_dict"][key]) for key, x in one["state_dict"].items()
        )
        found.append(check(f"{name}: weights bit for bit", equal))
        at = one["global_step"]
        found.append(check(f"{name}: step {at}", at == other["global_step"]))
    moments = [x["optimizer_states"][0]["state"] for x in (one, other)]
    equal = all(
        torch.equal(x, moments[1][n][k]) for n, s in moments[0].items() for k, x in s.items()
    )
    found.append(check("best.ckpt: optimiser bit for bit", equal))
    log, other_log = rows(whole), rows(killed)
    for mine, theirs in zip_longest(log, other_log):
        if mine != theirs:
            say(f"uninterrupted: {mine}\nkilled: {theirs}")
            break
    found.append(check(f"metrics.csv: {len(log)} rows, none twice or missing", log == other_log))
    facts = [json.loads((folder / "train.json").read_text()) for folder in (whole, killed)]
    for key in ("steps", "tokens"):
        found.append(check(f"train.json: {key} {facts[0][key]:,}", facts[0][key] == facts[1][key]))
    weights = [(f / "export/model.safetensors").read_bytes() for f in (whole, killed)]
    found.append(check("export: weights bit for bit", weights[0] == weights[1]))
    names = [{f.name for f in folder.iterdir()} for folder in (whole, killed)]
    found.append(check(f"files: {', '.join(sorted(names[0]))}", names[0] == names[1]))
    return found


def fifty(kills: int, *, fork: bool, seed: int) -> None:
    """Kill a run so often, in the current folder."""
    draw, steps = random.Random(seed), 6 * kills
    text = "".join(f"Line {i} says {i * i} and {i % 7}.\n\n" for i in range(16))
    Path("text.txt").write_text(text)
    Path("run.yaml").write_text(CONFIG.format(steps=steps))
    command = ["fit", "--config", "run.yaml", "--name"]
    whole, folder = (Path("runs", name, "version_0") for name in ("whole", "killed"))
    life = Life([*command, "whole"], Path("whole.txt"), fork=fork)
    life.wait(life.ended)
    if life.code:
        raise SystemExit(Path("whole.txt").read_text())
    say(f"uninterrupted: {steps} steps in {time.monotonic() - life.begin:.1f} s")
    saved: dict[str, int] = {}
    writing = 0
    for number in range(1, kills + 1):
        life = Life([*command, "killed", "--ckpt_path", "last"], Path("life.txt"), fork=fork)
        kind = KINDS[number % len(KINDS)]
        moment(life, kind, folder, 6 * (number - 1), draw)
        seconds = time.monotonic() - life.begin
        done = life.ended()
        life.kill()
        if done and life.code:
            raise SystemExit(f"life {number} ended by itself:\n{life.output.read_text()}")
        before, (told, saved) = saved, states(folder)
        writing += any(folder.glob("*.part"))
        source = life.source()
        say(
            f"{'ended' if done else 'kill'} {number:2d}  {kind:10s} at {seconds:5.1f} s  "
            f"from {f'{source} {before[source]}' if source else '-':17s}  "
            f"log at step {step(folder):3d}  on disk: {told}"
        )
        if newest(saved) < newest(before):
            raise SystemExit(f"LOST: step {newest(before)} was saved, {newest(saved)} is left")
    life = Life([*command, "killed", "--ckpt_path", "last"], Path("life.txt"), fork=fork)
    life.wait(life.ended)
    if life.code:
        raise SystemExit(life.output.read_text())
    source = life.source()
    say(f"the last life went on from {source} {saved[source]}; {writing} kills while writing")
    for line in compare(whole, folder):
        say(f"equal: {line}")


def say(line: str) -> None:
    """Print a line now."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run(sys.argv[2:])
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("--kills", type=int, default=50)
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--fork", action="store_true", help="start fast, import once")
        given = parser.parse_args()
        if given.fork:
            importlib.import_module("statezoo.cli")
        with tempfile.TemporaryDirectory() as place:
            os.environ.setdefault("STATEZOO_CACHE", f"{place}/cache")
            os.chdir(place)
            fifty(given.kills, fork=given.fork, seed=given.seed)
