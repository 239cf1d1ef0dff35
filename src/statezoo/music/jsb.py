"""The JSB chorales as a benchmark: files, what checkpoints reach, what others report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped,unused-ignore]

__all__ = ["FRAMES", "PUBLISHED", "TOKENS", "Contaminated", "Published", "Trained", "find_files"]

FRAMES, TOKENS = "frames", "tokens"

FILES = {
    FRAMES: ("jsb_quarter_roll.json", "jsb-chorales-quarter.json"),
    TOKENS: ("jsb_16th_satb.json", "Jsb16thSeparated.json"),
}
"""Names of the public files, with or without .gz; the second is the one upstream."""

VOICES, STEPS_PER_BEAT = 4, 4
LONGEST_MARKOV = 6
WHOLE = 1 << 20  # tokens, more than any piece has

SPLITS = {"valid": "val", "test": "test"}


def find_files(root: str) -> dict[str, Path]:
    """The files of the benchmark below a folder: quarter-note frames, and sixteenths in voices.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If there is neither in it.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"No folder {root!r} with the JSB chorales.")
    found = {}
    for task, names in FILES.items():
        wanted = [full for name in names for full in (name, f"{name}.gz")]
        paths = [path for path in folder.rglob("*.json*") if path.name in wanted]
        if paths:
            found[task] = min(paths, key=lambda path: (wanted.index(path.name), str(path)))
    if not found:
        every = ", ".join(name for names in FILES.values() for name in names)
        raise ValueError(f"{root} holds no JSB chorales: bench needs one of {every} (or .gz).")
    return found


# ------------------------------------------------------- what a checkpoint has seen


class Contaminated(ValueError):
    """A checkpoint that has been trained on the music it would be tested on."""


@dataclass(frozen=True)
class Trained:
    """What is known of a checkpoint's training.

    Attributes:
        path: Data it was trained on; None where it is not known.
        transpose: How it was transposed, in words; empty where it is not known.
        bach: Whether the data was music21's Bach.
    """

    path: str | None = None
    transpose: str = ""
    bach: bool = False

    @property
    def note(self) -> str:
        """What to say of the data beside a number."""
        if self.path is None:
            return "training data unknown"
        known = [name for names in FILES.values() for name in names]
        name = Path(self.path).name.removesuffix(".gz")
        return "" if name in known else f"trained on {name}, not checked for these chorales"


def trained_on(file: Path, content: Mapping[str, Any]) -> Trained:
    """Read what a checkpoint, and the config.yaml beside it, say of its data.

    Args:
        file: The checkpoint.
        content: What it holds.
    """
    settings: dict[str, Any] = {}
    pretrained = None
    config = file.with_name("config.yaml")
    if config.is_file():
        run = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
        settings |= (run.get("data") or {}).get("init_args") or {}
        pretrained = ((run.get("model") or {}).get("init_args") or {}).get("pretrained")
    for name in ("PianoFrames", "Music"):
        settings |= content.get(name) or {}
    if "path" not in settings:
        return Trained()
    path = settings["path"]
    bach = path is None or "music21" in Path(path).parts
    if pretrained and Path(pretrained).is_file():
        from statezoo.lightning_modules import checkpoint as ckpt

        bach = bach or trained_on(Path(pretrained), ckpt.read(pretrained)).bach
    return Trained("music21's Bach" if path is None else str(path), _transposed(settings), bach)


def _transposed(settings: Mapping[str, Any]) -> str:
    moved = settings.get("transpose")
    if moved is None:
        return ""
    low, high = (-moved, moved) if isinstance(moved, int) else moved
    return f"{low:+d} to {high:+d}" if (low, high) != (0, 0) else "no"


def refuse_bach(name: str, trained: Trained) -> None:
    """Raise where a number would be about music that was trained on.

    Raises:
        Contaminated: If the training data was music21's Bach.
    """
    if trained.bach:
        raise Contaminated(
            f"{name} was trained on the Bach chorales of music21, which are the same music: 68 of "
            "the 77 pieces of the JSB test, and 60 of the 76 of its validation, share more than a "
            "tenth of their passages with them. Train on the JSB training split instead: "
            "statezoo fit --config music/jsb_frames, or music/jsb_satb."
        )


# ------------------------------------------------------------------------ scores


def frame_scores(module: Any, file: Path) -> dict[str, float]:
    """Nats per frame of a ``NoteFrames`` module on ``valid`` and ``test``: the mean over frames."""
    import torch

    from statezoo.datamodules.music.frames import PianoFrames, Rolls

    data = PianoFrames(str(file))
    module.eval()
    found = {}
    for name, split in SPLITS.items():
        rolls = Rolls(data.rolls(split))
        total = 0.0
        with torch.no_grad():
            for begin in range(0, len(rolls), 8):
                numbers = list(range(begin, min(begin + 8, len(rolls))))
                total += float(module.frame_nll(rolls[0, numbers]).double().sum())
        found[name] = total / sum(map(len, rolls.pieces))
    return found


def token_scores(net: Any, source: str, file: Path) -> dict[str, float]:
    """Nats per token of a language model on the grid: whole pieces, from their first token on.

    Args:
        net: Network of the tokens that ``source`` has the tokenizer of.
        source: Checkpoint or exported folder.
        file: The chorales on the grid of sixteenths.

    Returns:
        ``valid``, ``test`` and, of the tokens on the beat alone, ``valid on beat`` and ``test on
        beat``.

    Raises:
        ValueError: If the tokens are others than those of the benchmark.
    """
    import torch
    from torch.nn.functional import cross_entropy

    data = grid(file, source)
    plain = grid(file)
    net.eval()
    found = {}
    for name, split in SPLITS.items():
        pieces = data.ids(split)
        if [len(ids) for ids in pieces] != [len(ids) for ids in plain.ids(split)]:
            raise ValueError(f"{source} has a tokenizer that cannot write all of {file.name}.")
        sums = torch.zeros(2, dtype=torch.float64)
        counts = torch.zeros(2, dtype=torch.float64)
        for ids in pieces:
            targets = torch.from_numpy(ids)
            read = torch.cat([torch.tensor([data.tokenizer.bos_id]), targets[:-1]])
            with torch.no_grad():
                logits = net(read[None]).logits[0]
            nats = cross_entropy(logits.double(), targets, reduction="none")
            on_beat = torch.arange(len(ids)) // VOICES % STEPS_PER_BEAT == 0
            sums += torch.stack([nats.sum(), nats[on_beat].sum()])
            counts += torch.tensor([len(ids), int(on_beat.sum())])
        found[name], found[f"{name} on beat"] = (sums / counts).tolist()
    return found


def grid(file: Path, source: str = "satb") -> Any:
    """The chorales in the tokens of a checkpoint, or in plain ones.

    Raises:
        ValueError: If the checkpoint's tokens are not pitches or rests on the grid.
    """
    from statezoo.datamodules.music.data import Music
    from statezoo.datamodules.music.satb import SatbGrid

    data = Music(str(file), source, packing="pieces", seq_len=WHOLE, transpose=(0, 0))
    tokenizer = data.tokenizer
    if not isinstance(tokenizer, SatbGrid) or tokenizer.hold:
        kind = "satb with hold" if isinstance(tokenizer, SatbGrid) else tokenizer.kind
        raise ValueError(
            f"{source} reads {kind} tokens; the benchmark is about encoding satb without hold, "
            "and nats per token of other tokens do not compare."
        )
    return data


def frame_baselines_of(file: Path) -> dict[str, dict[str, float]]:
    """Nats per frame of simple models on ``valid`` and ``test``, by name."""
    from statezoo.datamodules.music.frame_baselines import frame_baselines
    from statezoo.datamodules.music.frames import PianoFrames

    data = PianoFrames(str(file))
    train = data.rolls("train")
    columns = {name: frame_baselines(train, data.rolls(split)) for name, split in SPLITS.items()}
    return {
        row: {name: column[row] for name, column in columns.items()} for row in columns["valid"]
    }


def token_baselines_of(file: Path) -> dict[str, dict[str, float]]:
    """Nats per token of simple models on ``valid`` and ``test``, by name."""
    from statezoo.datamodules.music.baselines import Markov

    data = grid(file)
    tokenizer = data.tokenizer
    long = Markov(data.ids("train"), LONGEST_MARKOV, tokenizer.vocab_size, tokenizer.bos_id)
    found: dict[str, dict[str, float]] = {}
    for name, split in SPLITS.items():
        ids = data.ids(split)
        bits = data.baselines(split)
        bits[f"markov_{LONGEST_MARKOV}"] = long.bits(ids) / sum(map(len, ids))
        for row, value in bits.items():
            label = row.replace("markov_", "Markov chain of order ")
            label = label.replace("repeat", "every voice holds, or unigram")
            found.setdefault(label, {})[name] = value * math.log(2)
    return found


# --------------------------------------------------------------------- published


class Published(NamedTuple):
    """A number that others report; None where they report none."""

    model: str
    valid: float | None
    test: float | None
    source: str


BAI = "Bai et al. 2018, arXiv:1803.01271; quoted, not checked"
BOULANGER = "Boulanger-Lewandowski et al. 2012, arXiv:1206.6392; quoted, not checked"
RRU = "README of the Residual Recurrent Unit, read; its grid and split are said to be these"
HUANG = "Huang et al. 2018, arXiv:1809.04281; quoted, not checked"
COCONET = "Huang et al. 2017, arXiv:1903.07227, notes in order of time; quoted, not checked"

PUBLISHED: Mapping[str, Sequence[Published]] = {
    FRAMES: (
        Published("RNN", None, 8.91, BAI),
        Published("LSTM", None, 8.45, BAI),
        Published("GRU", None, 8.43, BAI),
        Published("TCN", None, 8.10, BAI),
        Published("LSTM", None, 8.33, RRU),
        Published("GRU", None, 8.20, RRU),
        Published("Mogrifier LSTM", None, 8.18, RRU),
        Published("RRU", None, 7.72, RRU),
        Published("RNN-RBM (notes depend on each other)", None, 6.27, BOULANGER),
        Published("RNN-NADE (notes depend on each other)", None, 5.56, BOULANGER),
    ),
    TOKENS: (
        Published("Coconet, chronological", 0.436, None, COCONET),
        Published("Transformer", 0.417, None, HUANG),
        Published("Music Transformer, relative attention", 0.357, None, HUANG),
        Published("Music Transformer, best", 0.335, None, HUANG),
    ),
}
"""By task, in nats per frame or per token."""
