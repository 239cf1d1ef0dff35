"""A checkpoint under conversion: every setting and every tensor is used, or its loss reported."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

HARMLESS = {  # settings that leave the function of the model as it is
    "A_init_range": "initial values",
    "architectures": "names of classes",
    "attn_mode": "choice of kernel",
    "auto_map": "code, never run",
    "chunk_size": "choice of kernel",
    "conv_init": "initial values",
    "conv_size": "there are no short convolutions",
    "dt_init": "initial values",
    "dt_init_floor": "initial values",
    "dt_init_scheme": "initial values",
    "dt_scale": "initial values",
    "fused_add_norm": "choice of kernel",
    "hidden_ratio": "the tensors say it",
    "initializer_cfg": "initial values",
    "max_position_embeddings": "no length is fixed",
    "mode": "choice of kernel",
    "pad_vocab_size_multiple": "the tensors say it",
    "rescale_prenorm_residual": "initial values",
    "residual_in_fp32": "precision alone: the stream has the dtype of the weights",
    "share_conv_kernel": "the tensors say it",
    "use_associative_scan": "choice of kernel",
    "use_cache": "generation",
    "use_l2warp": "training loss",
    "use_mambapy": "choice of kernel",
    "use_mem_eff_path": "choice of kernel",
    "use_fast_path": "choice of kernel",
    "use_short_conv": "the published code ignores it here",
}


@dataclass
class Report:
    """What became of a public checkpoint.

    Attributes:
        kind: What it is.
        tensors: New name of every tensor used, by its old name; several are joined by `` + ``.
        dropped: Tensors and settings left behind, each with the reason.
        notes: What else differs from the file as it stands.
    """

    kind: str
    tensors: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def __str__(self) -> str:
        """Summarise, the layers taken together."""
        lines = [f"{self.kind}: {len(self.tensors)} tensors used, {len(self.dropped)} keys dropped"]
        lines += [f"  note     {text}" for text in self.notes]
        for what, pairs in (("dropped", self.dropped), ("renamed", self.tensors)):
            merged = Counter((_any_layer(old), _any_layer(new)) for old, new in pairs.items())
            for (old, new), n in merged.items():
                times = f"  ({n} times)" if n > 1 else ""
                arrow = f" -> {new}" if what == "renamed" else f": {new}"
                if old != new:
                    lines.append(f"  {what}  {old}{arrow}{times}")
        return "\n".join(lines)


class Settings:
    """The settings of a checkpoint, each to be read, refused or known to be harmless.

    Args:
        config: Content of ``config.json``.
        report: Where drops and renames are written.
        what: What the settings belong to, for messages.
    """

    def __init__(self, config: dict[str, Any], report: Report, what: str = "config.json") -> None:
        self.config, self.report, self.what = config, report, what
        self.read = {"model_type"}

    def take(self, name: str, default: Any, *others: str) -> Any:
        """Return a setting, known by any of several names.

        Raises:
            ValueError: If it is there under two names, with different values.
        """
        found = {key: self.config[key] for key in (name, *others) if key in self.config}
        self.read |= found.keys()
        values = [value for value in found.values() if value is not None]
        if any(value != values[0] for value in values):
            raise ValueError(f"{self.what} contradicts itself: {found}.")
        for key in found:
            if key != name:
                self.report.note(f"{self.what}: {key} is read as {name}")
        return values[0] if values else default

    def need(self, name: str, *others: str) -> Any:
        """Return a setting that must be there.

        Raises:
            ValueError: If it is not.
        """
        value = self.take(name, None, *others)
        if value is None:
            raise ValueError(f"{self.what} lacks {name}.")
        return value

    def only(self, name: str, *allowed: Any, default: Any = None) -> None:
        """Accept a setting only with values that stand for what the mixer does.

        Raises:
            ValueError: If it has another value.
        """
        value = self.take(name, allowed[0] if default is None else default)
        if value not in allowed:
            raise ValueError(
                f"{self.what} has {name}={value!r}, which would change the function and is not "
                f"implemented here; implemented: {', '.join(map(repr, allowed))}."
            )

    def agree(self, name: str, found: Any, *others: str) -> Any:
        """Return what the tensors say, unless the settings say something else.

        Raises:
            ValueError: If they do.
        """
        value = self.take(name, found, *others)
        if value != found:
            raise ValueError(f"{self.what} has {name}={value!r}, but the tensors have {found!r}.")
        return found

    def finish(self) -> None:
        """Check that no setting was overlooked.

        Raises:
            ValueError: If one has no meaning known here.
        """
        common = PreTrainedConfig().to_dict().keys()
        for key in sorted(self.config.keys() - self.read):
            value = self.config[key]
            if key in HARMLESS or key.startswith(("_", "fuse_", "time_step_", "use_bfloat16")):
                reason = HARMLESS.get(key, "initial values, or choice of kernel")
            elif key in common or key in ("torch_dtype", "transformers_version"):
                reason = "a setting of every transformers model"
            elif value is None:
                reason = "unknown, and null"
            else:
                raise ValueError(
                    f"{self.what} has {key}={value!r}, which no converter knows. If it leaves the "
                    "function of the model as it is, take it out and convert again."
                )
            self.report.dropped[f"{self.what}: {key}"] = reason


class Tensors:
    """The tensors of a checkpoint, on their way to new names.

    Args:
        tensors: By their names in the checkpoint.
        report: Where drops and renames are written.
    """

    def __init__(self, tensors: dict[str, Tensor], report: Report) -> None:
        self.old, self.report = dict(tensors), report
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.new: dict[str, Tensor] = {}
        self.origin: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor.

        Raises:
            ValueError: If it is missing.
        """
        if name not in self.shapes:
            raise ValueError(f"the checkpoint lacks the tensor {name}.")
        return self.shapes[name]

    def take(self, *names: str) -> list[Tensor]:
        """Return tensors and mark them as used.

        Raises:
            ValueError: If one is missing.
        """
        for name in names:
            self.shape(name)
        return [self.old.pop(name) for name in names]

    def move(self, old: str, new: str, change: Callable[[Tensor], Tensor] | None = None) -> None:
        """Give a tensor its new name, and perhaps another form."""
        (tensor,) = self.take(old)
        self.put({new: change(tensor) if change else tensor}, old)

    def join(self, olds: list[str], new: str) -> None:
        """Stack the rows of several tensors."""
        self.put({new: torch.cat(self.take(*olds))}, *olds)

    def split(self, old: str, news: list[str], rows: list[int]) -> None:
        """Cut the rows of a tensor into several tensors."""
        if self.shape(old)[0] != sum(rows):
            raise ValueError(f"{old} has the shape {self.shape(old)}, not {sum(rows)} rows.")
        (tensor,) = self.take(old)
        parts = [part.contiguous() for part in tensor.split(rows)]
        self.put(dict(zip(news, parts, strict=True)), old)

    def put(self, new: dict[str, Tensor], *olds: str) -> None:
        """Add tensors under their new names, made from old ones."""
        for old in olds:
            self.report.tensors[old] = " + ".join(new)
        self.new |= new
        self.origin |= dict.fromkeys(new, " + ".join(olds))

    def drop(self, old: str, reason: str) -> None:
        """Leave a tensor behind."""
        self.take(old)
        self.report.dropped[old] = reason

    def head(self, settings: Settings, embeddings: str, default: bool | None) -> bool:
        """Move the output head; return whether it is tied to the embedding.

        Args:
            settings: Settings, where ``tie_word_embeddings`` may be missing.
            embeddings: Old name of the embedding.
            default: What a missing key means; ``None`` lets the tensors decide.

        Raises:
            ValueError: If settings and tensors contradict each other.
        """
        name = "lm_head.weight"
        tied = settings.take("tie_word_embeddings", default, "tie_embeddings")
        if tied is None:
            same = name in self and torch.equal(self.old[name], self.old[embeddings])
            tied = same or name not in self
            self.report.note(
                f"config.json does not say whether the head is tied: the tensors say it is"
                f"{'' if tied else ' not'}"
            )
        if not tied:
            self.move(name, name)
        elif name in self:
            if not torch.equal(self.old[name], self.old[embeddings]):
                raise ValueError(
                    f"config.json ties the head to the embedding, but {name} differs from "
                    f"{embeddings}: one of them is wrong."
                )
            self.drop(name, "a copy of the embedding, to which it is tied")
        return bool(tied)

    def vocabulary(self, settings: Settings, embeddings: str) -> int:
        """Return the number of rows of the embedding, padding included.

        Raises:
            ValueError: If there are fewer than tokens.
        """
        rows = self.shape(embeddings)[0]
        tokens = settings.take("vocab_size", rows)
        if tokens > rows:
            raise ValueError(
                f"{embeddings} has {rows} rows, too few for vocab_size={tokens} of config.json."
            )
        if tokens < rows:
            self.report.note(f"the vocabulary of {tokens} tokens is padded to {rows}")
        return rows

    def finish(self, expected: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Return the tensors, once it is sure that all fit.

        Args:
            expected: Shapes of the new model.

        Raises:
            ValueError: If a tensor is missing, left over or of another shape.
        """
        faults = [f"missing: {self._old_name(new)}" for new in sorted(expected.keys() - self.new)]
        faults += [f"no place for: {old}" for old in sorted(self.old)]
        for new, tensor in sorted(self.new.items()):
            old, shape = self.origin[new], tuple(tensor.shape)
            if new not in expected:
                faults.append(f"no place for: {old}")
            elif shape != expected[new]:
                faults.append(
                    f"wrong shape: {old} gives {list(shape)} where config.json asks for "
                    f"{list(expected[new])}"
                )
        if faults:
            more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
            raise ValueError(f"the tensors do not fit config.json; {'; '.join(faults[:8])}{more}.")
        return self.new

    def _old_name(self, new: str) -> str:
        """Guess what a missing tensor was called, from other layers or a neighbour."""
        layer = re.search(r"\.(\d+)\.", new)
        for known, old in self.origin.items():
            if layer and _any_layer(known) == _any_layer(new):
                return re.sub(r"\.\d+\.", layer[0], old, count=1)
        return f"{new} (by its name here)"


def _any_layer(name: str) -> str:
    return re.sub(r"(?<=layers\.)\d+(?=\.)", "*", name)
