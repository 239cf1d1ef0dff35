"""Imports point one way: kernels <- zoo <- lightning_modules <- statezoo; data knows no model."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOR_ALL = {"safety", "shipped"}  # know no other part
MAY_IMPORT = {
    "kernels": {"kernels"},
    "zoo": {"kernels", "zoo", *FOR_ALL},
    "datamodules": {"datamodules", *FOR_ALL},
    "lightning_modules": {"kernels", "zoo", "datamodules", "lightning_modules", "hub", *FOR_ALL},
}
FILES = [f for folder in MAY_IMPORT for f in sorted((ROOT / folder).rglob("*.py"))]


def own_imports(file: Path) -> set[str]:
    """The parts of statezoo that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("statezoo.")}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_one_way(file):
    layer = file.relative_to(ROOT).parts[0]
    wrong = own_imports(file) - MAY_IMPORT[layer]
    assert not wrong, f"{layer} must not import {wrong}"


@pytest.mark.parametrize("part", sorted(FOR_ALL))
def test_what_all_may_import_imports_nothing_of_ours(part):
    assert not own_imports(ROOT / "src" / "statezoo" / f"{part}.py")


def test_every_layer_was_read():
    assert len(FILES) > 20
    assert "kernels" in own_imports(ROOT / "zoo" / "gla.py")
