"""Short windows first: a training loader whose windows grow while the tokens per batch stay.

Which windows a batch is made of is a pure function of its number, so a run resumes in the middle of
a stage as it does anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from statezoo.datamodules.batch import Batch
from statezoo.datamodules.loader import SeekableLoader, Windows

__all__ = ["Stage", "StagedLoader", "Warmup"]


class Stage(NamedTuple):
    """A part of a run.

    Attributes:
        seq_len: Tokens per window.
        batch_size: Windows per batch and process.
        first_step: Optimiser step it begins with; it ends where the next one begins.
    """

    seq_len: int
    batch_size: int
    first_step: int


class Warmup(NamedTuple):
    """How windows grow: twice as long at every stage, half as many.

    Attributes:
        start: Tokens per window at first.
        steps_per_stage: Optimiser steps until they are twice as long.
        accumulate: Batches per optimiser step.
    """

    start: int
    steps_per_stage: int
    accumulate: int = 1

    def stages(self, seq_len: int, batch_size: int) -> list[Stage]:
        """Return the stages, of which the last has windows of ``seq_len``.

        Raises:
            ValueError: If ``start`` doubled some times does not become ``seq_len``.
        """
        lengths = [self.start]
        while 0 < lengths[-1] < seq_len:
            lengths.append(2 * lengths[-1])
        if lengths[-1] != seq_len or len(lengths) < 2:
            halves = [seq_len >> k for k in range(1, 8) if seq_len >> k << k == seq_len]
            choices = ", ".join(map(str, halves)) or "none as seq_len is odd"
            raise ValueError(
                f"Length warm-up needs a start that becomes seq_len={seq_len} by doubling "
                f"({choices}), got start={self.start}."
            )
        return [
            Stage(length, batch_size * (seq_len // length), k * self.steps_per_stage)
            for k, length in enumerate(lengths)
        ]

    def loader(
        self, last: SeekableLoader, seq_len: int, at_length: Callable[[int], Windows]
    ) -> StagedLoader:
        """Return a loader that goes through the stages and goes on as ``last``.

        Args:
            last: Loader of the windows of ``seq_len``.
            seq_len: Tokens per window of the last stage.
            at_length: Makes windows of another length from the same data.
        """
        stages = self.stages(seq_len, last.batch_size)
        loaders = [last.like(at_length(s.seq_len), s.batch_size) for s in stages[:-1]]
        return StagedLoader([*loaders, last], [s.first_step for s in stages], self.accumulate)


class StagedLoader(SeekableLoader):
    """Shuffled loaders one after the other; the last has no end.

    Each begins with its own first epoch and goes through as many as there is time for. A pass has
    as many batches as an epoch of the last one has, whatever the stage.

    Args:
        loaders: The loaders, which differ in windows and ``batch_size`` alone.
        first_steps: Optimiser step each begins with.
        accumulate: Batches per optimiser step; those left over at the end of a pass make a step.
    """

    def __init__(
        self, loaders: Sequence[SeekableLoader], first_steps: Sequence[int], accumulate: int = 1
    ) -> None:
        last = loaders[-1]
        if not all(loader.shuffle for loader in loaders):
            raise ValueError("StagedLoader needs shuffled loaders: others begin anew each pass.")
        super().__init__(
            last.windows,
            last.batch_size,
            shuffle=True,
            seed=last.seed,
            num_workers=last.num_workers,
            rank=last.rank,
            world_size=last.world_size,
        )
        self.done = self.pass_end = last.done
        self.loaders, self.first_steps, self.accumulate = list(loaders), first_steps, accumulate

    def first_batches(self) -> list[int]:
        """Return the number of the batch that each stage begins with."""
        steps_per_pass = -(-self.length // self.accumulate)
        passes = (divmod(step, steps_per_pass) for step in self.first_steps)
        return [whole * self.length + rest * self.accumulate for whole, rest in passes]

    def layout(self) -> dict[str, Any] | None:
        """Describe the order within each stage as its loader does."""
        return self.loaders[-1].layout()

    def read(self, numbers: range) -> Iterator[Batch]:
        """Batches of these numbers, counted from the beginning of the run."""
        bounds = [*self.first_batches(), max(numbers.stop, 1 << 62)]
        for loader, (first, end) in zip(self.loaders, pairwise(bounds), strict=True):
            begin, stop = max(numbers.start, first), min(numbers.stop, end)
            if begin < stop:
                yield from loader.read(range(begin - first, stop - first))

    def state_dict(self) -> dict[str, Any]:
        """Position as plain numbers, the same on every rank, and what it is a position in."""
        lengths = [loader.epoch_length for loader in self.loaders]
        stages = [list(x) for x in zip(self.first_batches(), lengths, strict=True)]
        return super().state_dict() | {"stages": stages}
