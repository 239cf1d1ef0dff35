"""A tiny language model, and a trainer that writes nothing."""

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from statezoo.lightning_modules import CausalLM

TINY = {"vocab_size": 16, "d_model": 16, "n_layers": 2}


class Batches:
    """A loader; a plain list would be taken for several."""

    def __init__(self, made):
        self.made = made

    def __iter__(self):
        return iter(self.made)

    def __len__(self):
        return len(self.made)

    def __getitem__(self, i):
        return self.made[i]


@pytest.fixture
def tiny():
    """Make equal modules at each call, unless told otherwise."""

    def make(mixers=("gla",), **settings):
        seed_everything(1, verbose=False)
        return CausalLM(list(mixers), **{**TINY, **settings})

    return make


@pytest.fixture
def trainer(tmp_path):
    """Make a quiet trainer on one CPU."""

    def make(**settings):
        defaults = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
            "num_sanity_val_steps": 0,
        }
        return Trainer(**{**defaults, **settings})

    return make


@pytest.fixture
def batches():
    """Make batches of random tokens of which ``scored[i]`` per row count in batch ``i``."""

    def make(scored, T=8, B=2, vocab=16):
        draw = torch.Generator().manual_seed(3)
        made = []
        for n in scored:
            tokens = torch.randint(vocab, (B, T), generator=draw)
            targets = torch.randint(vocab, (B, T), generator=draw)
            targets[:, n:] = -100
            made.append({"tokens": tokens, "targets": targets, "n_bytes": torch.tensor(2 * B * n)})
        return Batches(made)

    return make
