"""The task of frames: against a plain loop, padding, every mixer, checkpoints."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from torch.utils.data import DataLoader

from statezoo.datamodules.music.frames import PianoFrames, Rolls
from statezoo.lightning_modules import load_checkpoint
from statezoo.lightning_modules.note_frames import NoteFrames
from statezoo.zoo import MIXERS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*You defined a `validation_step`.*"),
    pytest.mark.filterwarnings("ignore:The number of training batches.*"),
]

JSB = Path(__file__).parents[2] / "../shared/data/music/jsb_quarter_roll.json.gz"


def make(mixers=("gla",), **settings):
    seed_everything(1, verbose=False)
    return NoteFrames(list(mixers), **{"d_model": 16, "n_layers": 2, **settings})


def pieces(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.random((n, 88)) < 0.05).astype(np.uint8) for n in lengths]


def loader(batches):
    return DataLoader(batches, batch_size=None)


def plain_loop(task, rolls):
    """Nats per frame by running the model once for every frame, alone, and 88 Bernoullis."""
    task.eval()
    total = count = 0
    for roll in rolls:
        for t, frame in enumerate(roll):
            past = torch.from_numpy(roll[: t + 1].astype(np.int64))[None].clone()
            past[0, t] = 0  # what is asked must not be read
            with torch.no_grad():
                logits = task.net(past)[0][0, t].double().tolist()
            for note, logit in zip(frame.tolist(), logits, strict=True):
                p = 1 / (1 + math.exp(-logit))
                total -= math.log(p if note else 1 - p)
            count += 1
    return total / count


def test_the_logged_nll_is_that_of_a_plain_loop(trainer):
    """Equal to 1e-5: float32 sums in another order."""
    rolls = pieces([1, 5, 12, 3, 7])
    task = make()
    batches = [Rolls(rolls)[0, [0, 1, 2]], Rolls(rolls)[0, [3, 4, -1]]]
    (found,) = trainer().test(task, loader(batches), verbose=False)
    want = plain_loop(task, rolls)
    assert found["test/nll"] == pytest.approx(want, abs=1e-5)
    assert found["test/bits_per_frame"] == pytest.approx(want / math.log(2), abs=2e-5)


@pytest.mark.skipif(not JSB.exists(), reason="the JSB chorales are not here")
def test_a_real_piece_scores_the_same_alone_and_in_a_batch():
    rolls = PianoFrames(str(JSB)).rolls("test")[:4]
    task = make().eval()
    with torch.no_grad():
        together = task.frame_nll(Rolls(rolls)[0, [0, 1, 2, 3]])
        for row, roll in zip(together, rolls, strict=True):
            alone = task.frame_nll(Rolls([roll])[0, [0]])[0]
            assert torch.allclose(row[: len(roll)], alone, atol=1e-4)  # of about 25 nats
            assert not row[len(roll) :].any()


@pytest.mark.parametrize("mixer", sorted(name for name in MIXERS if not MIXERS[name].reads_ids))
def test_every_mixer_reads_the_past_alone_and_trains(mixer, trainer):
    task = make([mixer], d_model=32)
    rolls = pieces([9, 6])
    batch = Rolls(rolls)[0, [0, 1]]
    task.eval()
    with torch.no_grad():
        before = task.frame_nll(batch)
        changed = {**batch, "frames": batch["frames"].clone()}
        changed["frames"][0, 5] ^= 1
        after = task.frame_nll(changed)
    assert torch.equal(before[0, :5], after[0, :5])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0, 6:9], after[0, 6:9])
    trainer(max_steps=3).fit(task.train(), loader([batch]))
    for name, parameter in task.net.named_parameters():
        assert parameter.isfinite().all(), name


def test_padding_neither_counts_nor_changes_anything(trainer):
    """The gradient of a padded batch is that of the mean over its frames."""
    rolls = pieces([3, 11])
    task = make(dropout=0.0, note_dropout=0.0)
    alone = [Rolls([roll])[0, [0]] for roll in rolls]
    want = sum(task.frame_nll(batch).sum() for batch in alone) / 14
    want.backward()
    grads = {k: p.grad.clone() for k, p in task.net.named_parameters()}
    task.zero_grad()
    (task.frame_nll(Rolls(rolls)[0, [0, 1]]).sum() / 14).backward()
    for name, parameter in task.net.named_parameters():
        assert torch.allclose(parameter.grad, grads[name], atol=1e-5), name


def test_every_parameter_learns_the_start_too():
    task = make()
    task.frame_nll(Rolls(pieces([4]))[0, [0]]).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in task.net.parameters())


def test_silence_reads_as_the_start_and_has_a_gradient():
    """Norms on a stream of zeros would multiply its gradient past float32, and 0 * inf is nan."""
    roll = pieces([6])[0]
    roll[[2, 3]] = 0
    task = make([{"name": "mamba2", "head_dim": 16}], n_layers=20, channel=None).eval()
    batch, grads = Rolls([roll])[0, [0]], []
    for dtype in (torch.float64, torch.float32):
        task.to(dtype).zero_grad()
        task.frame_nll(batch).sum().backward()
        grads.append({k: p.grad.clone().double() for k, p in task.net.named_parameters()})
    for name, grad in grads[1].items():  # float32: sums of a few hundred terms
        assert torch.allclose(grad, grads[0][name], rtol=1e-3, atol=1e-4), name

    said = task.net(torch.from_numpy(roll)[None])[0][0]  # frame 3 and 4 follow silence
    task.net.start.data += 1
    moved = (task.net(torch.from_numpy(roll)[None])[0][0] - said).abs().amax(-1)
    assert (moved[[0, 3, 4]] > 0.01).all()


def test_it_learns_a_rule(trainer):
    """Each frame is the one before, a key higher: only the first can cost anything."""
    rolls = []
    for start in range(10):
        roll = np.zeros((8, 88), np.uint8)
        roll[np.arange(8), start + np.arange(8)] = 1
        rolls.append(roll)
    task = make(d_model=32, dropout=0.0, note_dropout=0.0, optim={"lr": 1e-2})
    batch = Rolls(rolls)[0, list(range(10))]
    trainer(max_steps=100).fit(task, loader([batch]))
    task.eval()
    with torch.no_grad():
        nats = task.frame_nll(batch)
    assert nats[:, 1:].mean() < 0.2
    assert nats[:, 0].mean() > 3  # ten coins of 1 in 10: 3.25 at best


def test_dropout_is_for_training():
    batch = Rolls(pieces([8]))[0, [0]]
    task = make(dropout=0.5, note_dropout=0.5)
    with torch.no_grad():
        assert not torch.equal(task.frame_nll(batch), task.frame_nll(batch))
        task.eval()
        assert torch.equal(task.frame_nll(batch), task.frame_nll(batch))


def test_a_checkpoint_gives_the_task_back(trainer, tmp_path):
    rolls = pieces([6, 4])
    batch = Rolls(rolls)[0, [0, 1]]
    task = make(["gla", "attention"], dropout=0.25, note_dropout=0.05)
    run = trainer(max_steps=2)
    run.fit(task, loader([batch]))
    run.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    back = load_checkpoint(tmp_path / "x.ckpt")
    assert isinstance(back, NoteFrames)
    assert (back.net.dropout, back.net.note_dropout) == (0.25, 0.05)
    task.eval()
    back.eval()
    with torch.no_grad():
        assert torch.equal(task.frame_nll(batch), back.frame_nll(batch))


def test_predictions_are_per_frame():
    task = make().eval()
    batch = Rolls(pieces([6, 4]))[0, [0, 1]]
    with torch.no_grad():
        found = task.predict_step(batch, 0)
    assert found["scored"].sum(1).tolist() == [6, 4]
    assert torch.equal(found["nll"], task.frame_nll(batch))


def test_wrong_data_and_settings(trainer, tmp_path):
    from statezoo.datamodules import Text

    (tmp_path / "x.txt").write_text("some text " * 200)
    with pytest.raises(ValueError, match="NoteFrames needs data made for the frames objective"):
        trainer(max_steps=1).fit(make(), datamodule=Text(str(tmp_path / "x.txt"), seq_len=8))
    with pytest.raises(ValueError, match=r"NoteFrames needs 0 <= dropout < 1, got 1\.0\."):
        make(dropout=1.0)
