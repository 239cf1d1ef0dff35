"""Toy data with labels of every kind, over the letters of ``motifs``."""

import torch
from lightning.pytorch import LightningDataModule
from tests.lightning_modules.conftest import Batches
from tests.lightning_modules.motifs import COMPLEMENT, A, G, N, T

NAMES = {"class": ["few", "many"], "classes": ["G", "TT"], "number": ["g"], "tags": ["no", "yes"]}


def answer(kind, row):
    """Say what a network is to learn of a row of letters."""
    if kind == "class":
        return int((row == G).float().mean() > 0.25)
    if kind == "classes":
        pairs = (row[:-1] == T) & (row[1:] == T)
        return torch.tensor([(row[: len(row) // 2] == G).sum() > 1, pairs.any()]).float()
    if kind == "number":
        return torch.tensor([1000 + 50 * (row == G).float().mean()])
    return (torch.cat([row[1:], row[:1]]) == G).long()  # what comes NEXT is a G


class Labels(LightningDataModule):
    """Random letters, labelled by a rule.

    Args:
        kind: Of the labels.
        n: Training sequences; 40 more are for validation.
        unknown: Every how many-th sequence has no label.
        lengths: Whether lengths differ.
        change: Applied to the labels of each batch.
    """

    vocab_size = 8
    complement = COMPLEMENT
    unit = "base"

    def __init__(self, kind="class", n=160, unknown=7, lengths=True, change=None):
        super().__init__()
        self.label_kind, self.class_names = kind, NAMES[kind]
        self.n, self.unknown, self.lengths, self.change = n, unknown, lengths, change

    def batches(self, n, seed, size=16):
        draw, made = torch.Generator().manual_seed(seed), []
        for begin in range(0, n, size):
            B = min(size, n - begin)
            tokens = torch.randint(A, N, (B, 12), generator=draw)
            sizes = (
                torch.randint(8, 13, (B, 1), generator=draw)
                if self.lengths
                else torch.full((B, 1), 12)
            )
            mask = torch.arange(12) < sizes
            known = [answer(self.label_kind, row[m]) for row, m in zip(tokens, mask, strict=True)]
            if self.label_kind == "class":
                labels = torch.tensor(known)
            elif self.label_kind == "tags":
                labels = torch.full((B, 12), -100)
                for i, tags in enumerate(known):
                    labels[i, : len(tags) - 1] = tags[:-1]
            else:
                labels = torch.stack(known)
            lost = torch.arange(B) % self.unknown == 1
            labels[lost] = torch.nan if labels.is_floating_point() else -100
            labels = labels if self.change is None else self.change(labels)
            batch = {"tokens": tokens * mask, "labels": labels}
            made.append(batch | ({"attention_mask": mask.long()} if self.lengths else {}))
        return Batches(made)

    @property
    def class_counts(self):
        found = torch.cat([b["labels"].flatten() for b in self.batches(self.n, 0)])
        return torch.bincount(found[found >= 0].long(), minlength=2).tolist()

    def train_dataloader(self):
        return self.batches(self.n, 0)

    def val_dataloader(self):
        return self.batches(40, 1)

    test_dataloader = predict_dataloader = val_dataloader
