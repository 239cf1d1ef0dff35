"""Every command and every Python example of the README runs as it stands there."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from statezoo.main import main
from statezoo.zoo import MIXERS

# Lightning calls names that jsonargparse has deprecated
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BY_MAKE = ("make demo", "make test")  # what a newcomer and CI run themselves


def blocks(language: str) -> list[str]:
    """The code blocks in one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    """The commands of all shell blocks, without comments."""
    lines = [
        shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()
    ]
    return [line for line in lines if line]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder with texts of their own."""
    texts = tmp_path / "my_texts"
    texts.mkdir()
    for number in range(4):
        words = [
            f"It was day {day} of voyage {number}, and the sea was calm." for day in range(200)
        ]
        (texts / f"voyage{number}.txt").write_text("\n".join(words))
    write_labels(tmp_path)
    write_genome(tmp_path)
    write_music(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STATEZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path


def write_labels(folder: Path) -> None:
    """Texts with a class, sentences with tags, and what is said of a model's data."""
    rows = [f"{('a calm' if i % 2 else 'a wild')} sea on day {i},{i % 2}" for i in range(40)]
    (folder / "reviews.csv").write_text("\n".join(["text,label", *rows]))
    words = [{"tokens": ["the", "sea", str(i)], "tags": ["O", "PLACE", "DAY"]} for i in range(40)]
    (folder / "words.jsonl").write_text("\n".join(map(json.dumps, words)))
    about = {key: f"of the {key}" for key in ("title", "data_license", "attribution", "test")}
    about |= {key: f"of the {key}" for key in ("contamination", "limits", "use")}
    (folder / "about.yaml").write_text(
        json.dumps(about | {"license": "apache-2.0", "datasets": ["voyages"], "language": "en"})
    )


def write_genome(folder: Path) -> None:
    """A genome with variants, and sequences with and without a class."""
    rng = np.random.default_rng(0)
    bases = "".join(rng.choice(list("ACGT"), 6000))
    (folder / "genome.fa").write_text(f">chr1\n{bases}\n")
    columns = ["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO"]
    rows = [["chr1", str(at), ".", bases[at - 1], "A,C,G,T".replace(bases[at - 1], "."), *"..."]
            for at in (1, 700, 6000)]  # fmt: skip
    lines = ["##fileformat=VCFv4.2", *("\t".join(row) for row in [columns, *rows])]
    (folder / "variants.vcf").write_text("\n".join(lines) + "\n")
    (folder / "reads.fa").write_text(f">a\n{bases[:60]}\n>b\n{bases[60:100]}\n")
    sites = [f"{bases[i : i + 40]},{'yes' if i % 80 else 'no'}" for i in range(0, 2400, 40)]
    (folder / "sites.csv").write_text("\n".join(["sequence,label", *sites]))


def write_music(folder: Path) -> None:
    """Tunes of four bars as MIDI files."""
    symusic = pytest.importorskip("symusic")
    (folder / "my_midis").mkdir()
    for number in range(6):
        score = symusic.Score(480)
        score.tracks.append(symusic.Track("tune", 0))
        for step in range(16):
            pitch = 60 + (step * (number + 3)) % 12
            score.tracks[0].notes.append(symusic.Note(480 * step, 480, pitch, 80))
        score.dump_midi(str(folder / "my_midis" / f"{number}.mid"))
    score.dump_midi(str(folder / "theme.mid"))
    shutil.copy(ROOT / "hub_cards" / "gla-bach" / "sample.mid", folder / "chorale.mid")


def test_every_command_runs_in_order(folder, monkeypatch, capsys):
    ours = [command for command in commands() if " ".join(command) not in BY_MAKE]
    assert len(ours) >= 8
    for command in ours:
        assert command[0] == "statezoo"
        monkeypatch.setattr("sys.argv", command)
        assert not main(), command
    assert "It was" in capsys.readouterr().out
    for left in ("best.ckpt", "last.ckpt", "config.yaml", "metrics.csv", "loss.png", "export"):
        assert (folder / "runs" / "gla-text" / "version_0" / left).exists()
    made = "my_model/model.safetensors nll.bedGraph scored.vcf vectors.parquet generated.fa"
    made += " new.fa llr.vcf scores.csv liger/model.safetensors my_card/README.md lengths.csv"
    made += " parity.md parity.csv parity.png bach/1.mid"
    for name in (*made.split(), "out/1.mid", "out/2.png", "filled.mid", "roll.png", "theme.wav"):
        assert (folder / name).stat().st_size > 0


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for command in BY_MAKE:
        assert command in README
        assert f"\n{command.split()[1]}:" in makefile


@pytest.mark.parametrize("code", blocks("python"), ids=range(len(blocks("python"))))
def test_every_python_example_runs(code, folder):
    exec(compile(code, "README.md", "exec"), {})


def test_every_architecture_is_in_the_table():
    for mixer in MIXERS.values():
        name = "Transformer" if mixer.name == "attention" else mixer.__name__
        if mixer.__module__.startswith("statezoo."):
            assert re.search(rf"^\|.*`{name}`.*\|", README, flags=re.MULTILINE), name


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
