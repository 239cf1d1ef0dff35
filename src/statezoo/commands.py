"""Commands of our own; they import torch only where they need it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Literal

from statezoo.card.command import card
from statezoo.evaluation.evaluate import evaluate
from statezoo.evaluation.lengths import lengths
from statezoo.evaluation.score import score
from statezoo.explain import explain
from statezoo.linearize import linearize
from statezoo.listing import aligned, listing, pretrained_listing
from statezoo.main import RUN
from statezoo.parser import command_parser, fail, nearest, underscored
from statezoo.plan.command import plan
from statezoo.probe.commands import sampler
from statezoo.probe.run import run as probe_run
from statezoo.publish import publish


def list_parts(pattern: str = "*", *, pretrained: bool | str = False) -> None:
    """List architectures with their presets and sizes, data modules and other configs.

    Args:
        pattern: Show names that match, such as ``gla*``.
        pretrained: Show the models that are trained instead, all or those whose names match this.
    """
    if pretrained:
        text = pretrained_listing(pattern if pretrained is True else str(pretrained))
    else:
        text = listing(pattern)
    sys.stdout.write(text + "\n")


def train_tokenizer(*paths: str, out: str, vocab_size: int = 4096) -> None:
    """Train a BPE tokenizer: of bytes on text files or folders, of bases on FASTA files.

    Args:
        paths: Files or folders that ``--data Text`` reads, or FASTA files, plain or .gz.
        out: Folder to write; ``--data.tokenizer FOLDER`` uses it.
        vocab_size: Number of symbols, at least 257; of bases, at least 9.
    """
    from statezoo.datamodules.dna.fasta import FASTA_ENDINGS
    from statezoo.datamodules.dna.tokenizers import train_dna_bpe
    from statezoo.datamodules.tokenizers import train_bpe

    genomes = [path for path in paths if path.removesuffix(".gz").endswith(FASTA_ENDINGS)]
    if genomes and len(genomes) < len(paths):
        raise ValueError(
            f"tokenizer train reads text or FASTA, not both; FASTA is {', '.join(genomes)}."
        )
    tokenizer = (train_dna_bpe if genomes else train_bpe)(paths, vocab_size, out)
    sys.stdout.write(f"wrote {out}: {tokenizer.vocab_size} symbols\n")


def extend_tokenizer(base: str, *, tokens: str, out: str) -> None:
    """Add symbols to the tokenizer of pretrained weights; the others keep their numbers.

    Args:
        base: Run, checkpoint, model folder or name, or a tokenizer.
        tokens: New symbols, with commas between.
        out: Folder to write; ``--data.tokenizer FOLDER --model.vocabulary extend`` uses it.
    """
    from pathlib import Path

    from statezoo.arguments import find_weights
    from statezoo.datamodules.extending import extend_tokenizer as extend
    from statezoo.datamodules.tokenizers import load_tokenizer

    has = (Path(base) / "tokenizer.json").is_file()
    found = load_tokenizer(base if has else find_weights(base))
    tokenizer = extend(found, [token.strip() for token in tokens.split(",")])
    tokenizer.save(out)
    sys.stdout.write(
        f"wrote {out}: {tokenizer.vocab_size} symbols, "
        f"{tokenizer.vocab_size - found.vocab_size} of them new\n"
    )


def export(ckpt: str, folder: str) -> None:
    """Write a checkpoint as a folder for Hugging Face's AutoModelForCausalLM.

    Args:
        ckpt: Checkpoint, or the folder of a run.
        folder: Folder to write.
    """
    from statezoo.arguments import find_checkpoint
    from statezoo.lightning_modules.network import export_checkpoint

    export_checkpoint(find_checkpoint(ckpt), folder)
    sys.stdout.write(f"wrote {folder}\n")


def generate(
    *,
    prompt: str = "",
    ckpt: str | None = None,
    model: str | None = None,
    max_new_tokens: int = 256,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    n: int = 1,
    device: str = "cpu",
) -> None:
    """Continue a prompt.

    Args:
        prompt: Text to go on from.
        ckpt: Checkpoint, folder of a run, or exported folder.
        model: Exported folder, name on the Hub, or short name of a model that we ship (see
            ``statezoo list --pretrained``), instead of ``ckpt``.
        max_new_tokens: Tokens to write.
        seed: The same seed gives the same text.
        temperature: 0 takes the likeliest token, 1 draws from the model's probabilities.
        top_k: Draw from this many likeliest tokens; 0 from all.
        top_p: Draw from the likeliest tokens that have this much probability together.
        n: Number of continuations.
        device: Where to run: cpu, cuda, mps.
    """
    from statezoo.generate import continuations

    if (ckpt is None) == (model is None):
        raise ValueError("generate needs --ckpt or --model, one of the two.")
    texts = continuations(
        str(ckpt or model),
        prompt,
        max_new_tokens=max_new_tokens,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        n=n,
        device=device,
    )
    for number, text in enumerate(texts, 1):
        sys.stdout.write((f"--- {number} ---\n" if n > 1 else "") + text + "\n")


def convert(
    source: str, folder: str, *, to: Literal["statezoo", "transformers"] = "statezoo"
) -> None:
    """Convert a public checkpoint, or write Mamba and Mamba-2 back for transformers.

    Args:
        source: Folder, or name on the Hub, of a model of state-spaces, transformers or fla.
        folder: Folder to write.
        to: Format to write; transformers has Mamba and Mamba-2 alone.
    """
    from pathlib import Path

    from statezoo import shipped
    from statezoo.download import local
    from statezoo.zoo import convert as converter

    place = local(shipped.resolve(source))
    if not Path(place).is_dir():
        raise FileNotFoundError(
            f"{source} is not a folder, and no Hub id is written like this{shipped.near(source)}."
        )
    report = converter.convert(place, folder, to)
    sys.stdout.write(f"{report}\nwrote {folder}\n")


COMMANDS: dict[str, Callable[..., None]] = {
    "card": card,
    "generate": generate,
    "export": export,
    "convert": convert,
    "publish": publish,
    "score": score,
    "evaluate": evaluate,
    "lengths": lengths,
    "explain": explain,
    "linearize": linearize,
    "plan": plan,
    "list": list_parts,
    "probe run": probe_run,
    "probe sampler": sampler,
    "tokenizer extend": extend_tokenizer,
    "tokenizer train": train_tokenizer,
}

GROUPS = ("dna", "music", "probe", "tokenizer")
"""First words of commands that have two; a domain's commands are in a package of its name."""


def _commands(group: str) -> dict[str, Callable[..., None]]:
    """Return the commands that may be meant; those of a domain are imported only for it."""
    if group not in ("dna", "music"):
        return COMMANDS
    own: dict[str, Callable[..., None]] = import_module(f"statezoo.{group}.commands").COMMANDS
    return own


def _overview(group: str, commands: Mapping[str, Callable[..., None]]) -> str:
    """List the commands of a group, each with the first line of its documentation."""
    rows = [
        (f"  statezoo {name}", (command.__doc__ or "").partition("\n")[0])
        for name, command in sorted(commands.items())
        if name.startswith(f"{group} ")
    ]
    return "\n".join([*aligned(rows), "", f"  statezoo {group} COMMAND --help", ""])


def run(arguments: Sequence[str]) -> None:
    """Run one of our commands.

    Raises:
        SystemExit: With code 2 after a mistake of the user.
    """
    words = 2 if arguments[0] in GROUPS else 1
    name = " ".join(arguments[:words])
    commands = _commands(arguments[0])
    if words == 2 and arguments[1:2] in ([], ["-h"], ["--help"]):
        sys.stdout.write(_overview(arguments[0], commands))
        return
    if name not in commands:
        known = [*RUN, *GROUPS, *commands]
        fail("statezoo", f"no command {name!r}{nearest(name, known)}", "statezoo --help lists them")
    program = f"statezoo {name}"
    command = commands[name]
    given: dict[str, Any] = (
        command_parser(command, program).parse_args(underscored(arguments[words:])).as_dict()
    )
    several = given.pop("paths", [])
    try:
        command(*several, **given)
    except (ValueError, OSError) as error:
        fail(program, str(error) or type(error).__name__)
