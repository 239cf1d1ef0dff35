"""What mixers say beside their output while they train: losses to add, values to log."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from statezoo.zoo.mixer import Mixer

Auxiliary = dict[int, dict[str, Tensor]]


def take_auxiliary(mixers: Iterable[nn.Module]) -> Auxiliary:
    """Take what the mixers of all layers left in their last forward pass, by layer.

    Raises:
        RuntimeError: If gradients cannot reach a loss.
    """
    taken: Auxiliary = {}
    for i, mixer in enumerate(mixers):
        if isinstance(mixer, Mixer) and mixer.auxiliary is not None:
            taken[i], mixer.auxiliary = mixer.auxiliary, None
            if torch.is_grad_enabled() and not taken[i]["loss"].requires_grad:
                _check_frozen(mixer)
    return taken


def _check_frozen(mixer: Mixer) -> None:
    if any(parameter.requires_grad for parameter in mixer.parameters()):
        raise RuntimeError(
            f"the auxiliary loss of {mixer.name!r} was computed without gradients: checkpoint with "
            "use_reentrant=False, or freeze the whole mixer."
        )


def auxiliary_loss(auxiliary: Auxiliary) -> Tensor | None:
    """Average the losses over the layers that have one."""
    losses = [found["loss"] for found in auxiliary.values()]
    return torch.stack(losses).mean() if losses else None


def add_auxiliary(
    loss: Tensor, auxiliary: Auxiliary | None, scored: Tensor | int, n: Tensor | int | None
) -> Tensor:
    """Add the auxiliary losses to a mean loss.

    Args:
        loss: Mean over ``scored`` items, or their sum over ``n`` where it is given.
        auxiliary: What mixers said.
        scored: Number of scored items.
        n: What the sum was divided by.
    """
    more = auxiliary_loss(auxiliary or {})
    if more is None:
        return loss
    return loss + (more if n is None else more * scored / n)


def to_vector(auxiliary: Auxiliary) -> Tensor:
    """Lay all values but losses end to end, so that they add up over batches in one operation."""
    values = [v.flatten() for f in auxiliary.values() for k, v in f.items() if k != "loss"]
    return torch.cat(values)


def name_values(auxiliary: Auxiliary, vector: list[float]) -> dict[str, float]:
    """Name the numbers of :func:`to_vector`.

    Args:
        auxiliary: What has the shape of what the vector was made of.
        vector: The numbers.

    Returns:
        ``<name>``, the mean over layers of a scalar, and ``<name>/<layer>.<index>`` of vectors.
    """
    scalars: dict[str, list[float]] = {}
    named: dict[str, float] = {}
    numbers = iter(vector)
    for layer, found in auxiliary.items():
        for name, value in found.items():
            if value.ndim:
                named |= {f"{name}/{layer}.{i}": next(numbers) for i in range(value.numel())}
            elif name != "loss":
                scalars.setdefault(name, []).append(next(numbers))
    return {name: sum(found) / len(found) for name, found in scalars.items()} | named
