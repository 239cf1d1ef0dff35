"""Text from a checkpoint or an exported folder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

import statezoo
import statezoo.zoo  # registers the architecture with transformers
from statezoo.arguments import find_checkpoint
from statezoo.datamodules.tokenizers import load_tokenizer
from statezoo.download import is_adapter, local
from statezoo.lightning_modules import checkpoint as ckpt
from statezoo.lightning_modules.adapter import base_of
from statezoo.lightning_modules.network import load_network


def load(source: str) -> tuple[Any, Any]:
    """Return network and tokenizer of a checkpoint, a run's folder, a Hub folder or a Hub name.

    An adapter comes with its base, and the base's tokenizer.

    Raises:
        ValueError: If there is no such thing, or it has no tokenizer.
    """
    source = local(source)
    path = Path(source)
    if is_adapter(path):
        return statezoo.load(path), load(base_of(path))[1]
    if path.is_file() or source.endswith(".ckpt") or (path.is_dir() and not _exported(path)):
        file = find_checkpoint(path)
        tokenizer = ckpt.read(file).get(ckpt.KEY, {}).get("tokenizer")
        if not tokenizer:
            raise ValueError(f"{str(file)!r} has no tokenizer, so it cannot read a prompt.")
        with tempfile.TemporaryDirectory() as folder:
            ckpt.write_files(tokenizer, Path(folder))
            return load_network(file), load_tokenizer(folder)
    return load_network(source), load_tokenizer(source)


def _exported(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def continuations(
    source: str,
    prompt: str,
    *,
    max_new_tokens: int,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    n: int,
    device: str,
) -> list[str]:
    """Continue ``prompt`` in ``n`` ways; the same arguments give the same texts on one machine.

    Returns:
        Prompt and continuation, of each way.

    Raises:
        ValueError: If a number is out of range or the source has no model and tokenizer.
    """
    if max_new_tokens < 1 or n < 1 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            "generate needs max_new_tokens and n of at least 1, temperature and top_k of at least "
            f"0 and top_p in (0, 1]; got {max_new_tokens}, {n}, {temperature}, {top_k}, {top_p}."
        )
    net, tokenizer = load(source)
    if not net.can_generate():
        raise ValueError(
            f"{source!r} is a {type(net).__name__}, which does not continue texts: generate needs "
            "a causal model; statezoo predict applies the others to data."
        )
    try:
        net = net.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot run on device {device!r}: {error}") from error
    torch.manual_seed(seed)
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(prompt)]] * n, device=device)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    found = net.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        pad_token_id=0,
        **sampling,
    )
    return [tokenizer.decode(row[1:].tolist()) for row in found]
