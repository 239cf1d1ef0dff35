"""Frames of notes: what is read, what is moved, what simple models need."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from statezoo.datamodules.music.frame_baselines import linear_nll, marginal_nll
from statezoo.datamodules.music.frames import PianoFrames, Rolls
from statezoo.datamodules.music.notes import TPQ, Piece, TrackInfo
from statezoo.datamodules.music.rolls import roll_of_piece, transposed

JSB = Path(__file__).parents[3] / "../shared/data/music/jsb_quarter_roll.json.gz"
needs_jsb = pytest.mark.skipif(not JSB.exists(), reason="the JSB chorales are not here")


def write(path, **splits):
    content = {"train": [[[60], [60, 64]]], "valid": [[[62]]], "test": [[[64], [], [65]]]}
    path.write_text(json.dumps({**content, **splits}))
    return path


def random_rolls(n, seed=0, length=30):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        roll = np.zeros((int(rng.integers(1, length)), 88), np.uint8)
        roll[:, 20:60] = rng.random((len(roll), 40)) < 0.1
        found.append(roll)
    return found


def test_a_frame_holds_exactly_its_pitches(tmp_path):
    data = PianoFrames(str(write(tmp_path / "quarter.json")))
    (train,), (val,), (test,) = (data.rolls(split) for split in ("train", "val", "test"))
    assert [np.flatnonzero(f).tolist() for f in train] == [[39], [39, 43]]
    assert [np.flatnonzero(f).tolist() for f in val] == [[41]]
    assert [np.flatnonzero(f).tolist() for f in test] == [[43], [], [44]]


def test_the_roll_of_a_piece_sounds_while_its_notes_do():
    notes = [
        [0, TPQ, 60, 80, 0],  # quarter 0
        [TPQ, 2 * TPQ, 64, 80, 0],  # quarters 1 and 2
        [2 * TPQ + 10, 20, 67, 80, 0],  # off the grid and short: the nearest, one step
        [0, TPQ, 20, 80, 0],  # below the keyboard
        [0, 4 * TPQ, 40, 80, 1],  # a drum: silence for a pianist
    ]
    piece = Piece((TrackInfo("a"), TrackInfo("d", is_drum=True)), np.array(notes))
    roll = roll_of_piece(piece, 1)
    assert [(np.flatnonzero(f) + 21).tolist() for f in roll] == [[60], [64], [64, 67], []]
    finer = roll_of_piece(piece, 2)
    assert [(np.flatnonzero(f) + 21).tolist() for f in finer[::2]] == [[60], [64], [64, 67], []]
    assert [(np.flatnonzero(f) + 21).tolist() for f in finer[1::2]] == [[60], [64], [64], []]


def test_transposition_moves_every_note_or_none():
    roll = np.zeros((2, 88), np.uint8)
    roll[0, [3, 80]] = roll[1, 50] = 1
    up = transposed(roll, 5)
    assert np.flatnonzero(up[0]).tolist() == [8, 85]
    assert np.flatnonzero(up[1]).tolist() == [55]
    assert transposed(roll, -3)[0, 0] == 1
    for out_of_reach in (-4, 8):
        assert np.array_equal(transposed(roll, out_of_reach), roll)
    assert np.array_equal(transposed(np.zeros((3, 88), np.uint8), 5), np.zeros((3, 88)))


def test_training_is_transposed_anew_each_epoch_and_validation_never(tmp_path):
    pieces = [[[60, 64, 67]] * 3 for _ in range(40)]
    data = PianoFrames(
        str(write(tmp_path / "quarter.json", train=pieces)), transpose=5, batch_size=40
    )
    loader = data.train_dataloader()
    epochs = [next(iter(loader))["frames"].numpy() for _ in range(2)]
    shifts = [batch[:, 0].argmax(1) - 39 for batch in epochs]
    assert set(np.concatenate(shifts).tolist()) == set(range(-5, 6))
    assert sorted(shifts[0].tolist()) != sorted(shifts[1].tolist())
    for batch, moved in zip(epochs, shifts, strict=True):
        for frames, shift in zip(batch, moved, strict=True):
            assert np.flatnonzero(frames[0]).tolist() == [39 + shift, 43 + shift, 46 + shift]
    for _ in range(2):
        (batch,) = data.val_dataloader()
        assert batch["frames"][0, 0].nonzero().flatten().tolist() == [41]
    again = PianoFrames(data.path, transpose=5, batch_size=40).train_dataloader()
    assert np.array_equal(next(iter(again))["frames"].numpy(), epochs[0])


def test_every_frame_is_in_one_batch(tmp_path):
    pieces = [[[60 + i]] * (i + 1) for i in range(7)]
    file = write(tmp_path / "quarter.json", train=pieces)
    data = PianoFrames(str(file), transpose=0, batch_size=3, max_frames=4)
    seen = np.zeros(88, int)
    for batch in data.train_dataloader():
        inside = torch.arange(batch["frames"].shape[1]) < batch["lengths"][:, None]
        assert not batch["frames"][~inside].any(), "notes in the padding"
        assert batch["frames"].shape[1] == batch["lengths"].max() <= 4
        seen += batch["frames"].sum((0, 1)).numpy()
    assert seen[39 : 39 + 7].tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_a_missing_piece_of_a_rank_scores_nothing():
    batch = Rolls(random_rolls(2))[0, [0, -1]]
    assert batch["lengths"].tolist() == [len(random_rolls(2)[0]), 0]
    alone = Rolls(random_rolls(2))[0, [-1]]
    assert alone["frames"].shape == (1, 1, 88)
    assert alone["lengths"].tolist() == [0]


def test_note_frequencies_by_hand():
    train = np.zeros((3, 88), np.uint8)
    train[:, 5], train[0, 6] = 1, 1
    held_out = np.zeros((2, 88), np.uint8)
    held_out[:, 5] = 1
    p5, p6, rest = 3.5 / 4, 1.5 / 4, 0.5 / 4
    want = -math.log(p5) - math.log(1 - p6) - 86 * math.log(1 - rest)
    assert marginal_nll([train], [held_out]) == pytest.approx(want, abs=1e-12)


def test_the_linear_model_sees_the_frame_before_and_no_other():
    rng = np.random.default_rng(0)
    pieces = []
    for _ in range(20):  # key 10 copies key 9 of the frame before; key 9 is a coin
        roll = np.zeros((40, 88), np.uint8)
        roll[:, 9] = rng.random(40) < 0.5
        roll[1:, 10] = roll[:-1, 9]
        pieces.append(roll)
    nll = linear_nll(pieces, pieces)
    assert math.log(2) - 0.02 < nll < math.log(2) + 0.3  # key 9 costs a bit, key 10 almost nothing
    assert marginal_nll(pieces, pieces) > 2 * math.log(2) - 0.05


@needs_jsb
def test_published_sizes_and_note_frequencies():
    data = PianoFrames(str(JSB))
    sizes = {
        k: (len(data.rolls(k)), sum(map(len, data.rolls(k)))) for k in ("train", "val", "test")
    }
    assert sizes == {"train": (229, 13807), "val": (76, 4602), "test": (77, 4725)}
    train = data.rolls("train")
    assert marginal_nll(train, data.rolls("val")) == pytest.approx(10.951, abs=1e-3)
    assert marginal_nll(train, data.rolls("test")) == pytest.approx(11.060, abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"batch_size": 0}, "PianoFrames needs batch_size of at least 1, got 0."),
        ({"transpose": -1}, "PianoFrames needs transpose of at least 0, got -1."),
        ({"steps_per_quarter": 0}, "PianoFrames needs steps_per_quarter of at least 1, got 0."),
        ({"val_fraction": 0.0}, "PianoFrames needs val_fraction above 0"),
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "some files left to train on"),
    ],
)
def test_settings_out_of_range(settings, says):
    with pytest.raises(ValueError, match=says):
        PianoFrames(**settings)


def test_a_path_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="No file or folder 'nowhere'"):
        PianoFrames("nowhere").setup()


def test_a_folder_of_midi_is_split_by_file(tmp_path):
    pytest.importorskip("symusic")
    for number in range(10):
        rows = np.array([[i * TPQ, TPQ, 50 + i * number % 7, 80, 0] for i in range(8)])
        Piece((TrackInfo("a"),), rows).save_midi(tmp_path / f"{number}.mid")
    (tmp_path / "bad.mid").write_text("no music")
    data = PianoFrames(str(tmp_path), steps_per_quarter=2)
    sizes = {split: len(data.rolls(split)) for split in ("train", "val", "test")}
    assert sum(sizes.values()) == 10
    assert min(sizes.values()) >= 1
    assert all(len(roll) == 16 for split in sizes for roll in data.rolls(split))
    again = PianoFrames(str(tmp_path), steps_per_quarter=2)
    assert np.array_equal(again.rolls("val")[0], data.rolls("val")[0])
