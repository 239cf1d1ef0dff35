"""Infilling: outside the span nothing changes, inside it only the masked tracks do."""

from itertools import pairwise

import mido
import numpy as np
import pytest
import symusic
import torch

from statezoo.commands import run
from statezoo.datamodules.music.notes import Piece
from statezoo.datamodules.music.tokenizers import music_tokenizer
from statezoo.datamodules.tokenizers import Characters
from statezoo.music import Sampling, infill
from statezoo.music.decoding import sample, score
from statezoo.music.infilling import find_task
from statezoo.music.merging import Events
from statezoo.zoo import StateZooConfig, StateZooForCausalLM

pytestmark = [
    pytest.mark.filterwarnings("ignore:pkg_resources is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:Deprecated call to .pkg_resources:DeprecationWarning"),
]

MAMBA = [{"name": "mamba2", "head_dim": 16, "d_state": 8}]
MODELS = [
    ("satb", {}, ["gla"]),
    ("satb", {"hold": True}, MAMBA),
    ("remi", {}, MAMBA),
    ("remi", {"programs": True}, ["gla"]),
    ("tsd", {"programs": True}, ["gla"]),
    ("midilike", {}, ["gla"]),
    ("performance", {}, ["gla"]),
]
TPQ = 220
NAMES = ("Soprano", "Alto", "Tenor", "Bass")


def network(tokenizer, mixers=("gla",)):
    torch.manual_seed(0)
    config = StateZooConfig(vocab_size=tokenizer.vocab_size, d_model=16, mixers=[*mixers])
    return StateZooForCausalLM(config).eval()


def save(folder, kind="satb", settings=None, mixers=("gla",)):
    tokenizer = music_tokenizer(kind, **(settings or {}))
    network(tokenizer, mixers).save_pretrained(folder)
    tokenizer.save(folder)
    return str(folder)


def chorale(meter=(4, 4), bars=6):
    """Four voices off the grid, notes over every bar line, and a pedal."""
    rng = np.random.default_rng(0)
    bar = 4 * TPQ * meter[0] // meter[1]
    score = symusic.Score(TPQ)
    for voice, name in enumerate(NAMES):
        track = symusic.Track(name=name, program=10 * voice)
        edges = np.sort(rng.choice(np.arange(1, bars * bar // 20), 5 * bars, replace=False)) * 20
        for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            pitch = 72 - 9 * voice + int(rng.integers(5))
            track.notes.append(symusic.Note(begin + voice, end - begin, pitch, 60 + pitch % 40))
        track.controls.append(symusic.ControlChange(10 * voice, 64, 127))
        score.tracks.append(track)
    score.time_signatures.append(symusic.TimeSignature(0, *meter))
    score.tempos.append(symusic.Tempo(0, 90))
    score.tempos.append(symusic.Tempo(3 * bar, 70))
    return score, bar


def notes(score, tracks=range(4), since=0, until=1 << 30):
    return sorted(
        (number, note.time, note.duration, note.pitch, note.velocity)
        for number, track in enumerate(score.tracks)
        for note in track.notes
        if number in tracks and since <= note.time < until
    )


def events(score):
    kinds = ("tempos", "time_signatures", "key_signatures", "markers")
    found = [[str(event) for event in getattr(score, kind)] for kind in kinds]
    return found + [[str(c) for c in track.controls] for track in score.tracks]


def check(filled, given, masked, begin, end):
    """Compare with the file; returns the new notes."""
    assert filled.ticks_per_quarter == TPQ
    assert [t.name for t in filled.tracks] == [*NAMES]
    assert notes(filled, until=begin) == notes(given, until=begin)
    assert notes(filled, since=end) == notes(given, since=end)
    others = set(range(4)) - set(masked)
    assert notes(filled, others) == notes(given, others)
    assert events(filled) == events(given)
    new = notes(filled, masked, begin, end)
    assert all(time + size <= end and size > 0 for _, time, size, _, _ in new)
    for track, time, _, pitch, _ in new:  # a pitch never begins while it sounds
        same = [n for n in notes(filled, [track]) if n[3] == pitch and n[1] <= time < n[1] + n[2]]
        assert len(same) == 1
    return new


@pytest.mark.parametrize(("kind", "settings", "mixers"), MODELS)
@pytest.mark.parametrize(("meter", "bars"), [((4, 4), "3:4"), ((3, 4), "1"), ((6, 8), "5:6")])
def test_nothing_else_changes(kind, settings, mixers, meter, bars):
    tokenizer = music_tokenizer(kind, **settings)
    given, bar = chorale(meter)
    first, last = (int(part) for part in (bars if ":" in bars else f"{bars}:{bars}").split(":"))
    model = network(tokenizer, mixers), tokenizer
    whole = notes(given)
    filled = infill(model, given, tracks="2,Bass", bars=bars, n=6, sampling=Sampling(seed=1))
    assert notes(given) == whole
    new = check(filled, given, (1, 3), (first - 1) * bar, last * bar)
    assert new
    assert new != notes(given, (1, 3), (first - 1) * bar, last * bar)


@pytest.mark.parametrize("hold", [False, True])
def test_voices_stay_in_range_and_sound_one_note_at_a_time(hold):
    tokenizer = music_tokenizer("satb", hold=hold)
    given, bar = chorale()
    model = network(tokenizer), tokenizer
    filled = infill(model, given, tracks="1,2,3,4", bars="2:5", n=2, sampling=Sampling(seed=3))
    new = check(filled, given, range(4), bar, 5 * bar)
    ranges = ((60, 81), (53, 74), (48, 69), (36, 64))
    assert {note[0] for note in new} == {0, 1, 2, 3}
    assert all(ranges[track][0] <= pitch <= ranges[track][1] for track, _, _, pitch, _ in new)
    for voice in range(4):
        line = notes(filled, [voice])
        assert all(a[1] + a[2] <= b[1] for a, b in pairwise(line))


@pytest.mark.parametrize("kind", ["satb", "remi", "performance"])
def test_files_load_and_the_same_seed_gives_the_same_bytes(kind, tmp_path):
    model = save(tmp_path / "model", kind)
    given, bar = chorale()
    given.dump_midi(str(tmp_path / "song.mid"))
    given = symusic.Score(str(tmp_path / "song.mid"))
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = tmp_path / f"{name}.mid"
        run(
            f"music infill --model {model} --input {tmp_path}/song.mid --tracks 1 --bars 3:4 "
            f"--out {out} --n 2 --seed {seed}".split()
        )
        found.append(out.read_bytes())
        assert check(symusic.Score(str(out)), given, [0], 2 * bar, 4 * bar)
        plain = mido.MidiFile(out)
        begun = [m for track in plain.tracks for m in track if m.type == "note_on" and m.velocity]
        assert plain.ticks_per_beat == TPQ
        assert len(begun) == len(notes(symusic.Score(str(out))))
    assert found[0] == found[1] != found[2]


def test_the_candidate_that_the_model_finds_likeliest_is_taken():
    tokenizer = music_tokenizer("satb")
    net = network(tokenizer)
    given, _ = chorale()

    def nats(one):
        return score(net, tokenizer, tokenizer.encode_piece(Piece.from_score(one))).sum()

    def draw(n):
        return infill((net, tokenizer), given, tracks="3", bars="4:6", n=n)

    first, best = draw(1), draw(8)
    assert notes(first) != notes(best)
    assert nats(best) > nats(first)


def stopped(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        run(["music", "infill", *map(str, arguments)])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_mistakes(tmp_path, capsys):
    model, file, out = save(tmp_path / "model"), tmp_path / "song.mid", tmp_path / "out.mid"
    chorale()[0].dump_midi(str(file))
    start = ["--model", model, "--input", file, "--out", out]
    message = stopped(capsys, [*start, "--tracks", "1,Flute", "--bars", "1"])
    assert "there is no track 'Flute'; the file has 1 (Soprano), 2 (Alto), 3 (Tenor), 4" in message
    assert "there is no track '5'" in stopped(capsys, [*start, "--tracks", 5, "--bars", "1"])
    for bars in ("4:3", "7", "0:2"):
        message = stopped(capsys, [*start, "--tracks", 1, "--bars", bars])
        assert f"the file has bars 1 to 6, got '{bars}'." in message
    message = stopped(capsys, [*start, "--tracks", 1, "--bars", "x"])
    assert "bars are written 9:12, or 9 for one, got 'x'." in message
    message = stopped(capsys, [*start, "--tracks", 1, "--bars", 1, "--n", 0])
    assert "infill needs n of at least 1, got 0." in message
    assert not out.exists()
    out.touch()
    message = stopped(capsys, [*start, "--tracks", 1, "--bars", 1])
    assert "out.mid is there already: choose another --out, or pass --overwrite." in message


def test_models_that_cannot_write_it():
    satb, given = music_tokenizer("satb"), chorale()[0]
    model = network(satb), satb
    three = given.copy()
    three.tracks = [three.tracks[i] for i in range(3)]
    with pytest.raises(ValueError, match=r"needs four tracks .* it has 1 \(Soprano\), 2 \(Alto\)"):
        infill(model, three, tracks="1", bars="1")
    two = given.copy()
    two.tracks[1].notes.append(symusic.Note(0, 6 * 4 * TPQ, 60, 70))
    with pytest.raises(ValueError, match=r"track 2 \(Alto\) has two notes at once in bar 1\."):
        infill(model, two, tracks="1", bars="1")
    text = Characters("abc")
    with pytest.raises(ValueError, match="music infill needs a model of music"):
        infill((network(text), text), given, tracks="1", bars="1")
    kit = given.copy()
    kit.tracks[3].is_drum = True
    remi = music_tokenizer("remi")
    with pytest.raises(ValueError, match=r"track 4 \(Bass\) has drums, which the model's remi"):
        infill((network(remi), remi), kit, tracks="4", bars="1")


EVENTS = [
    (kind, settings)
    for kind in ("remi", "tsd", "midilike")
    for settings in ({}, {"programs": True})
] + [("performance", {})]


@pytest.mark.parametrize(("kind", "settings"), EVENTS)
def test_the_model_reads_the_kept_notes_of_the_span_in_their_place(kind, settings):
    tokenizer = music_tokenizer(kind, **settings)
    given, _ = chorale()
    given.tracks[0].program = 10  # as the masked one
    given.tracks[3].is_drum = bool(settings)
    work = Events(tokenizer, find_task(given, "2", "3:4"))
    net = network(tokenizer)
    kept = tokenizer.encode_piece(work.task.kept)

    def played(ids):
        piece = tokenizer.decode_piece(ids)
        return {
            (piece.tracks[note[4]].is_drum, piece.tracks[note[4]].program, *note[:1], *note[2:4])
            for note in piece.notes.tolist()
            if work.start <= note[0] < work.end
        }

    rules = {"end": work.end, "allowed": work.allowed, "forced": work.forced}
    for row in sample(net, tokenizer, work.prompt, rows=3, sampling=Sampling(seed=4), **rules):
        whole = played([*work.prompt, *row.ids])
        assert len(played(kept)) > 10
        assert played(kept) <= whole
        assert len(whole - played(kept)) == len(work.notes(row))


@pytest.mark.parametrize("kind", ["satb", "remi", "performance"])
def test_all_bars_of_all_tracks(kind):
    tokenizer = music_tokenizer(kind)
    given, bar = chorale()
    filled = infill((network(tokenizer), tokenizer), given, tracks="1,2,3,4", bars="1:6", n=2)
    assert check(filled, given, range(4), 0, 6 * bar)


def test_merged_tokens_write_the_masked_tracks_alone():
    given, bar = chorale()
    plain = music_tokenizer("tsd")
    tokenizer = plain.train([Piece.from_score(given)], plain.vocab_size + 20)
    settings = {"tracks": "Alto", "bars": "3:4", "n": 2, "sampling": Sampling(seed=1)}
    filled = infill((network(tokenizer), tokenizer), given, **settings)
    assert check(filled, given, [1], 2 * bar, 4 * bar)
