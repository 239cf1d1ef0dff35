import itertools

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from statezoo.datamodules import Text
from statezoo.datamodules.batch import IGNORE
from statezoo.datamodules.loader import SeekableLoader
from statezoo.datamodules.packing import TokenFile, Windows


@pytest.fixture
def windows(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(97, dtype=np.uint16))
    return Windows(TokenFile(tmp_path / "ids.npy"), np.array([[0, 97]]), seq_len=4, bos_id=0)


def targets(batches):
    return [batch["targets"].tolist() for batch in batches]


def scored(batches):
    return sorted(t for rows in targets(batches) for row in rows for t in row if t != IGNORE)


@pytest.mark.parametrize("stop", [1, 3, 8, 9, 10, 20])  # 9 batches: inside, at and past an epoch
@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 0), (0, 2)])
def test_resumes_anywhere_with_any_number_of_workers(windows, stop, before, after):
    want = SeekableLoader(windows, 3, shuffle=True, seed=1)
    whole = [*want, *want, *want]
    first = SeekableLoader(windows, 3, shuffle=True, seed=1, num_workers=before)
    epochs = itertools.chain.from_iterable(itertools.repeat(first))
    read = list(itertools.islice(epochs, stop))
    second = SeekableLoader(windows, 3, shuffle=True, seed=1, num_workers=after)
    second.load_state_dict(first.state_dict())
    rest = list(second)
    assert len(rest) == (9 - stop % 9)
    assert targets([*read, *rest, *second][:27]) == targets(whole)[: stop + len(rest) + 9]


def test_each_epoch_reads_all_tokens_once_in_another_order(windows):
    loader = SeekableLoader(windows, 3, shuffle=True, seed=1)
    one, two = list(loader), list(loader)
    assert len(one) == len(two) == len(loader) == 9
    assert scored(one) == scored(two) == list(range(97))
    assert targets(one) != targets(two)
    again = SeekableLoader(windows, 3, shuffle=True, seed=1, epoch=1)
    assert targets(again) == targets(two)
    other = SeekableLoader(windows, 3, shuffle=True, seed=2)
    assert targets(other) != targets(one)


def test_unshuffled_begins_anew_after_an_unfinished_pass(windows):
    loader = SeekableLoader(windows, 3)
    next(iter(loader))
    assert scored(loader) == list(range(97))
    assert targets(loader) == targets(loader)


def test_limited_passes_go_on_and_resume(windows):
    want = SeekableLoader(windows, 3, shuffle=True)
    whole = targets([*want, *want])
    loader = SeekableLoader(windows, 3, shuffle=True)
    loader.limit(4)
    assert len(loader) == 4
    read = [*loader, *loader]
    other = SeekableLoader(windows, 3, shuffle=True)
    other.limit(4)
    other.load_state_dict(loader.state_dict())
    assert targets([*read, *other, *other]) == whole[:16]
    loader.limit(0.5)
    assert len(loader) == 4


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_share_each_epoch(windows, world):
    for shuffle in (False, True):
        loaders = [
            SeekableLoader(windows, 2, shuffle=shuffle, rank=rank, world_size=world)
            for rank in range(world)
        ]
        parts = [list(loader) for loader in loaders]
        assert len({len(part) for part in parts}) == 1
        assert all(len(batch["tokens"]) for part in parts for batch in part)
        read = scored(itertools.chain(*parts))
        if shuffle:
            assert set(read) == set(range(97))
            assert len(read) < 97 + 4 * world
        else:
            assert read == list(range(97))


def test_more_ranks_than_windows(windows):
    parts = [list(SeekableLoader(windows, 2, rank=r, world_size=40)) for r in range(40)]
    assert scored(itertools.chain(*parts)) == list(range(97))


def test_global_random_state_is_left_alone(windows):
    state = torch.get_rng_state()
    list(SeekableLoader(windows, 3, shuffle=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_other_data_is_refused(windows):
    state = SeekableLoader(windows, 3).state_dict() | {"epoch_length": 5}
    with pytest.raises(ValueError, match="5 batches per epoch, now there are 9"):
        SeekableLoader(windows, 3).load_state_dict(state)


def test_any_number_of_processes_goes_on_with_the_same_batches(windows):
    one = SeekableLoader(windows, 12, shuffle=True)
    whole = [scored([batch]) for batch in one]
    begun = [SeekableLoader(windows, 6, shuffle=True, rank=r, world_size=2) for r in range(2)]
    iterators = [iter(loader) for loader in begun]
    assert scored(next(it) for it in iterators) == whole[0]
    rest = [SeekableLoader(windows, 3, shuffle=True, rank=r, world_size=4) for r in range(4)]
    for loader in rest:
        loader.load_state_dict(begun[0].state_dict())
    parts = [list(loader) for loader in rest]
    assert [len(part) for part in parts] == [len(whole) - 1] * 4
    read = [scored(batches) for batches in zip(*parts, strict=True)]
    assert read[0] == whole[1]  # the last is filled up to a multiple of the processes


@pytest.mark.parametrize(
    ("batch_size", "world", "advice"),
    [(6, 4, "data.batch_size 3"), (3, 5, "a number of processes that divides 12, and")],
)
def test_other_batches_are_refused_with_those_to_choose(windows, batch_size, world, advice):
    state = SeekableLoader(windows, 6, world_size=2).state_dict()
    said = (
        f"made with 12 windows per batch over all processes, now there are {batch_size * world}, "
        f"{batch_size} on each of {world}: resume with {advice}"
    )
    with pytest.raises(ValueError, match=said):
        SeekableLoader(windows, batch_size, world_size=world).load_state_dict(state)


@pytest.mark.parametrize(
    ("settings", "said"), [({"batch_size": 0}, "batch_size"), ({"rank": 1}, "rank")]
)
def test_settings_out_of_range(windows, settings, said):
    with pytest.raises(ValueError, match=said):
        SeekableLoader(windows, **{"batch_size": 1, **settings})


quiet = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:`isinstance.*LeafSpec", "ignore:The number of training"
)


class Reader(LightningModule):
    """Remembers what it reads; may be stopped like a killed process, after a checkpoint."""

    def __init__(self, die_at=None):
        super().__init__()
        self.layer, self.read, self.die_at = nn.Linear(1, 1), [], die_at

    def training_step(self, batch, index):
        if self.global_step == self.die_at:
            raise ConnectionAbortedError
        self.read.append((self.global_step, batch["targets"].tolist()))
        return self.layer(batch["targets"].float().unsqueeze(-1)).mean()

    def validation_step(self, batch, index):
        assert batch["n_bytes"] > 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-6)


def fit(folder, corpus, module, workers=0, ckpt=None, **kwargs):
    checkpoint = ModelCheckpoint(
        folder, "last", every_n_train_steps=1, enable_version_counter=False
    )
    trainer = Trainer(
        accelerator="cpu", max_epochs=3, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[checkpoint], **kwargs,
    )  # fmt: skip
    data = Text(str(corpus), seq_len=8, batch_size=4, num_workers=workers)
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return trainer


@quiet
@pytest.mark.parametrize("limit", [1.0, 5])
@pytest.mark.parametrize("die_at", [3, 7, 9, 14, 18])
def test_lightning_resumes_the_same_run(tmp_path, die_at, limit):
    corpus = tmp_path / "a.txt"
    corpus.write_text("The quick brown fox jumps over the lazy dog; " * 7)
    whole = Reader()
    fit(tmp_path / "whole", corpus, whole, limit_train_batches=limit)
    first, second = Reader(die_at), Reader()
    folder = tmp_path / "parts"
    if die_at < len(whole.read):
        with pytest.raises(ConnectionAbortedError):
            fit(folder, corpus, first, limit_train_batches=limit)
    else:
        fit(folder, corpus, first, limit_train_batches=limit)
    fit(folder, corpus, second, ckpt=folder / "last.ckpt", limit_train_batches=limit)
    assert first.read + second.read == whole.read


@quiet
def test_lightning_resumes_with_workers(tmp_path):
    corpus = tmp_path / "a.txt"
    corpus.write_text("The quick brown fox jumps over the lazy dog; " * 7)
    whole, first, second = Reader(), Reader(5), Reader()
    fit(tmp_path / "whole", corpus, whole)
    with pytest.raises(ConnectionAbortedError):
        fit(tmp_path / "parts", corpus, first, workers=2)
    fit(tmp_path / "parts", corpus, second, workers=1, ckpt=tmp_path / "parts/last.ckpt")
    assert first.read + second.read == whole.read


@quiet
def test_overfit_batches_repeats_the_same(tmp_path):
    corpus = tmp_path / "a.txt"
    corpus.write_text("The quick brown fox jumps over the lazy dog; " * 7)
    module = Reader()
    fit(tmp_path / "run", corpus, module, overfit_batches=2)
    read = [batch for _, batch in module.read]
    assert read == read[:2] * 3
