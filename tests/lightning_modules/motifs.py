"""Toy DNA with a planted motif, for the tasks: labelled, or with hidden letters, or as it is."""

import numpy as np
import torch
from lightning.pytorch import LightningDataModule

from statezoo.datamodules.loader import SeekableLoader
from statezoo.datamodules.tokenizers import Characters

PAD, BOS, MASK, A, C, G, T, N = range(8)
COMPLEMENT = [0, 1, 2, 6, 5, 4, 3, 7]
MOTIF = [G, A, T, T, A, C, A]


class Sequences:
    """A split: what the loader reads; the ``size`` is that of its shifts."""

    size = 1

    def __init__(self, n, seed, collate, longest=24):
        rng = np.random.default_rng(seed)
        self.collate = collate
        self.rows, self.labels = [], []
        for i in range(n):
            row = rng.integers(A, N, int(rng.integers(longest // 2, longest + 1)))
            if i % 3 == 0:
                at = int(rng.integers(len(row) - len(MOTIF) + 1))
                row[at : at + len(MOTIF)] = MOTIF
            self.rows.append(row)
            self.labels.append(int(i % 3 == 0))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        _, ids = index
        return self.collate(self, ids)


class Motifs(LightningDataModule):
    """Random sequences, of which every third holds a motif.

    Args:
        objective: What batches are for: ``labels``, ``masked`` or ``causal``.
        batch_size: Sequences per batch.
        n: Training sequences.
        weights: Give every second target the weight 0.1.
        alphabet: Letters of the tokenizer; other letters, other tokenizer.
        names: Names of the classes; none for data without labels.
    """

    vocab_size = 8
    complement = COMPLEMENT
    rc_augment = False
    unit = "base"

    def __init__(
        self,
        objective: str = "labels",
        batch_size: int = 4,
        n: int = 48,
        weights: bool = False,
        alphabet: str = "-^?ACGT",
        names: list[str] = ("background", "motif"),
    ):
        super().__init__()
        self.batch_size, self.n, self.weights = batch_size, n, weights
        if objective != "labels":
            self.objective = objective
        self.class_names = list(names)
        self.tokenizer = Characters.of([alphabet.encode()])
        self.tokenizer.bos_id = BOS
        self.splits = {
            "train": Sequences(n, 0, self.collate),
            "val": Sequences(31, 1, self.collate),
        }

    @property
    def class_counts(self):
        return [self.splits["train"].labels.count(i) for i in range(2)]

    def collate(self, split, ids):
        rows = [torch.from_numpy(split.rows[i]) for i in ids]
        mask = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        tokens = torch.full_like(mask, PAD)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], mask[i, : len(row)] = row, 1
        if self.rc_augment and split is self.splits["train"]:
            raise AssertionError("augmentation is switched on")
        batch = {"tokens": tokens, "attention_mask": mask}
        if not hasattr(self, "objective"):
            if self.class_names:
                batch["labels"] = torch.tensor([split.labels[i] for i in ids])
            return {**batch, "ids": [f"s{i}" for i in ids]}
        if self.objective == "masked":
            hidden = (torch.arange(tokens.shape[1])[None] + torch.tensor(ids)[:, None]) % 5 == 0
            targets = tokens.masked_fill(~hidden | (mask == 0), -100)
            batch["tokens"] = tokens.masked_fill(hidden & (mask == 1), MASK)
        else:
            targets = torch.full_like(tokens, -100)
            targets[:, :-1] = tokens[:, 1:]
            targets[targets == PAD] = -100
        batch |= {"targets": targets, "n_bytes": (targets != -100).sum()}
        if self.weights:
            batch["weights"] = torch.where(torch.arange(tokens.shape[1]) % 2 == 0, 1.0, 0.1)
            batch["weights"] = batch["weights"].expand_as(tokens).contiguous()
        return batch

    def _loader(self, split, shuffle):
        return SeekableLoader(self.splits[split], self.batch_size, shuffle=shuffle)

    def train_dataloader(self):
        return self._loader("train", True)

    def val_dataloader(self):
        return self._loader("val", False)

    test_dataloader = predict_dataloader = val_dataloader
