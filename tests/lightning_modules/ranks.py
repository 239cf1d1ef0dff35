"""Some gloo processes on one machine, each of which runs the same function."""

import os
import random
import time
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Trainer

from statezoo.datamodules.base import SplitData
from statezoo.datamodules.batch import IGNORE

WORDS, T = 11, 12


class Here(LightningEnvironment):
    """The processes that are there already."""

    def __init__(self, rank, world):
        super().__init__()
        self.rank, self.world = rank, world
        self._rank, self._world_size = rank, world

    creates_processes_externally = True

    def world_size(self):
        return self.world

    def global_rank(self):
        return self.rank

    local_rank = global_rank

    def set_world_size(self, size):
        pass

    set_global_rank = set_world_size

    def teardown(self):
        pass


def _one(rank, function, world, file, arguments):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=300),
    )
    try:
        function(rank, world, *arguments)
    finally:
        dist.destroy_process_group()


def spawn(function, world, folder, *arguments, seconds=900):
    """Run ``function(rank, world, *arguments)`` in each of some processes."""
    file = folder / f"meet-{random.getrandbits(40):x}"
    context = torch.multiprocessing.start_processes(
        _one, (function, world, str(file), arguments), world, join=False, start_method="spawn"
    )
    end = time.monotonic() + seconds
    try:
        while not context.join(timeout=max(0.0, end - time.monotonic()), grace_period=5):
            if time.monotonic() >= end:
                raise TimeoutError(f"{world} processes are not done after {seconds} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


class Uneven:
    """Packed windows of two texts, of which between a fifth and all targets are scored."""

    size = 1

    def __init__(self, n, packed=True):
        draw = np.random.default_rng(7)
        self.tokens = draw.integers(WORDS, size=(n, T))
        self.targets = draw.integers(WORDS, size=(n, T))
        self.cuts = draw.integers(1, T, size=n)
        for i, scored in enumerate(draw.integers(T // 5, T + 1, size=n)):
            self.targets[i, scored:] = IGNORE
        self.packed = packed

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        _, windows = index
        tokens, targets = (torch.from_numpy(x[windows]) for x in (self.tokens, self.targets))
        targets[torch.tensor(windows) < 0] = IGNORE
        batch = {"tokens": tokens, "targets": targets, "n_bytes": (targets != IGNORE).sum()}
        if self.packed:
            bounds = [0]
            for i, window in enumerate(windows):
                bounds += [i * T + int(self.cuts[window]), (i + 1) * T]
            batch["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
            batch |= {key: batch[key].view(1, -1) for key in ("tokens", "targets")}
        return batch


class Alternating:
    """The batches that some ranks would read, one after another."""

    def __init__(self, loaders):
        self.loaders = loaders

    def __iter__(self):
        return (batch for batches in zip(*self.loaders, strict=True) for batch in batches)

    def __len__(self):
        return sum(map(len, self.loaders))


class UnevenData(SplitData):
    """Twelve batches of such windows over all processes, four windows each."""

    num_workers, seed = 0, 3

    def __init__(self, batch_size, n=48, packed=True, as_ranks=1):
        super().__init__()
        self.batch_size, self.as_ranks = batch_size, as_ranks
        self.splits = {"train": Uneven(n, packed), "val": Uneven(7, packed)}

    def windows(self, split):
        return self.splits.get(split)

    def train_dataloader(self):
        if self.as_ranks == 1:
            return super().train_dataloader()
        of = [
            self.loader(
                self.windows("train"), self.batch_size, shuffle=True, seed=self.seed,
                rank=rank, world_size=self.as_ranks,
            )
            for rank in range(self.as_ranks)
        ]  # fmt: skip
        return Alternating(of)


def trainer(folder, strategy="auto", rank=0, world=1, **settings):
    """A quiet trainer on CPU, one of some processes."""
    defaults = {
        "accelerator": "cpu", "devices": world, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
        "default_root_dir": folder, "use_distributed_sampler": False, "strategy": strategy,
        "log_every_n_steps": 1,
    }  # fmt: skip
    if strategy != "auto":
        defaults["plugins"] = [Here(rank, world)]
    os.environ["LOCAL_RANK"] = str(rank)
    return Trainer(**{**defaults, **settings})
