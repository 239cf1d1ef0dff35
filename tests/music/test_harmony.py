"""Harmonising: the melody stays on top, ranges hold, and the numbers equal plain loops."""

import json
import math

import numpy as np
import pytest
import symusic
import torch

from statezoo.commands import run
from statezoo.datamodules.music.notes import Piece, TrackInfo
from statezoo.datamodules.music.satb import piece_from_grid
from statezoo.datamodules.music.tokenizers import music_tokenizer
from statezoo.music import Sampling, harmonise, harmony_nll
from statezoo.music.harmony import RANGES, harmony_floors
from statezoo.zoo import StateZooConfig, StateZooForCausalLM

SATB = pytest.mark.parametrize("hold", [False, True])
TPQ = 220


def network(tokenizer, mixers=("gla", "attention")):
    torch.manual_seed(0)
    config = StateZooConfig(vocab_size=tokenizer.vocab_size, d_model=16, mixers=[*mixers])
    net = StateZooForCausalLM(config).eval()
    net.lm_head.weight = torch.nn.Parameter(net.lm_head.weight * 5)
    return net


def melody(pitches=(72, 72, 60, 74, 62, 81, 60, 65), rest_after=3):
    score = symusic.Score(TPQ)
    track = symusic.Track(name="Tune", program=73)
    for place, pitch in enumerate(pitches):
        start = (place + (place > rest_after)) * TPQ
        track.notes.append(symusic.Note(start, TPQ - 3, pitch, 50 + place))
    score.tracks.append(track)
    score.time_signatures.append(symusic.TimeSignature(0, 3, 4))
    return score


def chorales(count, steps=12, seed=0):
    """``[steps 4]`` grids of slow voices."""
    rng = np.random.default_rng(seed)
    middle = np.array([67, 60, 55, 45])
    return [(middle + rng.integers(-4, 5, (steps // 2, 4))).repeat(2, axis=0) for _ in range(count)]


@SATB
def test_melody_unchanged_and_voices_in_range(hold):
    tokenizer = music_tokenizer("satb", hold=hold)
    given = melody()
    found = harmonise((network(tokenizer), tokenizer), given, n=4, sampling=Sampling(seed=1))
    assert [track.name for track in found.tracks] == ["Soprano", "Alto", "Tenor", "Bass"]
    assert found.ticks_per_quarter == TPQ
    top = [(n.time, n.duration, n.pitch, n.velocity) for n in found.tracks[0].notes]
    assert top == [(n.time, n.duration, n.pitch, n.velocity) for n in given.tracks[0].notes]
    for track, (low, high) in zip(found.tracks, RANGES, strict=True):
        assert len(track.notes)
        assert all(low <= note.pitch <= high for note in track.notes)
    for track in found.tracks[1:]:
        for note in track.notes:
            assert note.time + note.duration <= given.end()
            above = [s.pitch for s in given.tracks[0].notes if s.time <= note.time < s.end]
            assert not above or note.pitch <= min(above)
    sounding = Piece.from_score(found)
    lower = sounding.notes[sounding.track > 0]
    upper = sounding.notes[sounding.track == 0]
    for begin, size, pitch, _, _ in upper.tolist():
        over = (lower[:, 0] < begin + size - 10) & (lower[:, 0] + lower[:, 1] > begin + 10)
        assert (lower[over, 2] <= pitch).all()


def test_the_likeliest_of_n_is_written():
    tokenizer = music_tokenizer("satb")
    net = network(tokenizer)

    def likelihood(n):
        found = Piece.from_score(harmonise((net, tokenizer), melody(), n=n))
        ids = tokenizer.encode_piece(found)
        with torch.no_grad():
            logits = net(torch.tensor([[tokenizer.bos_id, *ids[:-1]]])).logits[0]
        return logits.log_softmax(-1)[range(len(ids)), ids].sum().item()

    assert likelihood(12) > likelihood(1)


def test_same_seed_same_file(tmp_path):
    tokenizer = music_tokenizer("satb")
    network(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    melody().dump_midi(str(tmp_path / "soprano.mid"))
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(
            f"music harmonise --model {tmp_path}/model --melody {tmp_path}/soprano.mid "
            f"--voices SATB --n 2 --seed {seed} --out {tmp_path}/{name}.mid".split()
        )
        found.append((tmp_path / f"{name}.mid").read_bytes())
    assert found[0] == found[1] != found[2]


def test_harmony_nll_is_a_plain_loop():
    tokenizer = music_tokenizer("satb")
    net = network(tokenizer)
    piece = piece_from_grid(chorales(1, steps=6)[0])
    ids = [tokenizer.bos_id, *tokenizer.encode_piece(piece).tolist()]
    total = count = 0
    for place in range(1, len(ids)):
        if (place - 1) % 4:
            with torch.no_grad():
                logits = net(torch.tensor([ids[:place]])).logits[0, -1].double()
            total -= logits.log_softmax(-1)[ids[place]].item()
            count += 1
    assert count == 18
    assert harmony_nll((net, tokenizer), piece) == pytest.approx(total / count, abs=1e-5)


def test_floors_are_plain_counts():
    tokenizer = music_tokenizer("satb")
    encode = [tokenizer.encode_piece(piece_from_grid(grid)) for grid in chorales(5)]
    train, test = encode[:4], encode[4:]
    floors = harmony_floors(train, test, tokenizer)
    size, unigram, markov, count = tokenizer.vocab_size, 0.0, 0.0, 0
    for voice in (1, 2, 3):
        lines = [ids[voice::4].tolist() for ids in train]
        words = [word for line in lines for word in line]
        pairs = [p for line in lines for p in zip([tokenizer.bos_id, *line], line, strict=False)]
        kinds = len({*words})
        before = tokenizer.bos_id
        for word in test[0][voice::4].tolist():
            unigram -= math.log((words.count(word) + 0.5) / (len(words) + 0.5 * size))
            p = (words.count(word) + kinds / size) / (len(words) + kinds)
            after = [second for first, second in pairs if first == before]
            if after:
                p = (after.count(word) + len({*after}) * p) / (len(after) + len({*after}))
            markov -= math.log(p)
            before, count = word, count + 1
    assert floors["unigram"] == pytest.approx(unigram / count, abs=1e-9)
    assert floors["markov"] == pytest.approx(markov / count, abs=1e-9)


def test_evaluate_prints_the_model_beside_the_floors(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STATEZOO_CACHE", str(tmp_path / "cache"))
    tokenizer = music_tokenizer("satb")
    net = network(tokenizer)
    net.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    grids = {"train": chorales(4), "valid": chorales(1, seed=1), "test": chorales(2, seed=2)}
    content = {split: [grid.tolist() for grid in part] for split, part in grids.items()}
    file = tmp_path / "Jsb16thSeparated.json"
    file.write_text(json.dumps(content))
    run(["music", "harmonise", "--model", str(tmp_path / "model"), "--evaluate", str(file)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("given the soprano, 2 pieces of test")
    printed = {line.split()[0]: float(line.split()[1]) for line in lines[1:]}
    own = [harmony_nll((net, tokenizer), piece_from_grid(grid)) for grid in grids["test"]]
    assert printed["model"] == pytest.approx(np.mean(own), abs=1e-4)
    assert {*printed} == {"model", "unigram", "markov"}


def test_mistakes(tmp_path, capsys):
    tokenizer, remi = music_tokenizer("satb"), music_tokenizer("remi")
    model = network(tokenizer), tokenizer
    with pytest.raises(
        ValueError, match=r"four voices, and this one has remi tokens: statezoo fit --data Music"
    ):
        harmonise((network(remi), remi), melody())
    with pytest.raises(ValueError, match=r"pitch 84 in bar 1, outside a soprano's 60 to 81"):
        harmonise(model, melody((72, 84)))
    two = Piece((TrackInfo(),), np.array([[0, 960, 70, 80, 0], [480, 480, 64, 80, 0]]))
    with pytest.raises(ValueError, match=r"two notes at once in bar 1: give the soprano alone\."):
        harmonise(model, two)
    with pytest.raises(ValueError, match=r"the melody has no notes\."):
        harmonise(model, symusic.Score(480))
    with pytest.raises(ValueError, match=r"n of at least 1, got 0\."):
        harmonise(model, melody(), n=0)
    out = tmp_path / "there.mid"
    out.touch()
    cases = [
        (["--voices", "SA"], "voices can be SATB alone, which these models know; got 'SA'."),
        ([], "music harmonise needs --melody and --out, or --evaluate."),
        (["--melody", "x.mid", "--out", str(out)], "is there already: choose another --out"),
        (["--melody", "x.mid", "--out", str(tmp_path / "no/x.mid")], "there is no folder"),
    ]
    for arguments, message in cases:
        with pytest.raises(SystemExit) as stop:
            run(["music", "harmonise", "--model", "none", *arguments])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
