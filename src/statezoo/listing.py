"""What ``statezoo list`` shows, read off the sources and shipped configs without torch."""

from __future__ import annotations

import ast
import fnmatch
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

SIZE = re.compile(r"_(tiny|small|\d+m)$")
STATEMENT = re.compile(
    r"([\d.]+) million parameters (?:on (bytes)|with a vocabulary of (\d+)), "
    r"([^,;]+ a (?:sequence|token)); ([^;]+)\."
)
"""Second line of every preset; tests/zoo/test_presets.py holds it against the model."""
WIDTH = 100
COLUMNS = ("preset", "parameters", "vocabulary", "state a sequence (float32)", "trains on")
NAMES = {"Attention": "Transformer"}
"""Modules whose names are not those of their mixers' classes."""


@dataclass(frozen=True)
class Preset:
    """A shipped config of a model, as its header and its file name describe it.

    Attributes:
        name: Name of the file, without ``.yaml``.
        model: Class of the model.
        title: What it is, without the paper.
        paper: Where it was published, such as ``arXiv:2312.06635``; or nothing.
        cells: Parameters, vocabulary, state of a sequence, what it trains on.
    """

    name: str
    model: str
    title: str
    paper: str
    cells: tuple[str, str, str, str]

    @property
    def architecture(self) -> str:
        """Name without the size."""
        return SIZE.sub("", self.name)

    @property
    def size(self) -> tuple[int, float]:
        """Order within an architecture: the plain name first, then by parameters."""
        return int(self.name != self.architecture), float(self.cells[0].split()[0])

    def matches(self, pattern: str) -> bool:
        """Say whether the pattern fits the preset, its architecture or its class."""
        return fits(pattern, self.name, self.architecture, self.model)


def fits(pattern: str, *names: str) -> bool:
    """Say whether a shell pattern fits one of the names, in either case."""
    return any(fnmatch.fnmatchcase(name.lower(), pattern.lower()) for name in names)


def listing(pattern: str = "*") -> str:
    """Compose the lists of everything whose name fits ``pattern``, in at most 100 columns.

    Raises:
        ValueError: If there is no such name.
    """
    presets, others = configs()
    hybrid = ("Hybrid", "A stack of different mixers: the list of them repeats over the layers.")
    modules = dict([*classes("zoo", "Mixer"), hybrid])
    tasks = [x for base in ("Task", "TokenTask") for x in classes("lightning_modules", base)]
    data = [x for base in ("SplitData", "LabelledData") for x in classes("datamodules", base)]
    covered = {preset.model for preset in presets}
    sections = {
        "architectures without a preset (--model)": {
            (name, what) for name, what in modules.items() if name not in covered
        },
        "tasks, of any mixers (--model)": {x for x in tasks if x[0] != "TokenTask"},
        "data (--data)": {x for x in data if x[0] != "LabelledData"},
        "other configs (--config)": set(others),
    }
    text = table([preset for preset in presets if preset.matches(pattern)])
    for title, found in sections.items():
        rows = sorted((name, what) for name, what in found if fits(pattern, name))
        if rows:
            lines = aligned([(f"  {name}", what) for name, what in rows])
            text += [title, *(x if len(x) <= WIDTH else f"{x[: WIDTH - 3]}..." for x in lines), ""]
    if not text:
        raise ValueError(f"nothing is called {pattern!r}: statezoo list shows all names.")
    return "\n".join(text)


def table(presets: Sequence[Preset]) -> list[str]:
    """Lay out presets, a row each, under the title of their architecture."""
    groups: dict[str, list[Preset]] = {}
    for preset in sorted(presets, key=lambda p: (p.architecture, p.size)):
        groups.setdefault(preset.architecture, []).append(preset)
    rows = [COLUMNS, *((f"  {p.name}", *p.cells) for group in groups.values() for p in group)]
    head, *lines = aligned(rows)
    text = ["architectures (--model) and their presets (--config)", "", head] if groups else []
    for group in groups.values():
        first = group[0]
        about = [x for x in (first.title, first.paper) if x and x != first.model]
        text += [f"{first.model}  {', '.join(about)}", *(lines.pop(0) for _ in group)]
    return [*text, ""] if groups else []


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Write rows of cells in columns, two spaces apart."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def configs() -> tuple[list[Preset], list[tuple[str, str]]]:
    """Return the presets among the shipped configs, and the others with their first comment."""
    presets, others = [], []
    for path, file in walk(files("statezoo") / "configs"):
        name, _, ending = path.rpartition(".")
        if ending != "yaml":
            continue
        text = file.read_text(encoding="utf-8")
        if preset := read(name, text):
            presets.append(preset)
        else:
            others.append((name, text.partition("\n")[0].lstrip("# ").partition(". ")[0]))
    return presets, others


def read(name: str, text: str) -> Preset | None:
    """Return the preset that a config's text describes, if it does."""
    title, statement, *_ = [line.lstrip("# ") for line in text.splitlines()] + ["", ""]
    said = STATEMENT.fullmatch(statement)
    model = re.search(r"^  class_path: *(?:\S*\.)?(\w+)", text, re.MULTILINE)
    if said is None or model is None:
        return None
    what, _, paper = title.removesuffix(".").rpartition(", arXiv:")
    millions, on_bytes, vocabulary, state, where = said.groups()
    state = state.replace(" of state", "").removesuffix(" a sequence")  # as the column says
    cells = (f"{millions} M", on_bytes or vocabulary, state, where)
    return Preset(name, model[1], what or title, paper and f"arXiv:{paper}", cells)


def walk(folder: Traversable, within: str = "") -> Iterator[tuple[str, Traversable]]:
    """Yield the files of a folder and of those in it, each after its path from the folder."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from walk(entry, f"{within}{entry.name}/")
        else:
            yield within + entry.name, entry


def classes(part: str, base: str) -> Iterator[tuple[str, str]]:
    """Yield the classes of a part of the library, with the first line of their documentation."""
    for path, file in walk(files("statezoo") / part):
        if not path.endswith(".py"):
            continue
        source = file.read_text(encoding="utf-8")
        if f"{base})" not in source:
            continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and base in map(last_name, node.bases):
                text = ast.get_docstring(node) or ""
                yield NAMES.get(node.name, node.name), text.partition("\n")[0]


def last_name(base: ast.expr) -> str:
    """Return the last part of a dotted name."""
    return ast.unparse(base).rpartition(".")[2]
