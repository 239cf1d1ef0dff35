"""``statezoo linearize``: a softmax decoder becomes a hybrid of recurrence and window."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping


def linearize(
    *,
    teacher: str,
    out: str,
    mixer: Literal["gla", "gated_deltanet", "mamba2"] = "gla",
    window: int = 64,
    layers: str = "all",
    arm: Literal["both", "recurrence", "window"] = "both",
) -> None:
    """Turn a trained Transformer into a recurrent model with a window, without new weights.

    Args:
        teacher: Llama, Mistral, Qwen2 or Qwen3 decoder, or Transformer of ours: folder, name on
            the Hub, checkpoint, or folder of a run.
        out: Folder to write.
        mixer: Recurrence that half of the attention becomes; its gates come from the keys.
        window: How many last tokens the other half, attention, sees.
        layers: Layers to turn: all; keep:4, where every 4th stays attention; or 0,1,4-7.
        arm: Both halves, or one of them alone, to see what it is worth.
    """
    from statezoo.lightning_modules.network import export, no_progress_bars
    from statezoo.zoo.convert.files import copy_tokenizer
    from statezoo.zoo.convert.linearize import linearize as convert

    source, net, tokenizer = read_teacher(teacher)
    folder = Path(out)
    if source.resolve() == folder.resolve():
        raise ValueError(f"{out} is the teacher itself: write to another folder.")
    try:
        with no_progress_bars():
            student = convert(net, mixer, window, layers, arm)
    except TypeError as error:
        raise ValueError(f"{teacher}: {error}") from error
    export(student, folder, tokenizer)
    if source.is_dir():
        copy_tokenizer(source, folder)
    names = [entry["name"] for entry in student.config.layer_mixers]
    n = sum(p.numel() for p in student.parameters())
    kept = len(names) - names.count("liger")
    sys.stdout.write(
        f"wrote {out}: {names.count('liger')} layers of liger ({mixer}, window {window}, arm "
        f"{arm}){f', {kept} of the teacher' if kept else ''}; {n:,} parameters, none of them new\n"
        f"try  statezoo fit --config linearize --model.pretrained {out} --model.teacher {teacher} "
        "--data.path MINE\n"
    )


def read_teacher(teacher: str) -> tuple[Path, Any, Mapping[str, bytes]]:
    """Return where a teacher is, the network, and the tokenizer's files of a checkpoint.

    Raises:
        ValueError: If there is no such model, or it cannot be converted.
        FileNotFoundError: If no Hub id is written like this.
    """
    from statezoo import shipped
    from statezoo.arguments import find_weights
    from statezoo.download import local
    from statezoo.lightning_modules import checkpoint
    from statezoo.lightning_modules.network import load_network

    place = Path(local(find_weights(teacher)))
    if place.suffix == ".ckpt":
        return place, load_network(place), checkpoint.read(place)[checkpoint.KEY]["tokenizer"]
    if not place.is_dir():
        raise FileNotFoundError(
            f"{teacher} is not a folder, and no Hub id is written like this{shipped.near(teacher)}."
        )
    return place, load_network(place), {}
