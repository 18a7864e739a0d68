"""The package map: what is listed, what lands in a wheel and an editable install, and what `import layers` says."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("hybridvl", "layers", "pyproject.toml", "README.md", "LICENSE")

# Where hybridvl and hybridvl.layers come from, once everything in them imports.
SHOW_ORIGIN = "import hybridvl.layers.ops; print(hybridvl.__file__, hybridvl.layers.__file__, sep='\\n')"
# The environment's own editable install must not answer for the one under test.
WITHOUT_EDITABLE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in str(finder)]
for name in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[name]
"""


def settings() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def source_folder(package: str) -> Path:
    """The real folder of a package: hybridvl.layers.ops lives in layers/ops."""
    parts = package.split(".")
    return ROOT.joinpath(*(parts[1:] if parts[:2] == ["hybridvl", "layers"] else parts))


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-I", "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, so that building leaves nothing in the working tree."""
    copy = tmp_path_factory.mktemp("project")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(source, copy / name)
    return copy


def build(project: Path, hook: str) -> Path:
    """Call a build hook of the project, as pip does, and return the wheel."""
    out = project / "out" / hook
    out.mkdir(parents=True)
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(out)!r}))"
    done = run_python(code, cwd=project)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


def test_every_folder_with_code_is_listed() -> None:
    found = {"hybridvl" if path.parent == ROOT / "hybridvl" else None for path in ROOT.glob("hybridvl/*.py")}
    for top, prefix in ((ROOT / "hybridvl", "hybridvl"), (ROOT / "layers", "hybridvl.layers")):
        for path in top.rglob("*.py"):
            inner = path.parent.relative_to(top)
            if top.name == "hybridvl" and inner.parts[:1] == ("layers",):
                continue  # the link: counted under layers/
            found.add(".".join((prefix, *inner.parts)))
    assert set(settings()["packages"]) == found


@pytest.mark.parametrize("package", settings()["packages"])
def test_listed_package_is_a_regular_package(package: str) -> None:
    assert (source_folder(package) / "__init__.py").is_file()


def test_layers_is_reached_through_a_relative_link() -> None:
    link = ROOT / "hybridvl" / "layers"
    assert link.is_symlink()
    assert str(link.readlink()) == "../layers"
    assert settings()["package-dir"] == {"hybridvl": "hybridvl", "hybridvl.layers": "layers"}


def test_wheel_holds_every_source_file_once_and_imports(project: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(build(project, "build_wheel")) as wheel:
        names = wheel.namelist()
        wheel.extractall(tmp_path)
    packed = sorted(name for name in names if not name.split("/")[0].endswith(".dist-info"))
    expected = [
        f"{top}/{path.relative_to(project / folder)}"
        for folder, top in (("hybridvl", "hybridvl"), ("layers", "hybridvl/layers"))
        for path in (project / folder).rglob("*.py")
        if "hybridvl/layers" not in str(path)
    ]
    expected += [
        "hybridvl/py.typed",
        *(f"hybridvl/data/tokenizer/{path.name}" for path in (project / "hybridvl/data/tokenizer").iterdir()),
    ]
    assert packed == sorted(expected)

    shown = run_python(f"{WITHOUT_EDITABLE}sys.path.insert(0, {str(tmp_path)!r}); {SHOW_ORIGIN}", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.split() == [
        str(tmp_path / "hybridvl/__init__.py"),
        str(tmp_path / "hybridvl/layers/__init__.py"),
    ]


def test_editable_install_finds_the_working_tree(project: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(build(project, "build_editable")) as wheel:
        wheel.extractall(tmp_path)
    enter = f"import site; sys.path.insert(0, {str(tmp_path)!r}); site.addsitedir({str(tmp_path)!r}); "
    shown = run_python(f"{WITHOUT_EDITABLE}{enter}{SHOW_ORIGIN}", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    package, layers = (Path(line).resolve() for line in shown.stdout.split())
    assert package == project / "hybridvl/__init__.py"
    assert layers == project / "layers/__init__.py"


def test_uninstalled_from_the_root(tmp_path: Path) -> None:
    code = f"{WITHOUT_EDITABLE}sys.path.insert(0, {str(ROOT)!r}); {SHOW_ORIGIN}"
    shown = run_python(code, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert [Path(line).resolve() for line in shown.stdout.split()] == [
        ROOT / "hybridvl/__init__.py",
        ROOT / "layers/__init__.py",
    ]


def test_top_level_layers_refuses_to_be_imported(tmp_path: Path) -> None:
    done = run_python(f"import sys; sys.path.insert(0, {str(ROOT)!r}); import layers", cwd=tmp_path)
    assert done.returncode == 1
    assert "ImportError: import this package as 'hybridvl.layers', not as 'layers'" in done.stderr
