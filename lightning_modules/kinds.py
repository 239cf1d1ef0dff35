"""Kinds of labels, which task learns them, and checks of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from statezoo.datamodules.batch import IGNORE


class LabelKind(NamedTuple):
    """A kind of labels that data may have.

    Attributes:
        task: Name of the task that learns them.
        labels: How batches hold them.
        names: What ``class_names`` names.
        at_least: How many there must be.
    """

    task: str
    labels: str
    names: str
    at_least: int


KINDS = {
    "class": LabelKind("SequenceClassifier", "[B], int64, -100 where unknown", "classes", 2),
    "classes": LabelKind(
        "MultiLabelClassifier", "[B C], float, 0 or 1, nan where unknown", "labels", 1
    ),
    "number": LabelKind("Regressor", "[B R], float, nan where unknown", "numbers", 1),
    "tags": LabelKind("TokenClassifier", "[B T], int64, -100 where unknown", "tags", 2),
}
"""What a data module may say as its ``label_kind``."""


def check_names(kind: str, class_names: Sequence[str] | None) -> list[str]:
    """Return the names of classes, labels, numbers or tags.

    Raises:
        ValueError: If there are none, too few, or two are the same.
    """
    task, _, what, least = KINDS[kind]
    if not class_names:
        raise ValueError(
            f"{task} needs data with {what} (a list `class_names`, as LabelledDNA has it), or "
            "class_names=[...] in Python; this data has none."
        )
    names = [str(name) for name in class_names]
    if len(set(names)) < max(least, len(names)):
        wanted = f"at least two different {what}" if least > 1 else f"different {what}"
        more = " (a number is for Regressor, one label for MultiLabelClassifier)"
        raise ValueError(f"{task} needs {wanted}, got {names}{more if len(names) == 1 else ''}.")
    return names


def check_weights(
    given: str | Sequence[float] | None, names: list[str]
) -> Literal["balanced"] | list[float] | None:
    """Return class weights as plain data.

    Raises:
        ValueError: If they are no weights, or not one for each class.
    """
    if given is None or given == "balanced":
        return given  # type: ignore[return-value]
    if isinstance(given, str):
        raise ValueError(
            f"class_weights must be balanced or null, got {given!r}, or a number for each class."
        )
    weights = [float(x) for x in given]
    if len(weights) != len(names) or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise ValueError(
            f"class_weights must be a number of at least 0 for each of {', '.join(names)}, one of "
            f"them above 0; got {weights}."
        )
    return weights


def check_labels(kind: str, labels: Tensor, n: int) -> None:
    """Look at the labels of a batch.

    Args:
        kind: What they should be, a key of ``KINDS``.
        labels: As batches have them.
        n: Number of classes, labels, numbers or tags.

    Raises:
        ValueError: If shape or values are not those of this kind.
    """
    task, form, what, _ = KINDS[kind]
    several, whole = kind in ("classes", "number"), not labels.is_floating_point()
    dims = 1 if kind == "class" else 2
    if labels.dim() != dims or several == whole or (several and labels.shape[1] != n):
        raise ValueError(
            f"{task} needs labels {form}; with {n} {what}, these are {[*labels.shape]}, "
            f"{str(labels.dtype).removeprefix('torch.')}."
        )
    if whole:
        wrong = labels[(labels != IGNORE) & ((labels < 0) | (labels >= n))]
        allowed = f"{what} 0 to {n - 1}, or {IGNORE} where unknown"
    elif kind == "classes":
        wrong = labels[(labels != 0) & (labels != 1) & ~labels.isnan()]
        allowed = "0 where a label does not hold, 1 where it does, nan where unknown"
    else:
        wrong, allowed = labels[labels.isinf()], "finite numbers, or nan where unknown"
    if len(wrong):
        raise ValueError(f"{task} needs labels that are {allowed}; got {wrong[0].item()}.")
