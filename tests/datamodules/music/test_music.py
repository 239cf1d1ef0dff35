import json
import math
import pickle

import numpy as np
import pytest
import torch
from tests.datamodules.music.shared import FULL, SHARED, band, chorale, folder_of

from statezoo.datamodules.batch import IGNORE
from statezoo.datamodules.music.baselines import Markov, repeat_bits, unigram_bits
from statezoo.datamodules.music.corpus import split_pieces
from statezoo.datamodules.music.data import Music
from statezoo.datamodules.music.tokenizers import MidiTokens, SatbGrid

JSB = SHARED / "jsb_16th_satb.json.gz"


@pytest.fixture
def songs(tmp_path):
    return str(folder_of(tmp_path / "songs", 8))


def gather(loader):
    """All pairs of what is read and what must be said, and the sizes they stand for."""
    pairs, units = [], 0
    for batch in loader:
        scored = batch["targets"] != IGNORE
        tokens, targets = batch["tokens"][scored], batch["targets"][scored]
        pairs += zip(tokens.tolist(), targets.tolist(), strict=True)
        units += int(batch["n_bytes"])
    return pairs, units


def wanted(data, split):
    """The same, by a plain loop over pieces."""
    pairs = []
    for ids in data.ids(split):
        pairs += zip([data.tokenizer.bos_id, *ids[:-1].tolist()], ids.tolist(), strict=True)
    return sorted(pairs)


@FULL
def test_the_jsb_splits_have_their_published_sizes():
    data = Music(str(JSB), packing="pieces", seq_len=2560)
    pairs, units = gather(data.val_dataloader())
    assert len(pairs) == units == 73_632
    assert len(gather(data.test_dataloader())[0]) == 75_600
    assert sorted(pairs) == wanted(data, "val")
    found = data.baselines()
    assert found["unigram"] * math.log(2) == pytest.approx(3.391, abs=5e-4)  # as printed
    assert data.baselines("test")["unigram"] * math.log(2) == pytest.approx(3.403, abs=5e-4)
    assert found["repeat"] < found["markov_3"] < found["markov_1"] < found["unigram"]
    assert data.unit == "token"


@pytest.mark.parametrize("packing", ["stream", "pieces"])
@pytest.mark.parametrize("encoding", ["satb", "remi", "performance"])
def test_every_token_is_a_target_once(songs, encoding, packing):
    data = Music(songs, encoding, packing=packing, seq_len=70, batch_size=3, transpose=(0, 0))
    for split, loader in (("val", data.val_dataloader()), ("train", data.train_dataloader())):
        pairs, units = gather(loader)
        if packing == "pieces" or split == "val":
            assert sorted(pairs) == wanted(data, split)
        else:  # the tokens before the first one of a shifted stream are not the end of it
            assert sorted(t for _, t in pairs) == sorted(t for _, t in wanted(data, split))
        notes = sum(len(piece) for _, piece in data.music(split))
        tokens = sum(map(len, data.ids(split)))
        assert units == (tokens if encoding == "satb" else notes)
    assert data.unit == ("token" if encoding == "satb" else "note")


def test_whole_pieces_are_packed(songs):
    data = Music(songs, packing="pieces", seq_len=4096, batch_size=2)
    for batch in data.train_dataloader():
        bounds = batch["cu_seqlens"].tolist()
        assert batch["tokens"].shape == batch["targets"].shape == (1, bounds[-1])
        assert batch["cu_seqlens"].dtype == torch.int32
        starts = batch["tokens"][0, bounds[:-1]]
        assert (starts == data.tokenizer.bos_id).all()
        assert int((batch["tokens"] == data.tokenizer.bos_id).sum()) == len(starts)


def test_cut_pieces_are_told(songs, caplog):
    data = Music(songs, packing="pieces", seq_len=100)
    data.setup()
    assert "7 of 7 pieces (train) are longer than seq_len=100" in caplog.text
    caplog.clear()
    Music(songs, packing="pieces", seq_len=256).setup()  # 4 bars are 256 tokens
    assert not caplog.text


def test_training_is_transposed_piece_by_piece_and_validation_never(songs):
    data = Music(songs, packing="pieces", seq_len=4096, batch_size=1, transpose=(-5, 6), seed=3)
    plain = {tuple(t.tolist()) for t in data.ids("train")}
    seen = set()
    for _ in range(2):
        for batch in data.train_dataloader():
            ids = batch["targets"][0].numpy()
            moved = [
                (n, t)
                for t in range(-5, 7)
                for n, want in enumerate(sorted(plain))
                if np.array_equal(ids, np.where(np.array(want) > 0, np.array(want) + t, 0))
            ]
            assert len(moved) == 1, "a piece in one key"
            seen.add(moved[0])
            np.testing.assert_array_equal(batch["tokens"][0, 1:], batch["targets"][0, :-1])
    assert len({shift for _, shift in seen}) > 4
    assert sorted(gather(data.val_dataloader())[0]) == wanted(data, "val")


def test_transposition_stays_in_the_range(tmp_path):
    for n in range(3):
        chorale(seed=n, key=4).save_midi(tmp_path / f"{n}.mid")  # up to 81, the highest there is
    data = Music(str(tmp_path), packing="pieces", transpose=(-1, 60), seq_len=4096)
    highest = max(int(piece.pitch.max()) for _, piece in data.music("train"))
    for _ in range(5):
        for batch in data.train_dataloader():
            assert int(batch["targets"].max()) <= 46
    assert highest == 81
    part = data._parts["train"]
    draws = {
        data._augmentation().draw(epoch, 0, pitches)[0]
        for epoch in range(50)
        for pitches in part.pitches
    }
    assert min(draws) == -1
    assert max(draws) <= 81 - min(int(p[1]) for p in part.pitches)


def test_drums_are_not_transposed(tmp_path):
    for n in range(4):
        band().transposed(n).save_midi(tmp_path / "train" / f"{n}.mid")
    chorale().save_midi(tmp_path / "val" / "other.mid")
    data = Music(str(tmp_path), "remi", packing="pieces")

    def drum_events(ids):
        return [data.tokenizer.names[i] for i in ids if "Drum" in data.tokenizer.names[i]]

    plain = sorted(drum_events(ids) for ids in data.ids("train"))
    moved = [drum_events(batch["targets"][0].tolist()) for batch in loader_of_one(data)]
    assert sorted(moved) == plain
    assert len(plain[0]) == 4


def loader_of_one(data):
    data.batch_size = 1
    return data.train_dataloader()


def test_augmentation_depends_on_seed_epoch_and_piece_alone(songs):
    def batches(epochs=1, **settings):
        data = Music(songs, "performance", seq_len=64, velocity=20, tempo=0.1, **settings)
        loader = data.train_dataloader()
        return [batch["tokens"] for _ in range(epochs) for batch in loader]

    first = batches(2)
    assert all(torch.equal(a, b) for a, b in zip(first, batches(2), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, batches(2, num_workers=1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, batches(2, seed=1), strict=True))


@pytest.mark.parametrize("packing", ["stream", "pieces"])
def test_a_run_resumes_in_the_middle_of_an_epoch(songs, packing):
    def loader():
        data = Music(songs, packing=packing, seq_len=50, batch_size=2, velocity=9)
        return data.train_dataloader()

    first = loader()
    whole = [batch["tokens"] for _ in range(2) for batch in first]
    interrupted, done = loader(), []
    for batch in interrupted:
        done.append(batch["tokens"])
        if len(done) == 3:
            break
    resumed = loader()
    resumed.load_state_dict(interrupted.state_dict())
    done += [batch["tokens"] for _ in range(2) for batch in resumed]
    assert len(done) == len(whole)
    assert all(torch.equal(a, b) for a, b in zip(done, whole, strict=True))


def test_windows_pickle_for_workers(songs):
    data = Music(songs, "performance", velocity=20)
    data.setup()
    windows = pickle.loads(pickle.dumps(data._windows["train"]))
    assert torch.equal(windows[5, [0]]["tokens"], data._windows["train"][5, [0]]["tokens"])


def test_a_rank_without_work_gets_a_batch_without_targets(songs):
    for packing in ("stream", "pieces"):
        data = Music(songs, packing=packing)
        data.setup()
        batch = data._windows["train"][0, [-1]]
        assert (batch["targets"] == IGNORE).all()
        assert int(batch["n_bytes"]) == 0
        assert batch["tokens"].numel() > 0


def test_bad_files_are_reported_and_two_good_ones_are_enough(tmp_path, caplog):
    folder = folder_of(tmp_path / "songs", 2)
    (folder / "a.mid").write_bytes(b"")
    (folder / "b.mid").write_text("no music")
    data = Music(str(folder), "remi", seq_len=32)
    data.setup()
    report = json.loads(data.report.read_text())
    assert report["usable"] == 2
    assert [row["reason"] for row in report["skipped"]] == [
        "empty file", "not a MIDI file: it does not begin with MThd"
    ]  # fmt: skip
    assert "skipped 2 of 4 pieces; all of them, with reasons, are in" in caplog.text
    assert len(data.ids("train")) == len(data.ids("val")) == 1
    assert next(iter(data.train_dataloader()))["tokens"].shape[1] == 32


def test_without_usable_files_the_reasons_are_told(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.mid").write_text("no music at all")
    with pytest.raises(ValueError, match=r"(?s)has 0 usable pieces, and Music.*a\.mid: not"):
        Music(str(tmp_path)).setup()
    folder_of(tmp_path, 1)
    with pytest.raises(ValueError, match="has 1 usable piece, and Music needs two"):
        Music(str(tmp_path)).setup()
    for n in range(3):
        chorale(key=20 + n, seed=n).save_midi(tmp_path / f"high{n}.mid")
    with pytest.raises(ValueError, match=r"(?s)1 usable piece.*outside the grid's range 36"):
        Music(str(tmp_path)).setup()


def test_copies_in_other_keys_do_not_make_a_validation_split(tmp_path):
    for n in range(3):
        chorale(key=n).save_midi(tmp_path / f"{n}.mid")
    with pytest.raises(ValueError, match="0 to validate on: add files that are other music"):
        Music(str(tmp_path)).setup()


def test_the_second_run_reads_the_cache(songs, cache, monkeypatch):
    first = Music(songs)
    first.setup()
    ids = first.ids("train")
    import statezoo.datamodules.music.readers as readers

    monkeypatch.setattr(readers, "read_pieces", None)
    again = Music(songs)
    assert all(np.array_equal(a, b) for a, b in zip(again.ids("train"), ids, strict=True))
    for (name, piece), (_, same) in zip(again.music("train"), first.music("train"), strict=True):
        assert piece == same, name
    assert str(again.report).startswith(str(cache))


def test_instruments_are_named_only_where_a_piece_has_several(tmp_path):
    one = Music(str(folder_of(tmp_path / "one", 3)), "tsd")
    assert not one.tokenizer.programs
    band().save_midi(tmp_path / "one" / "band.mid")
    several = Music(str(tmp_path / "one"), "tsd")
    assert several.tokenizer.programs
    assert not Music(
        str(tmp_path / "one"), "tsd", encoding_settings={"programs": False}
    ).tokenizer.programs


def test_a_checkpoint_knows_its_tokenizer(songs, tmp_path):
    data = Music(songs, "satb", encoding_settings={"hold": True})
    state = data.state_dict()
    torch.save({"Music": state}, tmp_path / "run.ckpt")
    Music(songs, str(tmp_path / "run.ckpt")).load_state_dict(state)
    with pytest.raises(ValueError, match=r"another tokenizer \(satb, 49 ids\) than this data has"):
        Music(songs).load_state_dict(state)


def test_merged_tokens_are_not_transposed(songs, tmp_path):
    plain = MidiTokens("remi", velocities=0)
    pieces = [piece for _, piece in Music(songs).music("train")]
    plain.train(pieces, plain.vocab_size + 40).save(tmp_path / "merged")
    with pytest.raises(ValueError, match=r"merged tokens, which cannot be transposed: set"):
        Music(songs, str(tmp_path / "merged"))
    data = Music(songs, str(tmp_path / "merged"), transpose=(0, 0), seq_len=32)
    assert gather(data.val_dataloader())[1] == sum(len(p) for _, p in data.music("val"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seq_len": 0}, "Music needs seq_len of at least 1, got 0"),
        ({"packing": "rows"}, "Music needs packing 'stream' or 'pieces', got 'rows'"),
        ({"val_fraction": 0}, "Music needs val_fraction above 0"),
        ({"transpose": (1, 5)}, r"transpose as \[lowest, highest\] semitones around 0"),
        ({"tempo": 1.0}, "from 0 to below 1, got 1.0"),
        ({"encoding": "octuple"}, "octuple has several vocabularies"),
        ({"encoding": "abc"}, "No music encoding 'abc'"),
    ],
)
def test_settings_out_of_range(songs, settings, message):
    with pytest.raises(ValueError, match=message):
        Music(songs, **settings)


def test_splits_keep_groups_together_and_places_as_they_are():
    sizes, groups = np.full(100, 10), [str(n // 4) for n in range(100)]
    labels = split_pieces(sizes, [""] * 100, groups, val_fraction=0.1, test_fraction=0.2, seed=0)
    for n in range(0, 100, 4):
        assert len(set(labels[n : n + 4])) == 1
    assert 8 <= (labels == "val").sum() <= 12
    assert 18 <= (labels == "test").sum() <= 25
    named = ["train", "val", "", "", "test"]
    found = split_pieces(
        np.ones(5, int), named, list("abcde"), val_fraction=0.5, test_fraction=0.5, seed=0
    )
    assert found.tolist() == ["train", "val", "train", "train", "test"]


def test_baselines_equal_plain_loops():
    rng = np.random.default_rng(0)
    train = [rng.integers(0, 5, size=n) for n in (40, 30)]
    test = [rng.integers(0, 6, size=n) for n in (25, 9)]
    vocab, bos, order = 7, 6, 2

    def probability(context, word):
        if not context:
            p = 1 / vocab
            seen = [w for ids in train for w in ids.tolist()]
        else:
            p = probability(context[1:], word)
            seen = []
            for ids in train:
                padded = [bos] * len(context) + ids.tolist()
                seen += [
                    padded[n + len(context)]
                    for n in range(len(ids))
                    if padded[n : n + len(context)] == list(context)
                ]
        return (seen.count(word) + len(set(seen)) * p) / (len(seen) + len(set(seen))) if seen else p

    bits = 0.0
    for ids in test:
        padded = [bos] * order + ids.tolist()
        for n, word in enumerate(ids.tolist()):
            bits -= math.log2(probability(tuple(padded[n : n + order]), word))
    assert Markov(train, order, vocab, bos).bits(test) == pytest.approx(bits, rel=1e-12)

    counts = np.bincount(np.concatenate(train), minlength=vocab) + 0.5
    plain = -sum(math.log2(counts[w] / counts.sum()) for ids in test for w in ids.tolist())
    assert unigram_bits(train, test, vocab) == pytest.approx(plain, rel=1e-12)
    steady = [np.tile([1, 2, 3, 4], 50)]
    assert repeat_bits(steady, steady, vocab, 4) / 200 < 0.1
    total = sum(  # what it says of all ids sums to one
        2 ** -(repeat_bits(train, [np.array([1, 2, 3, 4, w])], vocab, 4)
               - repeat_bits(train, [np.array([1, 2, 3, 4])], vocab, 4))
        for w in range(vocab)
    )  # fmt: skip
    assert total == pytest.approx(1, rel=1e-9)


def test_the_default_needs_music21(monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "music21" else real(name)
    )
    with pytest.raises(ValueError, match="without a path needs the package music21: pip install"):
        Music()


def test_the_grid_is_the_default():
    assert isinstance(Music(None).tokenizer, SatbGrid)
