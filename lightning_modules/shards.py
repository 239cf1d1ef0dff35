"""Tensors of a checkpoint in files of their own, one per process, beside the checkpoint.

A sharded checkpoint is two things: ``last.ckpt``, a file like any other checkpoint but without its
large tensors, and ``shards/STEP-NAME/``, safetensors that every process wrote of what it holds. The
file is written last and names the folder, so a checkpoint is whole or not there at all, whenever
the run is killed. Nothing in either is unpickled but plain data and tensors.

The shards are those of ``torch.distributed.checkpoint``, which puts tensors together again on any
number of processes, whatever the number that wrote them.
"""

from __future__ import annotations

import math
import re
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

__all__ = [
    "KEY",
    "ShardError",
    "Shards",
    "attach",
    "check",
    "clean",
    "is_spread",
    "named",
    "sharded",
    "take",
    "write",
]

KEY = "shards"
"""Where in a checkpoint, and the folder beside it: ``folder``, the one in there; ``files``, their
bytes and checksums; ``same``, names of weights that are the same tensor as another."""

WEIGHTS, STATES = "state_dict", "optimizer_states"


class ShardError(ValueError):
    """Shards that are missing, cut off or not what a checkpoint needs."""


class Shards:
    """The tensors of a sharded checkpoint, read when asked for.

    Args:
        content: The checkpoint.
        path: Its file.

    Attributes:
        shapes: Shape and dtype of each tensor, by name.

    Raises:
        ShardError: If files are missing, cut off, or say of tensors what cannot be.
    """

    def __init__(self, content: Mapping[str, Any], path: str | Path) -> None:
        index, self.path = content[KEY], Path(path)
        self.folder = self.path.parent / KEY / _name(index, self.path)
        self.files: dict[str, list[int]] = index["files"]
        for name, (size, _) in self.files.items():
            file = self.folder / name
            if not file.is_file():
                self._refuse(name, "is missing")
            if file.stat().st_size != size:
                self._refuse(name, "is cut off")
        self.same: dict[str, str] = index["same"]
        self.shapes = self._find()

    def _refuse(self, name: str, what: str) -> NoReturn:
        raise ShardError(
            f"{str(self.path)!r} has its tensors in {str(self.folder)!r}, where {name} {what}: "
            "that folder belongs to the checkpoint and is copied with it; or take another "
            "checkpoint of the run."
        )

    def check(self) -> None:
        """Look at every byte.

        Raises:
            ShardError: If something was changed since it was written.
        """
        for name, (_, checksum) in self.files.items():
            if _checksum(self.folder / name) != checksum:
                self._refuse(name, "is not what was written")

    def _find(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Look into the heads of the files; no tensor may claim more than is there."""
        try:
            found = self._reader().read_metadata().state_dict_metadata
        except Exception as error:  # safetensors and json raise many types
            raise ShardError(f"{str(self.folder)!r} has unreadable shards ({error}).") from error
        for name, tensor in found.items():
            if sum(math.prod(part.sizes) for part in tensor.chunks) != tensor.size.numel():
                raise ShardError(f"{str(self.folder)!r} is refused: {name} has gaps.")
        return {name: (x.size, x.properties.dtype) for name, x in found.items()}

    def _reader(self) -> Any:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        return HuggingFaceStorageReader(str(self.folder))

    def read(self, into: Mapping[str, Tensor]) -> None:
        """Fill tensors, by name; of those that are distributed, this process's part.

        Raises:
            ShardError: If one is missing or of another shape.
        """
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.state_dict_loader import load

        try:
            with warnings.catch_warnings():  # that it reads by itself, which is what it is told
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                load(dict(into), storage_reader=self._reader(), no_dist=True)
        except CheckpointException as error:  # no Exception, and of no one type
            cause = next(iter(error.failures.values()))[0]
            raise ShardError(f"{str(self.folder)!r} cannot be read: {cause}") from error

    def whole(self, part: str) -> dict[str, Tensor]:
        """Return the whole tensors of a part of the checkpoint, by name without that part's."""
        found = {
            name: torch.zeros(shape, dtype=dtype)
            for name, (shape, dtype) in self.shapes.items()
            if name.startswith(f"{part}.")
        }
        self.read(found)
        return {name.removeprefix(f"{part}."): x for name, x in found.items()}

    def weights(self) -> dict[str, Tensor]:
        """Return the state dict of the module."""
        found = self.whole(WEIGHTS)
        if lost := sorted({*self.same.values()} - found.keys()):
            raise ShardError(f"{str(self.path)!r} is refused: it has no {lost[0]}.")
        return found | {name: found[other] for name, other in self.same.items()}

    def fill(self, states: list[dict[str, Any]]) -> None:
        """Put the whole tensors of optimisers back into their states."""
        for i, state in enumerate(states):
            for name, x in self.whole(f"{STATES}.{i}").items():
                number, _, key = name.partition(".")
                state["state"][int(number)][key] = x


class _Weights(Mapping[str, Tensor]):
    """A state dict that is read as a whole when the first tensor is used."""

    def __init__(self, shards: Shards) -> None:
        self.shards, self.found = shards, dict[str, Tensor]()
        prefix = f"{WEIGHTS}."
        self.names = [n.removeprefix(prefix) for n in shards.shapes if n.startswith(prefix)]
        self.names += shards.same

    def __getitem__(self, name: str) -> Tensor:
        self.found = self.found or self.shards.weights()
        return self.found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def attach(content: MutableMapping[str, Any], path: str | Path) -> Shards | None:
    """Give a sharded checkpoint its weights again, read when the first is used.

    Args:
        content: What the file holds; changed in place.
        path: The file.

    Returns:
        The shards, for the optimiser's states; none of a checkpoint that is one file.

    Raises:
        ShardError: If they cannot be read.
    """
    if KEY not in content:
        return None
    shards = Shards(content, path)
    content[WEIGHTS] = _Weights(shards)
    del content[KEY]
    return shards


def sharded(content: Mapping[str, Any]) -> bool:
    """Say whether the weights of a checkpoint that was read are in shards."""
    return isinstance(content[WEIGHTS], _Weights)


def check(content: Mapping[str, Any]) -> None:
    """Look at every byte of the shards that :func:`attach` gave a checkpoint, if it has any.

    Raises:
        ShardError: If something was changed since it was written.
    """
    if isinstance(content[WEIGHTS], _Weights):
        content[WEIGHTS].shards.check()


def _name(index: Any, path: Path) -> str:
    """Return the folder's name, if this is an index and the name that of a folder beside it."""
    if not (isinstance(index, Mapping) and _is_index(index)):
        raise ShardError(f"{str(path)!r} is refused: it does not say what its shards are.")
    for name in (index["folder"], *index["files"]):
        if not re.fullmatch(r"\w[\w-]*(\.safetensors)?", name):
            raise ShardError(f"{str(path)!r} is refused: its shards would be in {name!r}.")
    return str(index["folder"])


def _is_index(index: Mapping[str, Any]) -> bool:
    """Say whether it holds names, numbers and nothing else."""
    files, same = (index.get(key) for key in ("files", "same"))
    if not (isinstance(index.get("folder"), str) and isinstance(files, dict)):
        return False
    if not isinstance(same, dict):
        return False
    pairs = all(isinstance(x, list) and [type(n) for n in x] == [int, int] for x in files.values())
    return pairs and all(isinstance(name, str) for name in (*files, *same, *same.values()))


def is_spread(module: torch.nn.Module) -> bool:
    """Say whether this process holds parts alone of a module's parameters."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def named(module: torch.nn.Module) -> dict[str, str]:
    """Name the parameters that are the same tensor as one named before: ``{name: first name}``."""
    first: dict[int, str] = {}
    every = module.named_parameters(remove_duplicate=False)
    found = {name: first.setdefault(id(parameter), name) for name, parameter in every}
    return {name: other for name, other in found.items() if name != other}


def take(checkpoint: dict[str, Any], same: Mapping[str, str]) -> dict[str, Tensor]:
    """Take out of a checkpoint the tensors that go into shards, by name.

    Numbers, such as an optimiser's count of steps, stay.

    Args:
        checkpoint: Changed in place.
        same: What :func:`named` said of the module.
    """
    weights = checkpoint[WEIGHTS]
    taken = {f"{WEIGHTS}.{name}": x for name, x in weights.items() if name not in same}
    checkpoint[WEIGHTS], states = {}, checkpoint.get(STATES, [])
    for i, state in enumerate(states):
        left: dict[int, dict[str, Any]] = {}
        for number, values in state["state"].items():
            large = {k: x for k, x in values.items() if isinstance(x, Tensor) and x.dim()}
            taken |= {f"{STATES}.{i}.{number}.{k}": x for k, x in large.items()}
            left[number] = {k: x for k, x in values.items() if k not in large}
        states[i] = {**state, "state": left}
    return taken


def write(tensors: Mapping[str, Tensor], folder: Path, same: Mapping[str, str]) -> dict[str, Any]:
    """Write what this process holds of tensors; all processes must call.

    Args:
        tensors: What :func:`take` returned.
        folder: Where to; a new one.
        same: What :func:`named` said of the module.

    Returns:
        What the checkpoint says of its shards.

    Raises:
        OSError: If a process cannot write; on all of them.
    """
    import torch.distributed as dist
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:  # no Exception, and of no one type
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f"process {rank} could not write into {str(folder)!r}: {cause}") from error
    mine = sorted(folder.glob(f"shard-{dist.get_rank() + 1:05d}-*.safetensors"))
    own = {file.name: [file.stat().st_size, _checksum(file)] for file in mine}
    parts: list[Any] = [own] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    files = {name: said for part in parts for name, said in part.items()}
    return {"folder": folder.name, "files": files, "same": dict(same)}


def _checksum(file: Path) -> int:
    """Return the CRC-32 of a file."""
    total = 0
    with file.open("rb") as opened:
        while block := opened.read(1 << 24):
            total = zlib.crc32(block, total)
    return total


def clean(folder: Path) -> None:
    """Delete the shards in a run's folder that no checkpoint in it names any more."""
    if not (folder / KEY).is_dir():
        return
    named = set()
    for file in folder.glob("*.ckpt*"):
        if file.suffix == ".damaged":
            continue
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception:  # one that cannot be read may name any: all stay
            return
        named.add(content.get(KEY, {}).get("folder"))
    for old in (folder / KEY).iterdir():
        if old.name not in named:
            shutil.rmtree(old, ignore_errors=True)
