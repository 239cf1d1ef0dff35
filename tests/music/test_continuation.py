"""Continuations: the prompt stays, the bars are exact, files load in symusic and mido."""

import json
from itertools import pairwise

import mido
import numpy as np
import pytest
import symusic
import torch

from statezoo.commands import run
from statezoo.datamodules.music.notes import Piece, TrackInfo
from statezoo.datamodules.music.tokenizers import music_tokenizer
from statezoo.music import Sampling, continue_piece
from statezoo.zoo import StateZooConfig, StateZooForCausalLM

pytestmark = [
    pytest.mark.filterwarnings("ignore:pkg_resources is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:Deprecated call to .pkg_resources:DeprecationWarning"),
]

MODELS = [
    ("satb", {}, ["gla"]),
    ("satb", {"hold": True}, ["gla"]),
    ("remi", {}, ["gla", "attention"]),
    ("remi", {"programs": True}, ["gla"]),
    ("tsd", {}, [{"name": "mamba2", "head_dim": 16, "d_state": 8}]),
    ("midilike", {"programs": True}, ["gla"]),
    ("performance", {}, ["gla"]),
]
TPQ = 220


def network(tokenizer, mixers=("gla",)):
    torch.manual_seed(0)
    config = StateZooConfig(vocab_size=tokenizer.vocab_size, d_model=16, mixers=[*mixers])
    return StateZooForCausalLM(config).eval()


def save(folder, kind="remi", settings=None, mixers=("gla",)):
    tokenizer = music_tokenizer(kind, **(settings or {}))
    network(tokenizer, mixers).save_pretrained(folder)
    tokenizer.save(folder)
    return str(folder)


def theme(meter=(4, 4), bars=6, tpq=TPQ):
    """A tune with onsets off every grid, notes over the bar lines, a pedal and a late meter."""
    rng = np.random.default_rng(0)
    bar = 4 * tpq * meter[0] // meter[1]
    score = symusic.Score(tpq)
    track = symusic.Track(name="Tune", program=5)
    starts = np.sort(rng.choice(bars * bar, 6 * bars, replace=False))
    starts[0] = 0
    for start, pitch in zip(starts.tolist(), rng.permutation(6 * bars).tolist(), strict=True):
        track.notes.append(symusic.Note(start, tpq + 7, 40 + pitch, 60 + pitch % 40))
    track.controls.append(symusic.ControlChange(10, 64, 127))
    score.tracks.append(track)
    score.time_signatures.append(symusic.TimeSignature(0, *meter))
    score.time_signatures.append(symusic.TimeSignature(5 * bar, 7, 8))
    score.tempos.append(symusic.Tempo(0, 90))
    return score, bar


def notes(score, since=0, until=1 << 30):
    return sorted(
        (track.program, note.time, note.duration, note.pitch, note.velocity)
        for track in score.tracks
        for note in track.notes
        if since <= note.time < until
    )


def check(score, given, cut, end):
    assert score.ticks_per_quarter == TPQ
    assert notes(score, until=cut) == notes(given, until=cut)
    assert max(time + size for _, time, size, _, _ in notes(score)) <= end
    assert score.end() == end
    assert all(sign.time < cut for sign in score.time_signatures)


@pytest.mark.parametrize(("kind", "settings", "mixers"), MODELS)
@pytest.mark.parametrize("meter", [(4, 4), (3, 4), (6, 8)])
def test_prompt_untouched_and_bars_exact(kind, settings, mixers, meter):
    tokenizer = music_tokenizer(kind, **settings)
    given, bar = theme(meter)
    model = network(tokenizer, mixers), tokenizer
    if kind == "satb":  # at most four notes at once, each in its own time
        for place, note in enumerate(sorted(given.tracks[0].notes, key=lambda n: n.time)):
            note.time, note.duration, note.pitch = place * TPQ // 2, TPQ // 2, 60 + place % 12
        given.tracks[0].notes = sorted(given.tracks[0].notes, key=lambda n: n.time)
    settings = {"prompt_bars": 3, "bars": 5, "n": 12}
    scores = continue_piece(model, given, **settings, sampling=Sampling(seed=2))
    assert len(scores) == 12
    for score in scores:
        check(score, given, 3 * bar, 8 * bar)
    new = {tuple(notes(score, since=3 * bar)) for score in scores}
    assert len(new) > 1
    assert any(new)


@pytest.mark.parametrize("kind", ["satb", "remi", "tsd", "midilike", "performance"])
def test_twenty_files_of_eight_bars(kind, tmp_path):
    model = save(tmp_path / "model", kind)
    given, bar = theme(bars=2)
    if kind == "satb":
        given.tracks[0].notes = [symusic.Note(i * TPQ, TPQ, 60 + i, 70) for i in range(8)]
    given.dump_midi(str(tmp_path / "theme.mid"))
    scores = continue_piece(
        model, tmp_path / "theme.mid", prompt_bars=2, bars=8, n=20, sampling=Sampling(0.95, 0.95)
    )
    files = set()
    for number, score in enumerate(scores):
        file = tmp_path / f"{number}.mid"
        score.dump_midi(str(file))
        files.add(file.read_bytes())
        loaded, plain = symusic.Score(str(file)), mido.MidiFile(file)
        check(loaded, given, 2 * bar, 10 * bar)
        assert plain.ticks_per_beat == TPQ
        times = [sum(m.time for m in track if m.type != "end_of_track") for track in plain.tracks]
        assert max(times) == 10 * bar
        begun = [m for track in plain.tracks for m in track if m.type == "note_on" and m.velocity]
        assert len(begun) == len(notes(loaded)) > len(notes(given))
    assert len(files) == 20


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(tmp_path):
    model = save(tmp_path / "model", "tsd")
    theme()[0].dump_midi(str(tmp_path / "theme.mid"))
    found = []
    for place, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(
            f"music continue --model {model} --prompt {tmp_path}/theme.mid --prompt-bars 2 "
            f"--bars 3 --n 2 --seed {seed} --wav --out-dir {tmp_path}/{place}".split()
        )
        names = sorted(file.name for file in (tmp_path / place).iterdir())
        assert names == sorted(
            f"{i}.{end}" for i in (1, 2) for end in ("mid", "png", "json", "wav")
        )
        found.append([(tmp_path / place / name).read_bytes() for name in names])
    assert found[0] == found[1] != found[2]
    numbers = json.loads((tmp_path / "a" / "1.json").read_text())
    assert (numbers["bars"], numbers["prompt_bars"]) == (5, 2)
    assert numbers["notes"] == len(notes(symusic.Score(str(tmp_path / "a" / "1.mid"))))


def test_instruments_of_the_prompt_play_on_or_those_asked_for(tmp_path):
    tokenizer = music_tokenizer("remi", programs=True)
    model = network(tokenizer), tokenizer
    given, bar = theme()
    drums = symusic.Track(name="Kit", program=0, is_drum=True)
    drums.notes.append(symusic.Note(0, 30, 36, 90))
    given.tracks.append(drums)

    def players(programs):
        score = continue_piece(
            model, given, prompt_bars=2, bars=6, programs=programs, sampling=Sampling(seed=1)
        )[0]
        return {
            "drums" if track.is_drum else track.program
            for track in score.tracks
            for note in track.notes
            if note.time >= 2 * bar
        }

    assert players(None) == {5, "drums"}
    assert players({0, 32}) == {0, 32}


@pytest.mark.parametrize("kind", ["remi", "tsd", "midilike", "performance"])
def test_pitch_range(kind):
    tokenizer = music_tokenizer(kind)
    given, bar = theme()
    settings = {"prompt_bars": 2, "bars": 6, "pitch_range": (50, 55)}
    score = continue_piece((network(tokenizer), tokenizer), given, **settings)[0]
    new = notes(score, since=2 * bar)
    assert new
    assert all(50 <= pitch <= 55 for _, _, _, pitch, _ in new)


def test_new_notes_never_sound_with_one_of_their_pitch():
    tokenizer = music_tokenizer("remi")
    given, bar = theme()
    given.tracks[0].notes.append(symusic.Note(2 * bar - 5, 3 * bar, 52, 70))
    settings = {"prompt_bars": 2, "bars": 6, "pitch_range": (50, 53)}
    score = continue_piece((network(tokenizer), tokenizer), given, **settings)[0]
    assert (5, 2 * bar - 5, 3 * bar, 52, 70) in notes(score)
    new = [*notes(score, since=2 * bar), (5, 2 * bar - 5, 3 * bar, 52, 70)]
    for pitch in range(50, 54):
        spans = sorted((time, time + size) for _, time, size, own, _ in new if own == pitch)
        assert all(a[1] <= b[0] for a, b in pairwise(spans))


def test_four_voices_play_on_in_their_own_tracks():
    tokenizer = music_tokenizer("satb")
    rows = [
        (t * 480, 480, p + t % 3, 80, v) for t in range(16) for v, p in enumerate((70, 64, 55, 45))
    ]
    names = ("Fl", "Ob", "Cl", "Fg")
    tracks = tuple(TrackInfo(name, 68 + i) for i, name in enumerate(names))
    piece = Piece(tracks, np.array(rows))
    score = continue_piece((network(tokenizer), tokenizer), piece, prompt_bars=4, bars=2)[0]
    assert [track.name for track in score.tracks] == [*names]
    assert all(any(n.time >= 4 * 1920 for n in track.notes) for track in score.tracks)


def test_a_held_pedal_is_released_and_musicxml_is_read(tmp_path):
    tokenizer = music_tokenizer("tsd")
    given, bar = theme()
    score = continue_piece((network(tokenizer), tokenizer), given, prompt_bars=2, bars=1)[0]
    controls = [(c.time, c.number, c.value) for c in score.tracks[0].controls]
    assert controls == [(10, 64, 127), (2 * bar, 64, 0)]
    abc = tmp_path / "tune.abc"
    abc.write_text("X:1\nT:x\nM:3/4\nL:1/4\nK:C\nCDE|FGA|GFE|\n")
    score = continue_piece((network(tokenizer), tokenizer), abc, prompt_bars=2, bars=2)[0]
    assert score.end() == 4 * 3 * 480
    assert [n.pitch for n in score.tracks[0].notes if n.time < 6 * 480] == [60, 62, 64, 65, 67, 69]


def stopped(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        run(["music", "continue", *map(str, arguments)])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_mistakes(tmp_path, capsys):
    model = save(tmp_path / "model", "tsd")
    file, out = tmp_path / "theme.mid", tmp_path / "out"
    theme()[0].dump_midi(str(file))
    start = ["--model", model, "--prompt", file, "--out-dir", out]
    assert "the prompt has 7 bars, and prompt_bars is 9: choose fewer, or give" in stopped(
        capsys, [*start, "--prompt-bars", 9]
    )
    assert "continue needs prompt_bars, bars and n of at least 1; got 4, 0, 4." in stopped(
        capsys, [*start, "--bars", 0]
    )
    assert "programs is written 0,32, got 'piano'." in stopped(
        capsys, [*start, "--programs", "piano"]
    )
    assert "pitch_range is written 36:84, lowest first, got '84:36'." in stopped(
        capsys, [*start, "--pitch-range", "84:36"]
    )
    assert "name no instruments" in stopped(capsys, [*start, "--programs", "0"])
    assert "top_p in (0, 1]" in stopped(capsys, [*start, "--top-p", 0])
    empty = tmp_path / "empty.mid"
    symusic.Score(480).dump_midi(str(empty))
    message = stopped(capsys, ["--model", model, "--prompt", empty, "--out-dir", out])
    assert "empty.mid cannot be used: no notes" in message
    late, bar = theme()
    late.tracks[0].notes = [symusic.Note(3 * bar, 100, 60, 70)]
    with pytest.raises(ValueError, match=r"no note begins in the first 2 bars of the prompt\."):
        continue_piece(model, late, prompt_bars=2, bars=1)
    assert not list(out.iterdir())
    (out / "2.png").touch()
    assert "has 2.png: choose another --out-dir, or pass --overwrite." in stopped(capsys, start)
    assert "cannot make the folder" in stopped(
        capsys, ["--model", model, "--prompt", file, "--out-dir", file]
    )


def test_a_piece_that_the_tokens_cannot_write():
    tokenizer = music_tokenizer("satb")
    given, _ = theme()
    given.tracks[0].notes = [symusic.Note(0, 4 * TPQ, 60 + i, 70) for i in range(5)]
    with pytest.raises(ValueError, match=r"in the model's satb tokens: it 5 notes sound at once"):
        continue_piece((network(tokenizer), tokenizer), given, prompt_bars=1, bars=1)
