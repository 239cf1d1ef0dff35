"""The JSB benchmark: its numbers against plain loops, what it refuses, that it goes on."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from statezoo.datamodules.music.data import Music
from statezoo.datamodules.music.frames import PianoFrames
from statezoo.lightning_modules import CausalLM
from statezoo.lightning_modules.note_frames import NoteFrames
from statezoo.music import bench as bench_module
from statezoo.music import jsb
from statezoo.music.bench import bench

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches.*"),
]

SHARED = Path(__file__).parents[2] / "../shared/data/music"
TINY = {"d_model": 16, "n_layers": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STATEZOO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    """A folder with both files, of a few short pieces, under their upstream names."""
    rng = np.random.default_rng(0)

    def voices(steps):
        top = rng.integers(60, 80, steps).repeat(4)
        return [[int(p), int(p) - 5, int(p) - 12, -1 if p % 5 == 0 else int(p) - 24] for p in top]

    def frames(steps):
        return [sorted(set(rng.integers(40, 80, 4).tolist())) for _ in range(steps)]

    folder = tmp_path / "root" / "sub"
    folder.mkdir(parents=True)
    sizes = {"train": (6, 5, 8), "valid": (3, 6), "test": (7, 2, 4)}
    content = {split: [voices(n) for n in steps] for split, steps in sizes.items()}
    (folder / "Jsb16thSeparated.json").write_text(json.dumps(content))
    content = {split: [frames(n) for n in steps] for split, steps in sizes.items()}
    packed = gzip.compress(json.dumps(content).encode())
    (folder / "jsb-chorales-quarter.json.gz").write_bytes(packed)
    return folder.parent


def fit(module, data, path):
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=path.parent,
    )
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(path, weights_only=False)
    return path


@pytest.fixture
def frames_ckpt(root, tmp_path):
    seed_everything(1, verbose=False)
    data = PianoFrames(str(root / "sub/jsb-chorales-quarter.json.gz"), transpose=3)
    return fit(NoteFrames(["gla"], **TINY), data, tmp_path / "frames.ckpt")


def grid_data(root, **more):
    settings = {"packing": "pieces", "seq_len": 64, "batch_size": 2, "transpose": (0, 0)}
    return Music(str(root / "sub/Jsb16thSeparated.json"), **{**settings, **more})


@pytest.fixture
def tokens_ckpt(root, tmp_path):
    seed_everything(1, verbose=False)
    data = grid_data(root)
    module = CausalLM(["gla"], vocab_size=data.vocab_size, **TINY)
    return fit(module, data, tmp_path / "tokens.ckpt")


def loop_over_frames(module, pieces):
    """Each frame by itself, from its past alone, note by note."""
    total = count = 0
    for piece in pieces:
        frames = torch.zeros(1, len(piece), 88, dtype=torch.uint8)
        for t, pitches in enumerate(piece):
            for pitch in pitches:
                frames[0, t, pitch - 21] = 1
        for t in range(len(piece)):
            past = frames[:, : t + 1].clone()
            past[0, t] = 0
            with torch.no_grad():
                p = torch.sigmoid(module.net(past)[0][0, t].double()).tolist()
            for note in range(88):
                total -= math.log(p[note] if frames[0, t, note] else 1 - p[note])
            count += 1
    return total / count


def loop_over_tokens(net, pieces):
    """Each token by itself, from BOS and the tokens before it."""
    nats, on_beat = [], []
    for piece in pieces:
        before = [47]
        for step, voices in enumerate(piece):
            for pitch in voices:
                token = 0 if pitch < 0 else pitch - 35
                with torch.no_grad():
                    logits = net(torch.tensor([before])).logits[0, -1].double()
                nats.append(-float(torch.log_softmax(logits, 0)[token]))
                if step % 4 == 0:
                    on_beat.append(nats[-1])
                before.append(token)
    return np.mean(nats), np.mean(on_beat)


def test_frames_equal_a_plain_loop(root, frames_ckpt, tmp_path, capsys):
    """To 1e-5: float32 in another order."""
    out = tmp_path / "table.md"
    bench(root=str(root), models=str(frames_ckpt), out=str(out))
    from statezoo.lightning_modules import load_checkpoint

    module = load_checkpoint(frames_ckpt).eval()
    content = json.loads(gzip.decompress((root / "sub/jsb-chorales-quarter.json.gz").read_bytes()))
    scores = kept(out, '["frames", "/')
    for split in ("valid", "test"):
        want = loop_over_frames(module, content[split])
        assert scores[split] == pytest.approx(want, abs=1e-5)
        assert f"| {want:.3f} " in out.read_text()
    assert "transposed -3 to +3 in training" in out.read_text()
    assert "| GRU |  | 8.430 |  | published [1] |" in out.read_text()
    assert "quoted, not checked" in out.read_text()
    assert out.read_text() in capsys.readouterr().out


def kept(out, begin):
    rows = json.loads(out.with_suffix(".json").read_text())
    (found,) = [row for key, row in rows.items() if key.startswith(begin)]
    return found


def test_tokens_equal_a_plain_loop(root, tokens_ckpt, tmp_path):
    """To 1e-5: float32 in another order."""
    out = tmp_path / "table.md"
    bench(root=str(root), models=str(tokens_ckpt), out=str(out))
    from statezoo.lightning_modules import load_network

    net = load_network(tokens_ckpt).eval()
    content = json.loads((root / "sub/Jsb16thSeparated.json").read_text())
    scores = kept(out, '["tokens", "/')
    for split in ("valid", "test"):
        every, on_beat = loop_over_tokens(net, content[split])
        assert scores[split] == pytest.approx(every, abs=1e-5)
        assert scores[f"{split} on beat"] == pytest.approx(on_beat, abs=1e-5)
    assert "not transposed" in out.read_text()


def test_what_is_finished_is_not_scored_again(root, frames_ckpt, tmp_path, monkeypatch):
    out = tmp_path / "table.md"
    bench(root=str(root), models=str(frames_ckpt), out=str(out))
    first = out.read_text()

    def never(*_):
        raise AssertionError("scored again")

    for name in ("frame_scores", "frame_baselines_of", "token_baselines_of"):
        monkeypatch.setattr(jsb, name, never)
    bench(root=str(root), models=str(frames_ckpt), out=str(out))
    assert out.read_text() == first


def test_a_checkpoint_of_the_same_music_is_refused(root, frames_ckpt, tmp_path, capsys):
    content = torch.load(frames_ckpt, weights_only=True)
    content["PianoFrames"]["path"] = None  # as music21's Bach is named
    torch.save(content, frames_ckpt)
    out = tmp_path / "table.md"
    bench(root=str(root), models=str(frames_ckpt), out=str(out))
    said = capsys.readouterr().out
    assert "68 of the 77 pieces of the JSB test" in said
    (row,) = [line for line in out.read_text().splitlines() if str(frames_ckpt) in line][:1]
    assert row.split("|")[2:4] == ["  ", "  "]
    assert "refused" in row
    assert not any(key.startswith('["frames", "/') for key in json.loads(kept_text(out)))


def kept_text(out):
    return out.with_suffix(".json").read_text()


def test_weights_that_began_with_the_same_music_are_refused(tmp_path):
    torch.save({"state_dict": {}, "Music": {"path": None}}, tmp_path / "bach.ckpt")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(
        f"model: {{init_args: {{pretrained: {tmp_path}/bach.ckpt}}}}\n"
        "data: {init_args: {path: jsb_16th_satb.json}}\n"
    )
    trained = jsb.trained_on(folder / "best.ckpt", {})
    assert trained.bach
    with pytest.raises(jsb.Contaminated, match="statezoo fit --config music/jsb_frames"):
        jsb.refuse_bach("x", trained)


@pytest.mark.parametrize(
    ("settings", "note", "transpose"),
    [
        ({"path": "a/jsb_quarter_roll.json.gz", "transpose": 5}, "", "-5 to +5"),
        ({"path": "Jsb16thSeparated.json", "transpose": [0, 0]}, "", "no"),
        ({"path": "songs"}, "trained on songs, not checked for these chorales", ""),
        ({}, "training data unknown", ""),
    ],
)
def test_what_is_known_of_the_training(tmp_path, settings, note, transpose):
    trained = jsb.trained_on(tmp_path / "x.ckpt", {"Music": settings})
    assert (trained.note, trained.transpose, trained.bach) == (note, transpose, False)
    (tmp_path / "config.yaml").write_text(json.dumps({"data": {"init_args": settings}}))
    assert jsb.trained_on(tmp_path / "x.ckpt", {}) == trained


def test_other_tokens_are_refused(root, tmp_path):
    data = grid_data(root, encoding_settings={"hold": True})
    module = CausalLM(["gla"], vocab_size=data.vocab_size, **TINY)
    path = fit(module, data, tmp_path / "hold.ckpt")
    with pytest.raises(ValueError, match="reads satb with hold tokens; the benchmark is about"):
        bench(root=str(root), models=str(path), out=str(tmp_path / "t.md"))


def test_a_folder_without_the_chorales(tmp_path):
    with pytest.raises(FileNotFoundError, match="No folder 'nowhere'"):
        bench(root="nowhere")
    with pytest.raises(ValueError, match=r"bench needs one of jsb_quarter_roll\.json, jsb-chor"):
        bench(root=str(tmp_path))


def test_a_model_without_its_file(root, frames_ckpt, tmp_path):
    (root / "sub/jsb-chorales-quarter.json.gz").unlink()
    with pytest.raises(ValueError, match="says frames; the folder lacks their file: jsb_quarter"):
        bench(root=str(root), models=str(frames_ckpt), out=str(tmp_path / "t.md"))


def test_training_with_the_shipped_config_and_going_on(root, tmp_path, monkeypatch):
    calls = []

    def stopped(arguments):
        calls.append(arguments)
        if len(calls) == 1:
            folder = tmp_path / "table/runs/frames-gla-20-0/version_0"
            folder.mkdir(parents=True)
            (folder / "last.ckpt").touch()
            raise KeyboardInterrupt

    monkeypatch.setattr("statezoo.cli.run", stopped)
    file = jsb.find_files(str(root))["frames"]
    given = {"steps": 20, "seed": 0, "runs": tmp_path / "table/runs"}
    with pytest.raises(KeyboardInterrupt):
        bench_module.train("frames", "gla", file, **given)
    assert "--ckpt_path" not in calls[0]
    bench_module.train("frames", "gla", file, **given)
    assert calls[1][-2:] == ["--ckpt_path", str(tmp_path / "table/runs/frames-gla-20-0")]
    bench_module.train("frames", "gla", file, **given)
    assert len(calls) == 2
    assert calls[0][:3] == ["fit", "--config", "music/jsb_frames.yaml"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_train_and_score_in_one_command(root, tmp_path):
    out = tmp_path / "table.md"
    bench(root=str(root), mixers="gla,retnet+attention", task="frames", steps=4, out=str(out))
    text = out.read_text()
    for name in ("**gla (seed 0)**", "**retnet+attention (seed 0)**"):
        (row,) = [line for line in text.splitlines() if name in line]
        assert 0 < float(row.split("|")[3]) < 100


@pytest.mark.skipif(not SHARED.exists(), reason="the JSB chorales are not here")
def test_published_sizes_of_the_grid():
    data = jsb.grid(jsb.find_files(str(SHARED))["tokens"])
    assert [sum(map(len, data.ids(split))) for split in ("val", "test")] == [73632, 75600]
