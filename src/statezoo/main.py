"""The ``statezoo`` command: light commands answer at once, the others import Lightning first."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

RUN = ("fit", "validate", "test", "predict")
OVERVIEW = """\
statezoo: sequence models with a fixed-size recurrent state

usage: statezoo COMMAND [settings]

  fit         train a model:      statezoo fit --model GLA --data Text
  validate    score a checkpoint: statezoo validate --ckpt_path runs/.../best.ckpt --data Text
  test        the same on the test split
  predict     write what a model says of each sequence to predictions.csv
  generate    continue a prompt:  statezoo generate --model gla-novels --prompt "Once upon"
  score       nats and bits per byte of texts
  evaluate    run tasks of lm-evaluation-harness
  lengths     loss by position in windows of 1 to 64 times the trained length
  explain     draw decay, writes, memory length and attention on an input
  export      write a checkpoint as a Hugging Face folder
  convert     read a public checkpoint of another library, or write Mamba for transformers
  linearize   turn a Llama, Mistral or Qwen into a model with a recurrent state
  plan        memory, time and devices that a training will need
  card        make a run a Hub folder with its numbers, a sample and a model card
  publish     send such a folder to the Hub
  tokenizer   train a tokenizer:  statezoo tokenizer train FILES --out FOLDER
  dna         variants, embeddings, tracks, sequences, benchmarks: statezoo dna --help
  music       continue, infill, harmonise, evaluate, draw, render: statezoo music --help
  probe       what architectures can do, and whether a sampler is sound: statezoo probe --help
  list        architectures, data, shipped configs; --pretrained: shipped weights

  statezoo COMMAND --help                 settings of a command
  statezoo fit --model.help GLA           settings of an architecture
  statezoo fit --data.help Text           settings of a data module
  statezoo fit --config gla.yaml          a shipped config, from any folder
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: What follows the program's name; default from the shell.

    Raises:
        SystemExit: With code 2 after a mistake of the user, told on standard error.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        sys.stdout.write(OVERVIEW)
        return
    if given[0] == "--version":
        from importlib.metadata import version

        sys.stdout.write(f"statezoo {version('statezoo')}\n")
        return
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for --model my_file.MyModel; last, so as to hide nothing
    if given[0] in RUN:
        from statezoo.cli import run
    else:
        from statezoo.commands import run
    try:
        run(given)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
