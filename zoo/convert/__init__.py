"""Public checkpoints: read into models of the zoo, and written back where others read them.

What is read is told by keys and shapes, never by a version: state-spaces' original Mamba and
Mamba-2, those of transformers and fla, fla's and linear-moe's models of one skeleton, with
fused or separate MLPs, old and new names, padded vocabularies and heads with or without a tie, and
transformers' Llama, Mistral, Qwen2 and Qwen3.
A tensor or setting that would be lost without a reason, or a setting that means another function
than the zoo has, is an error. Nothing from a checkpoint is executed.
"""

import logging
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.initialization import no_init_weights

from statezoo.safety import CONFIG, check_numbers
from statezoo.zoo.config import StateZooConfig
from statezoo.zoo.convert.decoders import DECODERS, complete, convert_decoder
from statezoo.zoo.convert.export import to_transformers
from statezoo.zoo.convert.files import copy_tokenizer, read_config, read_tensors
from statezoo.zoo.convert.fla import FAMILIES, convert_fla
from statezoo.zoo.convert.mamba import convert_mamba
from statezoo.zoo.convert.source import Report, Settings, Tensors
from statezoo.zoo.loading import check_size, load_folder
from statezoo.zoo.model import StateZooForCausalLM

__all__ = ["SUPPORTED", "Report", "convert", "load", "to_transformers"]

SUPPORTED = ("mamba", "mamba2", *FAMILIES, *DECODERS)
logger = logging.getLogger(__name__)


def load(folder: str | Path, **kwargs: Any) -> tuple[StateZooForCausalLM, Report]:
    """Read a public checkpoint.

    Args:
        folder: A folder with ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``,
            in one file or in shards.
        **kwargs: Further arguments of ``from_pretrained``, such as ``dtype``; by default that of
            the file.

    Returns:
        The model, ready for use, and what became of every key.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If it is no model that can be converted, a tensor is missing, left over or of
            the wrong shape, or a setting means another function than the zoo has.
        TypeError: If a setting has the wrong type.
    """
    folder = Path(folder)
    config = read_config(folder)
    kind = model_type(config)
    if kind not in SUPPORTED:
        raise ValueError(
            f"{folder} holds a model of type {kind!r}, not 'statezoo', and none that is converted: "
            f"{', '.join(sorted(SUPPORTED))}, and state-spaces' original files."
        )
    report = Report(kind)
    if kind in DECODERS:
        config = complete(config)
    read = read_tensors(folder)
    check_numbers(config, len(read), folder / CONFIG)
    found = {name: tuple(tensor.shape) for name, tensor in read.items()}
    settings, tensors = Settings(config, report), Tensors(read, report)
    convert_kind = convert_mamba
    if kind in FAMILIES or kind in DECODERS:
        convert_kind = convert_fla if kind in FAMILIES else convert_decoder
    try:
        new = StateZooConfig(**convert_kind(settings, tensors))
        settings.finish()
        check_size(lambda: StateZooForCausalLM(new), found)
        state = tensors.finish(shapes(new))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    logger.info("%s: %s", folder, report)
    net: StateZooForCausalLM = StateZooForCausalLM.from_pretrained(
        None, config=new, state_dict=state, **kwargs
    )
    return net, report


def convert(
    source: str | Path,
    folder: str | Path,
    to: Literal["statezoo", "transformers"] = "statezoo",
    **kwargs: Any,
) -> Report:
    """Write a checkpoint in another format, with its tokenizer.

    Args:
        source: Folder of a public checkpoint, or of a statezoo model if ``to`` is another format.
        folder: Where to write.
        to: The new format; ``"transformers"`` has Mamba and Mamba-2 alone.
        **kwargs: Further arguments of :func:`load`.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If it cannot be converted, or would be written over itself.
    """
    source, folder = Path(source), Path(folder)
    if source.resolve() == folder.resolve():
        raise ValueError(f"{folder} is the source itself: write to another folder.")
    if model_type(read_config(source)) == "statezoo":
        if to == "statezoo":
            raise ValueError(f"{source} holds a statezoo model already.")
        net: Any = load_folder(source, **kwargs)
        report = Report("statezoo", {name: name for name, _ in net.named_parameters()})
    else:
        net, report = load(source, **kwargs)
    folder.mkdir(parents=True, exist_ok=True)
    if to == "transformers":
        to_transformers(net, folder)
    else:
        net.save_pretrained(folder)
    copied = copy_tokenizer(source, folder)
    if copied:
        report.note(f"tokenizer copied: {', '.join(copied)}")
    return report


def model_type(config: dict[str, Any]) -> str | None:
    """Return what a configuration calls its model; state-spaces' own says nothing."""
    kind = config.get("model_type")
    if kind is None and {"d_model", "n_layer"} <= config.keys():
        return "mamba"
    return kind


def shapes(config: StateZooConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors of a model, without making it."""
    with torch.device("meta"), no_init_weights():
        net = StateZooForCausalLM(config)
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    return {
        name: tuple(tensor.shape) for name, tensor in net.state_dict().items() if name not in tied
    }
