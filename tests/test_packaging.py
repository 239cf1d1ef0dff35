"""The package installs, whole, under one name, and is light to import."""

import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("zoo", "kernels", "lightning_modules", "datamodules", "configs", "hub_cards")


def python(*args: str, cwd: Path | None = None, executable: str = sys.executable) -> str:
    """Run an isolated Python: the folder it starts in is not on its path."""
    run = subprocess.run(
        [executable, "-P", *args], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    # the build backend that the project's own environment has: no network, seconds
    build = "from setuptools.build_meta import build_wheel; import sys; build_wheel(sys.argv[1])"
    tree = tmp_path_factory.mktemp("tree") / "statezoo"
    copy_tracked(tree)
    python("-W", "ignore", "-c", build, str(out), cwd=tree)
    return next(out.glob("*.whl"))


def copy_tracked(target: Path) -> None:
    """Copy the files that make the package, links as links, without what earlier builds left."""
    listing = ["git", "ls-files", "-co", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        source, copy = ROOT / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            copy.symlink_to(source.readlink())
        elif source.is_file():
            copy.write_bytes(source.read_bytes())


def modules_of_the_checkout() -> set[str]:
    files = [f for folder in FOLDERS for f in (ROOT / folder).rglob("*.py")]
    return {f"statezoo/{f.relative_to(ROOT).as_posix()}" for f in files}


def test_wheel_holds_every_module_and_config(wheel):
    members = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"statezoo/{f.relative_to(ROOT)}" for f in (ROOT / "configs").rglob("*.yaml")}
    cards = {f"statezoo/{f.relative_to(ROOT)}" for f in (ROOT / "hub_cards").rglob("*.*")}
    tasks = {
        f"statezoo/{f.relative_to(ROOT / 'src/statezoo')}"
        for f in (ROOT / "src/statezoo/evaluation/tasks").iterdir()
    }
    assert configs
    assert cards
    assert tasks
    others = configs | {name for name in cards if not name.endswith(".pyc")} | tasks
    missing = (modules_of_the_checkout() | others | {"statezoo/py.typed"}) - members
    assert not missing, "list new folders in pyproject.toml, [tool.setuptools]"
    assert not [m for m in members if m.split("/")[0] in FOLDERS]


def test_wheel_imports_everything_in_an_empty_environment(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=False)
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    # its dependencies are those of this environment, minus this checkout
    here = [p for p in sys.path if "site-packages" in p]
    (site / "dependencies.pth").write_text("\n".join(here))
    files = [
        name.removesuffix(".py") for name in zipfile.ZipFile(wheel).namelist() if ".py" in name
    ]
    names = [f.removesuffix("/__init__").replace("/", ".") for f in files]
    names = [n for n in names if not n.endswith((".__main__", ".triton", ".typed"))]
    script = (
        f"import importlib, statezoo; [importlib.import_module(name) for name in {names}]; "
        "print(statezoo.__file__)"
    )
    found = python("-c", script, cwd=tmp_path, executable=str(tmp_path / "env/bin/python"))
    assert Path(found).is_relative_to(site)
    assert {"statezoo.zoo.gla", "statezoo.datamodules.text", "statezoo.cli"} <= set(names)


def test_import_statezoo_is_light():
    script = (
        "import statezoo, sys; print([m for m in sys.modules if m in ('torch', 'transformers')])"
    )
    assert python("-c", script).strip() == "[]"


IMPORTED = f"""
import statezoo.zoo, statezoo.lightning_modules, statezoo.datamodules, sys
print([m for m in sys.modules if m.split('.')[0] in {FOLDERS}])
"""


def test_folders_never_become_top_level_modules(tmp_path):
    assert python("-c", IMPORTED, cwd=tmp_path).strip() == "[]"


def test_imports_from_the_root_of_the_checkout():
    # here the folders are in sight, and transformers looks for Hugging Face's `kernels` package: it
    # may find a bare namespace, never a module of ours
    shown = subprocess.run(
        [sys.executable, "-c", IMPORTED + "import kernels; print(kernels.__file__)"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert set(eval(shown.stdout.splitlines()[0])) <= {"kernels"}
    assert shown.stdout.splitlines()[1] == "None"


def test_kernels_folder_stays_a_namespace():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_pinned_set_meets_the_stated_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    extras = project["optional-dependencies"].values()
    for requirement in [*project["dependencies"], *(r for extra in extras for r in extra)]:
        name = "".join(c if c.isalnum() or c in "-_" else " " for c in requirement).split()[0]
        assert name == "statezoo" or name in pins, f"pin {name} in constraints.txt"
