"""Every command and every Python example of the README runs as it stands there."""

import re
import shlex
from pathlib import Path

import pytest

from statezoo.main import main

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
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STATEZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path


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
    assert (folder / "my_model" / "model.safetensors").exists()


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for command in BY_MAKE:
        assert command in README
        assert f"\n{command.split()[1]}:" in makefile


@pytest.mark.parametrize("code", blocks("python"), ids=range(len(blocks("python"))))
def test_every_python_example_runs(code, folder):
    exec(compile(code, "README.md", "exec"), {})


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
