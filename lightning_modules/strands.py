"""Reverse complements as tasks treat them: the other strand of a batch, and which treatment."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from statezoo.datamodules.batch import Batch

Treatment = Literal["none", "augment", "average", "equivariant"]


def check_treatment(task: str, treatment: Treatment, complement: list[int] | None) -> None:
    """Refuse a treatment that needs complements where there are none.

    Raises:
        ValueError: If it does.
    """
    if treatment in ("average", "equivariant") and complement is None:
        raise ValueError(
            f"{task} with reverse_complement {treatment!r} needs data that says the complement of "
            "each symbol (a list `complement`, as DNA and LabelledDNA have it); this data has none."
        )


def treatment_of(
    asked: Treatment, complement: list[int] | None, equivariant: list[int] | None
) -> tuple[Treatment, list[int] | None]:
    """Return the treatment and complements of a task whose network is made.

    Args:
        asked: The treatment asked for; ``none`` gives way to that of pretrained weights.
        complement: Complements of the data's symbols, where known.
        equivariant: Complements that the network is built on, if it is equivariant.

    Raises:
        ValueError: If the network is equivariant and something else was asked for, or the data has
            other complements.
    """
    if equivariant is None:
        return asked, complement if asked == "average" else None
    if asked not in ("none", "equivariant"):
        raise ValueError(
            f"the pretrained network is equivariant, so reverse_complement {asked!r} would change "
            "nothing: leave it out."
        )
    if complement not in (None, equivariant):
        raise ValueError(
            f"the pretrained network takes {equivariant} for the complements of its symbols, the "
            f"data {complement}."
        )
    return "equivariant", equivariant


def augment(task: str, data: Any) -> None:
    """Have a data module read either strand in training.

    Raises:
        ValueError: If it cannot.
    """
    if not hasattr(data, "rc_augment"):
        name = "a data module" if data is None else f"more than {type(data).__name__}"
        raise ValueError(
            f"{task} with reverse_complement 'augment' needs {name}: data that can read the other "
            "strand (an attribute `rc_augment`, as DNA and LabelledDNA have it). 'average' and "
            "'equivariant' leave the data as it is."
        )
    data.rc_augment = True


def other_strand(batch: Batch, complement: list[int], bos_id: int | None) -> tuple[Batch, Tensor]:
    """Return a batch's reverse complement, each sequence in its own place.

    Padding and a leading ``bos_id`` stay where they are.

    Args:
        batch: Rows, padded on the right or not, or packed sequences.
        complement: The complement of every token.
        bos_id: First token of a sequence, if there is one.

    Returns:
        The batch with other tokens, and ``index [B*T]``, its own inverse: what was at position
        ``t`` is at ``index[t]``.
    """
    tokens = batch["tokens"]
    B, T = tokens.shape
    flat = tokens.flatten()
    place = torch.arange(B * T, device=tokens.device)
    if "cu_seqlens" in batch:
        bounds = batch["cu_seqlens"].long()
        lengths, starts = bounds.diff(), bounds[:-1]
    else:
        starts = torch.arange(0, B * T, T, device=tokens.device)
        lengths = torch.full_like(starts, T)
    first = torch.repeat_interleave(starts, lengths)
    if "attention_mask" in batch:
        lengths = batch["attention_mask"].sum(1)
        last = first + lengths.repeat_interleave(T) - 1
    else:
        last = first + torch.repeat_interleave(lengths, lengths) - 1
    kept = flat[first] == (-1 if bos_id is None else bos_id)
    index = torch.where(
        (place < first + kept.long()) | (place > last), place, first + last - place + kept.long()
    )
    table = torch.tensor(complement, device=tokens.device)
    other: Any = {**batch, "tokens": table[flat[index]].view_as(tokens)}
    return other, index


def mean_log_probabilities(one: Tensor, other: Tensor) -> Tensor:
    """Average what two strands say, ``[... W]``, and scale it to probabilities again."""
    mean = (one.float().log_softmax(-1) + other.float().log_softmax(-1)) / 2
    return mean.log_softmax(-1)
